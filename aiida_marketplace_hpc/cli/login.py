"""``marketplace-hpc login``, ``logout`` and ``logins``: credentials that are kept here and renewed for as long as it goes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aiida_marketplace_hpc.cli.common import Settings, client_options, emit, json_option, printable, table
from aiida_marketplace_hpc.errors import ConfigurationError, MarketplaceHpcError

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.logins import Login
    from aiida_marketplace_hpc.client.oidc import OidcClient, Provider, Tokens

_CLIENT_ID = "marketplace-hpc"
_LOCK = 30.0
"""Seconds: a renewal that is under way ends by then."""
_WANTED = ("openid", "email", "profile", "offline_access")
"""With ``offline_access`` a login lasts for weeks, and without a browser that stays open."""


@click.command()
@client_options()
@click.argument("name")
@click.option(
    "--issuer",
    metavar="URL",
    help="The OpenID Connect provider.  [default: the MarketPlace's, at --url or MP_HOST]",
)
@click.option(
    "--client-id", default=_CLIENT_ID, show_default=True, help="As what this program is known to the provider."
)
@click.option(
    "--client-credentials", is_flag=True, help="Log in a service with the secret of its client, not a person."
)
@click.option(
    "--client-secret-env", metavar="NAME", help="The environment variable with the secret.  [default: ask for it]"
)
@click.option(
    "--client-secret-file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="The file with the secret; - is the standard input.",
)
@click.option(
    "--scope", help="The scopes to ask for, with blanks between.  [default: what the provider has of the usual ones]"
)
@click.option(
    "--store",
    type=click.Choice(["auto", "keyring", "file"]),
    default="auto",
    show_default=True,
    help="Keep it in the system's keyring, or in a file that only you can read; auto: in the keyring if there is one.",
)
@click.pass_obj
def login(
    settings: Settings,
    /,
    name: str,
    issuer: str | None,
    client_id: str,
    client_credentials: bool,
    client_secret_env: str | None,
    client_secret_file: Path | None,
    scope: str | None,
    store: str,
) -> None:
    """Log in with a provider of identities, and keep what comes of it as the token source login:NAME.

    A person opens a page, on whatever device, and enters a code. A service has --client-credentials. Either is done once:
    tokens are renewed from then on, by all programs of yours that use login:NAME.
    """
    from aiida_marketplace_hpc.client.login import with_tokens
    from aiida_marketplace_hpc.client.logins import Login, LoginStore, checked_name
    from aiida_marketplace_hpc.client.oidc import OidcClient, Provider, marketplace_issuer

    checked_name(name)
    logins = LoginStore()
    secret = ""
    if client_secret_env or client_secret_file or client_credentials:
        secret = _secret(client_secret_env, client_secret_file)
    in_keyring = _in_keyring(store)
    provider = Provider.discover(issuer or marketplace_issuer(settings.url))
    client = OidcClient(provider, client_id, secret)
    wanted = _scope(scope, provider, client_credentials)
    tokens = client.log_in_as_service(wanted) if client_credentials else _as_person(client, wanted)
    made = Login(
        name,
        provider.issuer,
        client_id,
        "client_credentials" if client_credentials else "device",
        provider.token_endpoint,
        wanted,
        provider.revocation_endpoint,
        provider.end_session_endpoint,
        provider.basic,
        secret,
        in_keyring=in_keyring,
    )
    made = with_tokens(made, tokens)
    with logins.lock(name, _LOCK):
        if name in logins.names():
            logins.remove(name)
        logins.write(made)
    if not client_credentials and not tokens.refresh_token:
        click.echo(
            f"Warning: {provider.issuer} gave nothing to renew this login with: it ends with its token.", err=True
        )
    _show(settings, made, logins.where(made))


@click.command()
@json_option()
@click.argument("name")
@click.pass_obj
def logout(settings: Settings, /, name: str) -> None:
    """Forget a login, here and at its provider.

    If the provider cannot be told, the login is forgotten here all the same, and that is said.
    """
    from aiida_marketplace_hpc.client.login import client_of
    from aiida_marketplace_hpc.client.logins import LoginStore, checked_name
    from aiida_marketplace_hpc.errors import TokenUnavailable

    checked_name(name)
    logins = LoginStore()
    if name not in logins.names():
        raise ConfigurationError(f"there is no login {name}: `marketplace-hpc logins` lists them")
    revoked = False
    with logins.lock(name, _LOCK):
        try:
            kept = logins.read(name)
            revoked = not kept.refresh_token or client_of(kept).revoke(kept.refresh_token)
        except (MarketplaceHpcError, TokenUnavailable) as exc:
            click.echo(f"Warning: the provider could not be told: {printable(str(exc))}", err=True)
        logins.remove(name)
    emit(settings, {"name": name, "revoked": revoked}, f"Logged out of {name}.")


@click.command()
@json_option()
@click.pass_obj
def logins(settings: Settings, /) -> None:
    """List the logins that are kept here."""
    from aiida_marketplace_hpc.client.logins import LoginStore

    store = LoginStore()
    documents: list[dict[str, Any]] = []
    for name in store.names():
        try:
            documents.append(_document(store.read(name)))
        except MarketplaceHpcError as exc:
            documents.append({"name": name, "state": str(exc)})
    columns = ("name", "state", "holder", "issuer", "store")
    rows = [[document.get(column) for column in columns] for document in documents]
    text = (
        table(rows, [column.upper() for column in columns]) if rows else "There are none: marketplace-hpc login NAME."
    )
    emit(settings, {"logins": documents}, text)


def _secret(variable: str | None, file: Path | None) -> str:
    if variable:
        if not variable.isidentifier():  # Not repeated: it may be the secret itself.
            raise ConfigurationError("--client-secret-env needs the name of an environment variable")
        secret = os.environ.get(variable, "").strip()
        if not secret:
            raise ConfigurationError(f"the environment variable {variable} holds no client secret: set it")
    elif file is not None:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        secret = text.strip()
    else:
        secret = str(click.prompt("Client secret", hide_input=True, err=True)).strip()
    if not secret:
        raise ConfigurationError("the client secret is empty")
    return secret


def _in_keyring(store: str) -> bool:
    from aiida_marketplace_hpc.client.logins import keyring_is_usable

    if store == "file":
        return False
    usable = keyring_is_usable()
    if store == "keyring" and not usable:
        raise ConfigurationError(
            "this system has no keyring that can be used: install the package keyring, unlock the system's keyring, "
            "or keep the login in a file with --store file"
        )
    return usable


def _scope(given: str | None, provider: Provider, service: bool) -> str:
    if given is not None:
        return given
    offered = [scope for scope in _WANTED if scope in provider.scopes or scope == "openid"]
    return "" if service else " ".join(offered)


def _as_person(client: OidcClient, scope: str) -> Tokens:
    device = client.start_device_flow(scope)
    page = device.complete_uri or device.uri
    click.echo(f"Open {printable(page)}\nand confirm the code {printable(device.code)}. Waiting …", err=True)
    return client.await_approval(device)


def _document(kept: Login) -> dict[str, Any]:
    from aiida_marketplace_hpc.claims import claims_of, holder

    state = f"over: {kept.ended}" if kept.ended else "good"
    if not kept.ended and not kept.refresh_token and kept.grant == "device" and kept.lasts(time.time()) <= 0:
        state = "over: there is nothing to renew it with"
    return {
        "name": kept.name,
        "state": state,
        "holder": holder(claims_of(kept.access_token)),
        "issuer": kept.issuer,
        "client_id": kept.client_id,
        "grant": kept.grant,
        "expires_in": round(max(0.0, kept.lasts(time.time()))),
        "store": "keyring" if kept.in_keyring else "file",
    }


def _show(settings: Settings, kept: Login, where: str) -> None:
    document = {**_document(kept), "token_source": f"login:{kept.name}"}
    who = f" as {document['holder']}" if document["holder"] else ""
    emit(
        settings, document, f"Logged in{who} at {kept.issuer}; kept in {where}.\nThe token source is login:{kept.name}."
    )
