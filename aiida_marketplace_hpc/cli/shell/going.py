"""Commands for the way: ``cd``, ``pwd``, ``lcd``, ``lpwd``, ``roots``, ``help``, ``exit``."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from aiida_marketplace_hpc.cli.common import table
from aiida_marketplace_hpc.cli.shell.layout import size_text
from aiida_marketplace_hpc.cli.shell.line import Word
from aiida_marketplace_hpc.cli.shell.moving import here, local_paths
from aiida_marketplace_hpc.cli.shell.session import COMMANDS, Leave, Session, command, operands


@command("cd")
@operands("words", required=False, metavar="[FOLDER]")
def cd(session: Session, words: Sequence[str]) -> None:
    """Go to a folder: to the home without one, back to the one before with a minus sign (cd -)."""
    cluster = session.cluster
    folder = _one(words)
    if folder == "-":
        cluster.back()
        session.show(session.name(cluster.folder))
    else:
        cluster.enter(cluster.home if folder is None else folder)


@command("pwd")
def pwd(session: Session) -> None:
    """Print the folder on the cluster in which commands work."""
    session.show(session.name(session.cluster.folder))


@command("lcd", expands=False, completes=("local",))
@operands("words", required=False, metavar="[FOLDER]")
def lcd(session: Session, words: Sequence[Word]) -> None:
    """Go to a folder on this machine, from and to which put and get work."""
    paths = local_paths(words[0]) if len(words) == 1 else list(words)
    os.chdir(_one(paths) or here(Word("~", tilde=True)))


@command("lpwd")
def lpwd(session: Session) -> None:
    """Print the folder on this machine from and to which put and get work."""
    session.show(session.name(os.getcwd()))


@command("roots")
@click.option("-h", "human", is_flag=True, help="With units.")
def roots(session: Session, human: bool) -> None:
    """List the folders that the gateway reaches, with their free bytes. There is nothing outside of them."""
    session.cluster.gateway.info(refresh=True)
    rows = [
        [
            session.name(root.path),
            "" if root.free is None else size_text(root.free, human),
            "read-only" if root.read_only else "",
            root.name,
        ]
        for root in session.cluster.gateway.roots()
    ]
    session.show(table(rows, ["FOLDER", "FREE", "", "NAME"]))


@command("help", expands=False, completes=("command",))
@click.argument("name", required=False, metavar="[COMMAND]")
def help_(session: Session, name: str | None) -> None:
    """Say what there is, or how a command is used."""
    if name is not None:
        found = COMMANDS.commands.get(name)
        if found is None:
            raise click.UsageError(f"there is no command {name}")
        session.show(found.get_help(click.Context(found, info_name=name)))
        return
    rows = {found.name: found.get_short_help_str(90) for found in COMMANDS.commands.values()}
    for each in sorted(map(str, rows)):
        session.show(f"{each:8}{rows[each]}")
    session.show("\nhelp COMMAND says more. Names with blanks go in quotes; * ? [ ] match names on the cluster.")


@command("exit", expands=False, completes=())
@click.argument("status", required=False, type=click.IntRange(0, 255))
def exit_(session: Session, status: int | None) -> None:
    """Leave; so does Ctrl-D."""
    raise Leave(status)


COMMANDS.add_command(exit_, "quit")


def _one(words: Sequence[str]) -> str | None:
    if len(words) > 1:
        raise click.UsageError("one folder at a time")
    return words[0] if words else None
