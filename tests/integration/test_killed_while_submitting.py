"""Calculations that are killed while their job is being submitted: no job is left that nobody waits for.

Through the daemon and ``verdi process kill``, with a proxy before the gateway that does not let the submission through, or not
its answer.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sites import Installation, Site

from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.faults import Fault, Injected, LoseAnswer, ProxiedRequest, StallAnswer, StallRequest
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.proxy import FaultyProxy

pytestmark = pytest.mark.parametrize(
    "site", ["local", pytest.param("slurm", marks=pytest.mark.services)], indirect=True, scope="session"
)

LABEL = "proxied"
LINE = "echo ran >>executed; sleep 600"


def is_submission(request: ProxiedRequest) -> bool:
    return request.path.endswith("/job/create")


@dataclass
class Rig:
    """The installation with a further computer, whose way to the gateway leads through the proxy."""

    installation: Installation
    proxy: FaultyProxy
    gateway: HpcGateway
    """The same gateway by the direct way."""

    def submit(self) -> tuple[int, str]:
        """Submit a calculation that would run for ten minutes; its primary key and UUID."""
        pk, uuid = self.installation.run(
            f"node = start(orm.load_code('bash@{LABEL}'), {LINE!r})\nprint(json.dumps([node.pk, node.uuid]))"
        )
        return int(pk), str(uuid)

    def submit_into(self, fault: Fault, times: int | None = 1) -> tuple[Injected, int, str]:
        """Submit a calculation and wait until the fault has happened to its submission."""
        injected = self.proxy.inject(fault, times=times, only=is_submission)
        pk, uuid = self.submit()
        wait_until(lambda: injected.hit > 0, within=60, failure=lambda: self.installation.profile.daemon_log())
        return injected, pk, uuid

    def kill(self, pk: int) -> None:
        """Kill it as its user does, and see it dead."""
        said = self.installation.profile.verdi("process", "kill", str(pk), check=False)
        assert "processed" in said.stdout + said.stderr
        (outcome,) = self.installation.profile.wait_for([pk]).values()
        assert outcome.state == "killed"

    def jobs(self, uuid: str) -> list[dict[str, Any]]:
        """The gateway's jobs of a calculation, whatever their state."""
        listed = self.gateway.list_jobs()
        found = [jobid for jobid, job in listed.items() if job["client_ref"] == uuid]
        return [self.gateway.show_job(jobid) for jobid in found]

    def wait_for_state(self, uuid: str, state: str) -> dict[str, Any]:
        """Wait until the only job of a calculation is in a state."""
        wait_until(
            lambda: [job["state"] for job in self.jobs(uuid)] == [state],
            within=60,
            failure=lambda: f"{self.jobs(uuid)}\n{self.installation.profile.daemon_log()}",
        )
        return self.jobs(uuid)[0]

    def logged(self, pk: int) -> str:
        said: list[str] = self.installation.run(f"print(json.dumps(report(orm.load_node({pk}))))")
        return "\n".join(said)

    def reconcile(self, *options: str, answer: str = "", check: bool = True) -> str:
        """Run ``marketplace-hpc computer reconcile`` for the computer."""
        profile = self.installation.profile
        command = [str(Path(sys.executable).with_name("marketplace-hpc")), "computer", "reconcile", LABEL, *options]
        return profile.run(command, input=answer, env=self.installation.token, check=check).stdout


@pytest.fixture(scope="module")
def proxied(installation: Installation, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    token = tmp_path_factory.mktemp("secret") / "token"
    token.touch(mode=0o600)
    token.write_text(site.gateway.token)
    with (
        FaultyProxy(site.gateway.url) as proxy,
        contextlib.closing(HpcGateway(site.gateway.url, token_source=f"file:{token}")) as gateway,
    ):
        installation.run(
            f"where = {{'label': {LABEL!r}, 'hostname': 'gateway', 'workdir': orm.load_computer('cluster').get_workdir()}}\n"
            "plugins = {'transport_type': 'marketplace_hpc', 'scheduler_type': 'marketplace_hpc'}\n"
            "computer = orm.Computer(**where, **plugins).store()\n"
            "computer.set_minimum_job_poll_interval(0.2)\n"
            f"computer.configure(url={proxy.url!r}, token_source='env:MP_ACCESS_TOKEN')\n"
            "orm.InstalledCode(label='bash', computer=computer, filepath_executable='/usr/bin/bash').store()\n"
            "print(json.dumps(computer.pk))"
        )
        yield Rig(installation, proxy, gateway)


@pytest.fixture
def rig(proxied: Rig) -> Iterator[Rig]:
    yield proxied
    proxied.proxy.clear()
    for job in proxied.gateway.active_jobs():
        proxied.gateway.cancel_job(job["jobid"])


def test_a_job_whose_answer_hangs_is_cancelled_with_its_calculation(rig: Rig) -> None:
    _, pk, uuid = rig.submit_into(StallAnswer(after=0))
    rig.wait_for_state(uuid, "RUNNING")
    rig.kill(pk)
    rig.wait_for_state(uuid, "CANCELLED")
    wait_until(lambda: "was cancelled" in rig.logged(pk), within=30, failure=lambda: rig.logged(pk))


def test_a_submission_that_arrives_after_the_kill_launches_nothing(rig: Rig, site: Site) -> None:
    _, pk, uuid = rig.submit_into(StallRequest(after=0))
    assert rig.jobs(uuid) == []
    rig.kill(pk)
    job = rig.wait_for_state(uuid, "CANCELLED")
    # As if it arrived now.
    assert rig.gateway.submit(job["folder"], job["script"], client_ref=uuid)["state"] == "CANCELLED"
    assert not site.gateway.machine.exists(f"{job['folder']}/executed")


@pytest.mark.services
def test_what_could_not_be_cancelled_is_said_and_found_by_reconcile(rig: Rig) -> None:
    injected, pk, uuid = rig.submit_into(LoseAnswer(), times=None)
    rig.wait_for_state(uuid, "RUNNING")
    rig.kill(pk)
    # At once, and again when the submission has come back or is to be tried again.
    said = "could not be cancelled"
    wait_until(lambda: rig.logged(pk).count(said) == 2, within=60, failure=lambda: rig.logged(pk))
    assert f"marketplace-hpc computer reconcile {LABEL}" in rig.logged(pk)
    injected.withdraw()
    (job,) = rig.jobs(uuid)
    assert job["state"] == "RUNNING"

    (orphan,) = json.loads(rig.reconcile("--json"))["orphans"]
    assert (orphan["jobid"], orphan["client_ref"], orphan["pk"]) == (job["jobid"], uuid, pk)
    assert orphan["process_state"] == "killed"
    assert job["jobid"] in rig.reconcile(answer="n\n", check=False)
    rig.wait_for_state(uuid, "RUNNING")
    assert "1 job cancelled" in rig.reconcile("--yes")
    rig.wait_for_state(uuid, "CANCELLED")
    assert "No job runs on" in rig.reconcile()
