"""What surrounds every request: its id, its line in the access log, and an answer in JSON whatever happens."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aiida_marketplace_hpc.errors import Busy, GatewayError, ServerFault
from aiida_marketplace_hpc.gateway import log as program_log
from aiida_marketplace_hpc.gateway.metrics import Metrics
from aiida_marketplace_hpc.protocol import CAPABILITIES, REQUEST_ID_HEADER

logger = logging.getLogger(__name__)

_PARAMETERS = {parameter.name.encode() for capability in CAPABILITIES for parameter in capability.parameters}
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""What every answer has, unless it says something else. There is nothing about CORS: pages of other sites cannot read any."""
FULL = "full"
"""The key in the state of a request's scope that says: it came on a connection that was one too many."""
_HSTS = "max-age=31536000"


class AccessLog:
    """Who did what to which job and file, from where, and what came of it: one JSON object a line.

    A line for each request that was answered: its ``time``, ``request_id``, ``method``, ``path``, ``query``, ``capability``,
    ``status``, ``outcome``, ``duration`` in seconds, ``user`` and ``client``, which is an address. And one for each operation
    of a ``query`` when it has ended: ``time``, ``request_id``, ``operation`` with its ``fields``, ``outcome``, ``user`` and
    ``client``. The outcome is ``ok``, the code of an error, or ``broken off`` for an answer that was not sent to its end.

    :param path: the file to append to; without it lines go to the program's log. So does a line that cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        self._file: int | None = None
        self._torn = False
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # It has e-mail addresses and file names: nobody else reads it.
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, line: dict[str, Any]) -> None:
        """Write one line; the time is put before it."""
        line = {"time": datetime.now(timezone.utc).isoformat(), **line}
        text = json.dumps(line)
        with self._lock:
            if self._file is None:
                logger.info("%s", text, extra={program_log.LINE: line})
                return
            try:
                self._append(self._file, text)
            except OSError as exc:
                # A full disk must keep nobody from being answered, nor what they did from being known.
                logger.error("the access log cannot be written (%s): %s", exc.strerror, text)

    def _append(self, file: int, text: str) -> None:
        rest = f"\n{text}\n".encode("ascii") if self._torn else f"{text}\n".encode("ascii")
        size = len(rest)
        while rest:
            try:
                rest = rest[os.write(file, rest) :]
            finally:
                # What comes next is no part of a line of which only the beginning was written.
                self._torn = bool(rest) and (self._torn or len(rest) < size)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


class Json(JSONResponse):
    """JSON in ASCII, as the published gateway writes it; so a file name that is not UTF-8 survives as escaped surrogates."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_response(error: GatewayError) -> Json:
    """The answer that says an error."""
    headers = {}
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    return Json(error.to_wire(), status_code=error.status, headers=headers)


def loggable(query: bytes) -> str:
    """A query string without the values of what is no parameter: somebody may have put a token there."""
    pairs = (pair.partition(b"=") for pair in query.split(b"&"))
    return b"&".join(
        name + sign + (value if name in _PARAMETERS else b"..." if value else b"") for name, sign, value in pairs
    ).decode("latin-1")


class Access:
    """ASGI middleware; the innermost of what is not the application itself."""

    def __init__(self, app: ASGIApp, log: AccessLog, metrics: Metrics) -> None:
        self._app = app
        self._log = log
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = program_log.request_id(Headers(scope=scope).get(REQUEST_ID_HEADER, ""))
        # Handlers add what they find out (user, capability) to this dictionary.
        noted: dict[str, Any] = scope.setdefault("state", {})
        noted["request_id"] = request_id
        program_log.note(request_id=request_id)  # Each request is a task of its own.
        at_end = noted["at_end"] = ExitStack()
        noted["client"] = scope["client"][0] if scope.get("client") else None
        started = time.monotonic()
        status = 0
        logged = False

        def write_line(outcome: str = "broken off") -> None:
            nonlocal logged
            if logged:
                return
            logged = True
            duration = time.monotonic() - started
            self._metrics.request(noted.get("capability"), status, duration)
            self._log.write(
                {
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": scope["path"],
                    "query": noted.get("query", loggable(scope["query_string"])),
                    "capability": noted.get("capability"),
                    "status": status,
                    "outcome": outcome,
                    "duration": round(duration, 6),
                    "user": noted.get("user"),
                    "client": noted["client"],
                }
            )

        async def receive_and_count() -> Message:
            message = await receive()
            if noted.get("capability") == "createDataset":
                self._metrics.transferred("in", len(message.get("body", b"")))
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if scope["scheme"] == "https":
                    headers["Strict-Transport-Security"] = _HSTS
            elif noted.get("capability") == "getDataset" and status < 300:
                self._metrics.transferred("out", len(message.get("body", b"")))
            if message["type"] == "http.response.body" and not message.get("more_body"):
                # Before the last byte: whoever has the whole answer finds its line in the log.
                write_line(noted.get("outcome", "ok"))
            await send(message)

        try:
            if noted.get(FULL):
                full = Busy("the gateway has as many connections as it takes: try again later", request_id=request_id)
                answer = error_response(full)
                noted["outcome"] = full.code
                self._metrics.limit("connections")
                answer.headers["Connection"] = "close"
                await answer(scope, receive, send_with_headers)
            else:
                with at_end:
                    await self._app(scope, receive_and_count, send_with_headers)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:
                raise  # The answer has begun: cutting the connection is the only way left to say that it is not whole.
            fault = ServerFault(
                "the gateway has a fault; its log says more under this request's id", request_id=request_id
            )
            noted["outcome"] = fault.code
            await error_response(fault)(scope, receive, send_with_headers)
        finally:
            write_line()
