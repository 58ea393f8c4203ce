"""What the client's commands share: the options that name a gateway, the two forms of output, the exit codes.

Exit codes: 0 done; 1 the gateway answered with an error, or something local failed; 2 a wrong option or setting; 3 no
connection; 4 not authorised.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from aiida_marketplace_hpc.client.auth import DEFAULT_SOURCE
from aiida_marketplace_hpc.errors import (
    ConfigurationError,
    ConnectionFailed,
    GatewayError,
    MarketplaceHpcError,
    TokenUnavailable,
    Unauthorized,
)

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.folder import Progress
    from aiida_marketplace_hpc.client.gateway import HpcGateway

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """What the options say; those after a command win over those before it."""

    url: str = ""
    app_id: str = ""
    token_source: str = DEFAULT_SOURCE
    machine: str = ""
    json: bool = False


def client_options(*, environment: bool = False) -> Callable[[F], F]:
    """Give a command ``--url``, ``--app-id``, ``--token-source``, ``--machine``, ``--json``; they land in :class:`Settings`.

    :param environment: take the defaults from the environment.
    """

    def from_environment(name: str) -> dict[str, Any]:
        return {"envvar": name, "show_envvar": True} if environment else {}

    def decorate(command: F) -> F:
        for decorator in (
            json_option(),
            _setting("--machine", metavar="NAME", help="The system to use, where the gateway has several."),
            _setting("--token-source", metavar="SOURCE", help="env:NAME, file:PATH, command:CMD or login:NAME."),
            _setting(
                "--app-id",
                metavar="ID",
                help="Go through the MarketPlace's proxy to this app.",
                **from_environment("MP_APP_ID"),
            ),
            _setting(
                "--url",
                metavar="URL",
                help="The gateway's address, or the MarketPlace's.",
                **from_environment("MP_HOST"),
            ),
        ):
            command = decorator(command)
        return command

    return decorate


def json_option() -> Callable[[F], F]:
    """Give a command ``--json``; it lands in :class:`Settings`."""
    return _setting("--json", "json", is_flag=True, help="Print one JSON document.")


def _setting(*names: str, **attributes: Any) -> Callable[[F], F]:
    """An option that lands in :class:`Settings`, and that a command and the one above it may both have."""

    def remember(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        settings = ctx.ensure_object(Settings)
        if value is not None and parameter.name is not None:
            setattr(settings, parameter.name, value)

    return click.option(
        *names,
        default=None,
        expose_value=False,
        is_eager=True,  # Before a command that fails on its arguments, so that it knows in which form to say so.
        callback=remember,
        **attributes,
    )


def connect(settings: Settings) -> HpcGateway:
    """Make the gateway that the options name; nothing is sent yet.

    :raises ConfigurationError: they do not name one.
    """
    from aiida_marketplace_hpc.client.gateway import HpcGateway

    return HpcGateway(
        settings.url, app_id=settings.app_id, token_source=settings.token_source, machine=settings.machine
    )


def emit(settings: Settings, document: Any, text: str | None = None) -> None:
    """Print a result: the document as JSON, or the text for a person."""
    if settings.json:
        click.echo(json.dumps(document, indent=2, sort_keys=True, default=str))
    elif text:
        click.echo(printable(text))


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Lay out rows as a table."""
    from tabulate import tabulate

    cells = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    return tabulate(cells, headers=list(headers), tablefmt="plain", disable_numparse=True)


def printable(text: str) -> str:
    """Show bytes of a file name that are not UTF-8, and control characters, as escapes; a terminal must not obey them."""
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1] for character in text
    )


def mark(good: bool | None) -> str:
    """The sign for a check that passed, failed, or was not made, in what the terminal can show."""
    signs = {True: ("✓", "ok"), False: ("✗", "FAILED"), None: ("–", "skipped")}
    sign, word = signs[good]
    try:
        sign.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return word
    return sign


@contextmanager
def progress_bar(settings: Settings, total: int | None, text: str) -> Iterator[Progress | None]:
    """Show a transfer's progress where a person is watching.

    :param total: bytes, or ``None`` where it is not known.
    """
    if settings.json or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=printable(text), unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
        yield bar.update


@contextmanager
def exit_codes(ctx: click.Context) -> Iterator[None]:
    """Turn the errors that we raise on purpose into a message and an exit code; no traceback."""
    try:
        yield
    except MarketplaceHpcError as exc:
        code = exit_code(exc)
        document = exc.to_wire() if isinstance(exc, GatewayError) else {"error": exc.message, "code": exc.code}
        _fail(ctx, code, str(exc), document)
    except OSError as exc:
        if exc.errno == errno.EPIPE:
            raise  # Whoever read our output has left; click knows what to do.
        path = f": {exc.filename}" if exc.filename else ""
        message = f"{exc.strerror}{path}" if exc.strerror else str(exc)
        _fail(ctx, 1, message, {"error": message, "code": "local"})


def exit_code(error: MarketplaceHpcError) -> int:
    """The exit code for an error."""
    if isinstance(error, (Unauthorized, TokenUnavailable)):
        return 4
    if isinstance(error, ConfigurationError):
        return 2
    if isinstance(error, ConnectionFailed):
        return 3
    return 1


def _fail(ctx: click.Context, code: int, message: str, document: dict[str, Any]) -> None:
    settings = ctx.find_object(Settings) or Settings()
    if settings.json:
        emit(settings, document)
    click.echo(f"Error: {printable(message)}", err=True)
    ctx.exit(code)
