"""The scheduler over a real HTTP gateway with a batch system that does what the test says."""

from __future__ import annotations

import asyncio
import threading
import uuid
from pathlib import Path

import pytest
from aiida.engine import ExitCode
from aiida.schedulers import SchedulerError
from aiida.schedulers.datastructures import JobInfo, JobState
from aiida.transports.plugins.local import LocalTransport
from plumpy.greenback_bridge import ensure_portal

from aiida_marketplace_hpc import protocol
from aiida_marketplace_hpc import scheduler as scheduler_module
from aiida_marketplace_hpc.errors import Unauthorized, Unavailable
from aiida_marketplace_hpc.gateway.backends.base import Refused, Submission
from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler, job_info
from aiida_marketplace_hpc.submission import calculation_uuid
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.faults import Fault, LoseAnswer, Refuse
from aiida_marketplace_hpc.testing.proxy import FaultyProxy
from aiida_marketplace_hpc.testing.served import ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

UUID = str(uuid.UUID(int=0x1234567890ABCDEF1234567890ABCDEF))


@pytest.fixture
def workdir(transport: MarketplaceHpcTransport, tmp_path: Path) -> str:
    path = f"{transport.normalize('.')}/aiida/{UUID[:2]}/{UUID[2:4]}/{UUID[4:]}"
    transport.makedirs(path)
    (tmp_path / "script").write_text("#!/bin/bash\necho 1\n")
    transport.put(tmp_path / "script", f"{path}/_aiidasubmit.sh")
    return path


def state_of(scheduler: MarketplaceHpcScheduler, jobid: str) -> JobInfo:
    jobs = scheduler.get_jobs([jobid], as_dict=True)
    assert list(jobs) == [jobid]
    return jobs[jobid]


def test_submitting_twice_is_one_job_with_the_calculations_uuid(
    scheduler: MarketplaceHpcScheduler, workdir: str, backend: FakeBackend
) -> None:
    first = scheduler.submit_job(workdir, "_aiidasubmit.sh")
    assert scheduler.submit_job(workdir, "_aiidasubmit.sh") == first
    assert len(backend.submissions) == 1
    assert UUID in backend.submissions[0].comment


def test_the_life_of_a_job(scheduler: MarketplaceHpcScheduler, workdir: str, backend: FakeBackend) -> None:
    jobid = scheduler.submit_job(workdir, "_aiidasubmit.sh")
    assert isinstance(jobid, str)
    assert state_of(scheduler, jobid).job_state is JobState.QUEUED
    assert [job.job_id for job in scheduler.get_jobs()] == [jobid]
    backend.run("101")
    wait_until(lambda: state_of(scheduler, jobid).job_state is JobState.RUNNING)
    backend.end("101", protocol.JobState.FAILED, exit_code=4)
    wait_until(lambda: state_of(scheduler, jobid).job_state is JobState.DONE)
    info = state_of(scheduler, jobid)
    assert (info.exit_status, info.raw_data["scheduler_id"], info.raw_data["state"]) == (4, "101", "FAILED")
    assert JobInfo.load_from_serialized(info.serialize()).finish_time is not None
    assert scheduler.get_jobs() == []


def wait_until(condition: object, seconds: float = 10.0) -> None:
    import time

    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_poll_does_not_wait_for_transfers(
    scheduler: MarketplaceHpcScheduler, transport: MarketplaceHpcTransport, workdir: str
) -> None:
    jobid = scheduler.submit_job(workdir, "_aiidasubmit.sh")
    ended = threading.Event()

    async def main() -> JobInfo:
        await ensure_portal()
        run = transport.connection.off_loop.run
        transfers = [asyncio.ensure_future(run(ended.wait, 20)) for _ in range(transport.max_io_allowed)]
        await asyncio.sleep(0)
        try:
            return state_of(scheduler, str(jobid))
        finally:
            assert not any(transfer.done() for transfer in transfers)
            ended.set()
            await asyncio.gather(*transfers)

    assert asyncio.run(main()).job_state is JobState.QUEUED


def test_a_job_that_is_not_known_is_undetermined_and_troubles_nobody_else(
    scheduler: MarketplaceHpcScheduler, workdir: str
) -> None:
    jobid = scheduler.submit_job(workdir, "_aiidasubmit.sh")
    jobs = scheduler.get_jobs([jobid, "f" * 24], as_dict=True)
    assert jobs[jobid].job_state is JobState.QUEUED
    assert jobs["f" * 24].job_state is JobState.UNDETERMINED
    assert "no such job" in jobs["f" * 24].raw_data["reason"]


def test_a_gateway_that_does_not_answer_ends_no_job(
    scheduler: MarketplaceHpcScheduler, workdir: str, served: ServedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobid = scheduler.submit_job(workdir, "_aiidasubmit.sh")
    state_of(scheduler, jobid)
    url = served.url
    served.stop()
    monkeypatch.setattr(scheduler._connection.gateway._session, "_sleep", lambda _: None)
    info = state_of(scheduler, jobid)
    assert info.job_state is JobState.UNDETERMINED
    assert info.raw_data["last_known"]["state"] == "QUEUED"
    assert info.raw_data["gateway"] == url


def test_a_refused_token_is_raised_for_a_person_to_mend(
    scheduler: MarketplaceHpcScheduler, workdir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobid = scheduler.submit_job(workdir, "_aiidasubmit.sh")
    monkeypatch.setenv("MP_ACCESS_TOKEN", "expired-token")
    with pytest.raises(Unauthorized):
        scheduler.get_jobs([jobid])


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("invalid partition specified: nope", 130),
        ("Batch job submission failed: Invalid account or account/partition combination specified", 131),
    ],
)
def test_a_refusal_is_an_exit_code_with_the_schedulers_words(
    scheduler: MarketplaceHpcScheduler, workdir: str, backend: FakeBackend, words: str, status: int
) -> None:
    def refuse(_: Submission) -> str:
        raise Refused(words)

    backend.on_submit = refuse
    result = scheduler.submit_job(workdir, "_aiidasubmit.sh")
    assert isinstance(result, ExitCode)
    assert result.status == status
    assert words in result.message


def test_kill_may_be_repeated(scheduler: MarketplaceHpcScheduler, workdir: str, backend: FakeBackend) -> None:
    jobid = scheduler.submit_job(workdir, "_aiidasubmit.sh")
    assert scheduler.kill_job(jobid)
    assert scheduler.kill_job(jobid)
    assert set(backend.cancelled) == {"101"}
    assert not scheduler.kill_job("f" * 24)


def test_a_kill_is_done_when_the_gateway_has_it_in_writing(
    scheduler: MarketplaceHpcScheduler, workdir: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler._connection.gateway._session, "_sleep", lambda _: None)
    jobid = str(scheduler.submit_job(workdir, "_aiidasubmit.sh"))
    backend.run("101")
    backend.down = True
    assert scheduler.kill_job(jobid)
    assert not backend.jobs["101"].state.final
    backend.down = False
    wait_until(lambda: state_of(scheduler, jobid).raw_data["state"] == "CANCELLED")


@pytest.mark.parametrize("fault", [Refuse(503), LoseAnswer(504)])
def test_a_kill_that_nobody_has_confirmed_is_not_done(
    served: ServedGateway, workdir: str, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    with FaultyProxy(served.url) as proxy, MarketplaceHpcTransport(machine="cluster", url=proxy.url) as transport:
        monkeypatch.setattr(transport.connection.gateway._session, "_sleep", lambda _: None)
        scheduler = MarketplaceHpcScheduler()
        scheduler.set_transport(transport)
        jobid = str(scheduler.submit_job(workdir, "_aiidasubmit.sh"))
        proxy.inject(fault, times=None)
        with pytest.raises(Unavailable):
            scheduler.kill_job(jobid)


def test_the_end_of_a_job_is_waited_for_and_no_half_record_given(
    scheduler: MarketplaceHpcScheduler, workdir: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobid = str(scheduler.submit_job(workdir, "_aiidasubmit.sh"))
    backend.run("101")
    ending = threading.Timer(0.5, backend.end, args=("101", protocol.JobState.CANCELLED))
    ending.start()
    assert scheduler.get_detailed_job_info(jobid)["job"]["state"] == "CANCELLED"
    ending.join()


def test_a_job_that_goes_on_has_no_detailed_information(
    scheduler: MarketplaceHpcScheduler, workdir: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "_WAIT_FOR_END", 1)
    jobid = str(scheduler.submit_job(workdir, "_aiidasubmit.sh"))
    backend.run("101")
    with pytest.raises(SchedulerError, match="has not ended"):
        scheduler.get_detailed_job_info(jobid)


@pytest.mark.parametrize(
    ("state", "status"),
    [("COMPLETED", None), ("TIMEOUT", 120), ("OUT_OF_MEMORY", 110), ("NODE_FAIL", 140), ("FAILED", None)],
)
def test_the_detailed_information_is_what_aiida_reads(
    scheduler: MarketplaceHpcScheduler, workdir: str, backend: FakeBackend, state: str, status: int | None
) -> None:
    jobid = scheduler.submit_job(workdir, "_aiidasubmit.sh")
    assert isinstance(jobid, str)
    backend.end("101", protocol.JobState(state), exit_code=0)
    detailed = scheduler.get_detailed_job_info(jobid)
    assert (detailed["retval"], detailed["job"]["state"], detailed["job"]["scheduler_id"]) == (0, state, "101")
    exit_code = scheduler.parse_output(detailed, "", "")
    assert (exit_code.status if exit_code else None) == status


def test_a_job_refused_after_the_answer_still_says_why(scheduler: MarketplaceHpcScheduler) -> None:
    job = {"state": "REFUSED", "message": "invalid qos"}
    exit_code = scheduler.parse_output({"retval": 0, "stdout": "", "stderr": "", "job": job}, "", "")
    assert exit_code is not None
    assert "invalid qos" in exit_code.message


def test_every_state_has_its_place() -> None:
    document = dict.fromkeys(protocol.JOB_FIELDS)
    for state in protocol.JobState:
        info = job_info({**document, "jobid": "x", "state": state.value, "final": state.final}, "http://gateway")
        assert (info.job_state is JobState.DONE) == state.final


def test_another_transport_is_refused_clearly() -> None:
    scheduler = MarketplaceHpcScheduler()
    scheduler.set_transport(LocalTransport())
    with pytest.raises(SchedulerError, match="transport marketplace_hpc only"):
        scheduler.get_jobs()


def test_the_uuid_is_the_end_of_the_working_directory() -> None:
    assert calculation_uuid(f"/x/{UUID[:2]}/{UUID[2:4]}/{UUID[4:]}") == UUID
    assert calculation_uuid("/x/y/z") is None
