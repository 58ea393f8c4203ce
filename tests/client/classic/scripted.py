"""A classic gateway that answers as a test says, without a network; the journal is real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiida_marketplace_hpc.client.classic.disk import ClassicDisk
from aiida_marketplace_hpc.client.classic.gateway import Account, ClassicGateway, Look
from aiida_marketplace_hpc.client.classic.jobs import ClassicJobs
from aiida_marketplace_hpc.client.classic.records import read_records
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import ServerFault

HOME = "/cluster/home/alice"
WORK = f"{HOME}/aiida/ab/cd/0123-4567-89ab-cdef-0123456789ab"


class Scripted(ClassicGateway):
    """Has one folder per job, in memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(HpcGateway("http://127.0.0.1:1", token_source="env:NOWHERE"), folder)
        self._account = Account(HOME, "alice", "alice@example.org")
        self.files: dict[str, dict[str, bytes]] = {}
        self.launches: list[str] = []
        self.cancels: list[str] = []
        self.answer_to_cancel = "sent"
        self.on_launch: Callable[[str], None] = lambda jobid: None
        self.on_look: Callable[[str], None] = lambda jobid: None
        self.on_create: Callable[[], None] = lambda: None
        self._launching.create_job = self._create  # type: ignore[method-assign]

    def _create(self, fields: Any) -> str:
        self.on_create()
        jobid = f"{len(self.files):024x}"
        self.files[jobid] = {"job.sh": b"the provider's"}
        return jobid

    def launch(self, jobid: str) -> None:
        self.launches.append(jobid)
        self.on_launch(jobid)

    def cancel(self, jobid: str) -> str:
        self.cancels.append(jobid)
        return self.answer_to_cancel

    def look(self, jobid: str) -> Look:
        self.on_look(jobid)
        files = tuple(
            {"name": name, "size": str(len(content)), "type": "-"} for name, content in self.files[jobid].items()
        )
        return Look(files, read_records(files))

    def upload(self, jobid: str, name: str, content: bytes) -> None:
        self.files[jobid][name] = content

    def download(self, jobid: str, path: str) -> bytes:
        try:
            return self.files[jobid][path]
        except KeyError:
            raise failed(500) from None


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Site:
    """A working directory with a script, on a scripted gateway."""

    def __init__(self, folder: Path) -> None:
        self.gateway = Scripted(folder / "journal")
        self.clock = Clock()
        self.disk = ClassicDisk(self.gateway._gateway, self.gateway)
        self.jobs = self.new_jobs()
        self.disk.makedirs(WORK)
        (folder / "script").write_text("#!/bin/bash\ntrue\n")
        self.disk.putfile(folder / "script", f"{WORK}/run.sh")

    def new_jobs(self) -> ClassicJobs:
        """Those of another process, or of this one started anew."""
        return ClassicJobs(self.gateway, self.disk, clock=self.clock, sleep=self.clock.sleep)

    def submit(self) -> str:
        return str(self.jobs.submit(WORK, "run.sh")["jobid"])

    def state(self, jobid: str) -> dict[str, Any]:
        """The job as one poll answers it."""
        job: dict[str, Any] = self.jobs.job_states([jobid])["jobs"][jobid]
        return job

    def records(self, jobid: str, **sizes: int) -> None:
        """Put record files of these sizes into the job's folder; ``_`` in a name stands for ``-``."""
        for name, size in sizes.items():
            self.gateway.files[jobid][name.replace("_", "-")] = b"." * size


def failed(status: int) -> ServerFault:
    """An answer of the gateway's with this status."""
    error = ServerFault("unable to do that")
    error.http_status = status
    return error
