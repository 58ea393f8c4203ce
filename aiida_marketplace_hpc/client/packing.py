"""How requests travel where a way does not let them through as they are.

*In the envelope*: a platform that passes only the nine as published passes whatever stands in the body of
``newTransformation``; there the request of another capability travels, with its file as base64. *As base64*: where only text
survives, the content of uploads and downloads is coded, and all else is text already. Either is between a capability and its
HTTP request: whoever asks for the capability does not see it.
"""

from __future__ import annotations

import json
from base64 import b64decode
from binascii import Error as NoBase64
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TypeVar

from aiida_marketplace_hpc.client.answer import Answer
from aiida_marketplace_hpc.client.routes import Target
from aiida_marketplace_hpc.client.session import Body, Request
from aiida_marketplace_hpc.errors import IntegrityError
from aiida_marketplace_hpc.protocol import CARRIER, ENVELOPE
from aiida_marketplace_hpc.textual import Decoder, encode, encoded_length

T = TypeVar("T")
Handle = Callable[[Answer], T]


@dataclass(frozen=True)
class Way:
    """What was found out about the way to a gateway.

    :param envelope: the gateway at its end understands the envelope.
    :param nine_only: nothing else than the nine gets through, as published.
    :param text_only: nothing but text does.
    :param offered: what the platform said was on offer when this was found out.
    """

    envelope: bool = False
    nine_only: bool = False
    text_only: bool = False
    offered: frozenset[str] | None = None

    def wants_envelope(self, target: Target) -> bool:
        """Whether a request gets through in the envelope only."""
        if not self.envelope or target.capability.name == CARRIER:
            return False
        # Names that are no UTF-8 are no text either, but for JSON, which has a way to write them.
        return (self.nine_only and target.has_additions) or (self.text_only and not _is_text(target))

    def wants_text(self, target: Target) -> bool:
        """Whether the content of a request, or of its answer, is to be coded."""
        return self.text_only and target.capability.name in ("createDataset", "getDataset")


def in_envelope(request: Request, handle: Handle[T], carrier: Target) -> tuple[Request, Handle[T]]:
    """Put a request into the envelope, and take what answers it out.

    :param carrier: where ``newTransformation`` is asked for.
    """
    row = request.target.capability
    head = json.dumps({"capability": row.name, "parameters": dict(request.target.given)}).encode("ascii")[:-1]
    before, after = b'{"%s": %s' % (ENVELOPE.encode("ascii"), head), b"}}"
    body = request.body

    def whole() -> Body | bytes:
        if body is None:
            return before + after
        inner = body()
        if row.body == "file":
            return _Coded(inner, before + b', "content": "', b'"' + after)
        assert isinstance(inner, bytes)  # noqa: S101 - JSON is made in one piece.
        return b'%s, "fields": %s%s' % (before, inner, after)

    def take_out(answer: Answer) -> T:
        said = answer.json()
        try:
            content = b64decode(said["content"], validate=True)
        except (KeyError, TypeError, ValueError, NoBase64) as exc:
            raise IntegrityError(f"{carrier.host} answered with no file: something on the way changed it") from exc
        digest = said.get("digest")
        return handle(answer.unpacked(BytesIO(content).read, digest if isinstance(digest, str) else None))

    enclosed = replace(request, target=carrier, body=whole, content_type="application/json", accept="application/json")
    return enclosed, take_out if row.name == "getDataset" else handle


def as_text(request: Request, handle: Handle[T]) -> tuple[Request, Handle[T]]:
    """Code the content of an upload or download as base64."""
    target, body = request.target, request.body
    coded = ("encoding", "base64")
    target = replace(target, parameters=(*target.parameters, coded), given=(*target.given, coded))
    if target.capability.name == "createDataset":
        sent = None if body is None else lambda: _Coded(body())
        return replace(request, target=target, body=sent), handle

    def decoded(answer: Answer) -> T:
        return handle(answer.unpacked(Decoder(answer.read, IntegrityError).read, answer.digest))

    return replace(request, target=target), decoded


class _Coded:
    """A body as base64, between two texts."""

    def __init__(self, body: Body | bytes, before: bytes = b"", after: bytes = b"") -> None:
        self._body = body
        self._before = before
        self._after = after

    def __len__(self) -> int:
        return len(self._before) + encoded_length(len(self._body)) + len(self._after)

    def __iter__(self) -> Generator[bytes, None, None]:
        if self._before:
            yield self._before
        with closing(encode(self._pieces())) as coded:
            yield from coded
        if self._after:
            yield self._after

    def _pieces(self) -> Generator[bytes, None, None]:
        if isinstance(self._body, bytes):
            yield self._body
        else:
            with closing(iter(self._body)) as pieces:
                yield from pieces


def _is_text(target: Target) -> bool:
    try:
        for _, value in target.given:
            value.encode()
    except UnicodeEncodeError:
        return False
    return True
