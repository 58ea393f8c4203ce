"""G1, G3: two gateway processes on one database: each job runs once, whoever is asked, and also if one of them is frozen."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import MarketplaceHpcError
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.slurm import SlurmCluster
from aiida_marketplace_hpc.testing.slurm_faults import SlurmFaults

JOBS = 8
FREEZES = 6


class Pair:
    """Two gateways, and clients of them."""

    def __init__(self, first: GatewayProcess, second: GatewayProcess, place: Path, stack: ExitStack) -> None:
        self.processes = (first, second)
        self.place = place
        self._stack = stack
        self._token = place / "token"
        self._token.touch(mode=0o600)
        self._token.write_text(first.token)
        self.clients = (self.client(0), self.client(1))
        self.home = str(self.clients[0].info()["home"])

    def client(self, number: int) -> HpcGateway:
        return self._stack.enter_context(HpcGateway(self.processes[number].url, token_source=f"file:{self._token}"))

    def prepare(self, name: str, exit_code: int) -> str:
        """A folder with a script that counts its executions."""
        (self.place / name).write_text(f"#!/bin/sh\necho ran >> executed\nexit {exit_code}\n")
        folder = f"{self.home}/{name}"
        transfer.put_file(self.clients[0], self.place / name, f"{folder}/run.sh", parents=True)
        return folder

    def executions(self, folder: str) -> int:
        return self.processes[0].machine.read_text(f"{folder}/executed").count("ran")

    def wait(self, number: int, jobids: list[str], within: float) -> dict[str, dict[str, Any]]:
        """The jobs as one of the gateways sees them when all have ended."""
        deadline = time.monotonic() + within
        while True:
            jobs: dict[str, dict[str, Any]] = self.clients[number].job_states(jobids)["jobs"]
            if len(jobs) == len(jobids) and all(job["final"] for job in jobs.values()):
                return jobs
            assert time.monotonic() < deadline, jobs
            time.sleep(0.1)


@pytest.fixture
def pair_on(gateway_factory: Callable[..., GatewayProcess], tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    with ExitStack() as stack:

        def start(**parameters: Any) -> Pair:
            first = gateway_factory(**parameters)
            return Pair(first, gateway_factory(**parameters, beside=first), tmp_path, stack)

        yield start


@pytest.mark.parametrize(
    ("backend", "database"),
    [
        ("local", "sqlite"),
        pytest.param("slurm", "sqlite", marks=pytest.mark.services),
        pytest.param("local", "postgresql", marks=pytest.mark.services),
    ],
    indirect=["database"],
)
def test_whoever_is_asked_and_frozen_a_job_runs_once(pair_on: Callable[..., Pair], backend: str, database: str) -> None:
    kind = make_url(database).get_backend_name()
    # SQLite's file is in the state folder, where the gateway's account gets to it.
    pair = pair_on(backend=backend, env={"MARKETPLACE_HPC_DATABASE": database} if kind == "postgresql" else {})
    folders = [pair.prepare(f"two-gateways-{backend}-{kind}-{number}", number) for number in range(JOBS)]
    answers: list[list[str]] = [[] for _ in folders]
    problems: list[Exception] = []
    start = threading.Barrier(4)

    def ask(number: int) -> None:
        client = pair.client(number)
        start.wait()
        for folder, ids in zip(folders, answers, strict=True):
            while True:
                try:
                    ids.append(str(client.submit(folder, "run.sh")["jobid"]))
                    break
                except MarketplaceHpcError as exc:
                    if not exc.retryable:
                        problems.append(exc)
                        return

    seed = int(os.environ.get("MARKETPLACE_HPC_SEED", "0")) or random.randrange(10**6)
    dice = random.Random(seed)
    print(f"\nseed {seed}: {JOBS} jobs, {FREEZES} freezes")
    threads = [threading.Thread(target=ask, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(FREEZES):
        frozen = dice.choice(pair.processes)
        time.sleep(dice.uniform(0.0, 0.1))
        frozen.pause()
        time.sleep(dice.uniform(0.05, 0.4))
        frozen.resume()
    for thread in threads:
        thread.join()
    assert problems == []
    assert all(len(ids) == 4 and len(set(ids)) == 1 for ids in answers)
    jobids = [ids[0] for ids in answers]
    assert len(set(jobids)) == JOBS
    for number in range(2):
        jobs = pair.wait(number, jobids, within=60)
        assert [jobs[jobid]["exit_code"] for jobid in jobids] == list(range(JOBS))
    assert [pair.executions(folder) for folder in folders] == [1] * JOBS


@pytest.mark.services
@pytest.mark.timeout(400)
def test_a_gateway_that_is_frozen_across_its_lease_adds_no_execution(
    pair_on: Callable[..., Pair], slurm_cluster: SlurmCluster
) -> None:
    faults = SlurmFaults(slurm_cluster.machine)
    pair = pair_on(backend="slurm", env=faults.env)
    first, _ = pair.processes
    folders = [pair.prepare("frozen-before", 3), pair.prepare("frozen-after", 4)]
    hangs = []
    answers: list[str] = []
    threads = []
    for folder, kind in zip(folders, ("hang-before", "hang-after"), strict=True):
        hangs.append(faults.inject("sbatch", kind))  # type: ignore[arg-type]
        client = pair.client(0)

        def launch(client: HpcGateway = client, folder: str = folder) -> None:
            try:
                answers.append(str(client.submit(folder, "run.sh")["jobid"]))
            except MarketplaceHpcError:  # It has no answer from a gateway that is frozen for so long.
                pass

        threads.append(threading.Thread(target=launch))
        threads[-1].start()
        hangs[-1].wait_for_hit()
    first.pause()
    jobids = [str(pair.clients[1].submit(folder, "run.sh")["jobid"]) for folder in folders]
    ended = pair.wait(1, jobids, within=200)
    assert [ended[jobid]["exit_code"] for jobid in jobids] == [3, 4]

    def copies(folder: str) -> list[tuple[str, str]]:
        fields = "--format=State,ExitCode,WorkDir"
        said = slurm_cluster.run("sacct", "-X", "-a", "-n", "-P", fields, check=True).stdout
        rows = [line.split("|") for line in said.splitlines()]
        return [(state.split()[0], code) for state, code, where in rows if where == folder]

    # The documented race: the submission is delivered when another gateway has long taken over.
    for hang in hangs:
        hang.release()
    wait_until(lambda: len(copies(folders[0])) == 2, within=60, failure=lambda: "it was not delivered")
    first.resume()
    for thread in threads:
        thread.join()
    ends = {("FAILED", "75:0"), ("CANCELLED", "0:0")}
    wait_until(lambda: copies(folders[0])[1] in ends, within=60, failure=lambda: f"{copies(folders[0])}")
    print(f"copies: {[copies(folder) for folder in folders]}")
    assert copies(folders[0])[0] == ("FAILED", "3:0")
    assert copies(folders[1]) == [("FAILED", "4:0")]
    assert [pair.executions(folder) for folder in folders] == [1, 1]
    for number in range(2):
        jobs = pair.clients[number].job_states(jobids)["jobs"]
        assert [jobs[jobid]["exit_code"] for jobid in jobids] == [3, 4]
