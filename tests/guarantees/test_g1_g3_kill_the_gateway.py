"""G1 and G3: with a gateway that is killed again and again, every job runs exactly once, and every end is reported.

On real processes: the gateway is ended by SIGKILL at random instants while clients create, launch and repeat.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import ConnectionFailed, MarketplaceHpcError
from aiida_marketplace_hpc.testing.gateway import GatewayProcess

JOBS = 12
KILLS = 5


def persist(action: Callable[[], object], deadline: float) -> None:
    """Repeat an action until the gateway has answered it."""
    while True:
        try:
            action()
            return
        except MarketplaceHpcError as exc:
            if not exc.retryable or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("backend", "patience"),
    [
        ("local", 100),
        pytest.param("slurm", 300, marks=pytest.mark.services),
        pytest.param("firecrest", 300, marks=pytest.mark.services),
    ],
)
def test_every_job_runs_once_and_none_is_lost(
    gateway_factory: Callable[..., GatewayProcess], tmp_path: Path, backend: str, patience: float
) -> None:
    process = gateway_factory(backend=backend)
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(process.token)
    client = HpcGateway(process.url, token_source=f"file:{token}")
    home = str(client.info()["home"])
    deadline = time.monotonic() + patience
    submitted: dict[int, str] = {}
    problems: list[Exception] = []

    def user(numbers: list[int]) -> None:
        gateway = HpcGateway(process.url, token_source=f"file:{token}")
        try:
            for number in numbers:
                script = tmp_path / f"script-{number}"
                script.write_text(f"#!/bin/sh\necho ran >> executed\nsleep 0.2\nexit {number}\n")
                folder = f"{home}/{backend}-{number}"
                persist(
                    lambda folder=folder, script=script: transfer.put_file(  # type: ignore[misc]
                        gateway, script, f"{folder}/run.sh", parents=True
                    ),
                    deadline,
                )

                def launch(folder: str = folder, number: int = number) -> None:
                    submitted[number] = str(gateway.submit(folder, "run.sh")["jobid"])

                persist(launch, deadline)
                persist(launch, deadline)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the test's own thread reports it.
            problems.append(exc)
        finally:
            gateway.close()

    seed = int(os.environ.get("MARKETPLACE_HPC_SEED", "0")) or random.randrange(10**6)
    dice = random.Random(seed)
    print(f"\nseed {seed}: {KILLS} kills, {JOBS} jobs")
    users = [threading.Thread(target=user, args=([*range(start, JOBS, 3)],)) for start in range(3)]
    for one in users:
        one.start()
    for _ in range(KILLS):
        time.sleep(dice.uniform(0.02, 0.6))
        process.kill()
        process.restart()
    for one in users:
        one.join()
    assert problems == []
    assert len(set(submitted.values())) == JOBS

    def ended() -> bool:
        try:
            states = client.job_states(list(submitted.values()))["jobs"]
        except ConnectionFailed:
            return False
        return all(job["final"] for job in states.values())

    while not ended():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    jobs = client.job_states(list(submitted.values()))["jobs"]
    for number, jobid in submitted.items():
        executed = process.machine.read_text(f"{home}/{backend}-{number}/executed")
        assert executed == "ran\n", f"job {number} ran {executed.count('ran')} times"
        assert jobs[jobid]["exit_code"] == number
        assert jobs[jobid]["state"] == ("COMPLETED" if number == 0 else "FAILED")
    assert set(client.list_jobs()) == set(submitted.values())
    client.close()
