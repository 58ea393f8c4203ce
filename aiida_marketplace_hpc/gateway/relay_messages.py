"""Requests and answers as they travel through a message broker, as pure functions.

A request is JSON with ``endpoint``, ``method``, ``query_params``, ``headers`` and ``body``, an answer JSON with
``status_code``, ``headers`` and ``body``; bodies are text. That is the published form, to the letter.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import unquote

from aiida_marketplace_hpc.errors import GatewayError, InvalidRequest, NotSupported
from aiida_marketplace_hpc.protocol import BY_NAME, CAPABILITIES, ENVELOPE, REQUEST_ID_HEADER, Capability

_METHODS = {capability.method for capability in CAPABILITIES} | {"HEAD"}
_NOT_FORWARDED = {
    # What is about one connection, and not about the request.
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *("transfer-encoding", "upgrade", "expect"),
    # What follows from where it is sent to, and from the body that is sent.
    *("host", "content-length"),
    # The body of an answer must be text: compressed it would be none.
    "accept-encoding",
    # Whom the gateway believes these from is its operator's choice, and not that of whoever writes a message.
    *("forwarded", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"),
}
_NOT_ANSWERED = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "trailer",
    "upgrade",
    "content-encoding",
    "content-length",
}
_ODD = re.compile(r"[\x00-\x20\x7f#\\]")


@dataclass(frozen=True)
class RelayedRequest:
    """One request that came through the broker, ready to be sent on.

    :param endpoint: relative to the gateway's address, without a leading slash.
    """

    endpoint: str
    method: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)

    @property
    def asked_id(self) -> str:
        """The id that the client gave the request, if it did."""
        return next((text for name, text in self.headers.items() if name.lower() == REQUEST_ID_HEADER.lower()), "")

    @cached_property
    def capability(self) -> Capability | None:
        """What is asked for, also where it is in an envelope; ``None`` for what is in no table."""
        path = self.endpoint.partition("?")[0].strip("/")
        for capability in CAPABILITIES:
            pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(capability.path.strip("/")))
            if capability.method == self.method and re.fullmatch(pattern, path):
                return _inside(self.body) or capability if capability.name == "newTransformation" else capability
        return None


def _inside(body: bytes) -> Capability | None:
    """What an envelope asks for; ``None`` for a body that is none."""
    if ENVELOPE.encode() not in body:
        return None
    try:
        return BY_NAME.get(json.loads(body)[ENVELOPE]["capability"])
    except (ValueError, RecursionError, LookupError, TypeError):
        return None


def read_request(message: bytes) -> RelayedRequest:
    """Read the request in a message.

    :raises InvalidRequest: it is not in the published form, or asks for something that is not below the gateway's address.
        Nothing of the message is repeated in the error, which goes into a log.
    """
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest("the message is not JSON in UTF-8") from exc
    if not isinstance(fields, dict):
        raise InvalidRequest("the message is not a JSON object")
    endpoint, method = _text(fields, "endpoint"), _text(fields, "method").upper()
    if method not in _METHODS:
        raise InvalidRequest(f"the method of a message is one of {', '.join(sorted(_METHODS))}")
    body = fields.get("body")
    if body is not None and not isinstance(body, str):
        raise InvalidRequest("the body of a message is a text, or null")
    try:
        content = (body or "").encode()
    except UnicodeEncodeError as exc:
        raise InvalidRequest("the body of a message has half of a character in it") from exc
    headers = {name: value for name, value in _texts(fields, "headers").items() if name.lower() not in _NOT_FORWARDED}
    return RelayedRequest(_below(endpoint), method, _texts(fields, "query_params"), headers, content)


class AnswerMessage(NamedTuple):
    """An answer, and the message that carries it."""

    status: int
    message: bytes


def write_answer(status: int, headers: Mapping[str, str], content: bytes) -> AnswerMessage:
    """Put a gateway's answer into a message; ``content`` is not compressed.

    :raises NotSupported: the content is no text, which no message can carry.
    """
    try:
        body = content.decode()
    except UnicodeDecodeError as exc:
        raise NotSupported(
            "this file is not text, and the message broker between here and the gateway carries only text: "
            "download it directly from the gateway"
        ) from exc
    kept = {name: value for name, value in headers.items() if name.lower() not in _NOT_ANSWERED}
    kept["Content-Length"] = str(len(content))
    fields = {"status_code": status, "headers": kept, "body": body}
    return AnswerMessage(status, json.dumps(fields, ensure_ascii=False).encode())


def write_error(error: GatewayError, status: int | None = None, request_id: str | None = None) -> AnswerMessage:
    """Put an error of the relay's own into a message, in the form in which a gateway answers with one.

    :param status: in place of the error's own.
    :param request_id: that of the request, where it is known.
    """
    content = json.dumps({**error.to_wire(), "request_id": request_id}, indent=2, sort_keys=True).encode() + b"\n"
    headers = {"Content-Type": "application/json", **({REQUEST_ID_HEADER: request_id} if request_id else {})}
    return write_answer(status or error.status, headers, content)


def repetition_key(message: bytes, reply_to: str, correlation_id: str) -> str:
    """A key that two deliveries of one message share, and two messages do not."""
    marked = b"\0".join((reply_to.encode(), correlation_id.encode(), message))
    return f"relay-{hashlib.sha256(marked).hexdigest()}"


def queue_name(client_id: str, client_secret: str) -> str:
    """The queue from which the app with these credentials takes its requests."""
    digest = int(hashlib.sha256((client_id + client_secret).encode()).hexdigest(), 16)
    return f"{client_id}:{digest % 10**16}"


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"a message needs the text {name}")
    return value


def _texts(fields: Mapping[str, Any], name: str) -> dict[str, str]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise InvalidRequest(f"{name} of a message is an object of texts, or null")
    return value


def _below(endpoint: str) -> str:
    """Check that an endpoint stays below the gateway's address, whoever resolves it."""
    relative = endpoint.lstrip("/")
    path = relative.partition("?")[0]
    if _ODD.search(relative) or any(unquote(part) in (".", "..") for part in path.split("/")):
        raise InvalidRequest("the endpoint of a message is a path below the gateway's address, and nothing else")
    return relative
