"""A proxy in front of a gateway that measures what passes and misbehaves as real ones do.

Some of that is how it is set up, as strict proxies are: small bodies only, no chunked ones, no unknown headers, whole bodies
before anything is passed on. The rest happens when a test says so, to the requests that it says: see :mod:`faults`. Plain HTTP
only; each connection of a client has a thread and a connection to the server.
"""

from __future__ import annotations

import contextlib
import http
import select
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, NoReturn
from urllib.parse import urlsplit

from aiida_marketplace_hpc.testing.faults import (
    CutAnswer,
    CutRequest,
    Delay,
    DeliverAgain,
    Duplicate,
    Fault,
    FaultsOfRequest,
    FlipInAnswer,
    FlipInRequest,
    Injected,
    LoseAnswer,
    ProxiedRequest,
    Refuse,
    StallAnswer,
    StallRequest,
    acting,
)
from aiida_marketplace_hpc.testing.forwarder import Forwarder, bounded, no_delay, reset_on_close
from aiida_marketplace_hpc.testing.http_messages import PIECE, Broken, Head, Incoming, framed
from aiida_marketplace_hpc.transport import forget_connections

KNOWN_HEADERS = frozenset(
    {
        "Accept",
        "Accept-Encoding",
        "Authorization",
        "Connection",
        "Content-Encoding",
        "Content-Length",
        "Content-Type",
        "Date",
        "Host",
        "Location",
        "Server",
        "Transfer-Encoding",
        "User-Agent",
        "WWW-Authenticate",
    }
)
"""What is left of the headers of both directions where a proxy drops those that it does not know."""
_OF_ONE_HOP = (
    "Connection",
    "Keep-Alive",
    "Proxy-Connection",
    "Proxy-Authorization",
    "TE",
    "Trailer",
    "Upgrade",
    "Expect",
)
_IN_MEMORY = 8 * 1024 * 1024
_PHRASES = {413: "Request Entity Too Large", 504: "Gateway Time-out"}
"""Where nginx has words of its own."""
_LINGER = 30.0
"""Seconds for which the rest of a refused body is still read, so that the client gets to see the answer."""


class _Reset(Exception):
    """Both connections are to be reset."""


class _End(Exception):
    """The body is to end here as if it were whole."""


class _Close(Exception):
    """The connections are to be closed, without a reset."""


class _Oversized(Exception):
    """The body is greater than allowed."""


class _ServerGone(Exception):
    """The server cannot be reached, or has gone; the client is there."""


class FaultyProxy:
    """Passes HTTP on to one server; a context manager.

    Everything may be changed while it runs.

    :param upstream_url: ``http://HOST:PORT``, with a path or without.
    :param round_trip: seconds that are added to each round trip between client and proxy.
    :param max_body: answer 413 to requests whose body has more bytes.
    :param refuse_chunked: answer 411 to requests with a chunked body.
    :param known_headers_only: drop all headers but :data:`KNOWN_HEADERS`, of requests and of answers.
    :param buffered: take in a whole body before anything of it is passed on, in both directions.
    """

    def __init__(
        self,
        upstream_url: str,
        *,
        round_trip: float = 0.0,
        max_body: int | None = None,
        refuse_chunked: bool = False,
        known_headers_only: bool = False,
        buffered: bool = False,
    ) -> None:
        parts = urlsplit(upstream_url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{upstream_url} is not http://HOST:PORT")
        self.max_body = max_body
        self.refuse_chunked = refuse_chunked
        self.known_headers_only = known_headers_only
        self.buffered = buffered
        self.server = (parts.hostname, parts.port or 80)
        self._path = parts.path.rstrip("/")
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        bounded(self._listener)
        # In front, so that what the proxy itself answers comes as late as everything else.
        self._line = Forwarder(*self._listener.getsockname()[:2], round_trip=round_trip)
        self._lock = threading.Lock()
        self._requests: list[ProxiedRequest] = []
        self._injected: list[Injected] = []
        self._connections: set[_Connection] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = threading.Event()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._line.port}{self._path}"

    @property
    def round_trip(self) -> float:
        """Seconds that are added to each round trip."""
        return self._line.round_trip

    @round_trip.setter
    def round_trip(self, seconds: float) -> None:
        self._line.round_trip = seconds

    @property
    def sent(self) -> int:
        """All bytes that have come from clients so far, heads included."""
        return self._line.sent

    @property
    def received(self) -> int:
        """All bytes that have gone to clients so far, heads included."""
        return self._line.received

    @property
    def connections(self) -> int:
        """How many connections clients have made so far."""
        return self._line.connections

    @property
    def requests(self) -> list[ProxiedRequest]:
        """The requests that have come so far, in their order; those under way, too."""
        with self._lock:
            return list(self._requests)

    def inject(
        self, fault: Fault, *, times: int | None = 1, only: Callable[[ProxiedRequest], bool] | None = None
    ) -> Injected:
        """Let a fault happen to the next requests.

        :param times: to how many; ``None``: to all, until it is withdrawn.
        :param only: to which; called with a request of which only the head was read.
        """
        injected = Injected(fault, times, only)
        with self._lock:
            self._injected.append(injected)
        return injected

    def clear(self) -> None:
        """Withdraw all faults that have not happened yet."""
        with self._lock:
            for injected in self._injected:
                injected.withdraw()
            self._injected.clear()

    def cut(self) -> None:
        """Reset every connection that is open now."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.abort()

    def __enter__(self) -> FaultyProxy:
        forget_connections(self.url)
        self._start(self._accept)
        self._line.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut all connections and end. May be repeated."""
        self._closed.set()
        self._line.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        while True:
            self.cut()
            with self._lock:
                thread = next(iter(self._threads), None)
            if thread is None:
                return
            thread.join(0.1)

    def note(self, request: ProxiedRequest) -> list[Injected]:
        """Take down a request, and say which faults wait for it."""
        with self._lock:
            self._requests.append(request)
            injected = list(self._injected)
        return [fault for fault in injected if fault.may_hit(request)]

    def hold(self, delay: Delay) -> None:
        """Let the thread of a request wait.

        :raises _Close: the proxy has ended.
        """
        delay.wait(self._closed)
        if self._closed.is_set():
            raise _Close

    def deliver_again(self, fault: DeliverAgain, method: str, request: bytes) -> None:
        """Keep a request, and send it to the server when the fault says so."""

        def deliver() -> None:
            fault.wait(self._closed)
            if self._closed.is_set():
                return
            with contextlib.suppress(OSError, _ServerGone, Broken), contextlib.closing(_Server(self.server)) as server:
                server.send(request)
                answer = server.answer()
                if method != "HEAD" and answer.status not in (204, 304):
                    for _ in server.incoming.body(answer, until_end=True):
                        pass
                fault.statuses.append(answer.status)

        self._start(deliver)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            connection = _Connection(self, client)
            with self._lock:
                self._connections.add(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: _Connection) -> None:
        try:
            connection.serve()
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        def run() -> None:
            try:
                target(*args)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="proxy", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()


class _Connection:
    """One connection of a client, request after request."""

    def __init__(self, proxy: FaultyProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._incoming = Incoming(client)
        self._server: _Server | None = None
        self._aborted = False

    def serve(self) -> None:
        no_delay(self._client)
        try:
            while (head := self._incoming.head()) is not None:
                closes = head.closes
                rest = self._request(head)
                if closes:
                    break
                for _ in rest:  # The server may have answered before it had everything.
                    pass
        except (Broken, _Reset):
            # Also for a client that breaks off inside a request: the server learns it the same way.
            self._aborted = True
        except (_Close, OSError):
            pass
        finally:
            self._hang_up()

    def abort(self) -> None:
        """Reset both connections, from another thread."""
        self._aborted = True
        server = self._server
        for endpoint in (self._client, server.socket if server else None):
            if endpoint is not None:
                reset_on_close(endpoint)
                with contextlib.suppress(OSError):
                    endpoint.shutdown(socket.SHUT_RDWR)

    def _hang_up(self) -> None:
        if self._aborted:
            reset_on_close(self._client)
            if self._server is not None:
                reset_on_close(self._server.socket)
        self._drop_server()
        self._incoming.close()
        self._client.close()

    def _drop_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    # Requests

    def _request(self, head: Head) -> Iterator[bytes]:
        """Pass one request on and its answer back; return what of its body was not needed."""
        try:
            method, target, _ = head.first.decode("latin-1").split(" ", 2)
        except ValueError:
            raise Broken(f"not the first line of a request: {head.first!r}") from None
        path, _, query = target.partition("?")
        request = ProxiedRequest(method, path, query)
        faults = FaultsOfRequest(self._proxy.note(request), request)
        incoming = _counted(self._incoming.body(head), request)
        if (status := self._refusal(head, faults)) is not None:
            self._refuse(request, status, incoming)
        if "100-continue" in (head.get("Expect") or "").lower():
            self._client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            self._pass_on(head, request, faults, incoming)
        except _Oversized:
            self._refuse(request, 413, incoming)
        except _ServerGone:
            self._drop_server()
            if request.status is not None:
                raise _Reset from None  # The answer has begun: there is no other way left to say it.
            self._refuse(request, 502, incoming)
        return incoming

    def _refusal(self, head: Head, faults: FaultsOfRequest) -> int | None:
        """The status with which a request is refused on account of its head."""
        if head.chunked and self._proxy.refuse_chunked:
            return 411
        if self._proxy.max_body is not None and (head.length or 0) > self._proxy.max_body:
            return 413
        refuse = faults.claim(Refuse)
        return None if refuse is None else refuse.status

    def _pass_on(self, head: Head, request: ProxiedRequest, faults: FaultsOfRequest, incoming: Iterator[bytes]) -> None:
        twice = faults.claim(Duplicate) is not None
        again = faults.claim(DeliverAgain)
        delay = faults.claim(Delay)
        with contextlib.ExitStack() as held:
            body: Iterable[bytes] = _limited(incoming, self._proxy.max_body)
            if self._proxy.buffered or twice or again or delay:
                body = spooled = held.enter_context(_Spooled(body))
                if head.chunked:
                    head.drop("Transfer-Encoding")
                    head.put("Content-Length", len(spooled))
            self._clean(head)
            head.put("Host", "{}:{}".format(*self._proxy.server))
            if twice:
                for _ in self._ask(head, body, request)[1]:
                    pass
            if again is not None:
                self._proxy.deliver_again(again, request.method, b"".join(framed(head, body)))
            if delay is not None and delay.what == "request":
                self._proxy.hold(delay)
            body = faults.flip(FlipInRequest, body)
            body = faults.at(StallRequest, body, self._stall)
            body = faults.at(CutRequest, body, _raising(_Reset))
            answer, content = self._ask(head, body, request)
            if delay is not None and delay.what == "answer":
                self._proxy.hold(delay)
            if (lose := faults.claim(LoseAnswer)) is not None:
                for _ in content:
                    pass
                self._html(lose.status, request)
            else:
                self._answer(answer, content, request, faults)

    def _ask(self, head: Head, body: Iterable[bytes], request: ProxiedRequest) -> tuple[Head, Iterator[bytes]]:
        """Send a request to the server; return the head of its answer, and the body as it comes.

        :raises _ServerGone: there is none.
        """
        for piece in framed(head, body):
            # Not before there is something to send: a fault may be first.
            if not self._connected().send(piece):
                break  # It may have answered before it went.
        server = self._connected()
        answer = server.answer()
        return answer, self._content(server, answer, request)

    def _content(self, server: _Server, answer: Head, request: ProxiedRequest) -> Iterator[bytes]:
        if _has_body(request, answer):
            try:
                yield from server.incoming.body(answer, until_end=True)
            except Broken as exc:
                raise _ServerGone from exc
        server.busy = False
        if answer.closes:
            self._drop_server()

    def _connected(self) -> _Server:
        if self._server is not None and self._server.stale():
            self._drop_server()
        if self._server is None:
            try:
                self._server = _Server(self._proxy.server)
            except OSError as exc:
                raise _ServerGone from exc
        return self._server

    # Answers

    def _answer(self, head: Head, content: Iterator[bytes], request: ProxiedRequest, faults: FaultsOfRequest) -> None:
        self._clean(head)
        if not _has_body(request, head):
            for _ in content:
                pass
            request.status = head.status
            self._client.sendall(head.encode())
            return
        with contextlib.ExitStack() as held:
            body: Iterable[bytes] = content
            if self._proxy.buffered:
                body = spooled = held.enter_context(_Spooled(body))
                head.drop("Transfer-Encoding")
                head.put("Content-Length", len(spooled))
            body = faults.flip(FlipInAnswer, body)
            body = faults.at(StallAnswer, body, self._stall)
            body, closes = self._cut_short(head, body, faults)
            closes = closes or not (head.chunked or head.length is not None)
            if closes:
                head.put("Connection", "close")
            for piece in framed(head, self._passed(body, head.status, request)):
                self._client.sendall(piece)
            if closes:
                raise _Close

    def _cut_short(self, head: Head, body: Iterable[bytes], faults: FaultsOfRequest) -> tuple[Iterable[bytes], bool]:
        """Apply a cut; say also whether the connection has to be closed after it."""
        found = faults.waiting(CutAnswer)
        if found is None:
            return body, False
        cut, claim = found
        if cut.how != "whole":
            return faults.at(CutAnswer, body, _raising(_Reset if cut.how == "reset" else _Close)), False
        if head.length is None:
            return faults.at(CutAnswer, body, _raising(_End)), False
        if head.length <= cut.after or not claim():
            return body, False
        head.put("Content-Length", cut.after)
        return acting(body, cut.after, lambda: True, _raising(_End)), True

    def _passed(self, body: Iterable[bytes], status: int, request: ProxiedRequest) -> Iterator[bytes]:
        try:
            for piece in body:
                request.status = status
                request.answer += len(piece)
                yield piece
        except _End:
            self._drop_server()  # The rest of its answer is never read.
        request.status = status

    def _clean(self, head: Head) -> None:
        head.drop(*_OF_ONE_HOP)
        if self._proxy.known_headers_only:
            head.keep(KNOWN_HEADERS)

    def _stall(self) -> NoReturn:
        """Wait until the client goes, or the proxy ends."""
        gone = select.poll()
        gone.register(self._client, select.POLLRDHUP)
        gone.poll()
        raise _Reset

    def _refuse(self, request: ProxiedRequest, status: int, rest: Iterator[bytes]) -> None:
        """Answer without the server, read what of the body still comes so that the answer is not lost, and close.

        :raises _Close: always.
        """
        self._html(status, request, closes=True)
        self._client.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _LINGER
        with contextlib.suppress(Broken):
            for _ in rest:
                if time.monotonic() > deadline:
                    break
        raise _Close

    def _html(self, status: int, request: ProxiedRequest, *, closes: bool = False) -> None:
        title = f"{status} {_PHRASES.get(status) or http.HTTPStatus(status).phrase}"
        page = (
            f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>\r\n"
            "<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
        ).encode()
        head = Head(f"HTTP/1.1 {title}".encode())
        head.put("Server", "nginx")
        head.put("Content-Type", "text/html")
        head.put("Content-Length", len(page))
        head.put("Connection", "close" if closes else "keep-alive")
        request.status = status
        request.answer = len(page)
        self._client.sendall(head.encode() + page)


class _Server:
    """One connection to the server."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=20)
        self.socket.settimeout(None)
        no_delay(self.socket)
        bounded(self.socket)
        self.incoming = Incoming(self.socket)
        self.busy = False

    def stale(self) -> bool:
        """Whether it was closed while nothing was asked."""
        return not self.busy and bool(select.select([self.socket], [], [], 0)[0])

    def send(self, data: bytes) -> bool:
        """Send a part of a request; ``False`` if the server has gone."""
        self.busy = True
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def answer(self) -> Head:
        try:
            while (head := self.incoming.head()) is not None:
                if head.status >= 200:
                    return head
        except Broken as exc:
            raise _ServerGone from exc
        raise _ServerGone

    def close(self) -> None:
        self.incoming.close()
        self.socket.close()


def _raising(error: type[Exception]) -> Callable[[], NoReturn]:
    def act() -> NoReturn:
        raise error

    return act


def _counted(body: Iterable[bytes], request: ProxiedRequest) -> Iterator[bytes]:
    for piece in body:
        request.body += len(piece)
        yield piece


def _limited(body: Iterable[bytes], limit: int | None) -> Iterator[bytes]:
    size = 0
    for piece in body:
        size += len(piece)
        if limit is not None and size > limit:
            raise _Oversized
        yield piece


def _has_body(request: ProxiedRequest, answer: Head) -> bool:
    return request.method != "HEAD" and answer.status not in (204, 304)


class _Spooled:
    """A body that was taken in as a whole, and can be iterated over more than once."""

    def __init__(self, body: Iterable[bytes]) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed by __exit__.
        self._size = 0
        try:
            for piece in body:
                self._file.write(piece)
                self._size += len(piece)
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        while piece := self._file.read(PIECE):
            yield piece

    def __enter__(self) -> _Spooled:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
