"""The backend against a real Slurm: what its commands really answer about requeued jobs, arrays, reused ids and scripts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest

from aiida_marketplace_hpc.directives import parse_directives
from aiida_marketplace_hpc.gateway.backends.base import Observation, SchedulerDown, Submission, Trace
from aiida_marketplace_hpc.gateway.backends.slurm import SlurmBackend
from aiida_marketplace_hpc.gateway.backends.slurm_commands import Answer
from aiida_marketplace_hpc.gateway.backends.wrapper import make_wrapper
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def slurm(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """One whose job ids may be mixed up."""
    with SlurmCluster(slurm_cluster.machine) as slurm:
        yield slurm


@pytest.fixture
def backend(slurm: SlurmCluster) -> Iterator[SlurmBackend]:
    def run(
        arguments: Sequence[str], *, stdin: bytes, folder: str | None, environment: Mapping[str, str], timeout: float
    ) -> Answer:
        env = {name: environment[name] for name in ("TZ", "LC_ALL") if name in environment}
        try:
            done = slurm.machine.run(
                arguments, user=slurm.user, env={**slurm.env, **env}, cwd=folder or "/", input=stdin, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return Answer(None, "", "")
        return Answer(done.returncode, done.stdout, done.stderr)

    backend = SlurmBackend(user=slurm.user, run=run)
    backend.start()
    yield backend
    slurm.run("scancel", f"--user={slurm.user}", check=True)
    wait_until(lambda: not slurm.run("squeue", "-h").stdout, within=30, failure=lambda: "jobs do not end")


def submit(slurm: SlurmCluster, body: str, *options: str, folder: str = "") -> Submission:
    """Submit a wrapped script as the backend does; the id is in the place of the job's."""
    machine = slurm.machine
    folder = folder or machine.make_directory("job", user=slurm.user)
    text = f"#!/bin/sh\n{body}\n"
    machine.write(f"{folder}/job.sh", text, user=slurm.user)
    job = Submission("7", folder, f"{folder}/job.sh", text.encode(), "sha-256:0", ".marketplace-hpc-7", "", "node")
    wrapper = make_wrapper(job, parse_directives(job.script_text)).decode()
    done = slurm.run("sbatch", "--parsable", *options, user=slurm.user, cwd=folder, input=wrapper, check=True)
    return replace(job, jobid=done.stdout.strip())


def observe(backend: SlurmBackend, job: Submission) -> Observation | None:
    """What the gateway would believe: the queue about what lives, the accounting about an end."""
    queued = backend.queue().get(job.jobid)
    if queued is not None and not queued.state.final:
        return queued
    return backend.accounting({job.jobid: job.folder}).get(job.jobid)


def wait_for(backend: SlurmBackend, job: Submission, accept: Callable[[Observation], bool]) -> list[Observation]:
    """Wait for an observation, and return all on the way to it."""
    seen: list[Observation] = []

    def accepted() -> bool:
        one = observe(backend, job)
        if one is not None:
            seen.append(one)
        return one is not None and accept(one)

    wait_until(accepted, within=60, failure=lambda: f"{seen[-1:]}")
    return seen


def ended(one: Observation) -> bool:
    return one.state.final and one.complete


def test_scripts_of_waiting_and_running_jobs_say_what_they_are(slurm: SlurmCluster, backend: SlurmBackend) -> None:
    waiting = submit(slurm, "true", "--hold")
    running = submit(slurm, "exec sleep 100")
    array = submit(slurm, "exec sleep 100", "--array=0-2", "--hold")
    gone = submit(slurm, "true")
    foreign = slurm.run("sbatch", "--parsable", "--hold", "--wrap=true", user=slurm.user, cwd="/tmp", check=True)
    wait_for(backend, running, lambda one: one.state is JobState.RUNNING)
    wait_for(backend, gone, ended)
    salloc = ("salloc", "--no-shell", "--ntasks=1")
    slurm.run(*salloc, user=slurm.user, cwd="/tmp", check=True)
    without_script = slurm.run("squeue", "-h", "-n", "no-shell,interactive", "-o", "%i", check=True).stdout.split()
    assert without_script
    jobs = [waiting, running, array]
    ids = [*(job.jobid for job in jobs), foreign.stdout.strip(), *without_script, "999999"]
    assert backend.traces(ids) == {
        job.jobid: Trace("7", job.folder, job.script, job.script_digest, "node", "") for job in jobs
    }


def test_a_job_that_slurm_requeues_has_not_ended(slurm: SlurmCluster, backend: SlurmBackend) -> None:
    job = submit(slurm, "echo ran >> ran; exec sleep 100", "--requeue")
    ran = f"{job.folder}/ran"
    wait_until(lambda: slurm.machine.exists(ran), within=30, failure=lambda: "the job does not run")
    slurm.run("scontrol", "requeue", job.jobid, check=True)
    seen = wait_for(backend, job, lambda one: one.state in (JobState.QUEUED, JobState.HELD))
    recorded = backend.accounting({job.jobid: job.folder})
    seen += [recorded[job.jobid]] if job.jobid in recorded else []
    # It waits for two minutes now, before it runs again.
    assert not any(one.state.final for one in seen)
    slurm.run("scancel", job.jobid, check=True)
    (*_, last) = wait_for(backend, job, ended)
    assert last.state is JobState.CANCELLED


def test_an_array_has_ended_when_its_last_task_has(slurm: SlurmCluster, backend: SlurmBackend) -> None:
    script = "until [ -e go-$SLURM_ARRAY_TASK_ID ]; do sleep 0.1; done; exit $SLURM_ARRAY_TASK_ID"
    job = submit(slurm, script, "--array=0-2%2")
    seen = wait_for(backend, job, lambda one: one.state is JobState.RUNNING)
    for task in range(3):
        slurm.machine.write(f"{job.folder}/go-{task}", "", user=slurm.user)
        if task < 2:
            slurm.wait_for(f"{job.jobid}_{task}", "FAILED" if task else "COMPLETED")
            one = observe(backend, job)
            assert one is not None
            seen.append(one)
    assert not any(one.state.final for one in seen)
    (*_, last) = wait_for(backend, job, ended)
    assert last.state is JobState.FAILED
    assert len([row for row in last.rows if row[0].count(".") == 0]) == 3


@contextmanager
def controller_down(slurm: SlurmCluster) -> Iterator[None]:
    slurm.stop_controller()
    try:
        yield
    finally:
        slurm.start_controller()


def test_without_the_controller_no_script_is_known(slurm: SlurmCluster, backend: SlurmBackend) -> None:
    job = submit(slurm, "true", "--hold")
    with controller_down(slurm), pytest.raises(SchedulerDown):
        backend.traces([job.jobid])
    assert set(backend.traces([job.jobid])) == {job.jobid}


def test_an_id_that_is_used_again_confuses_nobody(slurm: SlurmCluster, backend: SlurmBackend) -> None:
    first = submit(slurm, "exit 3")
    wait_for(backend, first, ended)
    slurm.forget_ended_jobs(next_id=first.jobid)
    second = submit(slurm, "exec sleep 100")
    assert second.jobid == first.jobid
    wait_for(backend, second, lambda one: one.state is JobState.RUNNING)
    slurm.wait_for(second.jobid, "RUNNING")
    recorded = backend.accounting({first.jobid: first.folder})[first.jobid]
    assert (recorded.state, recorded.exit_code, recorded.folder) == (JobState.FAILED, 3, first.folder)
    backend.cancel(first.jobid, first.folder)
    assert backend.queue()[second.jobid].state is JobState.RUNNING
    backend.cancel(second.jobid, second.folder)
    (*_, last) = wait_for(backend, second, ended)
    assert last.state is JobState.CANCELLED
    assert backend.accounting({first.jobid: first.folder})[first.jobid].exit_code == 3
    backend.cancel(second.jobid, second.folder)
    slurm.forget_ended_jobs(next_id=str(int(first.jobid) + 1))
    backend.cancel(second.jobid, second.folder)
