"""What every answer has, whatever was asked, and what none has: headers for browsers, and nothing of the gateway's inside."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.gateway.routes import HANDLERS
from aiida_marketplace_hpc.gateway.routes.query import RUN
from aiida_marketplace_hpc.protocol import CAPABILITIES, Capability
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway

AUTHORIZED = {"Authorization": f"Bearer {TOKENS[ALICE]}"}


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedGateway]:
    """A gateway of which every capability and operation has a fault."""

    def fail(*_: Any) -> Any:
        raise OSError(5, "the inside of the gateway", f"{tmp_path}/state/ledger.sqlite")

    for name in HANDLERS:
        if name != "query":
            monkeypatch.setitem(HANDLERS, name, fail)
    for name in RUN:
        monkeypatch.setitem(RUN, name, fail)
    with ServedGateway(tmp_path, FakeBackend()) as served:
        yield served


def request_of(capability: Capability) -> dict[str, Any]:
    return {"path": capability.path.replace("{jobid}", "home"), "params": {"filename": "x"}, "json": {}}


def assert_is_safe(answer: requests.Response) -> None:
    headers = answer.headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert not [name for name in headers if name.lower().startswith("access-control-")]
    assert "Server" not in headers
    assert "Strict-Transport-Security" not in headers  # It would be a lie over plain HTTP.


def test_every_answer_has_the_headers(served: ServedGateway) -> None:
    home = f"{served.url}/api/v1/file/upload/home?filename=page.html"
    assert requests.put(home, data=b"<script>", headers=AUTHORIZED, timeout=20).status_code == 200
    asked = [
        ("GET", "/heartbeat", {}),
        ("GET", "/", {}),
        ("GET", "/docs", {}),
        ("GET", "/openapi.json", {}),
        ("GET", "/api/v1/info", AUTHORIZED),
        ("GET", "/api/v1/info", {}),
        ("GET", "/api/v1/job/state/nothing", AUTHORIZED),
        ("GET", "/api/v1/file/download/home?filename=page.html", AUTHORIZED),
        ("GET", "/api/v1/file/download/home?filename=.&bundle=true", AUTHORIZED),
        ("GET", "/api/v1/file/download/home?filename=../x", AUTHORIZED),
        ("GET", "/nowhere", {}),
        ("POST", "/heartbeat", {}),
        ("OPTIONS", "/api/v1/info", {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}),
    ]
    seen = set()
    for method, path, headers in asked:
        answer = requests.request(method, served.url + path, headers=headers, timeout=20)
        assert_is_safe(answer)
        seen.add(answer.status_code)
        if "download" in path and answer.ok:
            assert answer.headers["Content-Disposition"].startswith("attachment")
            assert answer.headers["Content-Type"] in ("application/octet-stream", bundle.MEDIA_TYPE)
    assert seen == {200, 401, 403, 404, 405}


def test_the_pages_may_load_their_own_style_and_nothing_else(served: ServedGateway) -> None:
    for path in ("/", "/docs"):
        answer = requests.get(served.url + path, timeout=20)
        style = re.search("<style>(.*?)</style>", answer.text, re.DOTALL)
        assert style is not None
        digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
        assert f"style-src 'sha256-{digest}'" in answer.headers["Content-Security-Policy"]
        assert "<script" not in answer.text
        assert " style=" not in answer.text


@pytest.mark.parametrize("capability", [row for row in CAPABILITIES if row.name != "query"], ids=lambda row: row.name)
def test_a_fault_says_nothing_of_the_inside(faulty: ServedGateway, capability: Capability, tmp_path: Path) -> None:
    request = request_of(capability)
    url = faulty.url + request.pop("path")
    answer = requests.request(capability.method, url, headers=AUTHORIZED, timeout=20, **request)
    assert_is_a_fault(answer, tmp_path)


def test_a_fault_in_an_operation_says_nothing_of_the_inside(faulty: ServedGateway, tmp_path: Path) -> None:
    body = {"operations": [{"op": "stat", "path": "/"}]}
    answer = requests.post(f"{faulty.url}/api/v1/query", json=body, headers=AUTHORIZED, timeout=20)
    assert_is_a_fault(answer, tmp_path)


def assert_is_a_fault(answer: requests.Response, inside: Path) -> None:
    assert answer.status_code == 500
    fields = answer.json()
    assert (fields["code"], fields["retryable"]) == ("server_fault", False)
    assert fields["request_id"] == answer.headers["X-Request-Id"]
    for secret in (str(inside), "Traceback", "OSError", "the inside of the gateway", ".py"):
        assert secret not in answer.text
    assert_is_safe(answer)
