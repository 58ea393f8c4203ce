"""``marketplace-hpc gateway admin``: what only a person can know."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiida.schedulers.datastructures import JobState
from click.testing import CliRunner, Result

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport


@pytest.fixture
def jobid(scheduler: MarketplaceHpcScheduler, transport: MarketplaceHpcTransport, tmp_path: Path) -> str:
    folder = f"{transport.normalize('.')}/work"
    transport.mkdir(folder)
    (tmp_path / "script").write_text("#!/bin/bash\n")
    transport.put(tmp_path / "script", f"{folder}/run.sh")
    return str(scheduler.submit_job(folder, "run.sh"))


def admin(served: ServedGateway, *arguments: str) -> Result:
    state = str(served.gateway.settings.state)
    return CliRunner().invoke(main, ["gateway", "admin", "--state", state, *arguments])


def test_a_job_that_the_scheduler_has_lost_ends_when_the_operator_says_so(
    served: ServedGateway, scheduler: MarketplaceHpcScheduler, backend: FakeBackend, jobid: str
) -> None:
    backend.forget("101")
    assert scheduler.get_jobs([jobid], as_dict=True)[jobid].job_state is JobState.QUEUED
    done = admin(served, "end-job", jobid, "--reason", "accounting lost")
    assert (done.exit_code, done.output) == (0, f"{jobid} NODE_FAIL\n")
    info = scheduler.get_jobs([jobid], as_dict=True)[jobid]
    assert info.job_state is JobState.DONE
    assert info.raw_data["message"] == "ended by the operator: accounting lost"
    exit_code = scheduler.parse_output(scheduler.get_detailed_job_info(jobid), "", "")
    assert exit_code is not None
    assert exit_code.status == 140
    again = admin(served, "end-job", jobid)
    assert again.exit_code == 1
    assert "has ended already" in again.output


def test_what_cannot_be_ended_is_said(served: ServedGateway, tmp_path: Path) -> None:
    assert "there is no job" in admin(served, "end-job", "f" * 24).output
    elsewhere = CliRunner().invoke(main, ["gateway", "admin", "--state", str(tmp_path / "x"), "end-job", "f" * 24])
    assert elsewhere.exit_code == 1
    assert "there is no database" in elsewhere.output
    assert not (tmp_path / "x").exists()


def test_the_configuration_of_a_gateway_with_software_for_all_serves_here_too(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(
        'backend = "slurm"\nhome = "/scratch/gateway/{username}"\nroot = ["software=/opt/software:ro"]\n'
        f'state = "{tmp_path}/state"\n'
    )
    said = CliRunner().invoke(main, ["gateway", "admin", "--config", str(file), "user", "list"]).output
    assert "there is no database" in said
