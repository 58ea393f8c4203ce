"""A calculation on a classic gateway, without AiiDA: the calls of transport and scheduler that AiiDA makes."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

from aiida.schedulers.datastructures import JobState

from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport


class Calculation:
    """A working directory, as AiiDA makes and uses one."""

    def __init__(self, transport: MarketplaceHpcTransport, scheduler: MarketplaceHpcScheduler, local: Path) -> None:
        self.transport, self.scheduler, self.local = transport, scheduler, local
        uuid = str(uuid4())
        shard = f"{transport.normalize('.')}/aiida/{uuid[:2]}/{uuid[2:4]}"
        transport.makedirs(shard, ignore_existing=True)
        self.work = f"{shard}/{uuid[4:]}"
        transport.mkdir(self.work)
        self.jobid = ""
        local.mkdir(exist_ok=True)

    def put(self, name: str, content: bytes | str) -> None:
        place = self.local / "put"
        place.write_bytes(content.encode() if isinstance(content, str) else content)
        self.transport.put(place, f"{self.work}/{name}")

    def submit(self, script: str, retrieved: list[object] | None = None) -> str:
        self.transport.makedirs(f"{self.work}/.aiida", ignore_existing=True)
        self.put(".aiida/calcinfo.json", json.dumps({"retrieve_list": retrieved or []}))
        self.put(
            "_aiidasubmit.sh",
            f"#!/bin/bash\n#SBATCH --output=_scheduler-stdout.txt\n#SBATCH --error=_scheduler-stderr.txt\n{script}\n",
        )
        jobid = self.scheduler.submit_job(self.work, "_aiidasubmit.sh")
        assert isinstance(jobid, str)
        self.jobid = jobid
        return jobid

    @property
    def state(self) -> JobState:
        return self.scheduler.get_jobs([self.jobid], as_dict=True)[self.jobid].job_state

    def wait(self) -> dict[str, object]:
        wait_until(lambda: self.state is JobState.DONE, within=30, failure=lambda: str(self.state))
        job = self.scheduler.get_detailed_job_info(self.jobid)["job"]
        assert isinstance(job, dict)
        return job

    def get(self, name: str) -> bytes:
        place = self.local / f"got-{uuid4()}"
        self.transport.getfile(f"{self.work}/{name}", place)
        return place.read_bytes()
