"""FirecREST version 1: jobs, files and tokens, on the double of version 1.13.0 with processes as jobs."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import FileError, InvalidRequest, NotSupported
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.testing.firecrest_v1 import CLIENT, SECRET, FirecrestV1
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway

SUBMIT = "POST /compute/jobs/path"


@pytest.fixture(scope="module")
def shared() -> Iterator[FirecrestV1]:
    with FirecrestV1(tokens=("constant",)) as double:
        yield double


@pytest.fixture
def double(shared: FirecrestV1) -> Iterator[FirecrestV1]:
    shared.requests.clear()
    yield shared
    shared.faults.clear()
    shared.max_file_size = 5
    shared.down = False


@dataclass
class Remote:
    """A gateway on FirecREST v1, and a client of it."""

    served: ServedGateway
    client: HpcGateway
    double: FirecrestV1
    made: list[str] = field(default_factory=list)

    @property
    def gateway(self) -> Gateway:
        return self.served.gateway

    @property
    def home(self) -> str:
        return str(self.client.info()["home"])

    def script(self, name: str, body: str) -> str:
        """A folder of Alice's with the script ``run.sh`` in it."""
        folder = f"{self.home}/{name}"
        Path(folder).mkdir(parents=True)
        Path(folder, "run.sh").write_text(f"#!/bin/sh\n{body}\n")
        return folder

    def job(self, jobid: str) -> dict[str, Any]:
        """How a job is."""
        job: dict[str, Any] = self.client.job_states([jobid])["jobs"][jobid]
        return job

    def runs(self, jobid: str) -> None:
        """Wait until a job runs."""
        wait_until(lambda: self.job(jobid)["state"] == "RUNNING", within=30, failure=lambda: f"{self.job(jobid)}")

    def end_of(self, jobid: str) -> dict[str, Any]:
        """Wait for the end of a job."""
        wait_until(lambda: self.job(jobid)["final"], within=40, failure=lambda: f"no end: {self.job(jobid)}")
        return self.job(jobid)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gateway not wait as long as it does in earnest."""
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.backends.firecrest_v1.SETTLING_TIME", 1.0)
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.service._RECONCILE_INTERVAL", 0.2)
    monkeypatch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])


def settings(double: FirecrestV1, tmp_path: Path, **more: Any) -> dict[str, Any]:
    """What a gateway is told about the double."""
    tokens = {
        "firecrest_token_url": double.token_url,
        "firecrest_client_id": CLIENT,
        "firecrest_client_secret": SECRET,
    }
    return {
        "backend": "firecrest",
        "firecrest_version": 1,
        "home": f"{tmp_path}/cluster/{{username}}",
        "firecrest_url": double.url,
        "firecrest_system": double.machine,
        **({} if "firecrest_token" in more else tokens),
        **more,
    }


@pytest.fixture
def remote(double: FirecrestV1, tmp_path: Path, quick: None, request: pytest.FixtureRequest) -> Iterator[Remote]:
    more = getattr(request, "param", {})
    with ServedGateway(tmp_path, None, **settings(double, tmp_path, **more)) as served:
        client = HpcGateway(served.url, token_source="env:MP_ACCESS_TOKEN")
        yield Remote(served, client, double)
        client.close()


def test_a_job_from_its_submission_to_its_end(remote: Remote) -> None:
    folder = remote.script("job", "echo said; exit 3")
    end = remote.end_of(remote.client.submit(folder, "run.sh")["jobid"])
    assert (end["state"], end["exit_code"]) == ("FAILED", 3)
    assert Path(folder, f"slurm-{end['scheduler_id']}.out").read_text() == "said\n"
    assert remote.double.requests[SUBMIT] == 1
