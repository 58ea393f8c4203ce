"""A FirecREST for tests with processes as jobs, and what of the gateway stands on it."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.gateway.backends.base import Observation, Submission
from aiida_marketplace_hpc.gateway.backends.firecrest import FirecrestBackend
from aiida_marketplace_hpc.gateway.firecrest.accounts import OneAccount
from aiida_marketplace_hpc.gateway.firecrest.client import Cluster
from aiida_marketplace_hpc.gateway.firecrest.tokens import ServiceTokens
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.testing.firecrest_jobs import Processes
from aiida_marketplace_hpc.testing.firecrest_v2 import FirecrestDouble
from aiida_marketplace_hpc.testing.machine import Machine, wait_until
from aiida_marketplace_hpc.testing.oidc import SERVICE, SERVICE_SECRET, OidcProvider
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway


@pytest.fixture(scope="session")
def provider() -> Iterator[OidcProvider]:
    with OidcProvider() as provider:
        yield provider


@pytest.fixture(scope="session")
def shared_double(provider: OidcProvider) -> Iterator[FirecrestDouble]:
    with (
        Machine(getpass.getuser()) as machine,
        FirecrestDouble(machine, Processes(machine), provider, largest=64 * 1024, part_size=32 * 1024) as double,
    ):
        yield double


@pytest.fixture
def double(shared_double: FirecrestDouble) -> Iterator[FirecrestDouble]:
    """Without what an earlier test has left: faults, counts, jobs that live. It takes and gives at most 64 KiB at once."""
    shared_double.calls.clear()
    yield shared_double
    shared_double.faults.clear()
    shared_double.young.clear()
    shared_double.old.clear()
    shared_double.locked.clear()
    shared_double.before_answer = None
    shared_double.jobs.close()


@pytest.fixture
def folder(double: FirecrestDouble, tmp_path: Path) -> str:
    """A folder on the cluster."""
    path = Path(double.machine.home, tmp_path.name)
    path.mkdir()
    return str(path)


@pytest.fixture
def cluster(double: FirecrestDouble, provider: OidcProvider) -> Iterator[Cluster]:
    tokens = ServiceTokens(SERVICE, SERVICE_SECRET, f"{provider.issuer}/protocol/openid-connect/token")
    cluster = Cluster(double.url, double.system, tokens, timeout=10)
    yield cluster
    cluster.close()


@dataclass
class Site:
    """A backend and a folder for its jobs."""

    backend: FirecrestBackend
    double: FirecrestDouble
    folder: str
    now: list[float] = field(default_factory=lambda: [1000.0])

    def job(self, body: str = "true", *, directives: str = "", name: str = "job.sh", **more: Any) -> Submission:
        """A job whose script is in the folder."""
        folder = more.pop("folder", self.folder)
        text = f"#!/bin/sh\n{directives}\n{body}\n".encode()
        Path(folder, name).write_bytes(text)
        jobid = more.pop("jobid", "0123456789abcdef01234567")
        guard = f".marketplace-hpc-{jobid}"
        return Submission(
            jobid, folder, f"{folder}/{name}", text, "sha-256:0", guard, f"marketplace-hpc:{jobid}", **more
        )

    def observe(self, id: str, folder: str | None = None) -> Observation | None:
        """What the gateway would believe."""
        self.now[0] += 10
        queued = self.backend.queue().get(id)
        if queued is not None and not queued.state.final:
            return queued
        return self.backend.accounting({id: folder or self.folder}).get(id)

    def end_of(self, id: str) -> Observation:
        """Wait for the end of a job."""
        seen: list[Observation] = []

        def ended() -> bool:
            one = self.observe(id)
            if one is not None:
                seen.append(one)
            return one is not None and one.state.final and one.complete

        wait_until(ended, within=30, failure=lambda: f"job {id} does not end: {seen[-1:]}")
        return seen[-1]


@pytest.fixture
def site(double: FirecrestDouble, cluster: Cluster, folder: str) -> Site:
    site = Site(FirecrestBackend(OneAccount(cluster), clock=lambda: site.now[0]), double, folder)
    return site


@dataclass
class Reached:
    """A gateway on a FirecREST of any version, and a client of it."""

    served: ServedGateway
    client: HpcGateway

    @property
    def gateway(self) -> Gateway:
        return self.served.gateway

    @property
    def home(self) -> str:
        """Alice's, on the cluster."""
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

    def end_of(self, jobid: str) -> dict[str, Any]:
        """Wait for the end of a job."""
        wait_until(lambda: self.job(jobid)["final"], within=40, failure=lambda: f"no end: {self.job(jobid)}")
        return self.job(jobid)


@dataclass
class Remote(Reached):
    """The same on FirecREST v2."""

    double: FirecrestDouble


def remote_settings(double: FirecrestDouble, tmp_path: Path) -> dict[str, Any]:
    """What a gateway is told about the double."""
    return {
        "backend": "firecrest",
        "home": f"{double.machine.home}/{tmp_path.name}/{{username}}",
        "firecrest_url": double.url,
        "firecrest_system": double.system,
        "firecrest_token_url": f"{double.provider.issuer}/protocol/openid-connect/token",
        "firecrest_client_id": SERVICE,
        "firecrest_client_secret": SERVICE_SECRET,
    }


@pytest.fixture
def remote(double: FirecrestDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.backends.firecrest.SETTLING_TIME", 1.0)
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.service._RECONCILE_INTERVAL", 0.2)
    monkeypatch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])
    with ServedGateway(tmp_path, None, **remote_settings(double, tmp_path)) as served:
        client = HpcGateway(served.url, token_source="env:MP_ACCESS_TOKEN")
        yield Remote(served, client, double)
        client.close()
