"""G2 and G3 on a Slurm without accounting: the controller's memory and the wrapper's notes tell how jobs ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_jobs import SlurmJobs

from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def unaccounted(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """A second Slurm, beside that of all tests: without slurmdbd."""
    with SlurmCluster(slurm_cluster.machine, accounting=False) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def process(unaccounted: SlurmCluster) -> Iterator[GatewayProcess]:
    with GatewayProcess(unaccounted.machine, backend="slurm", env=unaccounted.env) as process:
        yield process


@pytest.fixture
def jobs(process: GatewayProcess, unaccounted: SlurmCluster, tmp_path: Path) -> Iterator[SlurmJobs]:
    if not process.running:
        process.start()
    jobs = SlurmJobs(process, unaccounted, tmp_path)
    yield jobs
    jobs.client.close()


def test_it_says_that_there_is_none(jobs: SlurmJobs) -> None:
    assert jobs.client.info()["machines"][0]["accounting"] is False


@pytest.mark.parametrize(
    ("script", "state", "code"),
    [("sleep 1", "COMPLETED", 0), ("exit 7", "FAILED", 7), ("kill -9 $$", "FAILED", 137)],
)
def test_an_end_is_reported_with_its_exit_code(jobs: SlurmJobs, script: str, state: str, code: int) -> None:
    job = jobs.submit(script)
    ended = jobs.wait_for_end(job)
    assert (ended["state"], ended["exit_code"], jobs.executions(job)) == (state, code, 1)
    assert ended["ended_at"] >= ended["started_at"] >= ended["submitted_at"]
    accounting = jobs.client.show_job(job["jobid"])["accounting"]
    row = dict(zip(accounting["columns"], accounting["rows"][0], strict=True))
    assert (row["JobID"], row["State"], row["ExitCode"]) == (job["scheduler_id"], state, f"{code}:0")


def test_a_cancelled_job_is_cancelled(jobs: SlurmJobs) -> None:
    job = jobs.submit("trap 'echo told >> executed' TERM; sleep 60 & wait; exit 0")
    jobs.wait_for_execution(job)
    jobs.client.cancel_job(job["jobid"])
    assert jobs.wait_for_end(job)["state"] == "CANCELLED"


def test_a_signal_to_the_batch_shell_reaches_the_script(jobs: SlurmJobs) -> None:
    job = jobs.submit("trap 'exit 5' USR1\nwhile :; do sleep 0.1; done")
    jobs.wait_for_execution(job)
    jobs.slurm.run("scancel", "--batch", "--signal=USR1", job["scheduler_id"], check=True)
    ended = jobs.wait_for_end(job)
    assert (ended["state"], ended["exit_code"]) == ("FAILED", 5)


def test_a_job_over_its_time_limit_says_so(jobs: SlurmJobs) -> None:
    job = jobs.submit("exec sleep 300", "--time=1")
    assert jobs.wait_for_end(job, within=150)["state"] == "TIMEOUT"


def test_an_array_ends_when_its_last_task_does(jobs: SlurmJobs) -> None:
    job = jobs.submit(
        "until [ -e go-$SLURM_ARRAY_TASK_ID ]; do sleep 0.1; done\nexit $SLURM_ARRAY_TASK_ID", "--array=0-1"
    )
    jobs.wait_for(job, lambda seen: bool(seen["state"] == "RUNNING") and jobs.executions(job) == 2)
    machine = jobs.process.machine
    machine.write(f"{job['folder']}/go-0", "", user=machine.user)
    jobs.slurm.run("sh", "-c", f"until squeue -h -t CD -r -o %i | grep -q {job['scheduler_id']}_0; do sleep 0.1; done")
    assert not jobs.state(job)["final"]
    machine.write(f"{job['folder']}/go-1", "", user=machine.user)
    ended = jobs.wait_for_end(job)
    assert (ended["state"], ended["exit_code"]) == ("FAILED", 1)


@pytest.mark.parametrize(("code", "state"), [(0, "COMPLETED"), (7, "FAILED")])
def test_an_end_that_slurm_has_forgotten_is_found_in_the_folder(jobs: SlurmJobs, code: int, state: str) -> None:
    job = jobs.submit(f"sleep 1; exit {code}")
    jobs.process.stop()
    jobs.slurm.run("sh", "-c", "while squeue -h | grep -q .; do sleep 0.1; done", check=True)
    jobs.slurm.forget_ended_jobs()
    jobs.process.start()
    ended = jobs.wait_for_end(job)
    assert (ended["state"], ended["exit_code"], jobs.executions(job)) == (state, code, 1)


def test_a_job_that_left_no_note_and_was_forgotten_is_not_reported_finished(jobs: SlurmJobs) -> None:
    job = jobs.submit("kill -9 $PPID; exec sleep 60")
    jobs.wait_for_execution(job)
    jobs.process.stop()
    jobs.slurm.run("sh", "-c", "while squeue -h | grep -q .; do sleep 0.1; done", check=True)
    jobs.slurm.forget_ended_jobs()
    jobs.process.start()
    another = jobs.submit("true")
    jobs.wait_for_end(another)
    assert not jobs.state(job)["final"]
