"""The proxy of the tests: it passes on what it is given, counts it, and misbehaves exactly as it is told."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from aiida_marketplace_hpc.testing.faults import (
    CutAnswer,
    CutRequest,
    Delay,
    DeliverAgain,
    Duplicate,
    FlipInAnswer,
    FlipInRequest,
    LoseAnswer,
    Refuse,
    StallAnswer,
    StallRequest,
)
from aiida_marketplace_hpc.testing.forwarder import Forwarder
from aiida_marketplace_hpc.testing.proxy import FaultyProxy

CONTENT = bytes(range(256)) * 1000


class Upstream(ThreadingHTTPServer):
    """Answers with what it was sent, or to GET with :data:`CONTENT`; in chunks where the query says so."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str, bytes | None, dict[str, str]]] = []
        """Method, path, body (``None``: it did not come whole), headers."""

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server_address)

    def bodies(self, count: int) -> list[bytes | None]:
        """The bodies of what it has seen, once it has seen so many."""
        deadline = time.monotonic() + 10
        while len(self.seen) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        return [body for _, _, body, _ in self.seen]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_any(self) -> None:
        try:
            body = self.body()
        except (OSError, ValueError):
            body = None
        self.server.seen.append((self.command, self.path, body, dict(self.headers)))
        if body is None:
            self.close_connection = True
            return
        answer = CONTENT if self.command in ("GET", "HEAD") else body
        self.send_response(200)
        self.send_header("X-Odd", "kept")
        self.send_header("Content-Type", "application/octet-stream")
        if "chunked" in self.path:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(answer), 1000):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(answer[start : start + 1000]), answer[start : start + 1000]))
            self.wfile.write(b"0\r\n\r\n")
            return
        if "until-end" in self.path:
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_any  # noqa: N815 - the names of the standard library.

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) < length:
                raise ValueError("cut short")
            return body
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[FaultyProxy]:
    with FaultyProxy(upstream.url) as proxy:
        yield proxy


@contextlib.contextmanager
def client(proxy: FaultyProxy, timeout: float = 20) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=timeout)
    with contextlib.closing(connection):
        yield connection


def ask(
    proxy: FaultyProxy, method: str = "GET", path: str = "/path?query=1", body: Any = None, **options: Any
) -> tuple[int, bytes, dict[str, str]]:
    with client(proxy) as connection:
        connection.request(method, path, body, **options)
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.headers)


def in_chunks() -> Iterator[bytes]:
    for start in range(0, len(CONTENT), 10_000):
        yield CONTENT[start : start + 10_000]


def test_it_passes_everything_on_and_counts_it(proxy: FaultyProxy, upstream: Upstream) -> None:
    with client(proxy) as connection:
        for number in range(3):
            connection.request("PUT", f"/file/{number}?name=a%20b", CONTENT, {"X-Own": "yes"})
            answer = connection.getresponse()
            assert (answer.status, answer.read(), answer.headers["X-Odd"]) == (200, CONTENT, "kept")
    assert [(method, path, body) for method, path, body, _ in upstream.seen] == [
        ("PUT", f"/file/{number}?name=a%20b", CONTENT) for number in range(3)
    ]
    assert upstream.seen[0][3]["X-Own"] == "yes"
    assert [(r.method, r.path, r.query, r.body, r.status, r.answer, r.faults) for r in proxy.requests] == [
        ("PUT", f"/file/{number}", "name=a%20b", len(CONTENT), 200, len(CONTENT), []) for number in range(3)
    ]
    assert 3 * len(CONTENT) < proxy.sent < 3 * len(CONTENT) + 2000
    assert 3 * len(CONTENT) < proxy.received < 3 * len(CONTENT) + 2000
    assert proxy.connections == 1


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("path", ["/plain", "/chunked", "/until-end"])
def test_every_framing_passes(proxy: FaultyProxy, upstream: Upstream, path: str, buffered: bool) -> None:
    proxy.buffered = buffered
    status, content, headers = ask(proxy, path=path)
    assert (status, content) == (200, CONTENT)
    assert ask(proxy, "HEAD", path)[:2] == (200, b"")
    assert ask(proxy, "POST", path, in_chunks())[:2] == (200, CONTENT)
    sent = upstream.seen[-1][3]
    if buffered:
        assert headers["Content-Length"] == sent["Content-Length"] == str(len(CONTENT))
    else:
        assert ("Transfer-Encoding" in headers) == (path == "/chunked")
        assert sent["Transfer-Encoding"] == "chunked"


def test_a_path_before_those_of_the_gateway_stays(upstream: Upstream) -> None:
    with FaultyProxy(f"{upstream.url}/some/app/") as proxy:
        assert proxy.url.endswith("/some/app")
        ask(proxy, path=urlsplit(proxy.url).path + "/x")
    assert upstream.seen[0][1] == "/some/app/x"
    with pytest.raises(ValueError, match="is not http"):
        FaultyProxy("https://example.org")


def test_it_is_as_far_away_as_told(proxy: FaultyProxy) -> None:
    with client(proxy) as connection:
        for round_trip, trips in ((0.0, 0), (0.2, 1), (0.0, 0)):
            proxy.round_trip = round_trip
            started = time.monotonic()
            connection.request("GET", "/")
            assert connection.getresponse().read() == CONTENT
            assert time.monotonic() - started >= round_trip * trips
    proxy.round_trip = 0.2
    started = time.monotonic()
    ask(proxy)
    assert time.monotonic() - started >= 0.4  # The connection takes one, too.


def test_distance_does_not_limit_what_is_under_way(proxy: FaultyProxy) -> None:
    proxy.round_trip = 0.4
    started = time.monotonic()
    content = bytes(40_000_000)
    assert ask(proxy, "PUT", body=content)[1] == content
    # With one piece per one-way delay it would be half a minute; generous, as the machine may be busy.
    assert time.monotonic() - started < 15


def test_large_bodies_are_refused(proxy: FaultyProxy, upstream: Upstream) -> None:
    proxy.max_body = 100_000
    status, page, headers = ask(proxy, "PUT", body=CONTENT)
    assert (status, headers["Content-Type"], headers["Server"]) == (413, "text/html", "nginx")
    assert b"<title>413 Request Entity Too Large</title>" in page
    assert ask(proxy, "PUT", body=in_chunks(), encode_chunked=True)[0] == 413
    assert upstream.bodies(1) == [None]  # Only of the second body the beginning was passed on.
    assert ask(proxy, "PUT", body=CONTENT[:100_000])[0] == 200
    assert [request.status for request in proxy.requests] == [413, 413, 200]


def test_chunked_bodies_are_refused(proxy: FaultyProxy, upstream: Upstream) -> None:
    proxy.refuse_chunked = True
    assert ask(proxy, "PUT", body=in_chunks())[0] == 411
    assert upstream.seen == []
    assert ask(proxy, "PUT", body=CONTENT)[0] == 200


def test_unknown_headers_are_dropped(proxy: FaultyProxy, upstream: Upstream) -> None:
    proxy.known_headers_only = True
    headers = {"X-Request-Id": "1", "Range": "bytes=1-", "Repr-Digest": "x", "Authorization": "Bearer t"}
    status, _, answered = ask(proxy, headers=headers)
    assert status == 200
    assert "X-Odd" not in answered
    assert answered["Content-Type"] == "application/octet-stream"
    assert set(upstream.seen[0][3]) == {"Host", "Accept-Encoding", "Authorization"}


@pytest.mark.parametrize(
    ("fault", "seen"), [(Refuse(502), 0), (Refuse(504), 0), (LoseAnswer(502), 1), (LoseAnswer(504), 1)]
)
def test_it_answers_in_place_of_the_server(
    proxy: FaultyProxy, upstream: Upstream, fault: Refuse | LoseAnswer, seen: int
) -> None:
    injected = proxy.inject(fault, times=2, only=lambda request: request.method == "PUT")
    found = [ask(proxy, method, body=CONTENT)[0] for method in ("GET", "PUT", "PUT", "PUT")]
    assert found == [200, fault.status, fault.status, 200]
    assert injected.hit == 2
    assert [request.faults for request in proxy.requests] == [[], [fault], [fault], []]
    assert [body for method, _, body, _ in upstream.seen if method == "PUT"] == [CONTENT] * (1 + 2 * seen)


def test_a_fault_lasts_until_it_is_withdrawn(proxy: FaultyProxy) -> None:
    proxy.inject(Refuse(), times=None)
    assert [ask(proxy)[0] for _ in range(3)] == [502] * 3
    proxy.clear()
    assert ask(proxy)[0] == 200


def test_a_server_that_is_away_is_a_bad_gateway() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = "http://{}:{}".format(*nobody.getsockname())
    with FaultyProxy(url) as proxy:
        status, page, _ = ask(proxy, "PUT", body=CONTENT)
    assert (status, b"502 Bad Gateway" in page) == (502, True)


@pytest.mark.parametrize("after", [0, 1, 100_000])
def test_a_request_is_cut(proxy: FaultyProxy, upstream: Upstream, after: int) -> None:
    injected = proxy.inject(CutRequest(after))
    if after:
        assert ask(proxy, "PUT", body=b"")[0] == 200  # Too short to be cut.
    with pytest.raises((ConnectionError, http.client.BadStatusLine)):
        ask(proxy, "PUT", body=CONTENT)
    assert injected.hit == 1
    assert ask(proxy, "PUT", body=CONTENT)[1] == CONTENT
    # The server has seen the beginning, if anything.
    assert upstream.bodies(3 if after else 1) == ([b"", None, CONTENT] if after else [CONTENT])
    assert proxy.requests[-2].status is None
    assert proxy.requests[-2].body >= after


@pytest.mark.parametrize("path", ["/plain", "/chunked"])
@pytest.mark.parametrize("after", [0, 1, 100_000])
def test_an_answer_is_reset(proxy: FaultyProxy, path: str, after: int) -> None:
    proxy.inject(CutAnswer(after))
    with client(proxy) as connection:
        connection.request("GET", path)
        with pytest.raises(ConnectionResetError) as raised:
            connection.getresponse().read()
    assert not isinstance(raised.value, http.client.RemoteDisconnected)
    assert proxy.requests[0].answer == after
    assert proxy.requests[0].status == (200 if after else None)
    assert ask(proxy, path=path)[1] == CONTENT


@pytest.mark.parametrize("path", ["/plain", "/chunked"])
def test_an_answer_ends_before_its_end(proxy: FaultyProxy, path: str) -> None:
    proxy.inject(CutAnswer(100_000, "close"))
    with pytest.raises(http.client.IncompleteRead) as raised:
        ask(proxy, path=path)
    if path == "/plain":
        assert raised.value.partial == CONTENT[:100_000]
        assert raised.value.expected == len(CONTENT) - 100_000
    assert proxy.requests[0].answer == 100_000


@pytest.mark.parametrize("path", ["/plain", "/chunked", "/until-end"])
@pytest.mark.parametrize("after", [0, 1, 100_000])
def test_an_answer_that_lacks_its_end_looks_whole(proxy: FaultyProxy, path: str, after: int) -> None:
    proxy.inject(CutAnswer(after, "whole"))
    with client(proxy) as connection:
        for expected in (CONTENT[:after], CONTENT):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, expected)


def test_one_byte_is_changed(proxy: FaultyProxy, upstream: Upstream) -> None:
    changed = bytearray(CONTENT)
    changed[123_456] ^= 0xFF
    proxy.inject(FlipInRequest(123_456))
    assert ask(proxy, "PUT", body=CONTENT)[1] == changed
    proxy.inject(FlipInAnswer(123_456))
    assert ask(proxy, "PUT", body=CONTENT[:123_456])[1] == CONTENT[:123_456]  # It has no such byte.
    assert ask(proxy)[1] == changed
    assert ask(proxy)[1] == CONTENT


@pytest.mark.parametrize("path", ["/plain", "/chunked"])
def test_a_request_arrives_twice(proxy: FaultyProxy, upstream: Upstream, path: str) -> None:
    proxy.inject(Duplicate())
    assert ask(proxy, "POST", path, in_chunks())[1] == CONTENT
    assert upstream.bodies(2) == [CONTENT, CONTENT]
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("path", ["/plain", "/chunked"])
def test_a_request_arrives_again_when_it_is_told_to(proxy: FaultyProxy, upstream: Upstream, path: str) -> None:
    proxy.inject(again := DeliverAgain())
    assert ask(proxy, "POST", path, in_chunks())[1] == CONTENT
    assert ask(proxy, "POST", "/another", b"another")[1] == b"another"
    again.release()
    assert upstream.bodies(3) == [CONTENT, b"another", CONTENT]
    while not again.statuses:
        time.sleep(0.005)
    assert again.statuses == [200]
    assert len(proxy.requests) == 2


def test_a_request_is_overtaken(proxy: FaultyProxy, upstream: Upstream) -> None:
    proxy.inject(delay := Delay())
    with client(proxy) as connection:
        connection.request("PUT", "/", b"first")
        while not proxy.requests:
            time.sleep(0.005)
        assert ask(proxy, "PUT", body=b"second")[1] == b"second"
        delay.release()
        assert connection.getresponse().read() == b"first"
    assert upstream.bodies(2) == [b"second", b"first"]


def test_a_request_arrives_though_its_client_has_gone(proxy: FaultyProxy, upstream: Upstream) -> None:
    proxy.inject(delay := Delay())
    with client(proxy, timeout=0.2) as connection:
        connection.request("PUT", "/", b"late")
        with pytest.raises(TimeoutError):
            connection.getresponse()
    assert upstream.seen == []
    delay.release()
    assert upstream.bodies(1) == [b"late"]


def test_an_answer_is_late(proxy: FaultyProxy, upstream: Upstream) -> None:
    proxy.inject(Delay("answer", seconds=0.3))
    with client(proxy) as connection:
        connection.request("PUT", "/", b"first")
        assert upstream.bodies(1) == [b"first"]
        begun = time.monotonic()
        assert connection.getresponse().read() == b"first"
        assert time.monotonic() - begun > 0.2


@pytest.mark.parametrize("fault", [StallRequest(100_000), StallAnswer(0), StallAnswer(100_000)])
def test_nothing_passes_any_more(proxy: FaultyProxy, fault: StallRequest | StallAnswer) -> None:
    injected = proxy.inject(fault)
    with client(proxy, timeout=0.2) as connection:
        connection.request("PUT", "/", CONTENT)
        with pytest.raises(TimeoutError):
            connection.getresponse().read()
        assert injected.hit == 1
    assert ask(proxy, "PUT", body=CONTENT)[1] == CONTENT


def test_all_connections_are_cut(proxy: FaultyProxy) -> None:
    proxy.inject(StallAnswer(1000))
    with client(proxy) as connection:
        connection.request("GET", "/")
        answer = connection.getresponse()
        proxy.cut()
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            answer.read()
    assert ask(proxy)[1] == CONTENT


def test_it_leaves_no_thread(upstream: Upstream) -> None:
    before = set(threading.enumerate())
    with FaultyProxy(upstream.url) as proxy:
        proxy.inject(StallAnswer(0))
        with client(proxy, timeout=0.05) as connection:
            connection.request("GET", "/")
            with pytest.raises(TimeoutError):
                connection.getresponse()
            proxy.close()
    left = {thread for thread in set(threading.enumerate()) - before if thread.name in ("proxy", "forwarder")}
    assert left == set()


def test_ends_and_resets_reach_the_other_side() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Forwarder(*listener.getsockname()) as line:
        for reset in (False, True):
            with socket.create_connection(("127.0.0.1", line.port)) as here:
                there, _ = listener.accept()
                with there:
                    here.sendall(b"question")
                    assert there.recv(100) == b"question"
                    here.shutdown(socket.SHUT_WR)
                    assert there.recv(100) == b""
                    there.sendall(b"answer")
                    assert here.recv(100) == b"answer"
                    if reset:
                        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                if reset:
                    with pytest.raises(ConnectionResetError):
                        here.recv(100)
                else:
                    assert here.recv(100) == b""
        assert (line.connections, line.sent, line.received) == (2, 16, 12)
