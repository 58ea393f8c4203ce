"""Showing a long text with a program of this machine: ``$PAGER``, ``less`` or ``more``."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from aiida_marketplace_hpc.cli.shell.cluster import CommandError


def command() -> list[str] | None:
    """The program and its arguments; ``None`` where there is none.

    :raises CommandError: PAGER cannot be understood.
    """
    for candidate in (os.environ.get("PAGER", ""), "less", "more"):
        try:
            words = shlex.split(candidate)
        except ValueError as exc:
            raise CommandError(f"the environment variable PAGER is no command ({exc}): correct or unset it") from exc
        if words and shutil.which(words[0]):
            return words
    return None


def page(first: bytes, content: Iterator[bytes], write: Callable[[bytes], None]) -> None:
    """Show a text; what is not looked at is never asked for.

    :param first: its beginning.
    :param content: the rest.
    :param write: prints it where there is no program to show it.
    :raises MarketplaceHpcError: the rest cannot be fetched; what was fetched was shown.
    """
    program = command()
    if program is None:
        write(first)
        for piece in content:
            write(piece)
        return
    with _ctrl_c_is_for_the_pager():
        process = subprocess.Popen(program, stdin=subprocess.PIPE)
        try:
            _feed(process.stdin, itertools.chain([first], content))
        finally:
            process.wait()


def _feed(pipe: IO[bytes] | None, content: Iterator[bytes]) -> None:
    if pipe is None:
        return
    # Leaving the pager before the end breaks the pipe, which closing notices, too.
    with suppress(BrokenPipeError), pipe:
        for piece in content:
            pipe.write(piece)  # A full pipe makes this wait until the pager reads on.


@contextmanager
def _ctrl_c_is_for_the_pager() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A handler of Python's, which the pager does not inherit, as it would one that ignores the signal.
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
