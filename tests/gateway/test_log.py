"""The program's own log: whose request and which job a line is about, in the two formats, and no secret."""

from __future__ import annotations

import contextvars
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc import HpcGateway
from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.gateway import log
from aiida_marketplace_hpc.gateway.jobs import Jobs
from aiida_marketplace_hpc.gateway.schema import User
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.testing.backend import FakeBackend

COMMAND = [str(Path(sys.executable).with_name("marketplace-hpc")), "gateway", "serve", "--host", "127.0.0.1"]
ME, TOKEN = "me@example.org", "a-token-of-mine"


def formatted(form: log.LogFormat, message: str, *arguments: object, **options: Any) -> str:
    record = logging.LogRecord(
        "a.logger", logging.WARNING, "x.py", 1, message, arguments, options.pop("exc_info", None)
    )
    record.__dict__.update(options)
    formatter = log._Json(["dev-secret", "dev-secret-2"]) if form == "json" else log._Text(["dev-secret"])
    return formatter.format(record)


def test_a_line_says_what_it_is_about() -> None:
    with log.about(request_id="r1", user=ME, jobid=None):
        log.note(jobid="j1")
        text, document = formatted("text", "it %s", "works"), json.loads(formatted("json", "it %s", "works"))
    assert text.endswith(f"WARNING a.logger: it works [request r1 user {ME} job j1]")
    assert datetime.fromisoformat(document.pop("time")).utcoffset() is not None
    assert document == {
        "level": "warning",
        "logger": "a.logger",
        "message": "it works",
        "request_id": "r1",
        "user": ME,
        "jobid": "j1",
    }
    assert formatted("text", "nobody's").endswith("a.logger: nobody's")


def test_a_message_is_one_line_whatever_is_in_it() -> None:
    forged = "a\n2026-01-01 INFO all: is well"
    assert "\n" not in formatted("text", "no file %s", forged)
    assert json.loads(formatted("json", "no file %s", forged))["message"] == f"no file {forged}"


def test_no_line_has_a_secret() -> None:
    try:
        raise RuntimeError("at postgresql://gateway:pa55@db/ledger with Authorization: Bearer abc.def-1")
    except RuntimeError:
        error = sys.exc_info()
    jwt = "eyJhbGciOiJub25lIn0.eyJzdWIiOiIxIn0.c2ln"
    for form in ("text", "json"):
        said = formatted(form, "token %s and dev-secret at /x?access_token=zzz&a=1", jwt, exc_info=error)
        for secret in (jwt, "dev-secret", "pa55", "abc.def-1", "zzz"):
            assert secret not in said
        assert "RuntimeError" in said
        assert "a=1" in said
    assert "..-2" not in formatted("json", "dev-secret-2")


def test_a_whole_object_is_the_line() -> None:
    with log.about(user=ME):
        document = json.loads(formatted("json", "%s", "{}", line={"capability": "getInfo", "user": None}))
    assert (document["capability"], document["user"], document["logger"]) == ("getInfo", None, "a.logger")
    assert "message" not in document


@contextmanager
def abouts(caplog: pytest.LogCaptureFixture) -> Iterator[list[tuple[str, dict[str, str]]]]:
    """Each message of the package, and what it was about."""
    seen: list[tuple[str, dict[str, str]]] = []

    def see(record: logging.LogRecord) -> bool:
        seen.append((record.getMessage(), dict(log._context.get())))
        return True

    caplog.handler.addFilter(see)
    try:
        with caplog.at_level(logging.INFO):
            yield seen
    finally:
        caplog.handler.removeFilter(see)


def test_what_the_background_says_of_a_job_names_its_owner_and_its_request(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    def launched(jobs: Jobs) -> str:
        log.note(request_id="of-alice", user=alice.email)
        return jobs.launch(alice, jobs.create_in_folder(alice, folder, "run.sh")).id

    with abouts(caplog) as seen:
        jobid = contextvars.copy_context().run(launched, gateway.jobs)
        backend.end("101")
        with log.about(request_id="of-bob", user="bob@example.org"):  # His poll finds out.
            gateway.watch.refresh()
    told = [about for message, about in seen if jobid in message]
    assert len(told) >= 2
    assert told == [{"request_id": "of-alice", "user": alice.email, "jobid": jobid}] * len(told)
    assert gateway.jobs.as_wire(gateway.jobs.get(alice, jobid))["request_id"] == "of-alice"


def test_one_id_goes_from_the_client_through_the_gateway_into_the_job_and_no_token_does(tmp_path: Path) -> None:
    arguments = [*COMMAND, "--port", "0", "--state", str(tmp_path / "state"), "--log-format", "json"]
    settings = {"MARKETPLACE_HPC_DEV_TOKEN": json.dumps({ME: TOKEN}), "MARKETPLACE_HPC_LOG_LEVEL": "debug"}
    written = (tmp_path / "log").open("w+b")
    with (
        written,
        subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=written, text=True, env={"PATH": "/usr/bin:/bin", **settings}
        ) as process,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("listening on ").strip()
        try:
            with HpcGateway(url, token_source=StaticToken(TOKEN)) as gateway:
                home = gateway.info()["home"]
                gateway.ask("mkdir", path=f"{home}/work")
                gateway.upload_file("home", "work/run.sh", _script(tmp_path))
                job = gateway.submit(f"{home}/work", "run.sh", client_ref="the-node")
                done = gateway.show_job(job["jobid"], 10)
            requests.get(f"{url}/api/v1/info?token={TOKEN}", headers={"Authorization": "Bearer mistyped"}, timeout=10)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)
        said = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in said.splitlines()]
    request_id = job["request_id"]
    assert done["request_id"] == request_id
    assert (done["state"], done["client_ref"]) == ("COMPLETED", "the-node")
    (created,) = [line for line in lines if line.get("capability") == "newTransformation"]
    assert created["request_id"] == request_id
    about_it = [line for line in lines if job["jobid"] in line.get("message", "")]
    assert [line["message"].split(" -> ")[-1] for line in about_it][-1] == "COMPLETED"
    assert {(line["request_id"], line["user"], line["jobid"]) for line in about_it} == {(request_id, ME, job["jobid"])}
    comment = f"marketplace-hpc:{job['jobid']} the-node request:{request_id}"
    kept = [path for path in (tmp_path / "state" / "local").rglob("*") if path.is_file()]
    assert any(comment in path.read_text(errors="replace") for path in kept)
    assert TOKEN not in said
    assert "mistyped" not in said


def _script(tmp_path: Path) -> str:
    path = tmp_path / "run.sh"
    path.write_text("#!/bin/sh\necho done\n")
    return str(path)
