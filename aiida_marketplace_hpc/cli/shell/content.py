"""Commands that show what is in files: ``cat``, ``head``, ``tail``, ``less``. None reads more of a file than it shows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import click

from aiida_marketplace_hpc.cli.shell import pager
from aiida_marketplace_hpc.cli.shell.cluster import Json, is_missing
from aiida_marketplace_hpc.cli.shell.reading import Growing, Read, first_lines, last_lines, pieces
from aiida_marketplace_hpc.cli.shell.session import Session, command, explained, operands
from aiida_marketplace_hpc.errors import FileError, GatewayError, MarketplaceHpcError

_POLL = (1.0, 5.0)
"""Seconds between two looks at a file that is followed: after news, and at most when nothing happens."""

_lines_option = click.option(
    "-n", "lines", metavar="N", type=click.IntRange(0), default=10, help="So many lines; 10 unless said."
)
_bytes_option = click.option("-c", "count", metavar="N", type=click.IntRange(0), help="So many bytes instead.")


@command("cat")
@operands("paths")
def cat(session: Session, paths: Sequence[str]) -> int:
    """Print files as they are."""
    return _each(session, "cat", paths, lambda name, read: pieces(read), headed=False)


@command("head")
@_lines_option
@_bytes_option
@operands("paths")
def head(session: Session, paths: Sequence[str], lines: int, count: int | None) -> int:
    """Print the beginning of files."""

    def beginning(_: str, read: Read) -> Iterator[bytes]:
        return first_lines(read, lines) if count is None else pieces(read, 0, count)

    return _each(session, "head", paths, beginning, headed=len(paths) > 1)


@command("tail")
@_lines_option
@_bytes_option
@click.option("-f", "-F", "following", is_flag=True, help="Go on with what is added, until Ctrl-C.")
@operands("paths")
def tail(session: Session, paths: Sequence[str], lines: int, count: int | None, following: bool) -> int:
    """Print the end of files, and with -f what is added to them.

    A file that is followed may shrink, be replaced, vanish and come back: it is then shown from its beginning.
    """
    followed = {name: Growing() for name in paths}

    def end(name: str, read: Read) -> Iterator[bytes]:
        attributes = session.cluster.stat(session.cluster.path(name))
        if attributes["type"] == "directory":
            raise FileError(f"Is a directory: {attributes['path']}", errno="EISDIR", path=attributes["path"])
        size = int(attributes["size"])
        growing = followed[name]
        growing.position, growing.seen = size, (size, attributes["mtime"])
        wanted = last_lines(read, size, lines) if count is None else pieces(read, max(0, size - count), size)
        for piece in wanted:
            growing.remember(piece)
            yield piece

    status = _each(session, "tail", paths, end, headed=len(paths) > 1)
    if not following:
        return status
    _Follower(session, followed).run()
    return 0


@command("less")
@operands("paths")
def less(session: Session, paths: Sequence[str]) -> int:
    """Look at files page by page.

    With the program that PAGER names, or `less`, or `more`. Only as much is fetched as is looked at; going to the end of a
    file fetches it all.
    """
    if not session.interactive:
        return _each(session, "less", paths, lambda name, read: pieces(read), headed=False)
    status = 0
    for name in paths:
        content = pieces(_reader(session, name))
        try:
            # Before there is a pager, so that what is wrong with the file is said here.
            first = next(content, b"")
        except GatewayError as exc:
            status = session.report("less", exc)
            continue
        pager.page(first, content, session.write)
    return status


def _reader(session: Session, name: str) -> Read:
    return functools.partial(session.cluster.read, session.cluster.path(name))


def _each(
    session: Session,
    command_name: str,
    names: Sequence[str],
    part: Callable[[str, Read], Iterable[bytes]],
    *,
    headed: bool,
) -> int:
    """Print a part of each file; one that cannot be read is said, and the next one comes."""
    status = 0
    for number, name in enumerate(names):
        try:
            content = iter(part(name, _reader(session, name)))
            first = next(content, b"")
            if headed:
                session.show(_header(session, name, first=number == 0))
            for piece in itertools.chain([first], content):
                session.write(piece)
        except GatewayError as exc:
            status = session.report(command_name, exc)
    return status


def _header(session: Session, name: str, *, first: bool) -> str:
    return ("" if first else "\n") + f"==> {session.name(name)} <=="


class _Follower:
    """Shows what is added to files. A look at all of them is one request; only what is new is fetched."""

    def __init__(self, session: Session, files: dict[str, Growing]) -> None:
        self._session = session
        self._files = files
        self._missing: set[str] = set()
        self._last = list(files)[-1]
        self._cut_off = False

    def run(self) -> None:
        """Go on until Ctrl-C.

        :raises MarketplaceHpcError: for something that waiting does not mend, such as a refused token.
        """
        shortest, longest = _POLL
        pause = shortest
        while True:
            self._session.sleep(pause)
            try:
                news = self._look()
            except MarketplaceHpcError as exc:
                if not exc.retryable:
                    raise
                if not self._cut_off:
                    self._session.complain(f"tail: {explained(exc)}; still trying")
                self._cut_off, news = True, False
            else:
                self._cut_off = False
            pause = shortest if news else min(longest, pause * 1.5)

    def _look(self) -> bool:
        """Show what is new; return whether anything was."""
        cluster = self._session.cluster
        names = list(self._files)
        any_news = False
        for name, found in zip(names, cluster.stats([cluster.path(name) for name in names]), strict=True):
            if isinstance(found, GatewayError):
                if not is_missing(found):
                    raise found
                self._vanished(name)
                continue
            self._missing.discard(name)
            any_news |= self._show(name, found)
        return any_news

    def _vanished(self, name: str) -> None:
        if name not in self._missing:
            self._session.complain(f"tail: {name} is not there; waiting for it")
            self._missing.add(name)
            self._files[name].restart()

    def _show(self, name: str, attributes: Json) -> bool:
        session = self._session
        shown = False
        for piece in self._files[name].news(_reader(session, name), int(attributes["size"]), attributes["mtime"]):
            if piece is None:
                session.complain(f"tail: {name} is another file now, or was rewritten; from its beginning:")
                continue
            if name != self._last:
                session.show(_header(session, name, first=False))
                self._last = name
            session.write(piece)
            shown = True
        return shown
