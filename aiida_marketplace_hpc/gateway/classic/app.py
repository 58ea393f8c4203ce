"""The HTTP application of ``--classic``: the published routes, each with the published answers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.errors import Busy, Forbidden, GatewayError, TooLarge, Unauthorized, Unavailable
from aiida_marketplace_hpc.gateway import streams
from aiida_marketplace_hpc.gateway.access import Access, AccessLog
from aiida_marketplace_hpc.gateway.app import running
from aiida_marketplace_hpc.gateway.classic.answers import Failed, Uncaught, as_json, as_page
from aiida_marketplace_hpc.gateway.classic.calls import HANDLERS, PAGE, UNIMPLEMENTED, Call, Classic
from aiida_marketplace_hpc.gateway.config import MAX_JSON, MIB
from aiida_marketplace_hpc.gateway.limits import Limits
from aiida_marketplace_hpc.gateway.service import Caller, Gateway
from aiida_marketplace_hpc.protocol import BY_NAME, Capability

logger = logging.getLogger(__name__)


def create_app(gateway: Gateway) -> FastAPI:
    """Make the application of a gateway; its lifespan starts and stops the gateway's background."""
    settings, classic = gateway.settings, Classic(gateway)
    log = AccessLog(settings.access_log)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(gateway, log):
            await run_in_threadpool(classic.jobs.start)
            yield

    app = FastAPI(title=settings.name, version=__version__, lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Access, log=log, metrics=gateway.metrics)
    app.add_exception_handler(HTTPException, _http_error)
    limits = Limits(
        at_once=settings.requests_at_once, per_second=settings.requests_per_second, hit=gateway.metrics.limit
    )
    for name, handler in HANDLERS.items():
        capability = BY_NAME[name]
        app.add_route(capability.path, _endpoint(classic, capability, handler, limits), methods=[capability.method])
    for method, path in UNIMPLEMENTED:
        app.add_route(path, _unimplemented, methods=[method])
    for path in ("/api/v1/job", "/api/v1/file", "/api/v1/image"):
        app.add_route(path, _with_slash, methods=["GET"])
    app.add_route("/", _root, methods=["GET"])
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods. OPTIONS is answered everywhere, with the methods that there are."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = {}
    if status == 405:
        headers["Allow"] = f"{(getattr(error, 'headers', None) or {}).get('Allow', '')}, OPTIONS"
        if request.method == "OPTIONS":
            return HTMLResponse("", headers=headers)
    request.state.outcome = f"status {status}"
    return as_page(status, headers=headers)


async def _unimplemented(request: Request) -> Response:
    request.state.outcome = "status 500"
    return as_page()


async def _with_slash(request: Request) -> Response:
    """The redirection to a path's other form; relative, since the gateway need not know its address."""
    query = f"?{request.url.query}" if request.url.query else ""
    answer = HTMLResponse("<title>Redirecting...</title>\n<h1>Redirecting...</h1>\n", 308)
    answer.headers["Location"] = f"{request.url.path}/{query}"
    return answer


async def _root(request: Request) -> Response:
    return HTMLResponse(PAGE)


def _endpoint(
    classic: Classic, capability: Capability, handler: Callable[[Call], Response], limits: Limits
) -> Callable[[Request], Awaitable[Response]]:
    async def answered(request: Request) -> Response:
        call = Call(
            classic,
            jobid=request.path_params.get("jobid", ""),
            filename=next(iter(request.query_params.getlist("filename")), ""),
            range=request.headers.get("range", ""),
        )
        if capability.authenticated:
            call.identified = await _caller(classic.gateway, request.headers.get("authorization"))
            user = call.identified.user
            request.state.user = user.email
            try:
                await limits.enter(user.id)
            except Busy as exc:
                raise Uncaught(503) from exc
            request.state.at_end.callback(limits.release, user.id)
        if capability.body == "json":
            call.content = await streams.whole(streams.bounded(request, MAX_JSON))
            call.content_type = request.headers.get("content-type", "")
        async with AsyncExitStack() as resources:
            if capability.body == "file":
                call.file = await _file(request, classic.gateway.settings.form_limit * MIB, resources)
            return await run_in_threadpool(handler, call)

    async def endpoint(request: Request) -> Response:
        request.state.capability = capability.name
        try:
            return await answered(request)
        except Failed as exc:
            answer = as_json(exc.body, exc.status)
        except Uncaught as exc:
            answer = as_page(exc.status, exc.text)
        except GatewayError as exc:  # Of a body that broke off, or is larger than anything that the gateway takes.
            answer = as_page(413 if isinstance(exc, TooLarge) else 400)
        except Exception:
            logger.exception("request %s failed", request.state.request_id)
            answer = as_page()
        request.state.outcome = f"status {answer.status_code}"
        return answer

    return endpoint


async def _caller(gateway: Gateway, header: str | None) -> Caller:
    """Whose token it is, by the second word of the header, whatever the first one is."""
    words = None if header is None else header.split(" ")
    if words is not None and len(words) < 2:
        raise Uncaught
    token = words[1] if words else ""
    if not token:
        raise _refused("Authentication Token is missing!")
    known = gateway.known_caller(token)
    if known is not None:
        return known
    try:
        return await run_in_threadpool(gateway.caller, token)
    except Unauthorized as exc:
        raise _refused("Invalid Authentication token!") from exc
    except Forbidden as exc:
        raise _refused(exc.message) from exc
    except Unavailable as exc:
        raise _refused(f"Connection error to {gateway.authenticator.issuer} failed.", exc.message) from exc


def _refused(message: str, error: str = "Unauthorized") -> Failed:
    return Failed(401, {"data": None, "error": error, "message": message})


async def _file(request: Request, limit: int, resources: AsyncExitStack) -> UploadFile:
    try:
        form = await streams.bounded(request, limit).form()
    except ClientDisconnect as exc:
        raise streams.broken() from exc
    except (MultiPartException, HTTPException, AssertionError, KeyError) as exc:
        raise Uncaught from exc
    resources.push_async_callback(form.close)
    part = form.get("file")
    if not isinstance(part, UploadFile):
        raise Uncaught
    return part
