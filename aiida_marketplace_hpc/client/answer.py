"""Reading what a gateway, or a proxy in front of it, answered: within limits, to the last byte, as JSON or as an error."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from copy import copy
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3

from aiida_marketplace_hpc.errors import (
    Busy,
    GatewayError,
    MarketplaceHpcError,
    Phase,
    Unavailable,
    from_wire,
)
from aiida_marketplace_hpc.protocol import DIGEST_HEADER, REQUEST_ID_HEADER

MAX_ANSWER = 256 * 1024 * 1024
"""Bytes of a JSON answer that are accepted."""
_MAX_ERROR = 1024 * 1024
_PIECE = 64 * 1024
_MAX_RETRY_AFTER = 3600.0


class Answer:
    """A successful answer that is still to be read."""

    def __init__(
        self, response: requests.Response, request_id: str, failure: Callable[[Exception], MarketplaceHpcError]
    ) -> None:
        self._response = response
        self._failure = failure
        self._received = 0
        self._digest: str | None = response.headers.get(DIGEST_HEADER)
        self._read: Callable[[int], bytes] = self._raw
        self.request_id: str = response.headers.get(REQUEST_ID_HEADER) or request_id
        """The id under which the gateway's log has the details."""

    @property
    def content_type(self) -> str:
        return self._response.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    @property
    def digest(self) -> str | None:
        """The digest of the body that was announced, as RFC 9530 writes it; proxies may have dropped it."""
        return self._digest

    @property
    def date(self) -> float | None:
        """When it was answered by the clock at the other end, in seconds since the epoch, if that is said."""
        try:
            return parsedate_to_datetime(self._response.headers["Date"]).timestamp()
        except (KeyError, ValueError, TypeError):
            return None

    @property
    def length(self) -> int | None:
        """The announced number of bytes, if it is known."""
        text = self._response.headers.get("Content-Length", "")
        return int(text) if text.isdecimal() and "Content-Encoding" not in self._response.headers else None

    def unpacked(self, read: Callable[[int], bytes], digest: str | None) -> Answer:
        """The same answer without what its content was packed in for the way.

        :param read: reads at most so many bytes of the content, ``b""`` at the end.
        :param digest: of the content.
        """
        answer = copy(self)
        answer._read, answer._digest = read, digest
        return answer

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes, ``b""`` at the end.

        :raises ConnectionFailed: the answer breaks off or stalls.
        """
        return self._read(size)

    def _raw(self, size: int) -> bytes:
        try:
            piece = bytes(self._response.raw.read(size, decode_content=True))
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as exc:
            raise self._failure(exc) from exc
        self._received += len(piece)
        if not piece and self.length is not None and self._received != self.length:
            # Not every version of urllib3 looks.
            raise self._failure(EOFError(f"{self.length - self._received} bytes are missing"))
        return piece

    def content(self) -> bytes:
        """Return all bytes.

        :raises ConnectionFailed: the answer breaks off or stalls.
        """
        return b"".join(iter(lambda: self.read(_PIECE), b""))

    def raw(self) -> bytes:
        """Return all bytes as they came, whatever encoding they are said to have.

        The published gateway says of a file ``x.gz`` that it was compressed on the way.

        :raises ConnectionFailed: the answer breaks off or stalls.
        """
        pieces: list[bytes] = []
        try:
            while piece := bytes(self._response.raw.read(_PIECE, decode_content=False)):
                pieces.append(piece)
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as exc:
            raise self._failure(exc) from exc
        announced = self._response.headers.get("Content-Length", "")
        missing = int(announced) - sum(map(len, pieces)) if announced.isdecimal() else 0
        if missing:
            raise self._failure(EOFError(f"{missing} bytes are missing"))
        return b"".join(pieces)

    def json(self) -> dict[str, Any]:
        """Return the JSON object that was answered.

        :raises Unavailable: it is none: a proxy or a login page answered instead of the gateway.
        :raises ConnectionFailed: the answer breaks off or stalls.
        """
        content = self._capped(MAX_ANSWER)
        try:
            fields = json.loads(content)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            host = urlsplit(str(self._response.url)).netloc
            error = Unavailable(
                f"{host} answered with {self.content_type or 'something'} that is not the gateway's JSON: a proxy or a login "
                "page answered instead of the gateway; check the url, or try again later"
            )
            error.phase = Phase.MAYBE_SENT
            raise error
        return fields

    def _capped(self, limit: int) -> bytes:
        pieces, size = [], 0
        while piece := self.read(_PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                error = Unavailable(f"the gateway's answer is larger than {limit} bytes", retryable=False)
                error.phase = Phase.MAYBE_SENT
                raise error
        return b"".join(pieces)

    def error(self) -> GatewayError:
        """Read an unsuccessful answer."""
        response = self._response
        try:
            text = self._capped(_MAX_ERROR).decode("utf-8", "replace")
        except MarketplaceHpcError:
            text = ""  # The status alone says enough.
        try:
            body: Any = json.loads(text)
        except ValueError:
            body = text
        fields = body if isinstance(body, dict) else {}
        error = from_wire(response.status_code, body)
        error.request_id = error.request_id or self.request_id
        error.foreign = "code" not in fields
        error.http_status = response.status_code
        if error.foreign and response.status_code >= 500:
            # Not the gateway's own words: a proxy whose upstream did not answer in time may have passed the request on.
            error.phase = Phase.MAYBE_SENT
        if isinstance(error, Busy):
            # The gateway's own word is the more exact one: a header has whole seconds.
            error.retry_after = _seconds(fields.get("retry_after", response.headers.get("Retry-After")))
            error.under_way = fields.get("under_way") is True
        return error


def _seconds(value: object) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return 1.0
    return min(max(0.0, seconds), _MAX_RETRY_AFTER) if seconds == seconds else 1.0
