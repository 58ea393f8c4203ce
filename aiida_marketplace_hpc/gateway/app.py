"""The HTTP application: one route for each row of the capability table."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import replace
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
from starlette.responses import Response

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.errors import (
    Forbidden,
    GatewayError,
    InvalidRequest,
    NotFound,
    ServerFault,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from aiida_marketplace_hpc.gateway import log as program_log
from aiida_marketplace_hpc.gateway import streams
from aiida_marketplace_hpc.gateway.access import Access, AccessLog, Json, error_response, loggable
from aiida_marketplace_hpc.gateway.auth import bearer_token
from aiida_marketplace_hpc.gateway.config import MAX_JSON, MIB, Settings
from aiida_marketplace_hpc.gateway.document import document
from aiida_marketplace_hpc.gateway.envelope import enclosed, opened
from aiida_marketplace_hpc.gateway.limits import Limits
from aiida_marketplace_hpc.gateway.metrics import CONTENT_TYPE, TRANSFERS
from aiida_marketplace_hpc.gateway.pages import POLICY, api_page, front_page
from aiida_marketplace_hpc.gateway.people.routes import People
from aiida_marketplace_hpc.gateway.routes import HANDLERS
from aiida_marketplace_hpc.gateway.routes.call import Answer, Body, Call, Later, Note, Route, Stream, parse_parameters
from aiida_marketplace_hpc.gateway.service import Caller, Gateway
from aiida_marketplace_hpc.protocol import CAPABILITIES, CARRIER, ENVELOPE, RELAY_HEADER, Capability
from aiida_marketplace_hpc.versions import check_client

logger = logging.getLogger(__name__)

_THREADS = 100
_WAIT_FOR_SLURM = (
    "newTransformation",
    "updateTransformation",
    "deleteTransformation",
    "getTransformationState",
    "listJobs",
)


def create_app(gateway: Gateway) -> FastAPI:
    """Make the application of a gateway; its lifespan starts and stops the gateway's background."""
    log = AccessLog(gateway.settings.access_log)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with running(gateway, log):
            yield

    app = FastAPI(
        title=gateway.settings.name,
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    described = document(gateway.settings)
    app.openapi = lambda: described  # type: ignore[method-assign]
    app.add_middleware(Access, log=log, metrics=gateway.metrics)
    app.add_exception_handler(HTTPException, _http_error)
    limits = Limits(
        at_once=gateway.settings.requests_at_once,
        per_second=gateway.settings.requests_per_second,
        hit=gateway.metrics.limit,
    )
    for capability in CAPABILITIES:
        paths = {capability.path, capability.path.rstrip("/")}
        for path in sorted(paths):
            app.add_api_route(
                path,
                _endpoint(gateway, capability, limits, log),
                methods=[capability.method],
            )
    app.add_api_route("/docs", _page(api_page(gateway.settings)))
    if People.possible(gateway.settings):
        People(gateway, limits).add_to(app)
    else:
        app.add_api_route("/", _page(front_page(gateway.settings)))
    app.add_api_route("/ready", _ready(gateway))
    if gateway.settings.metrics:
        app.add_api_route("/metrics", _metrics(gateway))
    return app


@asynccontextmanager
async def running(gateway: Gateway, log: AccessLog) -> AsyncIterator[None]:
    """Start a gateway's background, and stop it in the end."""
    # Handlers block (files, database, scheduler), so each has a thread; a launch may hold one for seconds.
    anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS
    await run_in_threadpool(gateway.start)
    try:
        yield
    finally:
        await run_in_threadpool(gateway.stop)
        log.close()


def _page(content: str) -> Callable[[], Response]:
    return lambda: HTMLResponse(content, headers={"Content-Security-Policy": POLICY})


def _ready(gateway: Gateway) -> Callable[[Request], Awaitable[Response]]:
    async def ready(request: Request) -> Response:
        document = await gateway.readiness.document()
        # For a balancer of several gateways: when the scheduler is down they are all as good as each other.
        enough = _query(request).get("of") == "database" and document["database"] == "ok" and not document["stopping"]
        return Json(document, status_code=200 if document["ready"] or enough else 503)

    return ready


def _metrics(gateway: Gateway) -> Callable[[], Response]:
    return lambda: Response(gateway.metrics.page(), media_type=CONTENT_TYPE)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in the form of every other error."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    path, request_id = request.url.path, request.state.request_id
    answer: GatewayError
    if status == 405:
        answer = InvalidRequest(f"{request.method} is not possible on {path}", request_id=request_id)
    elif status == 404:
        answer = NotFound(f"there is nothing at {path}; see /docs", request_id=request_id)
    else:
        answer = ServerFault(str(error), request_id=request_id)
    request.state.outcome = answer.code
    if status == 405:
        return Json(answer.to_wire(), status_code=405, headers=getattr(error, "headers", None))
    return error_response(answer)


def _endpoint(
    gateway: Gateway, capability: Capability, limits: Limits, log: AccessLog
) -> Callable[[Request], Awaitable[Response]]:
    handler = HANDLERS[capability.name]
    settings = gateway.settings

    async def endpoint(request: Request) -> Response:
        request.state.capability = capability.name
        try:
            caller = None
            if capability.authenticated:
                check_client(request.headers.get("user-agent"))
                caller = await _caller(gateway, request)
                request.state.user = caller.user.email
                program_log.note(user=caller.user.email)
                await limits.enter(caller.user.id)
                request.state.at_end.callback(limits.release, caller.user.id)
            parameters = parse_parameters(capability, request.path_params, _query(request))
            _note(gateway, request, capability, parameters)
            async with AsyncExitStack() as resources:
                fields = await _json(request) if capability.body == "json" else {}
                body = await _file(request, settings, resources) if capability.body == "file" else None
                note = _operations_noted(request, log)
                route = Route.of(request.headers.get(RELAY_HEADER), text_only=settings.text_only)
                call = Call(gateway, parameters, fields, caller, body, note, route)
                if capability.name == "heartbeat":
                    # It needs nothing, not even a thread: all of them may wait for a disk that hangs.
                    answer = _carried_out(handler, call)
                elif capability.name == CARRIER and ENVELOPE in fields:
                    answer = await run_in_threadpool(_inside, request, call)
                else:
                    async with _turn(limits, capability, call):
                        answer = await run_in_threadpool(_carried_out, handler, call)
                if isinstance(answer, Later):
                    answer = await _awaited(answer)
            return answer if isinstance(answer, Response) else Json(answer)
        except GatewayError as exc:
            exc.request_id = request.state.request_id
            request.state.outcome = exc.code
            if isinstance(exc, TooLarge):
                gateway.metrics.limit("size")
            if isinstance(exc, ServerFault):
                logger.error("request %s: %s", request.state.request_id, exc)
            return error_response(exc)

    return endpoint


def _turn(limits: Limits, capability: Capability, call: Call) -> AbstractAsyncContextManager[None]:
    """A user's turn, for what does not wait for anybody: neither for the body of a request, nor for Slurm, nor FirecREST."""
    waits = capability.name in _WAIT_FOR_SLURM or (call.body is not None and call.body.arriving)
    waits = waits or bool(call.gateway.sites)
    return nullcontext() if waits or not capability.authenticated else limits.turn(call.caller.user.id)


def _note(gateway: Gateway, request: Request, capability: Capability, parameters: Mapping[str, Any]) -> None:
    """Let figures and log know what a request is about, by itself or in the envelope."""
    if (direction := TRANSFERS.get(capability.name)) is not None:
        request.state.at_end.enter_context(gateway.metrics.transfer(direction))
    jobid = parameters.get("jobid")
    if gateway.settings.root_at(str(jobid)) is None:
        program_log.note(jobid=jobid)


async def _caller(gateway: Gateway, request: Request) -> Caller:
    failures = gateway.metrics.token_failure
    try:
        token = bearer_token(request.headers.get("authorization"))
    except Unauthorized:
        failures("missing")
        raise
    try:
        known = gateway.known_caller(token)
        return known if known is not None else await run_in_threadpool(gateway.caller, token)
    except Unauthorized:
        failures("refused")
        raise
    except Forbidden:
        failures("not_admitted")
        raise
    except Unavailable:
        failures("unavailable")
        raise


def _operations_noted(request: Request, log: AccessLog) -> Note:
    """What writes the operations of a request into the log; it may do so when the request has been answered."""
    noted = request.state
    request_id, user, client = noted.request_id, getattr(noted, "user", None), noted.client

    def note(operation: str | None, fields: Mapping[str, Any], outcome: str) -> None:
        log.write(
            {
                "request_id": request_id,
                "operation": operation,
                "fields": fields,
                "outcome": outcome,
                "user": user,
                "client": client,
            }
        )

    return note


def _carried_out(handler: Callable[[Call], Answer], call: Call) -> dict[str, Any] | Later | Response:
    answer = handler(call)
    return streams.response(answer) if isinstance(answer, Stream) else answer


def _inside(request: Request, call: Call) -> dict[str, Any] | Later | Response:
    """Carry out what is in the envelope. The log says what that was, and not what it came in."""
    inside = opened(call.json, call.gateway.settings.request_limit * MIB)
    request.state.capability, request.state.query = inside.capability.name, loggable(inside.query.encode("ascii"))
    _note(call.gateway, request, inside.capability, inside.parameters)
    if inside.capability.body == "file":
        # It has come before it was known what it is.
        call.gateway.metrics.transferred("in", inside.size)
    answer = HANDLERS[inside.capability.name](
        replace(call, parameters=inside.parameters, json=inside.fields, body=inside.body)
    )
    return streams.response(enclosed(answer)) if isinstance(answer, Stream) else answer


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


async def _json(request: Request) -> dict[str, Any]:
    raw = await streams.whole(streams.bounded(request, MAX_JSON))
    try:
        fields = json.loads(raw) if raw else {}
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"the body is not JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise InvalidRequest("the body is a JSON object")
    return fields


async def _file(request: Request, settings: Settings, resources: AsyncExitStack) -> Body:
    """The file of an upload: the part ``file`` of a form, as published, or the body itself."""
    is_form = request.headers.get("content-type", "").lower().startswith("multipart/form-data")
    limit = settings.request_limit
    request = streams.bounded(request, (min(limit, settings.form_limit) if is_form else limit) * MIB)
    if not is_form:
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length) <= streams.PIECE:
            return Body(io.BytesIO(await streams.whole(request)).read)
        incoming = streams.Incoming(request)
        resources.callback(incoming.close)
        return Body(incoming.read, arriving=True)
    try:
        form = await request.form(max_files=1, max_fields=10)
    except (MultiPartException, HTTPException) as exc:
        raise InvalidRequest(f"the form does not parse: {exc}") from exc
    except ClientDisconnect as exc:
        raise streams.broken() from exc
    resources.push_async_callback(form.close)
    part = form.get("file")
    if not isinstance(part, UploadFile):
        raise InvalidRequest("the form has no part 'file'")
    return Body(part.file.read, part.filename)
