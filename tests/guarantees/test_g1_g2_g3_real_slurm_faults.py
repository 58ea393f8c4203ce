"""G1, G2 and G3 while parts of a real Slurm are stopped: controller, database, authentication.

Each is stopped in the middle of something and started again; then every script has run once, every job has ended as its script
did, and ledger and accounting say the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from slurm_jobs import SlurmJobs

from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

ROUNDS = 40.0
"""Seconds after a restart in which all is as it should be: commands that were under way end, and daemons find each other."""


@pytest.fixture(scope="module")
def process(slurm_cluster: SlurmCluster) -> Iterator[GatewayProcess]:
    with GatewayProcess(slurm_cluster.machine, backend="slurm", env=slurm_cluster.env) as process:
        yield process


@pytest.fixture
def jobs(process: GatewayProcess, slurm_cluster: SlurmCluster, tmp_path: Path) -> Iterator[SlurmJobs]:
    jobs = SlurmJobs(process, slurm_cluster, tmp_path)
    yield jobs
    jobs.client.close()


@contextmanager
def stopped(stop: Callable[[], None], start: Callable[[], None]) -> Iterator[None]:
    stop()
    try:
        yield
    finally:
        start()


def without_controller(slurm: SlurmCluster) -> Any:
    return stopped(slurm.stop_controller, slurm.start_controller)


def without_database(slurm: SlurmCluster) -> Any:
    return stopped(slurm.stop_dbd, slurm.start_dbd)


def without_munge(slurm: SlurmCluster) -> Any:
    return stopped(slurm.stop_munge, slurm.start_munge)


def stay_while_nothing_is_known(jobs: SlurmJobs, known: list[dict[str, Any]]) -> None:
    """Wait until the gateway says that Slurm does not answer, and see that it goes on saying what it knew last."""
    states = [job["state"] for job in known]
    for job in known:
        jobs.wait_for(job, lambda seen: bool(seen["final"] or (seen["message"] and seen["age"] > 5)))
    assert [jobs.state(job)["state"] for job in known] == states


def expect_one_execution(jobs: SlurmJobs, job: dict[str, Any], state: str, exit_code: int | None) -> None:
    """What the folder, the ledger and Slurm's accounting say about a job that has ended."""
    ended = jobs.wait_for_end(job, within=ROUNDS)
    assert (ended["state"], ended["exit_code"]) == (state, exit_code), jobs.client.show_job(job["jobid"])["accounting"]
    assert jobs.executions(job) == 1
    assert jobs.submissions(job) == [ended["scheduler_id"]]
    argv = ("sacct", "-X", "-n", "-P", "--format=State,ExitCode", f"--jobs={ended['scheduler_id']}")
    said, code = jobs.slurm.run(*argv, check=True).stdout.strip().split("|")
    assert said.split()[0] == state
    assert code == f"{exit_code or 0}:0"


def test_the_controller_stops_while_jobs_wait_and_run(jobs: SlurmJobs) -> None:
    """The gateway itself is restarted, too, while the controller is away."""
    running = jobs.submit("until [ -e go ]; do sleep 0.1; done; exit 3")
    waiting = jobs.submit("exit 4", f"--dependency=afterany:{running['scheduler_id']}")
    short = jobs.submit("sleep 3; exit 5")
    jobs.wait_for_execution(running)
    jobs.wait_for_execution(short)
    known = [jobs.wait_for_state(running, "RUNNING"), jobs.wait_for_state(waiting, "HELD")]
    known.append(jobs.wait_for_state(short, "RUNNING"))
    with without_controller(jobs.slurm):
        stay_while_nothing_is_known(jobs, known)
        jobs.process.restart()
        stay_while_nothing_is_known(jobs, known)
        jobs.process.machine.write(f"{running['folder']}/go", "", user=jobs.process.user)
    expect_one_execution(jobs, running, "FAILED", 3)
    expect_one_execution(jobs, waiting, "FAILED", 4)
    expect_one_execution(jobs, short, "FAILED", 5)


def test_a_submission_while_the_controller_is_away_waits_in_the_ledger(jobs: SlurmJobs) -> None:
    folder = jobs.prepare("exit 6")
    with without_controller(jobs.slurm):
        began = time.monotonic()
        job = jobs.launch(folder)
        assert time.monotonic() - began < 12
        assert job["state"] == "SUBMITTING"
        seen = jobs.wait_for(job, lambda seen: bool(seen["message"]))
        assert "Unable to contact slurm controller" in seen["message"]
        assert jobs.launch(folder)["jobid"] == job["jobid"]
        assert jobs.executions(job) == 0
    expect_one_execution(jobs, job, "FAILED", 6)


def test_the_controller_is_restarted_under_a_stream_of_submissions(jobs: SlurmJobs) -> None:
    folders = [jobs.prepare(f"exit {number}") for number in range(1, 13)]
    launched: list[dict[str, Any]] = []
    stream = threading.Thread(target=lambda: launched.extend(jobs.launch(folder) for folder in folders))
    stream.start()
    wait_until(lambda: len(launched) >= 3, within=30, failure=lambda: "no submissions")
    with without_controller(jobs.slurm):
        pass
    stream.join()
    assert len(launched) == len(folders)
    for number, job in enumerate(launched, start=1):
        expect_one_execution(jobs, job, "FAILED", number)


def test_a_cancellation_while_the_controller_is_away_is_made_up_for(jobs: SlurmJobs) -> None:
    job = jobs.submit("exec sleep 300")
    jobs.wait_for_execution(job)
    known = jobs.wait_for_state(job, "RUNNING")
    with without_controller(jobs.slurm):
        began = time.monotonic()
        jobs.client.cancel_job(job["jobid"])
        assert time.monotonic() - began < 12
        stay_while_nothing_is_known(jobs, [known])
    expect_one_execution(jobs, job, "CANCELLED", None)


def test_no_end_is_believed_while_the_database_is_away(jobs: SlurmJobs) -> None:
    script = "until [ -e go ]; do sleep 0.1; done; exit {}"
    job, another = jobs.submit(script.format(3)), jobs.submit(script.format(0))
    known = [jobs.wait_for_state(one, "RUNNING") for one in (job, another)]
    with without_database(jobs.slurm):
        for one in known:
            jobs.process.machine.write(f"{one['folder']}/go", "", user=jobs.process.user)
        ended = "squeue --noheader --states=COMPLETED,FAILED --format=%i"
        wanted = {one["scheduler_id"] for one in known}
        wait_until(
            lambda: wanted <= set(jobs.slurm.run(*ended.split()).stdout.split()),
            within=30,
            failure=lambda: "the jobs do not end",
        )
        stay_while_nothing_is_known(jobs, known)
        # Submissions go on: that is the controller's matter.
        later = jobs.submit("exit 8")
        jobs.wait_for_execution(later)
        assert not jobs.state(later)["final"]
    expect_one_execution(jobs, job, "FAILED", 3)
    expect_one_execution(jobs, another, "COMPLETED", 0)
    expect_one_execution(jobs, later, "FAILED", 8)


def test_authentication_fails_for_a_while(jobs: SlurmJobs) -> None:
    running = jobs.submit("until [ -e go ]; do sleep 0.1; done; exit 3")
    jobs.wait_for_execution(running)
    known = jobs.wait_for_state(running, "RUNNING")
    folder = jobs.prepare("exit 9")
    with without_munge(jobs.slurm):
        submitted = jobs.launch(folder)
        assert submitted["state"] == "SUBMITTING"
        seen = jobs.wait_for(submitted, lambda seen: bool(seen["message"]))
        assert "Munge encode failed" in seen["message"]
        stay_while_nothing_is_known(jobs, [known])
        assert jobs.executions(submitted) == 0
    jobs.process.machine.write(f"{running['folder']}/go", "", user=jobs.process.user)
    expect_one_execution(jobs, running, "FAILED", 3)
    expect_one_execution(jobs, submitted, "FAILED", 9)
