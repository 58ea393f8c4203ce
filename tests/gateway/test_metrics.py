"""What an operator sees of the scheduler's and the jobs' troubles."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from aiida_marketplace_hpc.gateway.backends.base import Fault, Submission, Unknown
from aiida_marketplace_hpc.gateway.schema import User
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ServedGateway


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
