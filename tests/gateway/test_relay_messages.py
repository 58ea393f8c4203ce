"""What travels through a message broker: the published form to the letter, and nothing that leads elsewhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aiida_marketplace_hpc.errors import InvalidRequest, NotSupported, Unavailable
from aiida_marketplace_hpc.gateway.relay_messages import (
    queue_name,
    read_request,
    repetition_key,
    write_answer,
    write_error,
)
from aiida_marketplace_hpc.protocol import CAPABILITIES


def message(**fields: Any) -> bytes:
    return json.dumps({"endpoint": "heartbeat", "method": "GET", **fields}).encode()


def test_the_queue_is_the_published_one() -> None:
    client = "c0ee3889-0b97-4083-8a7b-a1a807848437"
    assert queue_name(client, "s3cret") == f"{client}:7861589027953859"


def test_a_request_is_read() -> None:
    request = read_request(
        message(
            endpoint="/api/v1/file/upload/abc",
            method="put",
            query_params={"filename": "é"},
            headers={
                "authorization": "Bearer t",
                "content-type": "text/plain",
                "Host": "elsewhere",
                "content-length": "1",
            },
            body="naïve €",
        )
    )
    assert (request.endpoint, request.method) == ("api/v1/file/upload/abc", "PUT")
    assert request.query == {"filename": "é"}
    assert request.headers == {"authorization": "Bearer t", "content-type": "text/plain"}
    assert request.body == "naïve €".encode()


def test_what_is_null_or_missing_is_nothing() -> None:
    request = read_request(message(query_params=None, headers=None, body=None))
    assert (request.query, request.headers, request.body) == ({}, {}, b"")


@pytest.mark.parametrize(
    "name", ["Transfer-Encoding", "connection", "Proxy-Authorization", "X-Forwarded-For", "forwarded", "Expect"]
)
def test_headers_about_the_way_are_left_behind(name: str) -> None:
    assert read_request(message(headers={name: "x", "accept": "*/*"})).headers == {"accept": "*/*"}


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\xff\xfe",
        b"not json",
        b"[" * 100_000,
        b"[]",
        b"null",
        b"{}",
        message(endpoint=1),
        message(method=None),
        message(method="TRACE"),
        message(body={"a": 1}),
        message(body="\ud800"),
        message(headers={"a": 1}),
        message(headers=["a"]),
        message(query_params="a=b"),
        message(endpoint="../admin"),
        message(endpoint="a/%2e%2E/b"),
        message(endpoint="a\r\nb"),
        message(endpoint="a b"),
        message(endpoint="a#b"),
        message(endpoint="a\\..\\b"),
    ],
)
def test_what_is_no_request_is_refused(bad: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_request(bad)
    assert "admin" not in refused.value.message
    assert "TRACE" not in refused.value.message


def test_an_absolute_address_stays_below_the_gateway() -> None:
    assert read_request(message(endpoint="//evil.example.org/x")).endpoint == "evil.example.org/x"


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda capability: capability.name)
def test_each_capability_is_recognised(capability: Any) -> None:
    endpoint = capability.path.replace("{jobid}", "0123456789abcdef01234567")
    request = read_request(message(endpoint=f"{endpoint}?a=b", method=capability.method))
    assert request.capability is capability
    assert read_request(message(endpoint=f"{endpoint}x/y", method=capability.method)).capability is None


def test_no_token_is_in_a_representation() -> None:
    request = read_request(message(headers={"authorization": "Bearer very-secret"}, body="very-secret"))
    assert "very-secret" not in repr(request)


def test_an_answer_has_the_published_form() -> None:
    headers = {"Content-Type": "text/plain", "Server": "s", "Transfer-Encoding": "chunked", "Content-Encoding": "gzip"}
    answer = json.loads(write_answer(201, headers, "é".encode()).message)
    assert answer == {
        "status_code": 201,
        "headers": {"Content-Type": "text/plain", "Server": "s", "Content-Length": "2"},
        "body": "é",
    }


def test_an_answer_that_is_no_text_is_an_error() -> None:
    with pytest.raises(NotSupported, match="only text"):
        write_answer(200, {}, b"\xff\x00")


def test_an_error_looks_like_one_of_the_gateway() -> None:
    answer = json.loads(write_error(Unavailable("not now"), 504, "r1").message)
    assert answer["status_code"] == 504
    assert answer["headers"]["Content-Type"] == "application/json"
    assert json.loads(answer["body"])["error"] == "not now"
    assert json.loads(answer["body"])["code"] == "unavailable"
    assert json.loads(answer["body"])["request_id"] == answer["headers"]["X-Request-Id"] == "r1"


def test_a_delivery_of_the_same_message_has_the_same_key_and_no_other() -> None:
    key = repetition_key(b"m", "answers", "1")
    assert key == repetition_key(b"m", "answers", "1")
    others = [
        repetition_key(b"n", "answers", "1"),
        repetition_key(b"m", "other", "1"),
        repetition_key(b"m", "answers", "2"),
    ]
    assert key not in others
    assert len(key) <= 124
