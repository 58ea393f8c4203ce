"""``marketplace-hpc shell``: the cluster's files as in a shell, for people and for scripts.

``line`` turns what is typed into commands and words, ``session`` carries them out, on a ``cluster`` that knows the current
folder. The commands are in ``listing``, ``content`` (over ``reading``, which reads pieces of files, and ``pager``),
``changing``, ``moving`` and ``going``; each is a click command, which gives it options, help and errors for nothing.
``prompt`` is the conversation with a person, with ``completion``; ``script`` does without one; ``layout`` says how things
look.

The prompt is prompt_toolkit's. It comes with IPython, which aiida-core requires, so it is there wherever this package is,
and its users know it from ``verdi shell``. The standard library's ``readline`` was the alternative, and lost: it asks for
completions while nothing can be typed or interrupted, which a gateway far away makes tedious; it cuts words at fixed
characters, so that names with blanks and quotes are completed wrongly; and in many builds of Python it is another library
(libedit) that is set up differently. The standard library's ``cmd`` would have added no more than the loop. Scripts import
none of it.
"""

from __future__ import annotations

import os
import sys

import click

from aiida_marketplace_hpc.cli.common import Settings, client_options, connect

__all__ = ["shell"]


@click.command()
@click.argument("path", required=False)
@click.option("-c", "commands", metavar="COMMANDS", help="Carry out these commands and leave.")
@client_options()
@click.pass_context
def shell(ctx: click.Context, path: str | None, commands: str | None) -> None:
    """Look at and work on the cluster's files.

    PATH is the folder to begin in: an absolute path on the cluster, or one below the home; by default the home. `help` lists
    the commands. With -c, or when commands come from a pipe, there is neither a prompt nor a question, and the exit code is
    that of the last command that failed.
    """
    from aiida_marketplace_hpc.cli.shell import commands as _  # noqa: F401
    from aiida_marketplace_hpc.cli.shell.cluster import Cluster
    from aiida_marketplace_hpc.cli.shell.line import Word
    from aiida_marketplace_hpc.cli.shell.script import run_script
    from aiida_marketplace_hpc.cli.shell.session import INTERRUPTED, Session

    settings = ctx.find_object(Settings) or Settings()
    if settings.json:
        raise click.UsageError("the shell has no JSON to print: use `marketplace-hpc --json file …`")
    interactive = commands is None and sys.stdin.isatty() and sys.stdout.isatty()
    with connect(settings) as gateway:
        session = Session(Cluster(gateway), interactive)
        if path:
            session.cluster.enter(Word(path, tilde=path == "~" or path.startswith("~/")))
        try:
            if interactive:
                from aiida_marketplace_hpc.cli.shell.prompt import confirm, converse

                session.confirm = confirm
                status = converse(session)
            else:
                lines = [commands] if commands is not None else map(os.fsdecode, click.get_binary_stream("stdin"))
                status = run_script(session, lines)
        except KeyboardInterrupt:
            status = INTERRUPTED
    ctx.exit(status)
