"""Jobs through a gateway on a real Slurm, and what each side says about them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.slurm import SlurmCluster


class SlurmJobs:
    """A user of a gateway on a Slurm.

    :param folder: where scripts are kept before they are uploaded.
    """

    _numbers = itertools.count()

    def __init__(self, process: GatewayProcess, slurm: SlurmCluster, folder: Path) -> None:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(process.token)
        self.process = process
        self.slurm = slurm
        self.client = HpcGateway(process.url, token_source=f"file:{token}")
        self.home = str(self.client.info()["home"])
        self._folder = folder

    def prepare(self, script: str, *directives: str) -> str:
        """Upload a script that notes each of its executions, and return its folder."""
        name = f"job-{next(self._numbers)}"
        local = self._folder / name
        header = "".join(f"#SBATCH {line}\n" for line in directives)
        local.write_text(f"#!/bin/bash\n{header}echo ran >> executed\n{script}\n")
        transfer.put_file(self.client, local, f"{self.home}/{name}/run.sh", parents=True)
        return f"{self.home}/{name}"

    def launch(self, folder: str) -> dict[str, Any]:
        """Create and launch the job of a folder; the same again is the same job."""
        job: dict[str, Any] = self.client.submit(folder, "run.sh")
        return job

    def submit(self, script: str, *directives: str) -> dict[str, Any]:
        """A new job, launched."""
        return self.launch(self.prepare(script, *directives))

    def state(self, job: dict[str, Any]) -> dict[str, Any]:
        """What the ledger says about a job."""
        found: dict[str, Any] = self.client.job_states([job["jobid"]])["jobs"][job["jobid"]]
        return found

    def wait_for(
        self, job: dict[str, Any], accept: Callable[[dict[str, Any]], bool], within: float = 40.0
    ) -> dict[str, Any]:
        """Wait until the ledger says what is wanted, and return all that it says."""
        deadline = time.monotonic() + within
        while not accept(seen := self.state(job)):
            assert time.monotonic() < deadline, f"{seen}\n{self.process.log[-3000:]}"
            time.sleep(0.2)
        return seen

    def wait_for_state(self, job: dict[str, Any], state: str, within: float = 40.0) -> dict[str, Any]:
        return self.wait_for(job, lambda seen: bool(seen["state"] == state), within)

    def wait_for_end(self, job: dict[str, Any], within: float = 40.0) -> dict[str, Any]:
        return self.wait_for(job, lambda seen: bool(seen["final"]), within)

    def executions(self, job: dict[str, Any]) -> int:
        """How often the script of a job was started."""
        path = f"{job['folder']}/executed"
        machine = self.process.machine
        return machine.read_text(path).count("ran\n") if machine.exists(path) else 0

    def wait_for_execution(self, job: dict[str, Any], within: float = 40.0) -> None:
        wait_until(lambda: self.executions(job) > 0, within=within, failure=lambda: f"{job['folder']} does not run")

    def submissions(self, job: dict[str, Any]) -> list[str]:
        """The ids of all jobs that Slurm has taken from the folder of a job, by its accounting."""
        # By id: a question by time overlooks a record without a start, which slurmdbd keeps now and then.
        ids = ",".join(str(id) for id in range(1, 1000))
        argv = ("sacct", "--allusers", "--allocations", "-n", "-P", f"--jobs={ids}", "--format=JobIDRaw,WorkDir")
        rows = [line.split("|") for line in self.slurm.run(*argv, check=True).stdout.splitlines()]
        return [id for id, folder in rows if folder == job["folder"]]
