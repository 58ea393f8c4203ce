"""One call of a gateway: token, attempts, connection, answer.

A session may be used by many threads; each has its own pool of connections. A call has a deadline that nothing on the
other side can stretch. A transfer has none in total, but no wait in it is longer than :attr:`Timeouts.read`.
"""

from __future__ import annotations

import json
import random as random_module
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3
from requests.auth import AuthBase
from requests.cookies import extract_cookies_to_jar

from aiida_marketplace_hpc.client import retry as retry_module
from aiida_marketplace_hpc.client.answer import Answer
from aiida_marketplace_hpc.client.auth import TokenSource
from aiida_marketplace_hpc.client.connection import Bearer, Exchange, WatchedAdapter
from aiida_marketplace_hpc.client.failure import connection_error
from aiida_marketplace_hpc.client.retry import RetryPolicy
from aiida_marketplace_hpc.client.routes import Target
from aiida_marketplace_hpc.errors import (
    ConfigurationError,
    MarketplaceHpcError,
    ProviderUnavailable,
    TokenUnavailable,
    Unauthorized,
)
from aiida_marketplace_hpc.protocol import REQUEST_ID_HEADER
from aiida_marketplace_hpc.versions import USER_AGENT

T = TypeVar("T")

_IDLE = 3.0  # Seconds; servers close idle connections after 5 s (uvicorn) or more.


class Body(Protocol):
    """What a request carries when it is not one piece of bytes: its length is known, its bytes come one piece at a time."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Generator[bytes, None, None]: ...


@dataclass(frozen=True)
class Timeouts:
    """How long a call may take, in seconds.

    :param connect: to reach one address of the gateway.
    :param read: without a byte in or out.
    :param total: for a whole call with all its attempts; does not hold for transfers.
    """

    connect: float = 5.0
    read: float = 15.0
    total: float = 20.0


@dataclass(frozen=True)
class Request:
    """One thing to ask.

    :param body: makes the body, once per attempt.
    :param repeatable: doing it twice is the same as doing it once.
    :param transfer: it lasts as long as it makes progress.
    :param seconds: for all attempts, instead of :attr:`Timeouts.total`.
    :param once: a single attempt, unless the gateway is too busy; who asks repeats it (:meth:`GatewaySession.persist`).
    :param token_optional: it can be asked without a token.
    """

    target: Target
    body: Callable[[], Body | bytes] | None = None
    content_type: str | None = None
    accept: str = "application/json"
    repeatable: bool = False
    transfer: bool = False
    seconds: float | None = None
    once: bool = False
    token_optional: bool = False


class _BodyFailed(Exception):
    """Carries a local error out of the sending of a body, where urllib3 would take it for one of the connection."""


class _Guarded:
    """A body on its way; :meth:`close` lets go of the files that an attempt left open when it broke off."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._running: list[Generator[bytes, None, None]] = []

    def __len__(self) -> int:
        return len(self._body)

    def __iter__(self) -> Iterator[bytes]:
        running = self._pieces()
        self._running.append(running)
        return running

    def _pieces(self) -> Generator[bytes, None, None]:
        try:
            with closing(iter(self._body)) as pieces:
                yield from pieces
        except OSError as exc:
            raise _BodyFailed from exc

    def close(self) -> None:
        while self._running:
            self._running.pop().close()


class _Session(requests.Session):
    """A session for many small requests to one place.

    ``Session.request`` looks through the environment for proxies and certificates, and through a jar of cookies, for each
    request anew, which takes longer than anything else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.headers["User-Agent"] = USER_AGENT
        self.mount("http://", WatchedAdapter())
        self.mount("https://", WatchedAdapter())
        self._settings: dict[str, Any] = {}

    def exchange(
        self, method: str, url: str, body: Any, headers: Mapping[str, str], auth: AuthBase, timeout: tuple[float, float]
    ) -> requests.Response:
        """Send one request and give the answer, of which only the head was read. A redirect is not followed: the token would
        go to wherever it points."""
        request = requests.PreparedRequest()
        cookies = self.cookies if len(self.cookies) else None
        request.prepare(method, url, {**self.headers, **headers}, data=body, auth=auth, cookies=cookies)
        host = urlsplit(url).netloc
        if host not in self._settings:
            self._settings[host] = self.merge_environment_settings(url, {}, True, None, None)
        response = self.get_adapter(url).send(request, timeout=timeout, **self._settings[host])
        if "Set-Cookie" in response.headers:  # Some load balancers tell by them which server was ours.
            extract_cookies_to_jar(self.cookies, request, response.raw)  # type: ignore[no-untyped-call]
        return response


class _Pools(threading.local):
    """The connections of one thread."""

    session: _Session | None = None
    used: float = 0.0


class GatewaySession:
    """Makes calls. No network is touched before the first.

    :param source: gives the token, for every call anew.
    :param clock: the seconds of a monotonic clock.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        timeouts: Timeouts | None = None,
        retry: RetryPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self._source = source
        self._timeouts = timeouts or Timeouts()
        self._retry = retry or RetryPolicy(budget=self._timeouts.total)
        self._clock, self._sleep, self._random = clock, sleep, random
        self._pools = _Pools()
        self._open: weakref.WeakSet[requests.Session] = weakref.WeakSet()
        self._open_lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """How long a call may take that is no transfer."""
        return self._timeouts.total

    def call(self, request: Request, handle: Callable[[Answer], T]) -> T:
        """Ask, and give the successful answer to ``handle``, which reads it; return what that returns.

        Repeats attempts as :mod:`~aiida_marketplace_hpc.client.retry` allows, ``handle`` included.

        :raises GatewayError: the gateway answered: no.
        :raises ConnectionFailed: there was no complete answer.
        :raises ConfigurationError: a setting is wrong (token, address, certificate).
        """
        request_id = uuid.uuid4().hex
        deadline = self._clock() + (request.seconds or self.seconds)
        policy = replace(self._retry, attempts=1) if request.once else self._retry
        if request.seconds is not None:
            policy = replace(policy, budget=min(policy.budget, request.seconds))
        return retry_module.run(
            lambda: self._authorised(request, handle, request_id, deadline),
            repeatable=request.repeatable,
            policy=policy,
            clock=self._clock,
            sleep=self._sleep,
            random=self._random,
        )

    def persist(self, attempt: Callable[[], T], progress: Callable[[], int]) -> T:
        """Call ``attempt``, which makes several calls and goes on where it stopped, until it succeeds or gets no further.

        :param progress: how far it has got.
        :raises MarketplaceHpcError: the error of the last attempt.
        """
        return retry_module.run(
            attempt,
            repeatable=True,
            policy=self._retry,
            clock=self._clock,
            sleep=self._sleep,
            random=self._random,
            progress=progress,
        )

    def close(self) -> None:
        """Close all idle connections. The session can still be used."""
        with self._open_lock:
            sessions = list(self._open)
        for session in sessions:
            session.close()

    def _authorised(self, request: Request, handle: Callable[[Answer], T], request_id: str, deadline: float) -> T:
        token = self._token(request, deadline)
        try:
            return self._attempt(request, handle, request_id, deadline, token)
        except Unauthorized:
            # A refused request did nothing, so it may be sent again, whatever it is.
            if token is None or not self._source.reloadable:
                raise
            self._source.forget(token)
            fresh = self._token(request, deadline)
            if fresh == token:
                raise
            return self._attempt(request, handle, request_id, deadline, fresh)

    def _token(self, request: Request, deadline: float) -> str | None:
        try:
            return self._source.token(deadline - self._clock())
        except (TokenUnavailable, ProviderUnavailable):
            if request.token_optional:
                return None
            raise

    def _attempt(
        self, request: Request, handle: Callable[[Answer], T], request_id: str, deadline: float, token: str | None
    ) -> T:
        timeouts = self._timeouts
        exchange = Exchange(self._clock, timeouts.read, None if request.transfer else deadline)
        headers = {"Accept": request.accept, REQUEST_ID_HEADER: request_id}
        if request.content_type:
            headers["Content-Type"] = request.content_type
        if request.transfer:
            headers["Accept-Encoding"] = "identity"

        def failure(exc: Exception) -> MarketplaceHpcError:
            return connection_error(exc, exchange, request.target.host, request_id)

        body = _opened(request)
        with exchange.under_way(), closing(body) if isinstance(body, _Guarded) else nullcontext():
            try:
                patience = exchange.patience()
                session = self._session(request.repeatable)
                response = session.exchange(
                    request.target.method,
                    request.target.full_url,
                    body,
                    headers,
                    Bearer(token),
                    (min(timeouts.connect, patience), patience),
                )
            except _BodyFailed as exc:
                raise exc.__cause__ or exc from None
            except (OSError, urllib3.exceptions.HTTPError) as exc:
                raise failure(exc) from exc
            with response:
                answer = Answer(response, request_id, failure)
                try:
                    if 300 <= response.status_code < 400:
                        raise _redirected(response, request.target)
                    if not 200 <= response.status_code < 300:
                        raise answer.error()
                    return handle(answer)
                finally:
                    self._pools.used = self._clock()

    def _session(self, repeatable: bool) -> _Session:
        pools = self._pools
        if pools.session is None:
            session = _Session()
            pools.session = session
            with self._open_lock:
                self._open.add(session)
        elif not repeatable and self._clock() - pools.used > _IDLE:
            # A server that closes an idle connection just now would leave us not knowing whether the request arrived.
            pools.session.close()
        return pools.session


def _redirected(response: requests.Response, target: Target) -> ConfigurationError:
    parts = urlsplit(response.headers.get("Location", ""))
    # Without the query, in which a login page's address may carry anything.
    place = f"{parts.scheme}://{parts.netloc}{parts.path}" if parts.netloc else parts.path or "somewhere else"
    return ConfigurationError(
        f"{target.host} redirects to {place}, and redirects are not followed, to keep the token here: correct the url"
    )


def _opened(request: Request) -> _Guarded | bytes | None:
    if request.body is None:
        return None
    body = request.body()
    if isinstance(body, bytes):
        return body
    # An empty body must be empty bytes: of anything else requests does not announce a length of 0.
    return _Guarded(body) if len(body) else b""


def json_body(fields: Mapping[str, Any]) -> Callable[[], bytes]:
    """Encode a JSON body; file names that are not UTF-8 travel as escaped surrogates."""
    content = json.dumps(fields).encode("ascii")
    return lambda: content
