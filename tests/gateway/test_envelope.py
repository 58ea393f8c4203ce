"""Requests in the envelope of newTransformation: the same answers, checks, limits and lines in the log as by themselves."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import requests

from aiida_marketplace_hpc.protocol import BY_NAME, ENVELOPE
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway

CONTENT = bytes(range(256)) * 3000
JOB = {"job_name": "j", "ntasks_per_node": 1, "partition": "p", "image": "i", "executable_cmd": "c"}


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    with ServedGateway(tmp_path_factory.mktemp("gateway"), FakeBackend()) as served:
        yield served


def send(served: ServedGateway, user: str, letter: Any, **options: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {TOKENS.get(user, user)}"}
    return requests.post(f"{served.url}/api/v1/job/create", json=letter, headers=headers, timeout=20, **options)


def enclosed(served: ServedGateway, user: str, capability: str, **envelope: Any) -> requests.Response:
    return send(served, user, {ENVELOPE: {"capability": capability, **envelope}})


def direct(served: ServedGateway, user: str, capability: str, **envelope: Any) -> requests.Response:
    row, given = BY_NAME[capability], dict(envelope.get("parameters", {}))
    path = row.path.replace("{jobid}", quote(given.pop("jobid", ""), safe=""))
    headers = {"Authorization": f"Bearer {TOKENS.get(user, user)}"}
    data = base64.b64decode(envelope["content"]) if "content" in envelope else None
    asked = {"params": given, "json": envelope.get("fields"), "data": data}
    return requests.request(row.method, served.url + path, headers=headers, timeout=20, **asked)


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def same(answer: requests.Response) -> tuple[int, Any]:
    """What does not differ from one request to the next."""
    said = answer.json()
    return answer.status_code, {name: value for name, value in said.items() if name not in ("request_id", "roots")}


REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    (ALICE, "heartbeat", {}),
    (ALICE, "createOrUpdateCollection", {}),
    (ALICE, "getInfo", {}),
    ("nobody's", "getInfo", {}),
    (ALICE, "listJobs", {}),
    (ALICE, "listFiles", {"parameters": {"jobid": "home"}}),
    (ALICE, "query", {"fields": {"operations": [{"op": "stat", "path": "/"}, {"op": "nonsense"}]}}),
    (ALICE, "query", {"fields": {"operations": "none"}}),
    (ALICE, "query", {"fields": {"operations": [{"op": "jobs.active"}] * 1001}}),
    (ALICE, "createDataset", {"parameters": {"jobid": "home", "filename": "b"}, "content": text(CONTENT)}),
    (ALICE, "createDataset", {"parameters": {"jobid": "home", "filename": "e", "digest": "sha-256:0"}, "content": ""}),
    (ALICE, "createDataset", {"parameters": {"jobid": "home", "filename": "x", "mode": "many"}, "content": ""}),
    (ALICE, "createDataset", {"parameters": {"jobid": "home", "filename": "b", "overwrite": "false"}, "content": ""}),
    (ALICE, "getDataset", {"parameters": {"jobid": "home", "filename": "nothing"}}),
    (ALICE, "getDataset", {"parameters": {"jobid": "home"}}),
    (BOB, "getDataset", {"parameters": {"jobid": "home", "filename": "../alice_a/b"}}),
    (ALICE, "getTransformationState", {"parameters": {"jobid": "0" * 24}}),
    (ALICE, "updateTransformation", {"parameters": {"jobid": "nothing"}}),
    (ALICE, "deleteTransformation", {"parameters": {"jobid": "0" * 24, "unlaunched": "true"}}),
    (ALICE, "deleteDataset", {"parameters": {"jobid": "home", "filename": "nothing"}}),
]


@pytest.mark.parametrize(("user", "capability", "envelope"), REQUESTS)
def test_the_answer_is_that_of_the_capability(
    lasting: ServedGateway, user: str, capability: str, envelope: dict[str, Any]
) -> None:
    direct(lasting, ALICE, "createDataset", parameters={"jobid": "home", "filename": "b"}, content=text(CONTENT))
    assert same(enclosed(lasting, user, capability, **envelope)) == same(direct(lasting, user, capability, **envelope))


def test_nobody_reaches_anybody_elses_job(served: ServedGateway) -> None:
    jobid = send(served, ALICE, JOB).json()["jobid"]
    for capability in ("getTransformationState", "updateTransformation", "deleteTransformation"):
        asked = {"parameters": {"jobid": jobid}}
        assert enclosed(served, BOB, capability, **asked).status_code == 404
    assert enclosed(served, ALICE, "getTransformationState", **asked).json()["state"] == "CREATED"


def test_files_go_up_and_down(served: ServedGateway) -> None:
    name = {"jobid": "home", "filename": "caf\udce9"}  # A name that is not UTF-8.
    digest = f"sha-256:{hashlib.sha256(CONTENT).hexdigest()}"
    sent = enclosed(served, ALICE, "createDataset", parameters={**name, "digest": digest}, content=text(CONTENT))
    assert (sent.status_code, sent.json()["digest"]) == (200, digest)
    got = enclosed(served, ALICE, "getDataset", parameters=name)
    assert int(got.headers["Content-Length"]) == len(got.content)
    assert got.headers["Content-Type"] == "application/json"
    assert base64.b64decode(got.json()["content"]) == CONTENT
    piece = enclosed(served, ALICE, "getDataset", parameters={**name, "offset": "1", "length": "10"}).json()
    wanted = CONTENT[1:11]
    assert base64.b64decode(piece["content"]) == wanted
    assert piece["digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(wanted).digest()).decode()}:"
    bundle = enclosed(served, ALICE, "getDataset", parameters={**name, "bundle": "true"}).json()
    assert CONTENT[:1000] in base64.b64decode(bundle["content"])


ENVELOPES: list[Any] = [
    {},
    [],
    "heartbeat",
    {"capability": None},
    {"capability": ["heartbeat"]},
    {"capability": "noSuchThing"},
    {"capability": "newTransformation", "fields": JOB},
    {"capability": "newTransformation", "fields": {ENVELOPE: {"capability": "heartbeat"}}},
    {"capability": "heartbeat", "method": "GET"},
    {"capability": "heartbeat", "fields": {"a": 1}},
    {"capability": "heartbeat", "content": ""},
    {"capability": "getInfo", "parameters": []},
    {"capability": "getTransformationState", "parameters": {"jobid": 1}},
    {"capability": "getTransformationState", "parameters": {}},
    {"capability": "getDataset", "parameters": {"jobid": "home", "filename": "a\0b"}},
    {"capability": "getDataset", "parameters": {"jobid": "home", "filename": "a\ud800b"}},
    {"capability": "query", "fields": []},
    {"capability": "query", "fields": {ENVELOPE: {"capability": "heartbeat"}}},
    {"capability": "createDataset", "parameters": {"jobid": "home", "filename": "a"}},
    {"capability": "createDataset", "parameters": {"jobid": "home", "filename": "a"}, "content": "?"},
    {"capability": "createDataset", "parameters": {"jobid": "home", "filename": "a"}, "content": "ä"},
    {"capability": "createDataset", "parameters": {"jobid": "home", "filename": "a"}, "content": 1},
]


@pytest.mark.parametrize("envelope", ENVELOPES, ids=json.dumps)
def test_what_makes_no_sense_is_refused(lasting: ServedGateway, envelope: Any) -> None:
    for letter in ({ENVELOPE: envelope}, {ENVELOPE: {"capability": "heartbeat"}, **JOB}):
        answer = send(lasting, ALICE, letter)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request"), answer.text
    assert enclosed(lasting, ALICE, "listJobs").json() == {"jobs": {}}


def test_the_log_says_what_was_asked_for(served: ServedGateway) -> None:
    parameters = {"jobid": "home", "filename": "a b", "token": "a-secret"}
    enclosed(served, ALICE, "createDataset", parameters=parameters, content="")
    enclosed(served, ALICE, "getDataset", parameters={"jobid": "home", "filename": "gone"})
    enclosed(served, ALICE, "query", fields={"operations": [{"op": "remove", "path": "/nowhere"}]})
    enclosed(served, ALICE, "nonsense")
    lines = served.requests()
    assert [(line["capability"], line["query"], line["outcome"], line["user"]) for line in lines] == [
        ("createDataset", "jobid=home&filename=a%20b&token=...", "ok", ALICE),
        ("getDataset", "jobid=home&filename=gone", "file_error", ALICE),
        ("query", "", "ok", ALICE),
        ("newTransformation", "", "invalid_request", ALICE),
    ]
    assert [line["operation"] for line in served.operations()] == ["remove"]


def test_figures_count_what_was_asked_for(tmp_path: Any) -> None:
    with ServedGateway(tmp_path, FakeBackend(), metrics=True) as served:
        parameters = {"jobid": "home", "filename": "a"}
        assert enclosed(served, ALICE, "createDataset", parameters=parameters, content=text(CONTENT)).status_code == 200
        assert enclosed(served, ALICE, "getDataset", parameters=parameters).status_code == 200
        lines = requests.get(f"{served.url}/metrics", timeout=20).text.splitlines()
    shown = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    coded = len(text(CONTENT))
    assert shown['marketplace_hpc_requests_total{capability="createDataset",status="200"}'] == "1.0"
    assert float(shown['marketplace_hpc_transfer_bytes_total{direction="in"}']) == coded
    assert float(shown['marketplace_hpc_transfer_bytes_total{direction="out"}']) > coded
    assert shown['marketplace_hpc_transfers{direction="out"}'] == "0.0"


def test_files_are_limited_as_ever(served: ServedGateway, tmp_path: Any) -> None:
    with ServedGateway(tmp_path / "small", FakeBackend(), request_limit=1, requests_at_once=1) as small:
        asked = {"parameters": {"jobid": "home", "filename": "a"}}
        fits = enclosed(small, ALICE, "createDataset", **asked, content=text(bytes(1024 * 1024)))
        assert fits.status_code == 200
        large = enclosed(small, ALICE, "createDataset", **asked, content=text(bytes(1024 * 1024 + 3)))
        assert (large.status_code, large.json()["code"]) == (413, "too_large")
    # The body of newTransformation is as large as ever.
    assert enclosed(served, ALICE, "createDataset", **asked, content="A" * (17 * 1024 * 1024)).status_code == 413


def test_the_way_is_said_where_it_is_known(served: ServedGateway, tmp_path: Any) -> None:
    def route(gateway: ServedGateway, path: str, **headers: str) -> Any:
        headers["Authorization"] = f"Bearer {TOKENS[ALICE]}"
        return requests.get(gateway.url + path, headers=headers, timeout=20).json()["route"]

    with ServedGateway(tmp_path / "text", FakeBackend(), text_only=True) as behind_text:
        for path in ("/heartbeat", "/api/v1/info"):
            assert route(served, path) == {"text_only": False, "answer_limit": None}
            assert route(behind_text, path) == {"text_only": True, "answer_limit": None}
            relayed = {"X-Marketplace-Hpc-Relay": "1000"}
            assert route(served, path, **relayed) == {"text_only": True, "answer_limit": 1000}
            for odd in ("", "-1", "1e9", "9" * 5000, "²"):
                faked = {"X-Marketplace-Hpc-Relay": odd.encode()}
                assert route(served, path, **faked) == {"text_only": True, "answer_limit": None}
