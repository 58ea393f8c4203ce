"""During a maintenance nothing is submitted, nothing is lost, and everybody is told."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner, Result

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.cli.doctor import service
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import Unavailable
from aiida_marketplace_hpc.gateway.backends.base import Submission, Unknown
from aiida_marketplace_hpc.gateway.maintenance import Maintenance
from aiida_marketplace_hpc.gateway.schema import User
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ServedGateway

pytestmark = pytest.mark.databases


@pytest.fixture
def maintenance(gateway: Gateway) -> Maintenance:
    """As another process has it."""
    gateway.maintenance._clock = lambda: 0.0
    return Maintenance(gateway.ledger)


def look_again(gateway: Gateway) -> None:
    """What the gateway does after a second."""
    gateway.maintenance._asked = None
    gateway.jobs.reconcile()


def test_a_job_that_is_launched_meanwhile_waits_and_runs_once_afterwards(
    gateway: Gateway, maintenance: Maintenance, backend: FakeBackend, alice: User, folder: str
) -> None:
    maintenance.begin("new disks until noon")
    look_again(gateway)
    job = gateway.jobs.launch(alice, gateway.jobs.create_in_folder(alice, folder, "run.sh"))
    assert job.job_state is JobState.SUBMITTING
    for _ in range(2):
        look_again(gateway)
        assert "maintained" in str(gateway.jobs.get(alice, job.id).message)
        assert "new disks until noon" in str(gateway.jobs.get(alice, job.id).message)
    assert gateway.jobs.launch(alice, job).id == job.id
    assert backend.submissions == []
    maintenance.end()
    for _ in range(2):
        look_again(gateway)
        gateway.jobs._submissions.wait(job.id, 10)
    now = gateway.jobs.get(alice, job.id)
    assert (now.job_state, now.message) == (JobState.QUEUED, None)
    assert len(backend.submissions) == 1


def test_a_job_that_waits_can_be_cancelled(
    gateway: Gateway, maintenance: Maintenance, backend: FakeBackend, alice: User, folder: str
) -> None:
    maintenance.begin("")
    look_again(gateway)
    job = gateway.jobs.launch(alice, gateway.jobs.create_in_folder(alice, folder, "run.sh"))
    assert gateway.jobs.cancel(job).job_state is JobState.CANCELLED
    maintenance.end()
    look_again(gateway)
    assert backend.submissions == []


def test_a_submission_that_was_lost_before_it_is_found_again_and_not_repeated(
    gateway: Gateway,
    maintenance: Maintenance,
    backend: FakeBackend,
    alice: User,
    folder: str,
    later: list[timedelta],
) -> None:
    def lose(submission: Submission) -> str:
        raise Unknown("no answer")

    backend.on_submit = lose
    job = gateway.jobs.launch(alice, gateway.jobs.create_in_folder(alice, folder, "run.sh"))
    backend.on_submit = None
    maintenance.begin("")
    later.append(timedelta(hours=1))
    look_again(gateway)
    assert gateway.jobs.get(alice, job.id).job_state is JobState.SUBMITTING
    assert backend.submissions == []
    backend.accept(
        Submission(job.id, folder, f"{folder}/run.sh", b"", str(job.script_digest), f".guard-{job.id}", "", owner="x")
    )
    look_again(gateway)
    assert gateway.jobs.get(alice, job.id).scheduler_id == "101"
    assert len(backend.submissions) == 1


def test_what_runs_is_followed_to_its_end(
    gateway: Gateway, maintenance: Maintenance, backend: FakeBackend, alice: User, folder: str
) -> None:
    job = gateway.jobs.launch(alice, gateway.jobs.create_in_folder(alice, folder, "run.sh"))
    maintenance.begin("")
    backend.run("101")
    backend.end("101", exit_code=0)
    look_again(gateway)
    assert gateway.jobs.get(alice, job.id).job_state is JobState.COMPLETED


def test_it_may_be_said_again_with_other_words(maintenance: Maintenance) -> None:
    for message in ("soon", "later"):
        maintenance.begin(message)
        notice = maintenance.notice()
        assert notice is not None
        assert notice.message == message
    for _ in range(2):
        maintenance.end()
        assert maintenance.notice() is None


def drain(served: ServedGateway, *arguments: str) -> Result:
    state = str(served.gateway.settings.state)
    return CliRunner().invoke(main, ["gateway", "admin", "--state", state, "drain", *arguments])


def test_everybody_is_told(served: ServedGateway, tmp_path: Path) -> None:
    def heartbeat() -> dict[str, object]:
        answer: dict[str, object] = requests.get(f"{served.url}/heartbeat", timeout=20).json()
        return answer

    def is_draining(wanted: bool) -> None:
        wait_until(lambda: ("draining" in heartbeat()) is wanted, within=10, failure=lambda: str(heartbeat()))

    usual = heartbeat()
    assert not {"draining", "notice"} & set(usual)
    assert drain(served, "status").output == "off\n"
    assert drain(served, "on", "--message", "new disks").exit_code == 0
    is_draining(True)
    assert heartbeat() == {**usual, "draining": True, "notice": "new disks"}
    assert "new disks" in drain(served, "status").output
    with HpcGateway(served.url) as client:
        info = client.info(refresh=True)
        assert (info["draining"], info["notice"]) == (True, "new disks")
        with pytest.raises(Unavailable, match="new disks"):
            service._scheduler(client)
        assert drain(served, "off").exit_code == 0
        is_draining(False)
        assert "active jobs" in service._scheduler(client)
