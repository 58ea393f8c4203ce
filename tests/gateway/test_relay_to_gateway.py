"""What a relay answers when the gateway is down, slow, or says too much."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from aiida_marketplace_hpc.gateway import log
from aiida_marketplace_hpc.gateway.relay import ToGateway, pauses
from aiida_marketplace_hpc.gateway.relay_messages import RelayedRequest, read_request


class _Handler(http.server.BaseHTTPRequestHandler):
    seen: ClassVar[list[tuple[str, dict[str, str], bytes]]] = []

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.path, dict(self.headers), body))
        if self.path.startswith("/hangs"):
            self.server.released.wait()  # type: ignore[attr-defined]
            return
        if self.path.startswith("/breaks"):
            self.close_connection = True
            return
        moved = self.path.startswith("/moved")
        contents = {"/binary": b"\xff\x00", "/quotes": b'"' * 2000}
        content = contents.get(self.path, b"x" * 2000)
        self.send_response(302 if moved else 200)
        if moved:
            self.send_header("Location", "http://elsewhere.example.org/")
        self.send_header("Set-Cookie", "one=user")
        if self.path.startswith("/packed"):
            self.send_header("Content-Encoding", "gzip")
        half = self.path.startswith("/half")
        self.close_connection = half
        self.send_header("Content-Length", str(len(content) * (2 if half else 1)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815 - the base class calls them so

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.released = threading.Event()  # type: ignore[attr-defined]
    _Handler.seen = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.released.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def answered(url: str, endpoint: str, method: str = "GET", *, key: str = "", **more: Any) -> dict[str, Any]:
    request = RelayedRequest(endpoint, method, **more)
    answer: dict[str, Any] = json.loads(ToGateway(url, more.pop("timeout", 0.3), 3000).answer(request, key).message)
    return answer


def error(answer: dict[str, Any]) -> tuple[int, bool]:
    return answer["status_code"], json.loads(answer["body"])["retryable"]


def test_a_request_arrives_as_it_was_sent(url: str) -> None:
    answer = answered(url, "x", "PUT", query={"a": "ä&b"}, headers={"Authorization": "Bearer t"}, body="€".encode())
    path, headers, body = _Handler.seen[0]
    assert (path, body, headers["Authorization"]) == ("/x?a=%C3%A4%26b", "€".encode(), "Bearer t")
    assert (answer["status_code"], answer["body"]) == (200, "x" * 2000)


def test_a_gateway_that_is_down_is_said_to_be_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert error(answered(f"http://127.0.0.1:{port}", "heartbeat")) == (503, True)
    assert error(answered(f"http://127.0.0.1:{port}", "api/v1/query", "POST")) == (503, True)


@pytest.mark.parametrize(("endpoint", "status"), [("hangs", 504), ("breaks", 502), ("half", 502), ("packed", 502)])
def test_what_may_have_been_done_is_not_to_be_repeated_blindly(url: str, endpoint: str, status: int) -> None:
    assert error(answered(url, endpoint)) == (status, False)
    # The capability decides; below a prefix, so that the stand-in hangs.
    assert error(answered(f"{url}/{endpoint}", "heartbeat")) == (status, True)
    assert error(answered(f"{url}/{endpoint}", "api/v1/query", "POST")) == (status, False)


def test_an_answer_that_no_message_can_carry_is_an_error(url: str) -> None:
    assert answered(url, "binary")["status_code"] == 501
    assert answered(url, "quotes")["status_code"] == 413  # In JSON, each takes two bytes.
    answer = ToGateway(url, 5, 1000).answer(RelayedRequest("large", "GET"))
    assert json.loads(answer.message)["status_code"] == answer.status == 413


def test_nothing_is_sent_elsewhere(url: str) -> None:
    assert answered(url, "moved")["status_code"] == 302
    assert len(_Handler.seen) == 1


def test_cookies_of_one_user_are_not_those_of_the_next(url: str) -> None:
    gateway = ToGateway(url, 5, 3000)
    for _ in range(2):
        gateway.answer(RelayedRequest("x", "GET"))
    assert "Cookie" not in _Handler.seen[1][1]


def test_headers_that_make_no_request_are_refused_without_repeating_them(url: str) -> None:
    answer = answered(url, "x", headers={"Authorization": "Bearer secret\r\nX: y"})
    assert answer["status_code"] == 400
    assert "secret" not in answer["body"]
    assert _Handler.seen == []


def test_only_the_creation_of_a_job_gets_the_key(url: str) -> None:
    answered(url, "api/v1/job/create", "POST", key="k")
    answered(url, "api/v1/job/create", "POST", key="k", query={"key": "own"})
    answered(url, "api/v1/query", "POST", key="k")
    assert [path for path, _, _ in _Handler.seen] == [
        "/api/v1/job/create?key=k",
        "/api/v1/job/create?key=own",
        "/api/v1/query",
    ]


def test_what_is_in_an_envelope_decides(url: str) -> None:
    def create(fields: dict[str, Any], below: str = "") -> dict[str, Any]:
        body = json.dumps(fields).encode()
        return answered(url + below, "api/v1/job/create", "POST", key="k", body=body)

    create({"marketplace_hpc": {"capability": "query"}})
    create({"job_name": "marketplace_hpc", "executable_cmd": "x"})
    create({"marketplace_hpc": {"capability": ["nonsense"]}})
    assert [path.partition("?")[2] for path, _, _ in _Handler.seen] == ["", "key=k", "key=k"]
    assert error(create({"marketplace_hpc": {"capability": "query"}}, "/breaks")) == (502, False)
    assert error(create({"marketplace_hpc": {"capability": "getDataset"}}, "/breaks")) == (502, True)


def test_requests_are_marked_as_coming_over_a_way_for_text(url: str) -> None:
    answered(url, "x")
    request = read_request(b'{"endpoint": "x", "method": "GET", "headers": {"x-marketplace-hpc-RELAY": "7"}}')
    ToGateway(url, 5, 3000).answer(request)
    assert [headers["X-Marketplace-Hpc-Relay"] for _, headers, _ in _Handler.seen] == ["3000", "3000"]


def test_the_gateway_knows_a_request_by_the_id_that_the_relay_knows(url: str) -> None:
    asked = read_request(b'{"endpoint": "x", "method": "GET", "headers": {"x-request-ID": "of-the-client"}}')
    assert asked.asked_id == "of-the-client"
    gateway = ToGateway(url, 5, 3000)
    gateway.answer(asked, request_id=log.request_id(asked.asked_id))
    odd = RelayedRequest("x", "GET", headers={"X-Request-Id": "not an id"})
    gateway.answer(odd, request_id=log.request_id(odd.asked_id))
    first, second = (headers["X-Request-Id"] for _, headers, _ in _Handler.seen)
    assert first == "of-the-client"
    assert len(second) == 32
    failed = gateway.answer(RelayedRequest("breaks", "GET"), request_id="r1")
    assert failed.status == 502
    assert json.loads(json.loads(failed.message)["body"])["request_id"] == "r1"


def test_pauses_grow_to_a_limit() -> None:
    found = [pause for pause, _ in zip(pauses(), range(12), strict=False)]
    assert all(pause <= 30 for pause in found)
    assert found[0] <= 1
    assert min(found[8:]) >= 15
