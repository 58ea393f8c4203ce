"""A file for the environment with every setting of gateway and relay, each with what it says, none of them set."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from aiida_marketplace_hpc.gateway.config import FileSettings

_HEAD = """\
Every setting of gateway and relay, as variables of the environment; made by

    marketplace-hpc gateway check-config --template

Take the sign before those away that you want to set. Lists and tables are written in JSON, on one line.
One that is empty says nothing. A flag wins over the environment, the environment over the file that --config names.
Keep the file for its owner alone (chmod 600): it has secrets in it."""
_WITHOUT_FLAG = {
    "policy": 'What the site wants of jobs, such as {"max_time": "1-0", "default_partition": "normal"}. Keys: {keys}.',
    "registration": "What the MarketPlace is told about the gateway, for `gateway openapi`. Keys: {keys}.",
    "firecrest_client_secret": "The secret of --firecrest-client-id; no flag, as everybody on the machine sees those.",
    "firecrest_token": "A constant token for FirecREST, in place of client id, secret and token url; no flag.",
    "page_client_secret": "The secret of --page-client, if it has one, unless --page-client-secret-file names a file with it.",
    "broker": "The broker's address, with name and password, such as amqps://NAME:PASSWORD@broker.example.org:5671/%2F.",
    "client_secret": "The secret that the platform showed with the id.",
}
_PUBLISHED = {
    "MP_HOST_URL": "The MarketPlace's host: where tokens are checked (with auth=marketplace), and the relay's broker, unless "
    "it is set above, on port 5672 without TLS.",
    "F7T_TOKEN": "The same as MARKETPLACE_HPC_FIRECREST_TOKEN.",
    "GATEWAY_CLIENT_ID": "The same as MARKETPLACE_HPC_RELAY_CLIENT_ID.",
    "GATEWAY_CLIENT_SECRET": "The same as MARKETPLACE_HPC_RELAY_CLIENT_SECRET.",
    "HPCGATEWAY_URL": "The same as MARKETPLACE_HPC_RELAY_GATEWAY.",
}


def environment_template(serve: click.Command, relay: click.Command) -> str:
    """The text of the file; of the commands the helps of their flags are taken."""
    from aiida_marketplace_hpc.gateway.config import Settings
    from aiida_marketplace_hpc.gateway.relay_config import RelaySettings

    lines = [*_comment(_HEAD), "", "# --- the gateway", ""]
    lines += _settings(Settings, _helps(serve))
    lines += ["# --- the relay", ""]
    lines += _settings(RelaySettings, _helps(relay))
    lines += ["# --- names that were published before; those above win over them", ""]
    for name, meaning in _PUBLISHED.items():
        lines += [*_comment(meaning), f"#{name}=", ""]
    return "\n".join(lines).rstrip() + "\n"


def _helps(command: click.Command) -> Mapping[str, str]:
    return {one.name or "": _said(one) for one in command.params if isinstance(one, click.Option)}


def _said(option: click.Option) -> str:
    said = (option.help or "").replace(" May be repeated.", "")
    return f"{said} ({option.metavar}{', a list' if option.multiple else ''})" if option.metavar else said


def _settings(kind: type[FileSettings], helps: Mapping[str, str]) -> Iterator[str]:
    from aiida_marketplace_hpc.gateway.origins import variable_of

    for name, field in kind.model_fields.items():
        help = helps.get(name) or _WITHOUT_FLAG[name].replace("{keys}", ", ".join(_keys(field.annotation)))
        yield from _comment(" ".join(help.split()))
        yield f"#{variable_of(kind, name)}="
        yield ""


def _keys(annotation: Any) -> list[str]:
    return list(getattr(annotation, "model_fields", {}))


def _comment(text: str) -> list[str]:
    lines = [wrapped for line in text.splitlines() for wrapped in textwrap.wrap(line, 125) or [""]]
    return [f"# {line}".rstrip() for line in lines]
