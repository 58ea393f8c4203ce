"""Calculations that are killed while their job is being submitted: no job is left that nobody waits for.

Through the daemon and ``verdi process kill``, with a proxy before the gateway that does not let the submission through, or not
its answer.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

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

    def kill(self, pk: int, *options: str) -> None:
        """Kill it as its user does, and see it dead."""
        said = self.installation.profile.verdi("process", "kill", *options, str(pk), check=False)
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

    def reconcile(self, *options: str, label: str = LABEL, answer: str = "") -> subprocess.CompletedProcess[str]:
        """Run ``marketplace-hpc computer reconcile``."""
        profile = self.installation.profile
        command = [str(Path(sys.executable).with_name("marketplace-hpc")), "computer", "reconcile", label, *options]
        return profile.run(command, input=answer, env=self.installation.token, check=False)

    def submit_as_somebody_else(self, folder: str, client_ref: str | None, tmp_path: Path) -> str:
        """Submit a job that is no calculation of the profile; its id."""
        script = tmp_path / "run.sh"
        script.write_text("#!/bin/sh\nsleep 600\n")
        self.gateway.put_file(script, f"{folder}/run.sh", parents=True)
        return str(self.gateway.submit(folder, "run.sh", client_ref=client_ref)["jobid"])


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


@pytest.mark.parametrize("options", [[], pytest.param(["--force"], marks=pytest.mark.services)])
def test_a_job_whose_answer_hangs_is_cancelled_with_its_calculation(rig: Rig, options: list[str]) -> None:
    _, pk, uuid = rig.submit_into(StallAnswer(after=0))
    rig.wait_for_state(uuid, "RUNNING")
    rig.kill(pk, *options)
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
    # What identifies the job is asked for by the same request, whose answer is lost each time.
    _, pk, uuid = rig.submit_into(LoseAnswer(), times=None)
    rig.wait_for_state(uuid, "RUNNING")
    rig.kill(pk)
    advice = f"marketplace-hpc computer reconcile {LABEL}"
    wait_until(lambda: advice in rig.logged(pk), within=60, failure=lambda: rig.logged(pk))
    (job,) = rig.jobs(uuid)
    assert job["state"] == "RUNNING"

    (orphan,) = json.loads(rig.reconcile("--json").stdout)["orphans"]
    assert (orphan["jobid"], orphan["client_ref"], orphan["pk"]) == (job["jobid"], uuid, pk)
    assert orphan["process_state"] == "killed"
    refused = rig.reconcile(answer="n\n")
    assert (refused.returncode, job["jobid"] in refused.stdout) == (0, True)
    rig.wait_for_state(uuid, "RUNNING")
    agreed = rig.reconcile(answer="y\n")
    assert (agreed.returncode, "1 job cancelled" in agreed.stdout) == (0, True)
    rig.wait_for_state(uuid, "CANCELLED")


@pytest.mark.services
def test_reconcile_leaves_alone_what_may_be_somebody_elses(rig: Rig, site: Site, tmp_path: Path) -> None:
    (_, uuid), reference = rig.submit(), str(uuid4())
    rig.wait_for_state(uuid, "RUNNING")
    others = rig.submit_as_somebody_else(f"{site.home}/others-{reference}", reference, tmp_path)
    rig.submit_as_somebody_else(f"{site.home}/script-{reference}", None, tmp_path)

    said = json.loads(rig.reconcile("--json", "--yes").stdout)
    assert (said["orphans"], said["cancelled"]) == ([], [])
    assert [(job["jobid"], job["client_ref"], job["pk"]) for job in said["unknown"]] == [(others, reference, None)]
    assert len(rig.gateway.active_jobs()) == 3
    said = json.loads(rig.reconcile("--json", "--yes", "--unknown").stdout)
    assert said["cancelled"] == [others]
    rig.wait_for_state(reference, "CANCELLED")
    assert len(rig.gateway.active_jobs()) == 2
    assert "No job runs on" in rig.reconcile().stdout

    for label, words in (("localhost", "it has the transport core.local"), ("nowhere", "has no computer nowhere")):
        wrong = rig.reconcile(label=label)
        assert wrong.returncode == 2
        assert words in wrong.stderr
        assert "Traceback" not in wrong.stderr


@pytest.mark.services
def test_a_daemon_that_is_restarted_while_it_submits_cancels_nothing(rig: Rig, site: Site) -> None:
    _, pk, uuid = rig.submit_into(StallAnswer(after=0))
    rig.installation.stop_daemon()
    (job,) = rig.jobs(uuid)
    assert not job["final"]
    rig.installation.start_daemon()
    wait_until(
        lambda: rig.installation.run(f"print(json.dumps(orm.load_node({pk}).get_job_id()))") == job["jobid"],
        within=60,
        failure=lambda: rig.installation.profile.daemon_log(),
    )
    rig.wait_for_state(uuid, "RUNNING")
    assert site.gateway.machine.read_text(f"{job['folder']}/executed") == "ran\n"
