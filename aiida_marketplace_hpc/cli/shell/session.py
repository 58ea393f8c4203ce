"""One session: the commands that there are, and what happens with a line of them."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from aiida_marketplace_hpc.cli.common import exit_code, printable
from aiida_marketplace_hpc.cli.shell.cluster import Cluster, CommandError
from aiida_marketplace_hpc.cli.shell.layout import shown_name
from aiida_marketplace_hpc.cli.shell.line import Command, Word, parse
from aiida_marketplace_hpc.errors import FileError, GatewayError, MarketplaceHpcError

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""
UNKNOWN = 127
"""The exit code of a command that does not exist."""


class Leave(Exception):
    """The session is to end.

    :param status: with this exit code; ``None``: with that of the last command that failed.
    """

    def __init__(self, status: int | None = None) -> None:
        super().__init__()
        self.status = status


@dataclass
class Session:
    """What commands work with.

    :param interactive: a person is there: names are shown for a terminal, questions can be asked.
    :param confirm: asks a question that is answered with yes or no.
    :param sleep: waits so many seconds.
    :ivar failed: the exit code of the last command that failed; 0 if none did.
    """

    cluster: Cluster
    interactive: bool = False
    confirm: Callable[[str], bool] = lambda question: False
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time
    failed: int = field(default=0, init=False)

    @property
    def colours(self) -> bool:
        """Whether names are shown in colours."""
        return self.interactive and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"

    @property
    def width(self) -> int:
        """The columns of the terminal."""
        return shutil.get_terminal_size().columns

    def name(self, text: str) -> str:
        """A name to print: for a person harmless and as it would be typed, else as it is."""
        return shown_name(text) if self.interactive else text

    def show(self, text: str) -> None:
        """Print a line."""
        self.write(os.fsencode(f"{text}\n"))

    def write(self, content: bytes) -> None:
        """Print bytes of a file, as they are."""
        click.echo(content, nl=False)

    def complain(self, message: str) -> None:
        """Print a line about what goes wrong."""
        click.echo(printable(message), err=True)

    def report(self, name: str, error: GatewayError) -> int:
        """Say that a command failed for one of its operands; return the exit code for it."""
        self.complain(f"{name}: {explained(error)}")
        return exit_code(error)

    def run(self, text: str) -> None:
        """Carry out a line of commands. A command that fails says so, and the next one comes.

        :raises LineError: the line cannot be understood; nothing of it was done.
        :raises Leave: ``exit`` was in it.
        :raises KeyboardInterrupt: Ctrl-C, which ends the line.
        """
        status = 0
        for command in parse(text):
            if command.after_success and status != 0:
                continue
            status = self._run(command)
            self.failed = status or self.failed

    def _run(self, command: Command) -> int:
        name = str(command.words[0])
        found = COMMANDS.commands.get(name)
        if not isinstance(found, ShellCommand):
            self.complain(f"{name}: no such command; the cluster runs jobs, not programs, for this shell (try help)")
            return UNKNOWN
        try:
            return self._call(found, name, command.words[1:])
        except (KeyboardInterrupt, BrokenPipeError):
            self.failed = INTERRUPTED
            raise
        except click.UsageError as exc:
            self.complain(f"{name}: {exc.format_message()} (help {name})")
            return 2
        except CommandError as exc:
            self.complain(f"{name}: {exc}")
            return 1
        except MarketplaceHpcError as exc:
            self.complain(f"{name}: {explained(exc)}")
            return exit_code(exc)
        except OSError as exc:
            self.complain(f"{name}: {exc.filename}: {exc.strerror}" if exc.filename else f"{name}: {exc}")
            return 1

    def _call(self, command: ShellCommand, name: str, words: Sequence[Word]) -> int:
        arguments = self.cluster.expand(words) if command.expands else list(words)
        try:
            with command.make_context(name, list(arguments), obj=self) as context:
                return int(command.invoke(context) or 0)
        except click.exceptions.Exit as exc:  # --help
            return exc.exit_code


class ShellCommand(click.Command):
    """A command of the shell. What it is called with returns its exit code, or ``None`` for 0.

    :param expands: whether patterns become remote paths before the command sees them.
    :param completes: what its operands are, ``remote``, ``local`` or ``command``; the last one holds for all that follow.
    """

    def __init__(
        self, *arguments: Any, expands: bool = True, completes: Sequence[str] = ("remote",), **attributes: Any
    ) -> None:
        super().__init__(*arguments, **attributes)
        self.expands = expands
        self.completes = tuple(completes)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take ``-20`` for ``-n 20``, where there is an ``-n``."""
        if any("-n" in parameter.opts for parameter in self.params):
            args = [part for arg in args for part in (("-n", arg[1:]) if re.fullmatch(r"-\d+", arg) else (arg,))]
        return super().parse_args(ctx, args)


COMMANDS = click.Group()
"""All commands by name; the modules that define them put them here."""


def command(name: str, **attributes: Any) -> Callable[[Callable[..., int | None]], ShellCommand]:
    """Make a function that takes the session and its parameters a command of the shell."""

    def decorate(function: Callable[..., int | None]) -> ShellCommand:
        made: ShellCommand = click.command(name, cls=ShellCommand, **attributes)(click.pass_obj(function))
        COMMANDS.add_command(made)
        return made

    return decorate


def operands(name: str, *, required: bool = True, metavar: str = "PATH...") -> Callable[[Any], Any]:
    """The operands of a command, as words: what was a pattern is still known."""
    return click.argument(name, nargs=-1, required=required, type=click.UNPROCESSED, metavar=metavar)


def explained(error: MarketplaceHpcError) -> str:
    """An error in a line, without the id of the request where the file system's word says all."""
    return error.message if isinstance(error, FileError) else str(error)
