"""The guarantees about jobs, as far as FirecREST allows, with its answers lost in every way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.errors import Unavailable
from aiida_marketplace_hpc.gateway.backends.base import Submission
from aiida_marketplace_hpc.gateway.submission import read_guard
from aiida_marketplace_hpc.testing.machine import wait_until
from tests.firecrest.conftest import Remote

LOST: list[dict[str, Any]] = [
    {"status": 408},
    {"status": None},
    {"status": 424, "message": "Unable to establish SSH connection."},
    {"status": 504, "own": False},
]


@pytest.mark.parametrize("fault", LOST)
def test_g1_a_submission_whose_answer_was_lost_is_found_again(remote: Remote, fault: dict[str, Any]) -> None:
    folder = remote.script("lost", "echo ran >> executed; exit 4")
    remote.double.fail("submit", carried_out=True, **fault)
    job = remote.client.submit(folder, "run.sh")
    end = remote.end_of(job["jobid"])
    assert (end["state"], end["exit_code"]) == ("FAILED", 4)
    assert remote.double.calls["submit"] == 1
    assert Path(folder, "executed").read_text() == "ran\n"


@pytest.mark.parametrize("fault", LOST[:2])
def test_g1_a_submission_that_never_was_is_made_once_that_is_proven(remote: Remote, fault: dict[str, Any]) -> None:
    folder = remote.script("never", "echo ran >> executed")
    remote.double.fail("submit", **fault)
    job = remote.client.submit(folder, "run.sh")
    assert remote.end_of(job["jobid"])["state"] == "COMPLETED"
    assert remote.double.calls["submit"] == 2
    assert Path(folder, "executed").read_text() == "ran\n"


def test_g1_nothing_is_proven_while_firecrest_does_not_answer_about_jobs(remote: Remote) -> None:
    first = remote.client.submit(remote.script("first", "true"), "run.sh")
    remote.end_of(first["jobid"])
    folder = remote.script("dark", "echo ran >> executed")
    remote.double.fail("submit", status=408, carried_out=True)
    remote.double.fail("jobs", status=500, times=10_000, message="Error executing Slurm command.")
    job = remote.client.submit(folder, "run.sh")
    asked = remote.double.calls["jobs"]
    # Time enough to be taken for proven, if silence were a proof.
    until = time.monotonic() + 2
    wait_until(
        lambda: remote.double.calls["jobs"] > asked + 4 and time.monotonic() > until,
        within=40,
        failure=lambda: "nobody asks",
    )
    assert remote.double.calls["submit"] == 2
    assert remote.job(job["jobid"])["state"] == "SUBMITTING"
    remote.double.faults.clear()
    assert remote.end_of(job["jobid"])["state"] == "COMPLETED"
    assert remote.double.calls["submit"] == 2
    assert Path(folder, "executed").read_text() == "ran\n"


@pytest.mark.services  # It waits for two of the gateway's attempts.
def test_g1_what_cannot_be_read_just_now_is_not_taken_for_missing(remote: Remote) -> None:
    """Neither the script of a job that waits, which would be refused for good, nor its guard, without which it runs again."""
    folder = remote.script("waits", "echo ran >> executed")
    remote.double.fail("submit", status=503, message="The scheduler service is unhealthy.")
    job = remote.client.submit(folder, "run.sh")["jobid"]
    remote.double.fail("download", status=408)
    reads = remote.double.calls["download"]
    wait_until(lambda: remote.double.calls["download"] > reads, within=40, failure=lambda: "nobody tries again")
    assert remote.end_of(job)["state"] == "COMPLETED"
    assert Path(folder, "executed").read_text() == "ran\n"
    files = remote.gateway.files_of(remote.gateway.ledger.users()[0])
    guard = f"{folder}/.marketplace-hpc-{job}"
    remote.double.fail("download", status=408, times=2)
    with pytest.raises(Unavailable):
        read_guard(files, guard)
    remote.double.faults.clear()
    assert read_guard(files, guard)[0] == remote.job(job)["scheduler_id"]
    assert read_guard(files, f"{folder}/.marketplace-hpc-0") == (None, None)


def test_g1_a_job_that_was_given_up_never_runs(remote: Remote) -> None:
    """The submission comes after the gateway has taken the guard: a shell finds it taken, although it is a link."""
    folder = remote.script("given-up", "echo ran >> executed")
    remote.double.fail("submit", status=408)
    job = remote.client.submit(folder, "run.sh")
    remote.client.cancel_job(job["jobid"])
    assert remote.end_of(job["jobid"])["state"] == "CANCELLED"
    guard = Path(folder, f".marketplace-hpc-{job['jobid']}")
    assert guard.is_symlink()
    text = Path(folder, "run.sh").read_bytes()
    late = Submission(job["jobid"], folder, f"{folder}/run.sh", text, "sha-256:0", guard.name, "")
    id = remote.gateway.backend.submit(late)
    output = Path(folder, f"slurm-{id}.out")
    wait_until(
        lambda: output.exists() and "second copy" in output.read_text(), within=20, failure=lambda: "it does not end"
    )
    assert not Path(folder, "executed").exists()


def test_g2_a_living_job_is_never_done_whatever_firecrest_says(remote: Remote) -> None:
    folder = remote.script("alive", "until [ -e go ]; do sleep 0.1; done")
    job = remote.client.submit(folder, "run.sh")["jobid"]
    wait_until(lambda: remote.job(job)["state"] == "RUNNING", within=20, failure=lambda: "it does not run")
    id = remote.job(job)["scheduler_id"]
    for hide in (lambda: remote.double.young.add(id), lambda: remote.double.fail("jobs", status=408, times=30)):
        hide()
        asked = remote.double.calls["jobs"]
        wait_until(
            lambda asked=asked: remote.job(job)["final"] or remote.double.calls["jobs"] > asked + 4,  # type: ignore[misc]
            within=40,
            failure=lambda: "nobody asks",
        )
        assert remote.job(job)["state"] == "RUNNING"
        remote.double.young.clear()
        remote.double.faults.clear()
    Path(folder, "go").touch()
    assert remote.end_of(job)["state"] == "COMPLETED"


@pytest.mark.parametrize("where", ["old", "young"])
def test_g3_an_end_that_nobody_saw_is_found(remote: Remote, where: str) -> None:
    """After a day it is on record under its id only; when Slurm has forgotten it, the wrapper's note is left."""
    folder = remote.script("weeks", "until [ -e go ]; do sleep 0.1; done; exit 7")
    job = remote.client.submit(folder, "run.sh")["jobid"]
    wait_until(lambda: remote.job(job)["state"] == "RUNNING", within=20, failure=lambda: "it does not run")
    getattr(remote.double, where).add(remote.job(job)["scheduler_id"])
    Path(folder, "go").touch()
    end = remote.end_of(job)
    assert (end["state"], end["exit_code"]) == ("FAILED", 7)


def test_g1_g3_a_lost_ledger_learns_from_living_jobs(remote: Remote) -> None:
    folder = remote.script("ledger", "until [ -e go ]; do sleep 0.1; done")
    job = remote.client.submit(folder, "run.sh")["jobid"]
    wait_until(lambda: remote.job(job)["state"] == "RUNNING", within=20, failure=lambda: "it does not run")
    [trace] = remote.gateway.backend.traces([remote.job(job)["scheduler_id"]]).values()
    assert (trace.jobid, trace.folder) == (job, folder)
    Path(folder, "go").touch()
    remote.end_of(job)
