"""Reading parts of a remote file, whatever its size: from the beginning, from the end, and as it grows.

Everything here works on a function that reads one piece, and knows no gateway.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

Read = Callable[[int, int], bytes]
"""Reads a piece: from an offset, at most so many bytes; fewer only at the end of the file."""

_FIRST = 64 * 1024
_PIECE = 1024 * 1024
"""Bytes asked for at once, first and at most. A short file costs one request, a long one few."""
_KEPT = 8 * 1024 * 1024
"""Bytes that are kept while the beginning of the last lines is looked for; longer ones are read a second time."""
_CONTEXT = 64


def pieces(read: Read, start: int = 0, end: int | None = None) -> Generator[bytes, None, None]:
    """Yield a file piece by piece.

    :param end: stop before this byte; ``None``: at the end of the file.
    """
    size = _FIRST
    while end is None or start < end:
        asked = size if end is None else min(size, end - start)
        piece = read(start, asked)
        if piece:
            yield piece
        if len(piece) < asked:
            return
        start += len(piece)
        size = min(2 * size, _PIECE)


def first_lines(read: Read, count: int) -> Iterator[bytes]:
    """Yield the first lines, and read little more than those."""
    if count <= 0:
        return
    for piece in pieces(read):
        newlines = piece.count(b"\n")
        if newlines >= count:
            end = -1
            for _ in range(count):
                end = piece.index(b"\n", end + 1)
            yield piece[: end + 1]
            return
        count -= newlines
        yield piece


def last_lines(read: Read, size: int, count: int) -> Iterator[bytes]:
    """Yield the last lines of a file that has ``size`` bytes, and read little more than those."""
    if count <= 0:
        return
    start, kept = size, b""
    length = _FIRST
    while start > 0:
        begin = max(0, start - length)
        piece = read(begin, start - begin)
        # The line end that closes the last line begins no further one.
        body = piece[:-1] if start == size and piece.endswith(b"\n") else piece
        newlines = body.count(b"\n")
        if newlines >= count:
            cut = len(body)
            for _ in range(count):
                cut = body.rindex(b"\n", 0, cut)
            begin, piece = begin + cut + 1, piece[cut + 1 :]
            count = 0
        count -= newlines
        start, kept = begin, piece + kept
        if count <= 0:
            break
        if len(kept) > _KEPT:
            yield from _from_far(read, start, count, size)
            return
        length = min(2 * length, _PIECE)
    if kept:
        yield kept


def _from_far(read: Read, start: int, count: int, size: int) -> Iterator[bytes]:
    """Go on without keeping: find the beginning of the last lines before ``start``, then read from there."""
    while start > 0 and count > 0:
        begin = max(0, start - _PIECE)
        piece = read(begin, start - begin)
        newlines = piece.count(b"\n")
        if newlines >= count:
            cut = len(piece)
            for _ in range(count):
                cut = piece.rindex(b"\n", 0, cut)
            begin += cut + 1
        count -= newlines
        start = begin
    yield from pieces(read, start, size)


@dataclass
class Growing:
    """A file that is followed: what of it was shown, and how to notice that it is another one now.

    A gateway says size and time of a file, not whether it is still the same one. So the last bytes that were shown are read
    again with the new ones: if they differ, the file was replaced or rewritten and is shown from its beginning.

    :param position: bytes that were shown.
    :param context: the last of them.
    :param seen: size and time when it was looked at last.
    """

    position: int = 0
    context: bytes = b""
    seen: tuple[int, float] | None = field(default=None)

    def remember(self, piece: bytes) -> None:
        """Note the end of what was shown."""
        self.context = (self.context + piece)[-_CONTEXT:]

    def restart(self) -> None:
        """Begin again with the first byte."""
        self.position, self.context, self.seen = 0, b"", None

    def news(self, read: Read, size: int, mtime: float) -> Iterator[bytes | None]:
        """Yield what is new since the last time; ``None`` first if it is another file now. Reads nothing if nothing changed.

        :param size: the file's size now, in bytes.
        :param mtime: when it was changed.
        """
        if self.seen == (size, mtime):
            return
        known = self.context
        fresh = pieces(read, self.position - len(known), size)
        first = next(fresh, b"") if size >= self.position else None
        if first is None or not first.startswith(known):
            self.restart()
            yield None
            fresh, first = pieces(read, 0, size), b""
        else:
            first = first[len(known) :]
        for piece in itertools.chain([first] if first else [], fresh):
            self.position += len(piece)
            self.remember(piece)
            yield piece
        self.seen = (size, mtime)
