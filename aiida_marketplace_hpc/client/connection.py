"""Connections that keep to a deadline and know whether anything of a request left this machine.

``requests`` bounds the wait for each piece of an answer, not the answer; and its errors do not say whether a request had
been sent when the connection failed. Both are known only at the socket, so the connections of its pools are extended here:
every wait on a socket is as long as the exchange under way has patience, and the first byte sent is noted.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase

from aiida_marketplace_hpc.client.resolver import resolve

_SLICE = 64 * 1024  # Each slice that is sent has the whole patience: with 15 s, a line of 5 kB/s still makes progress.


@dataclass
class Exchange:
    """One request and its answer.

    :param clock: the seconds of a monotonic clock.
    :param progress: seconds that one wait on the socket may take.
    :param deadline: on ``clock``, when all must be over; ``None``: as long as there is progress.
    :param sent: whether a part of the request was given to the network.
    """

    clock: Callable[[], float]
    progress: float
    deadline: float | None = None
    sent: bool = False

    def patience(self) -> float:
        """Return the seconds that the next wait may take.

        :raises TimeoutError: there are none left.
        """
        if self.deadline is None:
            return self.progress
        left = self.deadline - self.clock()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return min(self.progress, left)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Make the connections that this thread uses keep to this exchange."""
        before = getattr(_thread, "exchange", None)
        _thread.exchange = self
        try:
            yield
        finally:
            _thread.exchange = before


# Between requests and a socket there is no parameter in which an exchange could travel; a call never leaves its thread.
_thread = threading.local()


def _current() -> Exchange | None:
    return getattr(_thread, "exchange", None)


class _Incoming(io.RawIOBase):
    """What comes in on a socket; each wait is bounded by the exchange's patience."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def readinto(self, buffer: Any) -> int | None:
        exchange = _current()
        if exchange is not None:
            self._sock.settimeout(exchange.patience())
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        incoming: Any = io.BufferedReader(_Incoming(sock))
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = incoming


class _Watched:
    """Extends a connection class of urllib3."""

    response_class: ClassVar[type[http.client.HTTPResponse]] = _Response
    host: str
    sock: Any
    timeout: Any
    _dns_host: str
    _connecting = False

    def _new_conn(self) -> Any:
        """Make a connection to the first address that takes one, each as long as there is patience."""
        exchange = _current()
        if exchange is None or hasattr(self, "_socks_options"):  # There the proxy resolves.
            return super()._new_conn()  # type: ignore[misc]
        name, timeout = self._dns_host, self.timeout
        try:
            addresses = resolve(name, exchange.patience())
        except UnicodeError:
            # It says what is wrong with the name.
            return super()._new_conn()  # type: ignore[misc]
        except socket.gaierror as exc:
            raise urllib3.exceptions.NameResolutionError(self.host, self, exc) from exc  # type: ignore[arg-type]
        try:
            for left in reversed(range(len(addresses))):
                self._dns_host = addresses[-left - 1]
                self.timeout = min(timeout, exchange.patience())
                try:
                    return super()._new_conn()  # type: ignore[misc]
                except urllib3.exceptions.HTTPError:
                    if not left:
                        raise
        finally:
            self._dns_host, self.timeout = name, timeout

    def connect(self) -> None:
        # What is sent while connecting (TLS, CONNECT to a proxy) is not the request.
        self._connecting = True
        try:
            super().connect()  # type: ignore[misc]
        finally:
            self._connecting = False

    def send(self, data: Any) -> None:
        exchange = _current()
        if exchange is None or self._connecting or not isinstance(data, (bytes, bytearray, memoryview)):
            super().send(data)  # type: ignore[misc]
            return
        if self.sock is None:
            self.connect()  # As http.client would, but before anything counts as sent.
        view = memoryview(data)
        for start in range(0, len(view), _SLICE):
            self.sock.settimeout(exchange.patience())
            exchange.sent = True
            try:
                super().send(view[start : start + _SLICE])  # type: ignore[misc]
            except ConnectionResetError as exc:
                # urllib3 looks for an answer after a broken pipe only: a server that refuses a body does not read it all.
                raise BrokenPipeError(exc.errno, exc.strerror) from exc


@functools.cache
def _watched(pool: type[Any]) -> type[Any]:
    connection = type(f"Watched{pool.ConnectionCls.__name__}", (_Watched, pool.ConnectionCls), {})
    return type(f"Watched{pool.__name__}", (pool,), {"ConnectionCls": connection})


def _watch(manager: Any) -> None:
    pools = manager.pool_classes_by_scheme
    manager.pool_classes_by_scheme = {
        scheme: pool if issubclass(pool.ConnectionCls, _Watched) else _watched(pool) for scheme, pool in pools.items()
    }


class WatchedAdapter(HTTPAdapter):
    """An adapter whose connections, direct or through a proxy, keep to the :class:`Exchange` under way."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        _watch(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        _watch(manager)
        return manager


class Bearer(AuthBase):
    """Puts a token into a request's head.

    :param token: ``None``: there is none.
    """

    # An AuthBase, because requests would otherwise put the password of a ~/.netrc into the header.
    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request
