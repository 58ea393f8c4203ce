"""The HTTP application: one route for each row of the capability table."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl

import anyio
import anyio.to_thread
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.errors import (
    GatewayError,
    IntegrityError,
    InvalidRequest,
    NotFound,
    ServerFault,
    TooLarge,
)
from aiida_marketplace_hpc.gateway.access import Access, AccessLog, Json, error_response
from aiida_marketplace_hpc.gateway.auth import bearer_token
from aiida_marketplace_hpc.gateway.pages import api_page, front_page
from aiida_marketplace_hpc.gateway.routes import HANDLERS
from aiida_marketplace_hpc.gateway.routes.call import Body, Call, Later, Stream, parse_parameters
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.protocol import CAPABILITIES, Capability, Parameter

logger = logging.getLogger(__name__)

MAX_JSON = 16 * 1024 * 1024
"""Bytes of a JSON body."""
_THREADS = 100
_PIECE = 1024 * 1024  # Bytes that cross between the event loop and a thread at a time.
STALLED = 10.0
"""Seconds without a byte after which a transfer is given up: a dead client must not hold what it was writing to."""


def create_app(gateway: Gateway) -> FastAPI:
    """Make the application of a gateway; its lifespan starts and stops the gateway's background."""
    log = AccessLog(gateway.settings.access_log)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Handlers block (files, database, scheduler), so each has a thread; a launch may hold one for seconds.
        anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS
        await run_in_threadpool(gateway.start)
        try:
            yield
        finally:
            await run_in_threadpool(gateway.stop)
            log.close()

    app = FastAPI(
        title=gateway.settings.name,
        version=__version__,
        description="An HPC gateway: run jobs on a cluster and reach its files over HTTP.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Access, log=log)
    app.add_exception_handler(HTTPException, _http_error)
    for capability in CAPABILITIES:
        paths = {capability.path, capability.path.rstrip("/")}
        for path in sorted(paths):
            app.add_api_route(
                path,
                _endpoint(gateway, capability),
                methods=[capability.method],
                operation_id=capability.name,
                summary=capability.summary,
                include_in_schema=path == capability.path,
                openapi_extra={"parameters": [_documented(parameter) for parameter in capability.parameters]},
            )
    app.add_api_route("/", lambda: HTMLResponse(front_page(gateway.settings)), include_in_schema=False)
    app.add_api_route("/docs", lambda: HTMLResponse(api_page(gateway.settings)), include_in_schema=False)
    return app


def _documented(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.where,
        "required": parameter.required,
        "description": parameter.description,
        "schema": {"type": parameter.type},
    }


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in the form of every other error."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    request_id = request.state.request_id
    if status == 405:
        answer = InvalidRequest(f"{request.method} is not possible on {request.url.path}", request_id=request_id)
        headers = getattr(error, "headers", None)
        return Json(answer.to_wire(), status_code=405, headers=headers)
    if status == 404:
        return error_response(NotFound(f"there is nothing at {request.url.path}; see /docs", request_id=request_id))
    return error_response(ServerFault(str(error), request_id=request_id))


def _endpoint(gateway: Gateway, capability: Capability) -> Callable[[Request], Awaitable[Response]]:
    handler = HANDLERS[capability.name]

    async def endpoint(request: Request) -> Response:
        request.state.capability = capability.name
        try:
            caller = None
            if capability.authenticated:
                token = bearer_token(request.headers.get("authorization"))
                caller = await run_in_threadpool(gateway.caller, token)
                request.state.user = caller.user.email
            parameters = parse_parameters(capability, request.path_params, _query(request))
            async with AsyncExitStack() as resources:
                fields = await _json(request) if capability.body == "json" else {}
                body = await _file(request, resources) if capability.body == "file" else None
                answer = await run_in_threadpool(handler, Call(gateway, parameters, fields, caller, body))
                if isinstance(answer, Later):
                    answer = await _awaited(answer)
            return _response(answer)
        except GatewayError as exc:
            exc.request_id = request.state.request_id
            if isinstance(exc, ServerFault):
                logger.error("request %s: %s", request.state.request_id, exc)
            return error_response(exc)

    return endpoint


def _query(request: Request) -> dict[str, str]:
    # File names need not be UTF-8: what is not stays what it is, as surrogate escapes.
    raw = request.scope["query_string"].decode("latin-1")
    return dict(parse_qsl(raw, keep_blank_values=True, errors="surrogateescape"))


async def _awaited(later: Later) -> dict[str, Any]:
    future = asyncio.wrap_future(later.future)
    done, _ = await asyncio.wait([future], timeout=later.patience)
    if not done:
        future.cancel()  # Not what it is about: that is running.
        return later.meanwhile()
    return future.result()


def _response(answer: dict[str, Any] | Stream) -> Response:
    if not isinstance(answer, Stream):
        return Json(answer)
    headers = dict(answer.headers)
    if answer.size is not None:
        headers["Content-Length"] = str(answer.size)
    return _FileResponse(answer.chunks, media_type=answer.media_type, headers=headers)


class _FileResponse(StreamingResponse):
    """Reads the next piece while one is being sent; closes the file also when the client goes away in the middle."""

    def __init__(self, chunks: Generator[bytes, None, None], **options: Any) -> None:
        super().__init__(chunks, **options)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._chunks.close()  # Also if nothing was sent at all.

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        upcoming = asyncio.ensure_future(run_in_threadpool(self._piece))
        try:
            # Shielded: a thread cannot be cancelled, and it is at work on the chunks.
            while piece := await asyncio.shield(upcoming):
                upcoming = asyncio.ensure_future(run_in_threadpool(self._piece))
                for chunk in piece:
                    with anyio.fail_after(STALLED):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError as exc:
            raise ClientDisconnect from exc
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.wait([upcoming])
            upcoming.exception()  # Else asyncio complains that nobody looked.

    def _piece(self) -> list[bytes]:
        piece: list[bytes] = []
        size = 0
        while size < _PIECE and (chunk := next(self._chunks, None)) is not None:
            piece.append(chunk)
            size += len(chunk)
        return piece


async def _json(request: Request) -> dict[str, Any]:
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_JSON:
            raise TooLarge(f"a JSON body has at most {MAX_JSON} bytes")
    try:
        fields = json.loads(raw) if raw else {}
    except ValueError as exc:
        raise InvalidRequest(f"the body is not JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise InvalidRequest("the body is a JSON object")
    return fields


async def _file(request: Request, resources: AsyncExitStack) -> Body:
    """The file of an upload: the part ``file`` of a form, as published, or the body itself."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        incoming = _Incoming(request)
        resources.callback(incoming.close)
        return Body(incoming.read)
    try:
        form = await request.form(max_files=1, max_fields=10)
    except (MultiPartException, HTTPException) as exc:
        raise InvalidRequest(f"the form does not parse: {exc}") from exc
    resources.push_async_callback(form.close)
    part = form.get("file")
    if not isinstance(part, UploadFile):
        raise InvalidRequest("the form has no part 'file'")
    return Body(part.file.read, part.filename)


class _Incoming:
    """A body that arrives on the event loop, read by a worker thread; one piece is gathered while another is worked on."""

    def __init__(self, request: Request) -> None:
        self._stream = request.stream()
        self._loop = asyncio.get_running_loop()
        self._upcoming: Future[deque[bytes]] | None = None
        self._chunks: deque[bytes] = deque()
        self._ended = False
        self._broken: Exception | None = None

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes, ``b""`` at the end; for a worker thread."""
        if not self._chunks and not self._ended:
            self._chunks = (self._upcoming or self._gathering()).result()
            self._ended = not self._chunks
            self._upcoming = None if self._ended else self._gathering()
        if not self._chunks:
            return b""
        chunk = self._chunks.popleft()
        if len(chunk) > size:
            self._chunks.appendleft(chunk[size:])
            chunk = chunk[:size]
        return chunk

    def _gathering(self) -> Future[deque[bytes]]:
        return asyncio.run_coroutine_threadsafe(self._gather(), self._loop)

    async def _gather(self) -> deque[bytes]:
        chunks: deque[bytes] = deque()
        size = 0
        try:
            while size < _PIECE and self._broken is None:
                with anyio.fail_after(STALLED):
                    chunk = await anext(self._stream)
                if chunk:
                    chunks.append(chunk)
                    size += len(chunk)
        except StopAsyncIteration:
            pass
        except (ClientDisconnect, TimeoutError) as exc:
            self._broken = exc
        if self._broken is not None and not chunks:  # What came before is of use.
            raise IntegrityError("the connection broke off inside the body; nothing was written") from self._broken
        return chunks

    def close(self) -> None:
        """Leave the rest unread."""
        if self._upcoming is not None:
            self._upcoming.cancel()
