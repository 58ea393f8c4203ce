"""Content that travels as text, where a message broker carries nothing else: ``encoding=base64`` of uploads and downloads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from aiida_marketplace_hpc.errors import InvalidRequest
from aiida_marketplace_hpc.textual import Decoder, encode, encoded_length

if TYPE_CHECKING:
    from aiida_marketplace_hpc.gateway.routes.call import Body, Stream


def is_coded(encoding: str | None) -> bool:
    """Whether content travels as base64.

    :raises InvalidRequest: in another way that does not exist.
    """
    if encoding not in (None, "", "base64"):
        raise InvalidRequest(f"there is no encoding {encoding!r}: base64, or none")
    return encoding == "base64"


def decoded(body: Body) -> Body:
    """A body that comes as base64, as the file that it is."""
    return replace(body, read=Decoder(body.read).read)


def encoded(stream: Stream) -> Stream:
    """A file on its way out, as base64. Its end is the end of the answer, whose size says whether it is whole."""
    size = None if stream.size is None else encoded_length(stream.size)
    return replace(stream, chunks=encode(stream.chunks), media_type="text/plain; charset=us-ascii", size=size)
