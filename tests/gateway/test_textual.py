"""Content as base64, for a way on which only text survives."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Generator
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc.errors import InvalidRequest
from aiida_marketplace_hpc.gateway.routes.call import Body, Stream
from aiida_marketplace_hpc.gateway.textual import decoded, encoded
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway

CONTENT = bytes(range(256)) * 1024 + b"\xff"


def in_pieces(content: bytes, seed: int) -> list[bytes]:
    chance = random.Random(seed)
    pieces = []
    while content:
        size = chance.choice([1, 2, 3, 5, 1000, 70_000])
        pieces.append(content[:size])
        content = content[size:]
    return pieces


def read_all(text: bytes, seed: int = 0) -> bytes:
    pieces = [*in_pieces(text, seed), b""]
    body = decoded(Body(lambda _: pieces.pop(0) if pieces else b""))
    found = b""
    while chunk := body.read(1000):
        found += chunk
    assert body.read(1000) == b""
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 100_000])
def test_there_and_back(size: int, seed: int) -> None:
    content = CONTENT[:size]

    def chunks() -> Generator[bytes, None, None]:
        yield from in_pieces(content, seed)

    stream = encoded(Stream(chunks(), "application/octet-stream", size))
    text = b"".join(stream.chunks)
    assert text == base64.b64encode(content)
    assert stream.size == len(text)
    assert read_all(text, seed) == content
    assert read_all(base64.encodebytes(content), seed) == content


@pytest.mark.parametrize(
    "text", [b"QUJD?A==", b"QUJ", b"QQ==QUJD", b"QQ=="[:3], b"\xff\xff\xff\xff", b"QQ==" + b"QUJD" * 30000]
)
def test_what_is_no_base64_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not base64"):
        read_all(text)


def test_files_travel_as_text(served: ServedGateway) -> None:
    def ask(method: str, path: str, **more: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {TOKENS[ALICE]}"}
        return requests.request(method, f"{served.url}/api/v1/file/{path}", headers=headers, timeout=20, **more)

    query = {"filename": "binary", "encoding": "base64", "digest": f"sha-256:{hashlib.sha256(CONTENT).hexdigest()}"}
    text = base64.b64encode(CONTENT)
    assert ask("PUT", "upload/home", params=query, data=text).status_code == 200
    assert ask("GET", "download/home", params={"filename": "binary"}).content == CONTENT
    answer = ask("GET", "download/home", params={"filename": "binary", "encoding": "base64"})
    assert (answer.content, answer.headers["content-length"]) == (text, str(len(text)))
    piece = {"filename": "binary", "encoding": "base64", "offset": "1", "length": "10"}
    assert base64.b64decode(ask("GET", "download/home", params=piece).content) == CONTENT[1:11]

    form = {"params": {"filename": "form", "encoding": "base64"}, "files": {"file": ("x", text)}}
    assert ask("PUT", "upload/home", **form).status_code == 200
    assert ask("GET", "download/home", params={"filename": "form"}).content == CONTENT

    assert ask("PUT", "upload/home", params={"filename": "bad", "encoding": "base64"}, data=b"?").status_code == 400
    assert ask("GET", "download/home", params={"filename": "bad"}).status_code in (404, 409)
    for method, path in (("PUT", "upload/home"), ("GET", "download/home")):
        assert ask(method, path, params={"filename": "binary", "encoding": "rot13"}, data=b"").status_code == 400
