"""What an operator sees of requests and transfers, and of the scheduler's and the jobs' troubles."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc.gateway.backends.base import Fault, Submission, Unknown
from aiida_marketplace_hpc.gateway.metrics import Metrics
from aiida_marketplace_hpc.gateway.schema import User
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway


def figures(page: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def launch(gateway: Gateway, user: User, folder: str) -> str:
    return gateway.jobs.launch(user, gateway.jobs.create_in_folder(user, folder, "run.sh")).id


def test_a_scheduler_that_is_down_is_seen(gateway: Gateway, backend: FakeBackend, alice: User, folder: str) -> None:
    launch(gateway, alice, folder)
    before = figures(gateway.metrics.page().decode())
    assert before["marketplace_hpc_scheduler_up"] == 1
    assert before["marketplace_hpc_scheduler_answer_age_seconds"] >= 0
    assert before['marketplace_hpc_jobs{state="QUEUED"}'] == 1
    assert before['marketplace_hpc_jobs{state="COMPLETED"}'] == 0
    assert before['marketplace_hpc_submissions_total{outcome="taken"}'] == 1
    backend.down = True
    gateway.jobs.reconcile()
    after = figures(gateway.metrics.page().decode())
    assert after["marketplace_hpc_scheduler_up"] == 0
    failed = 'marketplace_hpc_scheduler_questions_total{outcome="failed"}'
    assert after[failed] == before.get(failed, 0) + 1
    assert (
        after["marketplace_hpc_scheduler_answer_age_seconds"] > before["marketplace_hpc_scheduler_answer_age_seconds"]
    )


def test_lost_answers_faults_and_second_copies_are_counted(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    def lose(submission: Submission) -> str:
        backend.accept(submission)
        backend.accept(submission)
        raise Unknown("Socket timed out")

    backend.on_submit = lose
    launch(gateway, alice, folder)
    gateway.jobs.reconcile()
    shown = figures(gateway.metrics.page().decode())
    assert shown['marketplace_hpc_submissions_total{outcome="unknown"}'] == 1
    assert shown['marketplace_hpc_submissions_total{outcome="found"}'] == 1
    assert shown["marketplace_hpc_duplicates_total"] == 1

    def broken(submission: Submission) -> str:
        raise Fault("the gateway cannot run sbatch")

    backend.end("101")
    gateway.jobs.reconcile()
    backend.on_submit = broken
    Path(folder, "run.sh").write_text("#!/bin/sh\necho other\n")
    caplog.clear()
    launch(gateway, alice, folder)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert figures(gateway.metrics.page().decode())['marketplace_hpc_submissions_total{outcome="fault"}'] == 1


def test_the_page_is_there_if_it_is_asked_for(tmp_path: Path, served: ServedGateway) -> None:
    assert requests.get(f"{served.url}/metrics", timeout=10).status_code == 404
    with ServedGateway(tmp_path / "shown", FakeBackend(), metrics=True) as shown:
        answer = requests.get(f"{shown.url}/metrics", timeout=10)
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "marketplace_hpc_scheduler_up" in answer.text


def send(served: ServedGateway, method: str, path: str, token: str | None = TOKENS[ALICE], **options: Any) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return requests.request(method, served.url + path, headers=headers, timeout=20, **options).status_code


def test_requests_and_transfers_are_counted_by_what_they_were(tmp_path: Path) -> None:
    with ServedGateway(tmp_path, FakeBackend(), metrics=True) as served:
        assert send(served, "PUT", "/api/v1/file/upload/home?filename=a", data=bytes(300_000)) == 200
        for _ in range(2):
            assert send(served, "GET", "/api/v1/file/download/home?filename=a") == 200
        assert send(served, "GET", "/api/v1/file/download/home?filename=none") == 409
        for path in ("/nowhere", "/any/other", "/.env"):
            assert send(served, "GET", path) == 404
        shown = figures(requests.get(f"{served.url}/metrics", timeout=10).text)
    assert shown['marketplace_hpc_requests_total{capability="createDataset",status="200"}'] == 1
    assert shown['marketplace_hpc_requests_total{capability="getDataset",status="200"}'] == 2
    assert shown['marketplace_hpc_requests_total{capability="getDataset",status="409"}'] == 1
    assert shown['marketplace_hpc_requests_total{capability="other",status="404"}'] == 3
    assert shown['marketplace_hpc_request_seconds_count{capability="getDataset"}'] == 3
    assert shown['marketplace_hpc_transfer_bytes_total{direction="in"}'] == 300_000
    assert shown['marketplace_hpc_transfer_bytes_total{direction="out"}'] == 600_000
    assert (
        shown['marketplace_hpc_transfers{direction="in"}'] == shown['marketplace_hpc_transfers{direction="out"}'] == 0
    )
    assert shown["process_open_fds"] > 0
    assert not any(word in name for name in shown for word in ("alice", "nowhere", "filename", ".env"))


def test_a_transfer_under_way_is_seen(served: ServedGateway) -> None:
    go = threading.Event()

    def body() -> Any:
        yield b"x" * 70_000
        go.wait(9)
        yield b"x"

    def shown() -> dict[str, float]:
        return figures(served.gateway.metrics.page().decode())

    with ThreadPoolExecutor(1) as threads:
        upload = threads.submit(send, served, "PUT", "/api/v1/file/upload/home?filename=a", data=body())
        try:
            wait_until(
                lambda: (
                    shown()['marketplace_hpc_transfers{direction="in"}'] == 1
                    and shown()['marketplace_hpc_transfer_bytes_total{direction="in"}'] == 70_000
                ),
                within=8,
                failure=lambda: str(shown()),
            )
        finally:
            go.set()
        assert upload.result() == 200
    wait_until(
        lambda: shown()['marketplace_hpc_transfers{direction="in"}'] == 0, within=8, failure=lambda: str(shown())
    )


def test_bad_tokens_and_limits_are_counted(tmp_path: Path) -> None:
    limits = {"request_limit": 1, "requests_per_second": 0.5}
    with ServedGateway(tmp_path, FakeBackend(), **limits) as served:
        assert send(served, "GET", "/api/v1/info", token=None) == 401
        assert send(served, "GET", "/api/v1/info", token="somebody-elses") == 401
        assert send(served, "PUT", "/api/v1/file/upload/home?filename=a", data=bytes(2 * 1024 * 1024)) == 413
        statuses = [send(served, "GET", "/api/v1/info") for _ in range(6)]
        shown = figures(served.gateway.metrics.page().decode())
    assert shown['marketplace_hpc_token_failures_total{reason="missing"}'] == 1
    assert shown['marketplace_hpc_token_failures_total{reason="refused"}'] == 1
    assert shown['marketplace_hpc_limits_hit_total{limit="size"}'] == 1
    assert shown['marketplace_hpc_limits_hit_total{limit="requests_per_second"}'] == statuses.count(429) > 0


def test_too_many_jobs_and_connections_are_counted(tmp_path: Path) -> None:
    published = {"job_name": "a", "ntasks_per_node": 1, "partition": "p", "image": "i", "executable_cmd": "true"}
    with ServedGateway(tmp_path, FakeBackend(), jobs_per_user=1, connections=1) as served:
        created = [send(served, "POST", "/api/v1/job/create", json=published) for _ in range(2)]
        with requests.Session() as held:
            assert held.get(f"{served.url}/heartbeat", timeout=10).ok
            one_too_many = send(served, "GET", "/heartbeat")
        shown = figures(served.gateway.metrics.page().decode())
    assert (created, one_too_many) == ([200, 429], 429)
    assert shown['marketplace_hpc_limits_hit_total{limit="jobs_per_user"}'] == 1
    assert shown['marketplace_hpc_limits_hit_total{limit="connections"}'] == 1


def test_what_the_reconciler_has_to_do_is_seen(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    def lost(submission: Submission) -> str:
        raise Unknown("Socket timed out")

    backend.on_submit = lost
    launch(gateway, alice, folder)
    backend.down = True
    with gateway.metrics.round():
        gateway.jobs.reconcile()
    shown = figures(gateway.metrics.page().decode())
    assert shown["marketplace_hpc_unsettled_jobs"] == 1
    assert shown["marketplace_hpc_reconciler_seconds_count"] == 1
    assert shown["marketplace_hpc_reconciler_stumbles_total"] == 0


def test_a_reconciler_that_stands_still_or_stumbles_is_seen() -> None:
    now = [5.0]
    metrics = Metrics(lambda: now[0])
    assert figures(metrics.page().decode())["marketplace_hpc_reconciler_age_seconds"] == -1
    with pytest.raises(RuntimeError), metrics.round():
        raise RuntimeError
    now[0] = 65.0
    shown = figures(metrics.page().decode())
    assert shown["marketplace_hpc_reconciler_age_seconds"] == 60
    assert shown["marketplace_hpc_reconciler_stumbles_total"] == 1
