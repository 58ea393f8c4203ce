"""A gateway that is started with other settings does not look for living jobs where they are not."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.gateway.continuity import check_living_jobs
from aiida_marketplace_hpc.gateway.ledger import Ledger, new_id
from aiida_marketplace_hpc.gateway.schema import Job
from aiida_marketplace_hpc.protocol import JobState

TOKEN = {"dev_token": {"alice@example.org": "token-of-alice"}}
FIRECREST = {
    **TOKEN,
    "backend": "firecrest",
    "home": "/home/{username}",
    "firecrest_url": "http://f7t.example.org",
    "firecrest_token": "secret",
}
SLURM = {**TOKEN, "backend": "slurm", "home": "/home/{username}"}

Add = Callable[..., str]


@pytest.fixture
def add(ledger: Ledger) -> Add:
    def add(backend: str, machine: str, scheduler_id: str | None, state: JobState = JobState.RUNNING) -> str:
        jobid = new_id()
        user = ledger.user_of(Identity("dev", "alice", "alice@example.org", "Alice"))
        job = Job(id=jobid, user_id=user.id, key=jobid, folder=f"/home/alice/{jobid}", script="run.sh")
        job.created_at = datetime.now(timezone.utc)
        job.state, job.backend, job.machine, job.scheduler_id = state.value, backend, machine, scheduler_id
        return ledger.add(job).id

    return add


ONE = {**FIRECREST, "firecrest_system": "daint"}
TWO = {**FIRECREST, "firecrest_system": "daint,eiger"}


@pytest.mark.parametrize(
    ("settings", "machine", "scheduler_id"),
    [
        pytest.param(ONE, "firecrest", "7", id="the only system"),
        pytest.param(ONE, "", "7", id="a job without a machine"),
        pytest.param(ONE, "daint", "7", id="the first of two, which is left alone"),
        pytest.param({**ONE, "machine": "Piz"}, "Piz", "7", id="the only system under another name"),
        pytest.param(TWO, "firecrest", "7", id="the only system, which has got a second one"),
        pytest.param(TWO, "daint", "7", id="the first of two"),
        pytest.param(TWO, "eiger", "eiger/7", id="the second of two"),
        pytest.param(TWO, "eiger", None, id="being submitted to the second of two"),
        pytest.param(TWO, "clariden", "clariden/7", id="one of three, which was taken away"),
    ],
)
def test_jobs_that_are_where_they_were_let_it_start(
    ledger: Ledger, add: Add, settings: dict[str, Any], machine: str, scheduler_id: str | None
) -> None:
    add("firecrest", machine, scheduler_id)
    check_living_jobs(load(settings), ledger)


@pytest.mark.parametrize(
    ("settings", "machine", "scheduler_id"),
    [
        pytest.param(ONE, "eiger", "eiger/7", id="the second of two is taken away"),
        pytest.param(ONE, "eiger", None, id="the second of two is taken away while it is submitted to"),
        pytest.param(ONE, "eiger", "7", id="the first of two is taken away"),
        pytest.param(TWO, "eiger", "7", id="the first of two is now the second"),
        pytest.param(TWO, "daint", "daint/7", id="the second of two is now the first"),
        pytest.param(SLURM, "firecrest", "7", id="another backend"),
    ],
)
def test_one_that_would_be_looked_for_elsewhere_keeps_it_from_starting(
    ledger: Ledger, add: Add, settings: dict[str, Any], machine: str, scheduler_id: str | None
) -> None:
    jobid = add("firecrest", machine, scheduler_id)
    with pytest.raises(ConfigurationError, match=f"{jobid}.*former settings.*drain"):
        check_living_jobs(load(settings), ledger)
    ledger.end(ledger.get(jobid), JobState.COMPLETED, "")  # type: ignore[arg-type]
    check_living_jobs(load(settings), ledger)


def test_what_a_scheduler_is_called_says_nothing_where_there_is_one(ledger: Ledger, add: Add) -> None:
    add("slurm", "former name", "7")
    check_living_jobs(load(SLURM), ledger)


def test_many_are_counted(ledger: Ledger, add: Add) -> None:
    for number in range(5):
        add("local", "local", str(number))
    with pytest.raises(ConfigurationError, match="and 2 more"):
        check_living_jobs(load(SLURM), ledger)


def test_serve_says_so_and_does_not_start(ledger: Ledger, add: Add, tmp_path: Path) -> None:
    jobid = add("slurm", "slurm", "7")
    settings = ["--dev-token", "me@example.org=a-token-of-mine", "--state", str(tmp_path / "state"), "--port", "0"]
    done = CliRunner().invoke(main, ["gateway", "serve", *settings, "--database", ledger.url])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), done.exception
    assert f"{jobid} (backend slurm, machine slurm, 7)" in done.stderr
