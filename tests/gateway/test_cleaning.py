"""Old folders of jobs: only those that the gateway made itself, only of jobs that have ended, and none by halves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import requests

from aiida_marketplace_hpc.gateway.cleaning import Cleaning
from aiida_marketplace_hpc.gateway.schema import Job, User
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.gateway.unfinished import Keep
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway

DAYS = 7
SCRIPT = b"#!/bin/sh\necho done\n"


@pytest.fixture
def clean(gateway: Gateway, clock: Callable[[], datetime]) -> Callable[[], None]:
    return Cleaning(gateway.ledger, gateway.files_of, Keep, timedelta(days=DAYS), now=clock).clean


@pytest.fixture
def home(gateway: Gateway, alice: User) -> str:
    root = gateway.files_of(alice).roots.by_name("home")
    assert root is not None
    return root.path


def made(gateway: Gateway, alice: User, home: str) -> Job:
    """A job as published, with something in its folder."""
    job = gateway.jobs.create_with_script(alice, home, SCRIPT)
    Path(job.folder, "results").mkdir()
    Path(job.folder, "results", "a").write_text("b")
    return job


def ended(gateway: Gateway, backend: FakeBackend, alice: User, job: Job, state: JobState = JobState.COMPLETED) -> Job:
    job = gateway.jobs.launch(alice, job)
    assert job.scheduler_id is not None
    backend.end(job.scheduler_id, state)
    gateway.watch.refresh()
    found = gateway.jobs.get(alice, job.id)
    assert found.job_state is state
    return found


def age(folder: str, days: float) -> None:
    """Let the last change of a folder be so long ago."""
    moment = time.time() - days * 86400
    os.utime(folder, (moment, moment))


def test_the_folder_of_a_job_is_removed_when_its_time_has_come(
    gateway: Gateway,
    backend: FakeBackend,
    alice: User,
    home: str,
    later: list[timedelta],
    clean: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed, done = (ended(gateway, backend, alice, made(gateway, alice, home)) for _ in range(2))
    later.append(timedelta(days=DAYS - 1))
    clean()
    assert Path(done.folder).exists()
    later.append(timedelta(days=2))
    with caplog.at_level("INFO"):
        clean()
    assert not Path(done.folder).exists()
    assert not Path(failed.folder).exists()
    assert f"the old folder {done.folder} was removed" in caplog.text
    assert list(Path(home, ".marketplace-hpc", "staging").iterdir()) == []
    assert gateway.jobs.get(alice, done.id).job_state is JobState.COMPLETED
    clean()


def test_what_is_used_or_somebodys_own_stays(
    gateway: Gateway,
    backend: FakeBackend,
    alice: User,
    home: str,
    folder: str,
    later: list[timedelta],
    clean: Callable[[], None],
) -> None:
    """Only the first of these goes."""
    goes = ended(gateway, backend, alice, made(gateway, alice, home))
    created = made(gateway, alice, home)
    lives = gateway.jobs.launch(alice, made(gateway, alice, home))
    own = ended(gateway, backend, alice, gateway.jobs.create_in_folder(alice, folder, "run.sh"))
    # A folder of a user's that looks like a job's.
    Path(home, "0" * 24).mkdir()
    # One in which AiiDA, say, ran a job of its own, and one below which it did.
    used = ended(gateway, backend, alice, made(gateway, alice, home))
    ended(gateway, backend, alice, gateway.jobs.create_in_folder(alice, used.folder, "job.sh", key="other"))
    above = ended(gateway, backend, alice, made(gateway, alice, home))
    Path(above.folder, "work").mkdir()
    Path(above.folder, "work", "run.sh").write_bytes(SCRIPT)
    ended(gateway, backend, alice, gateway.jobs.create_in_folder(alice, f"{above.folder}/work", "run.sh"))
    # One that a user put a link in the place of.
    linked = ended(gateway, backend, alice, made(gateway, alice, home))
    os.rename(linked.folder, f"{home}/elsewhere")
    os.symlink(f"{home}/elsewhere", linked.folder)
    later.append(timedelta(days=DAYS + 1))
    # One in which something has changed lately.
    changed = ended(gateway, backend, alice, made(gateway, alice, home))
    clean_folders = {job.id: job.folder for job in (created, lives, own, used, above, linked)}
    age(changed.folder, -DAYS - 1)
    clean()
    assert not Path(goes.folder).exists()
    assert [id for id, path in clean_folders.items() if not Path(path).is_dir()] == []
    assert Path(home, "0" * 24).is_dir()
    assert Path(home, "elsewhere", "results", "a").read_text() == "b"
    assert Path(changed.folder).is_dir()


def test_a_job_that_was_launched_in_the_last_moment_keeps_its_folder(
    gateway: Gateway,
    alice: User,
    backend: FakeBackend,
    home: str,
    later: list[timedelta],
    clean: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = ended(gateway, backend, alice, made(gateway, alice, home))
    later.append(timedelta(days=DAYS + 1))

    def launched_meanwhile(path: str, jobid: str) -> bool:
        gateway.jobs.launch(alice, gateway.jobs.create_in_folder(alice, path, "job.sh", key="again"))
        return False

    monkeypatch.setattr(gateway.ledger, "has_others_below", launched_meanwhile)
    clean()
    assert Path(job.folder, "results", "a").exists()


def test_a_folder_is_removed_as_a_whole(
    gateway: Gateway,
    alice: User,
    backend: FakeBackend,
    home: str,
    later: list[timedelta],
    clean: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = ended(gateway, backend, alice, made(gateway, alice, home))
    later.append(timedelta(days=DAYS + 1))
    unlink = os.unlink

    def killed(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "unlink", killed)
    clean()
    monkeypatch.setattr(os, "unlink", unlink)
    assert not Path(job.folder).exists()


def test_how_a_job_ended_is_known_longer_than_its_folder_is_kept(tmp_path: Path, backend: FakeBackend) -> None:
    headers = {"Authorization": f"Bearer {TOKENS[ALICE]}"}
    published = {"job_name": "a", "ntasks_per_node": 1, "partition": "p", "image": "i", "executable_cmd": "true"}
    with ServedGateway(tmp_path, backend, keep_job_folders=1e-9) as served:
        created = requests.post(f"{served.url}/api/v1/job/create", json=published, headers=headers, timeout=10).json()
        jobid, folder = created["jobid"], Path(created["folder"])
        requests.patch(f"{served.url}/api/v1/job/launch/{jobid}", headers=headers, timeout=10).raise_for_status()
        served.gateway.sweep()
        assert folder.exists()
        backend.end("101")
        served.gateway.watch.refresh()
        state = f"{served.url}/api/v1/job/state/{jobid}"
        while not (said := requests.get(state, headers=headers, timeout=10).json())["job"]["final"]:
            served.gateway.watch.refresh()
        assert [file["name"] for file in said["files"]] == ["job.sh"]
        served.gateway.sweep()
        assert not folder.exists()
        said = requests.get(state, headers=headers, timeout=10).json()
    assert (said["state"], said["files"]) == ("COMPLETED", [])
