"""Clients that keep a gateway waiting, on purpose or over a poor line: only those that get on are waited for."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from aiida_marketplace_hpc.gateway import connections, streams
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway

pytestmark = pytest.mark.alone

AUTHORIZATION = f"Authorization: Bearer {TOKENS[ALICE]}"
PATIENCE = 0.3
RATE = 1000


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "STALLED", PATIENCE)
        patch.setattr(streams, "RATE", float(RATE))
        patch.setattr(connections, "KEEP_ALIVE", PATIENCE)
        yield


@pytest.fixture(scope="module")
def served(_quick: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    with ServedGateway(tmp_path_factory.mktemp("gateway"), FakeBackend()) as served:
        Path(served.gateway.settings.roots[0].path_for("alice_a")).mkdir(parents=True)
        yield served


@pytest.fixture
def home(served: ServedGateway) -> Iterator[Path]:
    """Alice's, which is empty."""
    home = Path(served.gateway.settings.roots[0].path_for("alice_a"))
    yield home
    for path in home.iterdir():
        if path.is_file():
            path.unlink()


def connect(served: ServedGateway) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def dribble(connection: socket.socket, data: bytes, *, every: float = 0.05) -> bytes:
    """Send byte after byte until the other side has had enough; what it answered."""
    with contextlib.suppress(ConnectionError):
        for number in range(len(data)):
            connection.sendall(data[number : number + 1])
            time.sleep(every)
        raise AssertionError("all of it was taken")
    return everything(connection)


def everything(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while piece := connection.recv(65536):
            found += piece
    return found


def answered(connection: socket.socket) -> bytes:
    """One whole answer."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += connection.recv(65536)
    length = int(found.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(found.partition(b"\r\n\r\n")[2]) < length:
        found += connection.recv(65536)
    return found


def test_patience_is_for_those_who_get_on() -> None:
    patience = streams.Patience()
    patience.note(PATIENCE / 2, 1)
    assert 0 < patience.left < PATIENCE
    patience.note(1.0, 10 * RATE)  # However long it waited before: what came is progress.
    assert patience.left == PATIENCE
    for _ in range(100):
        patience.note(0.01, 1)
    assert patience.left < 0


def test_who_connects_and_says_nothing_is_cut_off(served: ServedGateway) -> None:
    with connect(served) as connection:
        assert everything(connection) == b""


def test_who_sends_a_head_byte_by_byte_is_cut_off(served: ServedGateway) -> None:
    with connect(served) as connection:
        assert dribble(connection, b"GET /heartbeat HTTP/1.1\r\n" + b"X: y\r\n" * 1000) == b""


def test_who_sends_the_head_of_a_second_request_byte_by_byte_is_cut_off(served: ServedGateway) -> None:
    with connect(served) as connection:
        connection.sendall(head("GET", "/heartbeat"))
        assert answered(connection).startswith(b"HTTP/1.1 200")
        assert dribble(connection, b"GET /heartbeat HTTP/1.1\r\n" + b"X: y\r\n" * 1000) == b""


@pytest.mark.parametrize(
    ("method", "path", "lines"),
    [
        ("PUT", "/api/v1/file/upload/home?filename=f", ["Content-Length: 100000000"]),
        (
            "PUT",
            "/api/v1/file/upload/home?filename=f",
            ["Content-Length: 10000", "Content-Type: multipart/form-data; boundary=b"],
        ),
        ("POST", "/api/v1/query", ["Content-Length: 100"]),
    ],
)
def test_who_sends_a_body_byte_by_byte_is_told_so(
    served: ServedGateway, home: Path, method: str, path: str, lines: list[str]
) -> None:
    with connect(served) as connection:
        connection.sendall(head(method, path, AUTHORIZATION, *lines))
        body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + bytes(1000)
        answer = dribble(connection, body)
    if answer:  # It is lost where the connection was cut while there was more to read.
        assert answer.startswith(b"HTTP/1.1 422")
    line = served.requests()[-1]
    assert (line["status"], line["user"]) == (422, ALICE)
    assert line["duration"] < 5
    assert not (home / "f").exists()


def test_a_slow_but_steady_upload_arrives(served: ServedGateway, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STALLED", 1.0)  # This machine may be slow, too.
    content = bytes(range(250)) * 16
    started = time.monotonic()
    with connect(served) as connection:
        connection.sendall(
            head("PUT", "/api/v1/file/upload/home?filename=f", AUTHORIZATION, "Transfer-Encoding: chunked")
        )
        for start in range(0, len(content), 100):
            connection.sendall(b"64\r\n" + content[start : start + 100] + b"\r\n")
            time.sleep(0.03)
        connection.sendall(b"0\r\n\r\n")
        assert answered(connection).startswith(b"HTTP/1.1 200")
    assert time.monotonic() - started > streams.STALLED
    assert (home / "f").read_bytes() == content


def test_who_does_not_take_an_answer_is_cut_off(served: ServedGateway, home: Path) -> None:
    with connect(served) as connection:
        assert_is_cut_off(served, connection, home)


def test_who_does_not_take_an_answer_over_tls_is_cut_off(tmp_path: Path, certificate: Path) -> None:
    with ServedGateway(tmp_path, FakeBackend(), certfile=certificate) as served:
        home = Path(served.gateway.settings.roots[0].path_for("alice_a"))
        home.mkdir(parents=True)
        host, port = served.url.removeprefix("https://").split(":")
        context = ssl.create_default_context(cafile=certificate)
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            assert_is_cut_off(served, connection, home)


def assert_is_cut_off(served: ServedGateway, connection: socket.socket, home: Path) -> None:
    size = 64 * 1024 * 1024
    before = len(served.requests())
    with (home / "large").open("wb") as large:
        large.truncate(size)
    connection.sendall(head("GET", "/api/v1/file/download/home?filename=large", AUTHORIZATION))
    wait_until(
        lambda: poke(connection) and len(served.requests()) > before,
        within=10,
        failure=lambda: "the transfer is not given up",
    )
    assert served.requests()[-1]["outcome"] == "broken off"
    assert 0 < len(everything(connection)) < size
    wait_until(
        lambda: not served._server.server_state.connections, within=10, failure=lambda: "there is still a connection"
    )


def poke(connection: socket.socket) -> bool:
    """Send a little of another request, which changes nothing."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        connection.send(b"G")
    return True


def test_a_slow_but_steady_download_arrives(served: ServedGateway, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STALLED", 0.6)
    size = 24 * 1024 * 1024
    with (home / "large").open("wb") as large:
        large.truncate(size)
    started = time.monotonic()
    with connect(served) as connection:
        connection.sendall(head("GET", "/api/v1/file/download/home?filename=large", AUTHORIZATION, "Connection: close"))
        found = 0
        while piece := connection.recv(256 * 1024):
            found += len(piece)
            time.sleep(0.02)
    assert found > size
    assert time.monotonic() - started > 2 * streams.STALLED


def test_an_endless_body_that_nobody_reads_ends(served: ServedGateway) -> None:
    with connect(served) as connection:
        connection.sendall(head("PUT", "/api/v1/file/upload/home?filename=f", "Content-Length: 1000000000"))
        assert answered(connection).startswith(b"HTTP/1.1 401")
        assert dribble(connection, bytes(1000)) == b""


def test_connections_over_the_limit_are_told_so_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STALLED", 60.0)
    with (
        ServedGateway(tmp_path, FakeBackend(), connections=2) as served,
        connect(served) as first,
        connect(served) as second,
    ):
        wait_until(
            lambda: len(served._server.server_state.connections) == 2, within=10, failure=lambda: "no connections"
        )
        answer = requests.get(f"{served.url}/heartbeat", timeout=20)
        assert answer.status_code == 429
        assert (answer.json()["code"], answer.headers["Connection"]) == ("busy", "close")
        assert answer.headers["Retry-After"] == "1"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        second.sendall(head("GET", "/heartbeat"))
        assert answered(second).startswith(b"HTTP/1.1 200")
        first.close()
        wait_until(
            lambda: requests.get(f"{served.url}/heartbeat", timeout=20).ok,
            within=10,
            failure=lambda: "nobody is let in",
        )


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: " + b"x" * 100_000],
    ids=["TLS to a server without it", "a head without end"],
)
def test_what_is_no_http_is_answered_in_json(served: ServedGateway, sent: bytes) -> None:
    with connect(served) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        answer, _, body = everything(connection).partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"nosniff" in answer
    assert json.loads(body)["code"] == "invalid_request"
