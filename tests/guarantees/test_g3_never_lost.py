"""G3: a finished job is reported with its true end state, also when Slurm has forgotten it by then."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.slurm import SlurmCluster


def test_an_end_while_the_gateway_was_down_is_found_after_slurm_has_forgotten_the_job(
    slurm_cluster: SlurmCluster, gateway_factory: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    process = gateway_factory(backend="slurm")
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(process.token)
    client = HpcGateway(process.url, token_source=f"file:{token}")
    folder = f"{client.info()['home']}/forgotten"
    (tmp_path / "script").write_text("#!/bin/sh\nsleep 1\nexit 7\n")
    transfer.put_file(client, tmp_path / "script", f"{folder}/run.sh", parents=True)
    job = client.submit(folder, "run.sh")
    process.stop()
    slurm_cluster.wait_for(job["scheduler_id"], "FAILED")
    slurm_cluster.forget_ended_jobs()
    assert job["scheduler_id"] not in slurm_cluster.run("squeue", "--states=all", "-h", "-o", "%i").stdout.split()
    process.restart()

    def state() -> dict[str, Any]:
        found: dict[str, Any] = client.job_states([job["jobid"]])["jobs"][job["jobid"]]
        return found

    deadline = time.monotonic() + 20
    while not state()["final"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (state()["state"], state()["exit_code"]) == ("FAILED", 7)
    client.close()
