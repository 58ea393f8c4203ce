"""G1, G3: two gateways on one PostgreSQL behind one address, while each of them, or the database, is killed again and again.

On real processes. Every job runs once, and clients meet nothing but errors that say that asking again is right.
"""

from __future__ import annotations

import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import Unavailable
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine
from aiida_marketplace_hpc.testing.postgresql import PostgreSql
from aiida_marketplace_hpc.testing.roundrobin import RoundRobin
from tests.guarantees.test_g1_g3_kill_the_gateway import persist

JOBS = 9
USERS = 3
KILLS = 5

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]


class Replicas:
    """Two gateways on one database, behind one address, and the jobs of one user."""

    def __init__(self, processes: list[GatewayProcess], address: RoundRobin, place: Path, patience: float) -> None:
        self.processes = processes
        self.address = address
        self.submitted: dict[int, str] = {}
        self.problems: list[Exception] = []
        self._place = place
        self._name = f"replicas-{secrets.token_hex(3)}"  # Others use the same machine.
        self._deadline = time.monotonic() + patience
        self._token = place / "token"
        self._token.touch(mode=0o600)
        self._token.write_text(processes[0].token)

    def client(self, url: str = "") -> HpcGateway:
        return HpcGateway(url or self.address.url, token_source=f"file:{self._token}")

    def persist(self, action: Callable[[], object]) -> None:
        persist(action, self._deadline)

    def user(self, numbers: range) -> None:
        """Put the scripts there and submit them, each twice, as somebody does who has lost the answer."""
        try:
            for number in numbers:
                # A new connection for each job: the next gateway has its turn.
                with self.client() as gateway:
                    self._submit(gateway, number)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the test's own thread reports it.
            self.problems.append(exc)

    def _submit(self, gateway: HpcGateway, number: int) -> None:
        script = self._place / f"script-{number}"
        script.write_text(f"#!/bin/sh\necho ran >> executed\nsleep 0.2\nexit {number}\n")
        homes: list[str] = []
        self.persist(lambda: homes.append(str(gateway.info()["home"])))
        folder = f"{homes[-1]}/{self._name}-{number}"
        self.persist(lambda: transfer.put_file(gateway, script, f"{folder}/run.sh", parents=True))

        def launch() -> None:
            jobid = str(gateway.submit(folder, "run.sh")["jobid"])
            assert self.submitted.setdefault(number, jobid) == jobid

        for _ in range(2):
            self.persist(launch)

    def run(self, disturb: Callable[[], None]) -> None:
        """Let everybody submit while something is disturbed again and again."""
        users = [threading.Thread(target=self.user, args=(range(start, JOBS, USERS),)) for start in range(USERS)]
        for one in users:
            one.start()
        for _ in range(KILLS):
            disturb()
        for one in users:
            one.join()

    def check(self) -> None:
        """Each job has run once, and each gateway knows how it ended."""
        assert self.problems == []
        assert len(set(self.submitted.values())) == JOBS
        for process in self.processes:
            with self.client(process.url) as client:
                jobids = list(self.submitted.values())
                jobs = client.job_states(jobids)["jobs"]
                while not all(job["final"] for job in jobs.values()):
                    assert time.monotonic() < self._deadline, jobs
                    time.sleep(0.1)
                    jobs = client.job_states(jobids)["jobs"]
                home = client.info()["home"]
                assert set(client.list_jobs()) == set(jobids)
            for number, jobid in self.submitted.items():
                assert jobs[jobid]["exit_code"] == number
                executed = process.machine.read_text(f"{home}/{self._name}-{number}/executed")
                assert executed == "ran\n", f"job {number} ran {executed.count('ran')} times"
        assert all(self.address.served)


@pytest.fixture
def server(cluster_machine: Machine, postgresql_server: PostgreSql) -> Iterator[PostgreSql]:
    """A PostgreSQL that the test may kill; the other one says whether there can be one."""
    with PostgreSql(cluster_machine) as server:
        yield server


@pytest.fixture
def replicas(
    server: PostgreSql, gateway_factory: Callable[..., GatewayProcess], tmp_path: Path
) -> Iterator[Callable[[str], Replicas]]:
    with ExitStack() as stack:

        def start(backend: str) -> Replicas:
            env = {"MARKETPLACE_HPC_DATABASE": server.url(server.create())}
            first = gateway_factory(backend=backend, env=env)
            # The spool of the backend `local` is in the state folder; with Slurm gateways share nothing but the roots.
            second = gateway_factory(backend=backend, env=env, beside=first, own_state=backend == "slurm")
            address = stack.enter_context(RoundRobin([first.url, second.url]))
            made = Replicas([first, second], address, tmp_path, 100 if backend == "local" else 300)
            stack.callback(lambda: [_unsaid(server, process) for process in made.processes])
            return made

        yield start


def _unsaid(server: PostgreSql, process: GatewayProcess) -> None:
    assert server.password not in process.log


@pytest.fixture
def dice() -> random.Random:
    seed = int(os.environ.get("MARKETPLACE_HPC_SEED", "0")) or random.randrange(10**6)
    print(f"\nseed {seed}: {KILLS} kills, {JOBS} jobs")
    return random.Random(seed)


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_either_gateway_may_be_killed_while_jobs_are_submitted(
    replicas: Callable[[str], Replicas], backend: str, dice: random.Random
) -> None:
    pair = replicas(backend)

    def kill_one() -> None:
        time.sleep(dice.uniform(0.02, 0.6))
        victim = dice.choice(pair.processes)
        victim.kill()
        time.sleep(dice.uniform(0.0, 0.4))
        victim.restart()

    pair.run(kill_one)
    pair.check()


def test_the_database_may_be_killed_while_jobs_are_submitted(
    replicas: Callable[[str], Replicas], server: PostgreSql, dice: random.Random
) -> None:
    pair = replicas("local")

    def kill_database() -> None:
        time.sleep(dice.uniform(0.02, 0.6))
        server.kill()
        time.sleep(dice.uniform(0.0, 0.4))
        server.start()

    pair.run(kill_database)
    pair.check()
    assert all(process.running for process in pair.processes)


def test_without_its_database_a_gateway_says_so_and_goes_on_when_it_is_back(
    replicas: Callable[[str], Replicas], server: PostgreSql
) -> None:
    pair = replicas("local")
    with pair.client(pair.processes[0].url) as client:
        client.info()
        server.kill()
        assert "running" in client.heartbeat()["message"]
        with pytest.raises(Unavailable, match="database does not answer") as refused:
            client.list_jobs()
        assert refused.value.retryable
        server.start()
        assert client.list_jobs() == {}
