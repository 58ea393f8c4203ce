"""Content that travels as text, where a message broker carries nothing else: ``encoding=base64`` of uploads and downloads."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TYPE_CHECKING

from aiida_marketplace_hpc.errors import InvalidRequest

if TYPE_CHECKING:
    from aiida_marketplace_hpc.gateway.routes.call import Body, Stream

_PIECE = 48 * 1024
"""Bytes that are coded at once: a multiple of three, so that nothing is padded in the middle."""


def is_coded(encoding: str | None) -> bool:
    """Whether content travels as base64.

    :raises InvalidRequest: in another way that does not exist.
    """
    if encoding not in (None, "", "base64"):
        raise InvalidRequest(f"there is no encoding {encoding!r}: base64, or none")
    return encoding == "base64"


def decoded(body: Body) -> Body:
    """A body that comes as base64, as the file that it is."""
    return replace(body, read=_Decoder(body.read).read)


def encoded(stream: Stream) -> Stream:
    """A file on its way out, as base64. Its end is the end of the answer, whose size says whether it is whole."""
    size = None if stream.size is None else (stream.size + 2) // 3 * 4
    return replace(stream, chunks=_encode(stream.chunks), media_type="text/plain; charset=us-ascii", size=size)


class _Decoder:
    """Reads base64 from one that reads text; line ends in it do not count."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._text = b""
        self._ready = b""
        self._ended = False
        self._padded = False

    def read(self, size: int) -> bytes:
        while not self._ready and not self._ended:
            self._fill()
        taken, self._ready = self._ready[:size], self._ready[size:]
        return taken

    def _fill(self) -> None:
        more = self._read(_PIECE)
        self._text += more.translate(None, b"\r\n")
        whole = len(self._text) - len(self._text) % 4 if more else len(self._text)
        # What ends with padding is the end; binascii would take more after it for nothing.
        quads, self._text = self._text[:whole], self._text[whole:]
        if self._padded and quads:
            raise InvalidRequest("the body is not base64: it goes on after its end")
        try:
            self._ready = base64.b64decode(quads, validate=True)
        except binascii.Error as exc:
            raise InvalidRequest(f"the body is not base64: {exc}") from exc
        self._padded = quads.endswith(b"=")
        self._ended = not more


def _encode(chunks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
    rest = b""
    try:
        for chunk in chunks:
            rest += chunk
            whole = len(rest) - len(rest) % 3
            if whole:
                yield base64.b64encode(rest[:whole])
            rest = rest[whole:]
        if rest:
            yield base64.b64encode(rest)
    finally:
        chunks.close()
