"""The flags of ``gateway serve`` that say who may use the gateway, and as whom."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _tokens(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    tokens = {}
    for value in values:
        user, separator, token = value.partition("=")
        if not separator:
            raise click.BadParameter("it is USER=TOKEN")
        tokens[user] = token
    return tokens or None


def _words(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    try:
        return None if value is None else tuple(shlex.split(value))
    except ValueError as exc:
        raise click.BadParameter(f"it does not parse as a command line: {exc}") from exc


_OPTIONS = (
    click.option(
        "--auth",
        type=click.Choice(["dev", "oidc", "marketplace"]),
        help="Whose tokens are accepted: development tokens, signed tokens of an OpenID Connect provider, or those of the "
        "MarketPlace, which is asked.  [default: dev]",
    ),
    click.option(
        "--dev-token",
        multiple=True,
        callback=_tokens,
        metavar="USER=TOKEN",
        help="Accept this token as this user's. Development only: arguments are visible to everybody on the machine.",
    ),
    click.option(
        "--allow-dev-tokens",
        is_flag=True,
        default=None,
        help="Accept development tokens also on an address that others reach.",
    ),
    click.option(
        "--issuer",
        metavar="URL",
        help="Who issues the tokens.  [default: with marketplace, the realm of MP_HOST_URL or MP_HOST]",
    ),
    click.option(
        "--audience",
        multiple=True,
        metavar="AUDIENCE",
        help="With oidc: what tokens for this gateway have as their audience. May be repeated.",
    ),
    click.option("--email-claim", metavar="CLAIM", help="Where tokens have the e-mail address.  [default: email]"),
    click.option(
        "--account",
        type=click.Choice(["own", "shared", "delegated"]),
        help="Under which Unix account files are written and jobs run.  "
        "[default: own with one development token, else shared]",
    ),
    click.option(
        "--owner", metavar="WHO", help="With the account own: your e-mail address or subject; nobody else is served."
    ),
    click.option(
        "--require-registration",
        is_flag=True,
        default=None,
        help="Serve only whom an operator has registered, or whom --allow or --allow-claim admits.",
    ),
    click.option(
        "--allow",
        multiple=True,
        metavar="WHO",
        help="Serve this e-mail address or subject, and nobody who is not admitted. May be repeated.",
    ),
    click.option(
        "--allow-claim",
        multiple=True,
        metavar="NAME=VALUE",
        help="Serve whoever has this value in this claim, and nobody who is not admitted. May be repeated.",
    ),
    click.option("--home-claim", metavar="CLAIM", help="Take the name of a user's folder from this claim."),
    click.option(
        "--home-map",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Take it from this file (TOML or JSON), by e-mail address or subject.",
    ),
    click.option(
        "--home-command",
        callback=_words,
        metavar="COMMAND",
        help="Take it from what this command prints, which gets the identity as JSON on its standard input; no shell.",
    ),
)


def identity_options(command: F) -> F:
    """Give a command these flags."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
