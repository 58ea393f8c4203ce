"""HTTP/1.1 messages as they go over a socket: the head with its headers, and the body in pieces, however it is framed."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

PIECE = 256 * 1024
_MAX_HEAD = 64 * 1024


class Broken(Exception):
    """The other side has gone, or what it sends is not HTTP."""


@dataclass
class Head:
    """The first line of a message and its headers, whose names keep their case and order."""

    first: bytes
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def get(self, name: str) -> str | None:
        """The value of a header."""
        wanted = name.lower().encode()
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == wanted), None)

    def drop(self, *names: str) -> None:
        """Remove headers."""
        unwanted = {name.lower().encode() for name in names}
        self.headers = [pair for pair in self.headers if pair[0].lower() not in unwanted]

    def put(self, name: str, value: object) -> None:
        """Set a header."""
        self.drop(name)
        self.headers.append((name.encode(), str(value).encode("latin-1")))

    def keep(self, names: Iterable[str]) -> None:
        """Remove all other headers."""
        wanted = {name.lower().encode() for name in names}
        self.headers = [pair for pair in self.headers if pair[0].lower() in wanted]

    @property
    def chunked(self) -> bool:
        return "chunked" in (self.get("Transfer-Encoding") or "").lower()

    @property
    def length(self) -> int | None:
        """The announced length of the body."""
        value = self.get("Content-Length")
        if self.chunked or value is None:
            return None
        if not value.isdigit():
            raise Broken(f"a Content-Length of {value!r}")
        return int(value)

    @property
    def status(self) -> int:
        """Of an answer."""
        try:
            return int(self.first.split(None, 2)[1])
        except (IndexError, ValueError):
            raise Broken(f"not the first line of an answer: {self.first!r}") from None

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this message."""
        said = (self.get("Connection") or "").lower()
        return "close" in said or (b"HTTP/1.0" in self.first and "keep-alive" not in said)

    def encode(self) -> bytes:
        lines = [self.first, *(b"%s: %s" % pair for pair in self.headers)]
        return b"\r\n".join(lines) + b"\r\n\r\n"


class Incoming:
    """The messages that come in on a socket.

    :param count: called with the number of bytes that were just read, of heads, bodies and what frames them.
    """

    def __init__(self, endpoint: socket.socket, count: Callable[[int], None] | None = None) -> None:
        self._file = io.BufferedReader(endpoint.makefile("rb", buffering=0), PIECE)
        self._count = count or (lambda _: None)

    def head(self) -> Head | None:
        """Read a head; ``None`` if the connection ends before one begins.

        :raises Broken: it ends inside, or this is no HTTP.
        """
        first = self._line(may_end=True)
        if not first:
            return None
        head = Head(first)
        size = 0
        while line := self._line():
            name, colon, value = line.partition(b":")
            size += len(line)
            if not colon or size > _MAX_HEAD:
                raise Broken(f"not a header: {line[:80]!r}")
            head.headers.append((name, value.strip()))
        return head

    def body(self, head: Head, *, until_end: bool = False) -> Iterator[bytes]:
        """Read the body that follows a head.

        :param until_end: one without an announced length lasts until the connection ends (answers); else there is none.
        :raises Broken: (while iterating) the connection ends inside.
        """
        if head.chunked:
            return self._chunks()
        length = head.length
        if length is not None:
            return self._exactly(length)
        return iter(self._some, b"") if until_end else iter(())

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self._some(min(size, PIECE))
            if not piece:
                raise Broken(f"the connection ended with {size} bytes of the body missing")
            size -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while True:
            line = self._line()
            try:
                size = int(line.partition(b";")[0], 16)
            except ValueError:
                raise Broken(f"not the size of a chunk: {line[:80]!r}") from None
            if not size:
                while self._line():
                    pass
                return
            yield from self._exactly(size)
            self._line()

    def _line(self, *, may_end: bool = False) -> bytes:
        try:
            line = self._file.readline(_MAX_HEAD)
        except OSError as exc:
            raise Broken(str(exc)) from exc
        self._count(len(line))
        if not line.endswith(b"\n"):
            if may_end and not line:
                return b""
            raise Broken("the connection ended inside a head")
        return line.rstrip(b"\r\n")

    def _some(self, size: int = PIECE) -> bytes:
        try:
            piece = self._file.read1(size)
        except OSError as exc:
            raise Broken(str(exc)) from exc
        self._count(len(piece))
        return piece

    def close(self) -> None:
        self._file.close()


def framed(head: Head, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Encode a message for the network. Its head goes with the first piece of the body, not before."""
    chunked = head.chunked
    pending = head.encode()
    for piece in pieces:
        if chunked and piece:
            yield b"%s%x\r\n%s\r\n" % (pending, len(piece), piece)
        else:
            yield pending + piece
        pending = b""
    if rest := pending + (b"0\r\n\r\n" if chunked else b""):
        yield rest
