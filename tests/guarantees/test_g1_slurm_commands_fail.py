"""G1, G3: whatever sbatch, squeue, sacct and scancel do during a launch, the script runs once and its end is reported."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.slurm import SlurmCluster
from aiida_marketplace_hpc.testing.slurm_faults import Kind, SlurmFaults

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]

SUBMISSIONS: list[Kind] = [
    "fail-before",
    "fail-after",
    "silent",
    "garbage",
    "half",
    "late",
    "hang-before",
    "hang-after",
]


class Site:
    """A gateway on a Slurm whose commands misbehave, and a client of it."""

    def __init__(self, process: GatewayProcess, faults: SlurmFaults, slurm: SlurmCluster, place: Path) -> None:
        self.process = process
        self.faults = faults
        self.slurm = slurm
        self.place = place
        self.token = place / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(process.token)
        self.client = HpcGateway(process.url, token_source=f"file:{self.token}")
        self.home = str(self.client.info()["home"])

    def prepare(self, name: str, exit_code: int) -> str:
        """A folder with a script that counts its executions."""
        (self.place / name).write_text(f"#!/bin/sh\necho ran >> executed\nexit {exit_code}\n")
        folder = f"{self.home}/{name}"
        transfer.put_file(self.client, self.place / name, f"{folder}/run.sh", parents=True)
        return folder

    def wait(self, jobids: list[str], within: float) -> dict[str, dict[str, Any]]:
        deadline = time.monotonic() + within
        while True:
            jobs: dict[str, dict[str, Any]] = self.client.job_states(jobids)["jobs"]
            if all(job["final"] for job in jobs.values()):
                return jobs
            assert time.monotonic() < deadline, jobs
            time.sleep(0.2)

    def executions(self, folder: str) -> int:
        return self.process.machine.read_text(f"{folder}/executed").count("ran")

    def slurm_jobs(self, folder: str) -> dict[str, str]:
        """What the accounting has of a folder: exit codes by id."""
        fields = "JobID,ExitCode,WorkDir"
        said = self.slurm.run("sacct", "-X", "-a", "-n", "-P", f"--format={fields}", check=True).stdout
        rows = [line.split("|") for line in said.splitlines()]
        return {row[0]: row[1] for row in rows if row[2] == folder}


@pytest.fixture
def site(slurm_cluster: SlurmCluster, gateway_factory: Callable[..., GatewayProcess], tmp_path: Path) -> Iterator[Site]:
    faults = SlurmFaults(slurm_cluster.machine)
    process = gateway_factory(backend="slurm", env=faults.env)
    site = Site(process, faults, slurm_cluster, tmp_path)
    yield site
    faults.clear()
    site.client.close()


def test_a_script_runs_once_whatever_becomes_of_its_submission(site: Site) -> None:
    jobids: dict[str, str] = {}

    def launch(kind: str, folder: str) -> None:
        with HpcGateway(site.process.url, token_source=f"file:{site.token}") as client:
            jobids[kind] = str(client.submit(folder, "run.sh")["jobid"])

    folders = {kind: site.prepare(kind, number) for number, kind in enumerate(SUBMISSIONS)}
    launches = []
    for kind, folder in folders.items():
        fault = site.faults.inject("sbatch", kind)
        launches.append(threading.Thread(target=launch, args=(kind, folder)))
        launches[-1].start()
        fault.wait_for_hit()
        if kind == "late":
            late = fault
    for thread in launches:
        thread.join()
    assert len(jobids) == len(SUBMISSIONS)
    # While it looks for the submissions, the answers to its questions are lost and mangled, too.
    for number, kind in enumerate(("garbage", "half", "fail-before", "hang-before")):
        site.faults.inject("squeue", kind, seconds=2)  # type: ignore[arg-type]
        site.faults.inject("sacct", ("half", "garbage", "hang-after", "fail-after")[number], seconds=2)  # type: ignore[arg-type]
    jobs = site.wait(list(jobids.values()), within=200)
    # The one that was delivered late arrives when it has long been submitted again and has ended.
    late.release()
    deadline = time.monotonic() + 30
    while list(site.slurm_jobs(folders["late"]).values()).count("75:0") != 1:
        assert time.monotonic() < deadline, site.slurm_jobs(folders["late"])
        time.sleep(0.2)
    for number, kind in enumerate(SUBMISSIONS):
        assert site.executions(folders[kind]) == 1, kind
        assert jobs[jobids[kind]]["exit_code"] == number, kind
        assert len(site.slurm_jobs(folders[kind])) == (2 if kind == "late" else 1), kind
    assert {job["exit_code"] for job in site.client.job_states(list(jobids.values()))["jobs"].values()} == set(range(8))


def test_a_submission_delivered_late_is_found_and_not_repeated(site: Site) -> None:
    folder = site.prepare("found-late", 3)
    late = site.faults.inject("sbatch", "late", seconds=15)
    jobid = str(site.client.submit(folder, "run.sh")["jobid"])
    job = site.wait([jobid], within=120)[jobid]
    assert (job["exit_code"], late.hits) == (3, 1)
    assert site.executions(folder) == 1
    assert list(site.slurm_jobs(folder).values()) == ["3:0"]
