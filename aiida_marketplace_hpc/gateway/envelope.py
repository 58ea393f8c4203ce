"""A capability's request inside the body of ``newTransformation``, for a platform that passes only the nine as published.

What is in it is handed to the same handler, with the same checks, as if it had come by itself; so nothing is reached by it
that is not reached directly.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import quote, urlencode

from aiida_marketplace_hpc.errors import InvalidRequest, TooLarge
from aiida_marketplace_hpc.gateway.routes.call import Body, Stream, parse_parameters
from aiida_marketplace_hpc.protocol import BY_NAME, CARRIER, DIGEST_HEADER, ENVELOPE, ENVELOPE_FIELDS, Capability
from aiida_marketplace_hpc.textual import Decoder, encode, encoded_length


@dataclass(frozen=True)
class Enclosed:
    """The request in an envelope.

    :param parameters: converted to their types.
    :param query: the parameters as the query of an address has them, for the log.
    :param size: bytes of the file as they came, as base64.
    """

    capability: Capability
    parameters: Mapping[str, Any]
    query: str
    fields: Mapping[str, Any]
    body: Body | None
    size: int = 0


def opened(letter: Mapping[str, Any], limit: int) -> Enclosed:
    """Open an envelope.

    :param letter: the whole JSON body, which has the reserved key.
    :param limit: bytes of a file.
    :raises InvalidRequest: it makes no sense, or has another envelope in it.
    :raises TooLarge: the file is larger.
    """
    envelope = letter[ENVELOPE]
    if len(letter) > 1 or not isinstance(envelope, dict):
        raise InvalidRequest(f"{ENVELOPE} is an object, with nothing beside it")
    unknown = sorted(set(envelope) - set(ENVELOPE_FIELDS))
    if unknown:
        raise InvalidRequest(f"{ENVELOPE} has no {', '.join(unknown)}")
    name = envelope.get("capability")
    capability = BY_NAME.get(name) if isinstance(name, str) else None
    if capability is None or capability.name == CARRIER:
        raise InvalidRequest(f"{ENVELOPE} asks for a capability, but not for {CARRIER}: not for {name!r}")
    given = envelope.get("parameters", {})
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise InvalidRequest(f"the parameters in {ENVELOPE} are an object of texts")
    fields, content = envelope.get("fields", {}), envelope.get("content")
    if not isinstance(fields, dict) or (fields and capability.body != "json"):
        raise InvalidRequest(f"{capability.name} has no fields, or they are no object")
    body: Body | None = None
    size = 0
    if capability.body == "file":
        body, size = _file(content, limit)
    elif content is not None:
        raise InvalidRequest(f"{capability.name} has no content")
    return Enclosed(capability, parse_parameters(capability, given, given), _as_query(given), fields, body, size)


def _file(content: Any, limit: int) -> tuple[Body, int]:
    if not isinstance(content, str) or not content.isascii():
        raise InvalidRequest(f"the content in {ENVELOPE} is base64")
    if len(content) > encoded_length(limit):
        raise TooLarge(
            f"a file in one request has at most {limit} bytes here: send less at once, or ask who runs the gateway"
        )
    return Body(Decoder(BytesIO(content.encode("ascii")).read).read), len(content)


def _as_query(given: Mapping[str, str]) -> str:
    try:
        return urlencode(given, quote_via=quote, errors="surrogateescape")
    except UnicodeEncodeError as exc:  # Half of a character; what stands for a byte that is no UTF-8 is fine.
        raise InvalidRequest(f"the parameters in {ENVELOPE} have half of a character in them") from exc


def enclosed(stream: Stream) -> Stream:
    """A file on its way out, as the JSON object that answers an envelope."""
    said = {"content_type": stream.media_type}
    if DIGEST_HEADER in stream.headers:
        said["digest"] = stream.headers[DIGEST_HEADER]
    before = json.dumps(said).encode("ascii")[:-1] + b', "content": "'
    after = b'"}'
    size = None if stream.size is None else len(before) + encoded_length(stream.size) + len(after)
    return Stream(_between(before, stream.chunks, after), "application/json", size)


def _between(before: bytes, chunks: Generator[bytes, None, None], after: bytes) -> Generator[bytes, None, None]:
    coded = encode(chunks)
    try:
        yield before
        yield from coded
        yield after
    finally:
        coded.close()
        chunks.close()  # Also where nothing of it was asked for yet.
