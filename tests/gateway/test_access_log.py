"""The access log: who did what to which job and file, from where, and what came of it; and no token."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc.gateway.access import AccessLog, loggable
from aiida_marketplace_hpc.gateway.routes.query import _brief
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway


def send(served: ServedGateway, user: str | None, method: str, path: str, **options: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {TOKENS[user]}"} if user else {}
    headers |= options.pop("headers", {})
    return requests.request(method, served.url + path, headers=headers, timeout=20, **options)


def test_there_is_a_line_for_each_request_with_its_outcome_and_no_token(served: ServedGateway) -> None:
    answer = send(served, ALICE, "GET", "/api/v1/info", headers={"X-Request-Id": "from-the-client"})
    assert answer.headers["X-Request-Id"] == "from-the-client"
    send(served, None, "GET", "/heartbeat", headers={"X-Request-Id": "bad id\t"})
    send(served, None, "GET", "/api/v1/info")
    send(served, None, "GET", "/api/v1/info", headers={"Authorization": "Bearer a-mistyped-token"})
    send(served, BOB, "GET", "/api/v1/file/download/home", params={"filename": "../alice_a/secret"})
    send(served, BOB, "GET", "/api/v1/job/state/some-job")
    send(served, ALICE, "PUT", "/api/v1/file/upload/home?filename=a&access_token=token-of-alice&x", data=b"x")
    send(served, None, "GET", "/nowhere")
    send(served, None, "POST", "/heartbeat")
    served.stop()
    lines = served.requests()
    assert [(line["capability"], line["status"], line["outcome"], line["user"]) for line in lines] == [
        ("getInfo", 200, "ok", ALICE),
        ("heartbeat", 200, "ok", None),
        ("getInfo", 401, "unauthorized", None),
        ("getInfo", 401, "unauthorized", None),
        ("getDataset", 403, "forbidden", BOB),
        ("getTransformationState", 404, "not_found", BOB),
        ("createDataset", 200, "ok", ALICE),
        (None, 404, "not_found", None),
        (None, 405, "invalid_request", None),
    ]
    assert {line["client"] for line in lines} == {"127.0.0.1"}
    assert lines[0]["request_id"] == "from-the-client"
    assert lines[1]["request_id"] != "bad id"
    assert (lines[4]["path"], lines[4]["query"]) == (
        "/api/v1/file/download/home",
        "filename=..%2Falice_a%2Fsecret",
    )
    assert lines[5]["path"] == "/api/v1/job/state/some-job"
    assert lines[6]["query"] == "filename=a&access_token=...&x"
    said = served.access_log.read_text()
    assert "token-of" not in said
    assert "mistyped" not in said


def test_there_is_a_line_for_each_operation(served: ServedGateway) -> None:
    home = send(served, ALICE, "GET", "/api/v1/info").json()["home"]
    operations = [
        {"op": "mkdir", "path": f"{home}/a"},
        {"op": "rename", "path": f"{home}/a", "target": f"{home}/../bob/a"},
        {"op": "remove", "path": "/etc/passwd", "secret": "not a field"},
        {"op": "jobs.show", "jobid": "somebody-elses"},
        {"op": "jobs.states", "jobids": [str(number) for number in range(50)]},
        {"op": "nothing that there is"},
        7,
    ]
    answer = send(served, ALICE, "POST", "/api/v1/query", json={"operations": operations})
    assert answer.status_code == 200
    lines = served.operations()
    assert [(line["operation"], line["outcome"]) for line in lines] == [
        ("mkdir", "ok"),
        ("rename", "forbidden"),
        ("remove", "invalid_request"),
        ("jobs.show", "not_found"),
        ("jobs.states", "ok"),
        (None, "invalid_request"),
        (None, "invalid_request"),
    ]
    assert {(line["user"], line["client"]) for line in lines} == {(ALICE, "127.0.0.1")}
    assert {line["request_id"] for line in lines} == {answer.headers["X-Request-Id"]}
    assert [line["fields"] for line in lines[:4]] == [
        {"path": f"{home}/a"},
        {"path": f"{home}/a", "target": f"{home}/../bob/a"},
        {"path": "/etc/passwd"},
        {"jobid": "somebody-elses"},
    ]
    assert lines[4]["fields"]["jobids"][-1] == "... 50 in all"


def test_what_is_taken_down_is_no_longer_than_it_needs_to_be() -> None:
    assert _brief("x" * 10_000) == "x" * 4200
    assert _brief(["x" * 10_000, 1, [2], {}]) == ["x" * 4200, 1, "list", "dict"]
    assert _brief({"deep": [[]]}) == "dict"
    assert _brief(1.5) == "float"


def test_a_query_keeps_the_values_of_parameters_only() -> None:
    assert loggable(b"") == ""
    assert loggable(b"filename=a%20b&jobid=7&token=secret&Filename=x&=y&&z=") == (
        "filename=a%20b&jobid=7&token=...&Filename=...&=...&&z="
    )


def test_nobody_else_can_read_it(served: ServedGateway) -> None:
    assert stat.S_IMODE(served.access_log.stat().st_mode) == 0o600


def test_a_full_disk_keeps_nobody_from_being_answered_and_no_line_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "access.jsonl").symlink_to("/dev/full")
    with caplog.at_level(logging.ERROR), ServedGateway(tmp_path, FakeBackend()) as served:
        assert send(served, ALICE, "GET", "/api/v1/info").status_code == 200
    (said,) = [record.getMessage() for record in caplog.records if "access log" in record.getMessage()]
    assert "No space left on device" in said
    assert json.loads(said[said.index("{") :])["user"] == ALICE


def test_a_line_of_which_only_the_beginning_was_written_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = AccessLog(tmp_path / "log")
    write = os.write
    full = False

    def write_little(file: int, data: bytes) -> int:
        nonlocal full
        if full:
            raise OSError(28, "No space left on device")
        full = True
        return write(file, data[:10])

    monkeypatch.setattr(os, "write", write_little)
    log.write({"number": 1})
    log.write({"number": 2})
    monkeypatch.setattr(os, "write", write)
    log.write({"number": 3})
    log.write({"number": 4})
    log.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines[0]) == 10
    assert [json.loads(line)["number"] for line in lines[1:]] == [3, 4]
    said = [record.getMessage() for record in caplog.records]
    assert ['"number": 1' in said[0], '"number": 2' in said[1]] == [True, True]
