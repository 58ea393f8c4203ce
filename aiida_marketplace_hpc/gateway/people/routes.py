"""The addresses of the page for people, and what surrounds each: the session, the limits, errors as pages."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from urllib.parse import parse_qsl

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from aiida_marketplace_hpc.errors import Forbidden, GatewayError, InvalidRequest, ServerFault, Unauthorized
from aiida_marketplace_hpc.gateway import streams
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.config import Settings
from aiida_marketplace_hpc.gateway.limits import Limits
from aiida_marketplace_hpc.gateway.people import cookies, views
from aiida_marketplace_hpc.gateway.people.sessions import Sessions
from aiida_marketplace_hpc.gateway.people.sign_in import CALLBACK, IssuerSignIn, still_holds
from aiida_marketplace_hpc.gateway.people.visit import Visit, base_of, query_of
from aiida_marketplace_hpc.gateway.service import Gateway

logger = logging.getLogger(__name__)

View = Callable[[Visit], Response]

_LARGEST_FORM = 32 * 1024
"""Bytes; a token is the longest thing that is entered."""
_JOBID = re.compile(r"[0-9a-f]{24}")


class _FilePath(Convertor[str]):
    """The rest of an address, whatever is in it: the names of files have line breaks, too."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("file", _FilePath())


class People:
    """The page for people of a gateway.

    :raises ConfigurationError: browsers could not be signed in with these settings.
    """

    def __init__(self, gateway: Gateway, limits: Limits) -> None:
        self._gateway, self._limits = gateway, limits
        self._settings = gateway.settings
        self._sessions = Sessions(gateway.ledger)
        self._issuer = IssuerSignIn(self._settings, gateway.authenticator) if self._settings.page_client else None

    @staticmethod
    def possible(settings: Settings) -> bool:
        """Whether there is a page, and a way to sign in on it.

        Where each user's own token is what opens the cluster there is none: the page keeps no token.
        """
        can_sign_in = settings.auth == "dev" or bool(settings.page_client)
        return settings.pages and can_sign_in and settings.account_mode != "delegated"

    def add_to(self, app: FastAPI) -> None:
        """Give an application these addresses."""
        routes: list[tuple[str, str, View]] = [
            ("GET", "/", views.home),
            ("GET", "/jobs/{jobid}", views.job),
            ("GET", "/jobs/{jobid}/files/{path:file}", views.files),
            ("GET", "/jobs/{jobid}/tail/{path:file}", views.tail),
            ("POST", "/jobs/{jobid}/cancel", views.cancel),
            ("GET", "/sign-in", self._sign_in),
            ("POST", "/sign-out", self._sign_out),
        ]
        if self._issuer is None:
            routes.append(("POST", "/sign-in", self._sign_in_with_token))
        else:
            routes.append(("GET", CALLBACK, self._sign_in_finished))
        for method, path, view in routes:
            app.add_api_route(path, self._endpoint(view), methods=[method], include_in_schema=False)

    def _endpoint(self, view: View) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            visit = Visit(self._gateway, request, base_of(request), self._secure(request), query_of(request))
            try:
                if request.method == "POST":
                    visit = replace(visit, form=await _form(request))
                visit = await run_in_threadpool(self._recognized, visit)
                if visit.signed_in is not None:
                    user = visit.signed_in.user
                    request.state.user = user.email
                    await self._limits.enter(user.id)
                    request.state.at_end.callback(self._limits.release, user.id)
                return await run_in_threadpool(view, visit)
            except GatewayError as exc:
                exc.request_id = request.state.request_id
                request.state.outcome = exc.code
                if isinstance(exc, ServerFault):
                    logger.error("request %s: %s", request.state.request_id, exc)
                return _problem(visit, exc)

        return endpoint

    def _secure(self, request: Request) -> bool:
        return (self._settings.page_url or str(request.url)).startswith("https://")

    def _recognized(self, visit: Visit) -> Visit:
        """The visit of somebody whom the browser's session names, if it is one."""
        attempt = cookies.read(visit.request, cookies.SIGN_IN, secure=visit.secure)
        secret = cookies.read(visit.request, cookies.SESSION, secure=visit.secure)
        identity = self._sessions.find(secret)
        if identity is None or not still_holds(self._settings, self._gateway.authenticator, identity):
            return replace(visit, attempt=attempt)
        try:
            caller = self._gateway.caller_of(identity)
        except Forbidden:  # So that they can sign in as somebody else.
            self._sessions.end(secret)
            raise
        return replace(visit, attempt=attempt, secret=secret, signed_in=caller)

    def _sign_in(self, visit: Visit) -> Response:
        asked = visit.query.get("job", "")
        job = asked if _JOBID.fullmatch(asked) else ""
        if visit.signed_in is not None:
            return visit.go(f"jobs/{job}" if job else "")
        attempt = cookies.new_secret()
        response: Response
        if self._issuer is None:
            response = visit.show("sign_in", secret=attempt, refused="")
        else:
            response = RedirectResponse(self._issuer.address(attempt), status_code=303)
        kept = f"{attempt}.{job}" if job else attempt
        cookies.put(response, cookies.SIGN_IN, kept, secure=visit.secure, life=cookies.SIGN_IN_LIFE)
        return response

    def _sign_in_with_token(self, visit: Visit) -> Response:
        secret, _, job = visit.attempt.partition(".")
        visit.check_form(secret)
        try:
            identity = self._gateway.authenticator.identify(visit.form.get("access", ""))
        except Unauthorized as exc:
            visit.request.state.outcome = exc.code
            return visit.show("sign_in", exc.status, secret=secret, refused="This token is not accepted.")
        return self._signed_in(visit, identity, job)

    def _sign_in_finished(self, visit: Visit) -> Response:
        assert self._issuer is not None  # noqa: S101 - else there is no such address.
        secret, _, job = visit.attempt.partition(".")
        return self._signed_in(visit, self._issuer.finished(visit.query, secret), job)

    def _signed_in(self, visit: Visit, identity: Identity, job: str) -> Response:
        """Begin a session with a new secret, whatever the browser came with."""
        # Whoever may not use the gateway gets no session.
        caller = self._gateway.caller_of(identity)
        visit.request.state.user = caller.user.email
        if visit.secret:
            self._sessions.end(visit.secret)
        # A page, not a redirect: of one that another site has begun the new cookie would be no part.
        response = visit.show("signed_in", where=f"jobs/{job}" if job else "", refresh=0)
        cookies.drop(response, cookies.SIGN_IN, secure=visit.secure)
        cookies.put(response, cookies.SESSION, self._sessions.begin(identity), secure=visit.secure)
        return response

    def _sign_out(self, visit: Visit) -> Response:
        if visit.signed_in is not None:
            visit.check_form(visit.secret)
            self._sessions.end(visit.secret)
        response = visit.go("")
        cookies.drop(response, cookies.SESSION, secure=visit.secure)
        return response


async def _form(request: Request) -> dict[str, str]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Forbidden("this is no form of a page of this gateway")
    raw = await streams.whole(streams.bounded(request, _LARGEST_FORM))
    try:
        return dict(parse_qsl(raw.decode("ascii"), keep_blank_values=True, max_num_fields=20))
    except ValueError as exc:
        raise InvalidRequest("the form does not parse") from exc


def _problem(visit: Visit, error: GatewayError) -> Response:
    """An error as a page."""
    # What anybody can make a browser ask for shows no button for signing out.
    visit = replace(visit, signed_in=None) if isinstance(error, Unauthorized) else visit
    jobid = str(visit.request.path_params.get("jobid", ""))
    return visit.show(
        "problem",
        error.status,
        message=error.message,
        request_id=error.request_id,
        sign_in=isinstance(error, Unauthorized),
        job=jobid if _JOBID.fullmatch(jobid) else "",
    )
