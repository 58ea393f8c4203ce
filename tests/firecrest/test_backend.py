"""Jobs through FirecREST: what its answers mean, and what is made of those that do not come."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.gateway.backends.base import (
    BackendError,
    Deferred,
    Fault,
    Refused,
    SchedulerDown,
    Unknown,
)
from aiida_marketplace_hpc.gateway.backends.firecrest import FirecrestBackend
from aiida_marketplace_hpc.gateway.backends.wrapper import EXIT_SECOND_COPY
from aiida_marketplace_hpc.gateway.firecrest.accounts import OneAccount
from aiida_marketplace_hpc.gateway.firecrest.client import Cluster
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.firecrest_jobs import Processes
from tests.firecrest.conftest import Site

EARLIER = timedelta(seconds=5)


def now() -> datetime:
    return datetime.now(timezone.utc)


def test_a_job_from_its_submission_to_its_end(site: Site) -> None:
    job = site.job("echo said; echo wrong >&2; exit 3", directives="#SBATCH --output=out --error=err")
    id = site.backend.submit(job)
    one = site.end_of(id)
    assert (one.state, one.exit_code, one.signal, one.folder, one.name) == (
        JobState.FAILED,
        3,
        None,
        site.folder,
        "job.sh",
    )
    assert one.ended_at is not None
    assert one.started_at is not None
    assert one.time_limit == 600
    record = dict(zip(one.columns, one.rows[0], strict=True))
    assert (record["JobID"], record["State"], record["ExitCode"]) == (id, "FAILED", "3:0")
    assert Path(site.folder, "out").read_text() == "said\n"
    assert Path(site.folder, "err").read_text() == "wrong\n"
    lines = Path(site.folder, job.guard).read_text().splitlines()
    assert lines[0] == id
    assert lines[-1].startswith(f"ended {id} ")


def test_the_same_submission_twice_runs_user_code_once(site: Site) -> None:
    job = site.job("echo ran >> executed")
    first, second = site.backend.submit(job), site.backend.submit(job)
    codes = {site.end_of(first).exit_code, site.end_of(second).exit_code}
    assert codes == {0, EXIT_SECOND_COPY}
    assert Path(site.folder, "executed").read_text() == "ran\n"


def test_a_job_is_cancelled_and_one_that_has_ended_is_no_error(site: Site) -> None:
    id = site.backend.submit(site.job("sleep 60"))
    site.backend.cancel(id, "/somewhere/else")
    assert site.observe(id).state is JobState.RUNNING  # type: ignore[union-attr]
    site.backend.cancel(id, site.folder)
    assert site.end_of(id).state is JobState.CANCELLED
    site.backend.cancel(id, site.folder)
    site.backend.cancel(id)
    site.backend.cancel("424242")


@pytest.mark.parametrize(
    ("script", "what"),
    [
        (b"echo\n", "batch script"),
        (b"#!/bin/sh\n#SBATCH --partition=nowhere\ntrue\n", "partition"),
        (b"#!/bin/sh\n#SBATCH --job-name=a|b\ntrue\n", "cannot list jobs"),
        (b"#!/bin/sh\n#SBATCH --clusters=other\ntrue\n", "other clusters"),
        (b"#!/bin/sh\n# \xff\ntrue\n", "UTF-8"),
    ],
)
def test_what_is_refused(site: Site, script: bytes, what: str) -> None:
    job = site.job()
    Path(job.script).write_bytes(script)
    with pytest.raises(Refused, match=what):
        site.backend.submit(type(job)(**{**vars(job), "script_text": script}))


@pytest.mark.parametrize("name", ["it's", "a|b", "two\nlines"])
def test_a_folder_that_would_not_be_taken_for_what_it_is_never_gets_there(site: Site, name: str) -> None:
    folder = Path(site.folder, name)
    folder.mkdir()
    with pytest.raises(Refused):
        site.backend.submit(site.job(folder=str(folder)))
    assert site.double.calls["submit"] == 0


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 408}, Unknown),
        ({"status": 408, "carried_out": True}, Unknown),
        ({"status": None, "carried_out": True}, Unknown),
        ({"status": 424, "message": "Unable to establish SSH connection."}, Unknown),
        ({"status": 502, "own": False}, Unknown),
        ({"status": 504, "own": False, "carried_out": True}, Unknown),
        ({"status": 500, "message": "Unable to submit new job"}, Unknown),
        ({"status": 503, "message": "The scheduler service is unhealthy."}, Deferred),
        ({"status": 404, "message": "System not found"}, Fault),
        ({"status": 403, "message": "QOSMaxSubmitJobPerUserLimit: Job violates accounting/QOS policy"}, Deferred),
        (
            {
                "status": 500,
                "message": "Unexpected Slurm command response. exit_status:1 std_err:sbatch: error: Batch job "
                "submission failed: Socket timed out on send/recv operation",
            },
            Unknown,
        ),
    ],
)
def test_what_a_failed_submission_means(site: Site, fault: dict[str, Any], error: type[BackendError]) -> None:
    site.double.fail("submit", **fault)
    with pytest.raises(error) as raised:
        site.backend.submit(site.job())
    assert raised.type is error
    assert site.double.calls["submit"] == 1


def test_too_many_calls_are_made_later(site: Site) -> None:
    site.double.fail("submit", status=429, headers={"Retry-After": "0.2"})
    assert site.end_of(site.backend.submit(site.job())).state is JobState.COMPLETED
    site.double.fail("submit", status=429, headers={"Retry-After": "60"}, times=2)
    with pytest.raises(Deferred):
        site.backend.submit(site.job())
    before = sum(site.double.calls.values())
    with pytest.raises(SchedulerDown, match="fewer calls"):
        site.backend.queue()
    assert sum(site.double.calls.values()) == before


@pytest.mark.parametrize(
    "fault", [{"status": 408}, {"status": None}, {"status": 500, "message": "Error executing Slurm command."}]
)
def test_no_answer_about_jobs_says_nothing(site: Site, fault: dict[str, Any]) -> None:
    id = site.backend.submit(site.job("sleep 60"))
    for question in (
        lambda: site.backend.queue(),
        lambda: site.backend.accounting({id: site.folder}),
        lambda: site.backend.find(site.folder, now()),
    ):
        site.double.fail("jobs", **fault)
        with pytest.raises(SchedulerDown):
            question()


def test_a_lost_submission_is_found_by_its_folder(site: Site) -> None:
    since = now()
    job = site.job("sleep 60")
    site.double.fail("submit", status=408, carried_out=True)
    with pytest.raises(Unknown):
        site.backend.submit(job)
    [found] = site.backend.find(site.folder, since)
    assert not found.state.final
    [trace] = site.backend.traces([found.id]).values()
    assert (trace.jobid, trace.folder, trace.attempt) == (job.jobid, site.folder, 1)
    assert site.backend.find(str(Path(site.folder).parent), since) == []


def test_a_job_that_a_lost_ledger_has_forgotten_is_not_submitted_again(site: Site, cluster: Cluster) -> None:
    site.backend.submit(site.job("sleep 60"))
    reborn = FirecrestBackend(OneAccount(cluster))
    with pytest.raises(Deferred, match="forgotten"):
        reborn.submit(site.job("sleep 60", jobid="f" * 24))
    assert site.double.calls["submit"] == 1
    site.double.fail("jobs", status=408)
    with pytest.raises(Deferred, match="not known"):
        FirecrestBackend(OneAccount(cluster)).submit(site.job("sleep 60"))
    elsewhere = Path(site.folder, "elsewhere")
    elsewhere.mkdir()
    reborn.submit(site.job(folder=str(elsewhere), jobid="e" * 24))
    assert site.double.calls["submit"] == 2


def test_a_young_job_is_not_there_and_nothing_follows(site: Site) -> None:
    id = site.backend.submit(site.job("sleep 60"))
    site.double.young.add(id)
    assert site.observe(id) is None
    assert site.backend.traces([id]) == {}
    site.double.young.clear()
    assert site.observe(id) is not None


def test_a_job_of_yesterday_is_asked_for_by_its_id(site: Site) -> None:
    id = site.backend.submit(site.job("exit 5"))
    site.end_of(id)
    site.double.old.add(id)
    one = site.observe(id)
    assert one is not None
    assert (one.state, one.exit_code) == (JobState.FAILED, 5)
    assert id not in site.backend.queue()


def test_a_job_that_slurm_has_forgotten_has_left_a_note(site: Site) -> None:
    since = now()
    id = site.backend.submit(site.job("exit 6"))
    site.end_of(id)
    site.double.young.add(id)  # In no answer.
    one = site.observe(id)
    assert one is not None
    assert (one.state, one.exit_code, one.complete) == (JobState.FAILED, 6, True)
    [found] = site.backend.find(site.folder, since)
    assert (found.id, found.exit_code) == (id, 6)
    assert site.observe(id, "/somewhere/else") is None


def test_a_record_that_is_not_whole_proves_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    id = site.backend.submit(site.job("sleep 60"))
    whole = site.double.jobs.records

    def half(user: str, of: str | None = None) -> list[dict[str, Any]]:
        return [{**one, "name": "allocation", "partition": "", "workingDirectory": ""} for one in whole(user, of)]

    monkeypatch.setattr(site.double.jobs, "records", half)
    assert id not in site.backend.queue()
    assert site.observe(id) is None
    with pytest.raises(SchedulerDown, match="not whole"):
        site.backend.find(site.folder, now())


def test_a_job_that_breaks_the_listing_is_named(site: Site) -> None:
    jobs = site.double.jobs
    assert isinstance(jobs, Processes)
    poison = jobs.submit("#!/bin/sh\n#SBATCH --job-name='a|b'\nsleep 60\n", site.folder, "service-account-service")
    with pytest.raises(SchedulerDown, match=r"a \| in its name"):
        site.backend.queue()
    jobs.forget(poison)
    assert poison not in site.backend.queue()


def test_a_poll_of_a_thousand_jobs_is_one_call(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    [record] = site.double.jobs.records("", site.backend.submit(site.job("sleep 60")))
    ended = {"status": {"state": "COMPLETED", "stateReason": "None", "exitCode": 0, "interruptSignal": 0}}
    times = {"time": {**record["time"], "end": record["time"]["start"]}}
    many = [
        {**record, "jobId": str(number), "workingDirectory": f"/x/{number}", **(ended | times if number % 2 else {})}
        for number in range(1000, 2000)
    ]
    monkeypatch.setattr(site.double.jobs, "records", lambda *_: many)
    site.double.calls.clear()
    queue = site.backend.queue()
    found = site.backend.accounting({id: f"/x/{id}" for id, one in queue.items() if one.state.final})
    assert (len(queue), len(found), all(one.complete for one in found.values())) == (1000, 500, True)
    assert site.double.calls.total() == 1


def test_jobs_that_are_not_listed_are_asked_for_in_turn(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.backends.firecrest.ASKED_AT_ONCE", 2)
    asked: list[str | None] = []

    def records(_: str, id: str | None = None) -> list[dict[str, Any]]:
        asked.append(id)
        return []

    monkeypatch.setattr(site.double.jobs, "records", records)
    lost = {str(number): site.folder for number in range(1000, 1005)}
    for _ in range(3):
        assert site.backend.accounting(lost) == {}
    one_by_one = [id for id in asked if id]
    assert len(one_by_one) == 6
    assert set(one_by_one) == set(lost)


def test_the_map_of_states_is_that_of_slurm(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    [record] = site.double.jobs.records("", site.backend.submit(site.job("sleep 60")))
    expected = {
        "PENDING": JobState.QUEUED,
        "CANCELLED by 1000": JobState.CANCELLED,
        "OUT_OF_MEMORY": JobState.OUT_OF_MEMORY,
        "DEADLINE": JobState.DEADLINE,
        "TIMEOUT": JobState.TIMEOUT,
        "COMPLETING": JobState.RUNNING,
        "NEVER_HEARD_OF": JobState.RUNNING,
    }
    for native, state in expected.items():
        status = {"state": native, "stateReason": "None", "exitCode": 0, "interruptSignal": 0}
        monkeypatch.setattr(site.double.jobs, "records", lambda *_, status=status: [{**record, "status": status}])
        [one] = site.backend.queue().values()
        assert one.state is state


def test_an_array_is_one_job(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    [record] = site.double.jobs.records("", site.backend.submit(site.job("sleep 60")))
    tasks = [
        {**record, "jobId": "77_1"},
        {**record, "jobId": "77_[2-5]", "status": {**record["status"], "state": "PENDING"}},
    ]
    monkeypatch.setattr(site.double.jobs, "records", lambda *_: tasks)
    [(id, one)] = site.backend.queue().items()
    assert (id, one.state) == ("77", JobState.RUNNING)


@pytest.mark.parametrize("broken", [{"status": None}, {"jobId": "x"}, {"time": {"limit": "soon"}}])
def test_what_cannot_be_read_is_no_answer(site: Site, monkeypatch: pytest.MonkeyPatch, broken: dict[str, Any]) -> None:
    [record] = site.double.jobs.records("", site.backend.submit(site.job("sleep 60")))
    monkeypatch.setattr(site.double.jobs, "records", lambda *_: [{**record, **broken}])
    with pytest.raises(SchedulerDown):
        site.backend.queue()


def test_the_sites_defaults_count_where_the_script_says_nothing(site: Site) -> None:
    job = site.job(directives="#SBATCH --time=00:07:00")
    id = site.backend.submit(replace(job, options={"time": "00:03:00", "account": "default"}))
    said = [line for line in site.double.jobs.script(id).splitlines() if line.startswith("#SBATCH")]
    assert '#SBATCH --account="default"' in said
    assert not any("00:03:00" in line for line in said)
    site.backend.cancel(id)
