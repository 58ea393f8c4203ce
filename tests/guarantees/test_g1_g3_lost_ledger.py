"""G1 and G3 with a ledger that is lost: jobs that live are adopted, those that have run are not run again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import wait_until


@pytest.mark.parametrize("backend", ["local", pytest.param("slurm", marks=pytest.mark.services)])
def test_after_the_ledger_is_lost_every_script_still_runs_once(
    gateway_factory: Callable[..., GatewayProcess], tmp_path: Path, backend: str
) -> None:
    process = gateway_factory(backend=backend)
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(process.token)
    with HpcGateway(process.url, token_source=f"file:{token}") as gateway:
        folder = f"{gateway.info()['home']}/lost-ledger-{backend}"
        scripts = {
            "ended": "exit 3",
            "running": "while [ ! -e go ]; do sleep 0.1; done; exit 4",
            "waiting": "exit 5",
        }
        # The last one waits for its turn, whatever the number of processors.
        held = "#SBATCH --begin=now+15\n" if backend == "slurm" else ""
        names = {"ended": "", "running": "", "waiting": held}

        def submit(name: str) -> str:
            script = tmp_path / name
            script.write_text(f"#!/bin/sh\n{names[name]}echo ran >> executed\n{scripts[name]}\n")
            transfer.put_file(gateway, script, f"{folder}/{name}/run.sh", parents=True)
            return str(gateway.submit(f"{folder}/{name}", "run.sh", client_ref=f"node-{name}")["jobid"])

        def state(jobid: str) -> str:
            return str(gateway.show_job(jobid)["state"])

        before = {"ended": submit("ended")}
        wait_until(lambda: state(before["ended"]) == "FAILED", within=30, failure=lambda: state(before["ended"]))
        before["running"] = submit("running")
        wait_until(lambda: state(before["running"]) == "RUNNING", within=30, failure=lambda: state(before["running"]))
        before["waiting"] = submit("waiting")
        process.kill()
        process.machine.run(["sh", "-c", f"rm {process.state}/ledger.sqlite*"], check=True)
        process.start()
        after = {name: submit_again(gateway, folder, name) for name in scripts}
        assert after == before
        assert gateway.show_job(after["running"])["client_ref"] == "node-running"
        process.machine.run(["touch", f"{folder}/running/go"], check=True)
        ended = time.monotonic() + 60
        for name, code in (("ended", 3), ("running", 4), ("waiting", 5)):
            while gateway.show_job(after[name])["exit_code"] is None:
                assert time.monotonic() < ended, gateway.show_job(after[name])
                time.sleep(0.1)
            assert gateway.show_job(after[name])["exit_code"] == code
            assert process.machine.read_text(f"{folder}/{name}/executed") == "ran\n"


def submit_again(gateway: HpcGateway, folder: str, name: str) -> str:
    """What AiiDA does when it does not know whether it has submitted."""
    return str(gateway.submit(f"{folder}/{name}", "run.sh")["jobid"])
