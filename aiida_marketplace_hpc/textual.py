"""Bytes as base64 and back, piece by piece: for a way on which only text survives. Known to the client and to the gateway."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Generator

from aiida_marketplace_hpc.errors import GatewayError, InvalidRequest

_PIECE = 48 * 1024
"""Bytes that are decoded at once."""


def encoded_length(size: int) -> int:
    """How many characters so many bytes take."""
    return (size + 2) // 3 * 4


def encode(chunks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
    """Yield base64, without line ends, of chunks, which are closed in the end."""
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


class Decoder:
    """Reads bytes from one that reads base64; line ends in it do not count.

    :param read: reads at most so many bytes of text, ``b""`` at the end.
    :param error: makes the error for what is no base64.
    """

    def __init__(self, read: Callable[[int], bytes], error: Callable[[str], GatewayError] = InvalidRequest) -> None:
        self._read = read
        self._error = error
        self._text = b""
        self._ready = b""
        self._ended = False
        self._padded = False

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes, ``b""`` at the end.

        :raises GatewayError: what was read is no base64.
        """
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
            raise self._error("the body is not base64: it goes on after its end")
        try:
            self._ready = base64.b64decode(quads, validate=True)
        except binascii.Error as exc:
            raise self._error(f"the body is not base64: {exc}") from exc
        self._padded = quads.endswith(b"=")
        self._ended = not more
