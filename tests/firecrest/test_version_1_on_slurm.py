"""FirecREST version 1 over a real Slurm: what its accounting and its queue say about jobs, and what is made of that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

import pytest

from aiida_marketplace_hpc.gateway.backends.base import Observation, Submission
from aiida_marketplace_hpc.gateway.backends.firecrest_v1 import FirecrestV1Backend
from aiida_marketplace_hpc.gateway.backends.wrapper import EXIT_SECOND_COPY
from aiida_marketplace_hpc.gateway.firecrest.accounts import OneAccount
from aiida_marketplace_hpc.gateway.firecrest.client_v1 import ClusterV1
from aiida_marketplace_hpc.gateway.firecrest.tokens import ConstantToken
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.firecrest_v1 import FirecrestV1
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.services]


@dataclass
class Site:
    """A backend, and where its jobs lie."""

    backend: FirecrestV1Backend
    cluster: ClusterV1
    slurm: SlurmCluster
    folder: str
    made: list[str] = field(default_factory=list)

    def job(self, body: str = "true", directives: str = "", name: str = "") -> Submission:
        """A job in a folder of its own."""
        folder = f"{self.folder}/{name or len(self.made)}"
        text = f"#!/bin/sh\n#SBATCH --time=00:05:00\n{directives}\n{body}\n".encode()
        if folder not in self.made:
            self.made.append(folder)
            self.cluster.mkdir(folder, parents=True)
        self.cluster.store(f"{folder}/job.sh", text)
        jobid = f"{len(self.made):024x}"
        return Submission(jobid, folder, f"{folder}/job.sh", text, "sha-256:0", f".marketplace-hpc-{jobid}", "")

    def end_of(self, id: str, folder: str) -> Observation:
        """Wait for what the gateway would believe about the end of a job."""
        seen: list[Observation] = []

        def ended() -> bool:
            alive = self.backend.queue().get(id)
            one = alive or self.backend.accounting({id: folder}).get(id)
            seen.extend([one] if one is not None else [])
            return one is not None and one.state.final and one.complete

        wait_until(ended, within=60, failure=lambda: f"job {id} does not end: {seen[-1:]}", poll=0.2)
        return seen[-1]


@pytest.fixture(scope="module")
def double(slurm_cluster: SlurmCluster) -> Iterator[FirecrestV1]:
    with FirecrestV1(slurm_cluster, tokens=("constant",)) as double:
        yield double


@pytest.fixture
def site(double: FirecrestV1, slurm_cluster: SlurmCluster) -> Iterator[Site]:
    cluster = ClusterV1(double.url, double.machine, ConstantToken("constant"))
    backend = FirecrestV1Backend(OneAccount(cluster))
    yield Site(backend, cluster, slurm_cluster, f"{slurm_cluster.machine.home}/version-1-{time.monotonic_ns()}")
    slurm_cluster.run("scancel", f"--user={slurm_cluster.user}")
    cluster.close()


def _earlier() -> datetime:
    return datetime.now(timezone.utc) - timedelta(minutes=5)


def test_ends_are_what_slurm_says(site: Site) -> None:
    ends = {
        "exit 3": (JobState.FAILED, 3),
        "true": (JobState.COMPLETED, 0),
        "kill -9 $PPID": (JobState.FAILED, None),
    }
    jobs = {body: site.job(body) for body in ends}
    ids = {body: site.backend.submit(job) for body, job in jobs.items()}
    for body, (state, code) in ends.items():
        end = site.end_of(ids[body], jobs[body].folder)
        assert (end.state, end.exit_code, end.folder) == (state, code, jobs[body].folder), end
        assert end.started_at is not None
        assert end.ended_at is not None
        assert abs(end.ended_at.timestamp() - time.time()) < 120


def test_the_same_submission_twice_runs_user_code_once(site: Site) -> None:
    job = site.job("echo ran >> executed")
    first, second = site.backend.submit(job), site.backend.submit(job)
    codes = {site.end_of(id, job.folder).exit_code for id in (first, second)}
    assert codes == {0, EXIT_SECOND_COPY}
    assert site.cluster.fetch(f"{job.folder}/executed") == b"ran\n"


def test_a_job_that_waits_is_cancelled(site: Site) -> None:
    job = site.job(directives="#SBATCH --hold")
    id = site.backend.submit(job)
    site.backend.cancel(id, "/somewhere/else")
    assert not site.backend.find(job.folder, _earlier())[0].state.final
    site.backend.cancel(id, job.folder)
    assert site.end_of(id, job.folder).state is JobState.CANCELLED
    site.backend.cancel(id, job.folder)
    site.backend.cancel(id)


def test_jobs_beyond_the_first_page_are_found(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.firecrest.client_v1.AT_ONCE", 10)
    jobs = [site.job("sleep 60", directives="#SBATCH --exclusive") for _ in range(11)]
    ids = {site.backend.submit(job): job for job in jobs}
    # A job that is a moment old is not in the accounting yet.
    wait_until(
        lambda: {str(one["jobId"]) for one in site.cluster.jobs()} >= set(ids),
        within=30,
        failure=lambda: "not all are found",
        poll=0.5,
    )
    assert all([one.id for one in site.backend.find(job.folder, _earlier())] == [id] for id, job in ids.items())
