"""G2: a job that lives is never reported finished, whatever the scheduler says or does not say."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from aiida.schedulers.datastructures import JobState

from aiida_marketplace_hpc import protocol
from aiida_marketplace_hpc.gateway.backends.base import Observation, SchedulerDown
from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

Lie = Callable[[FakeBackend, pytest.MonkeyPatch], None]


def no_queue(backend: FakeBackend, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backend, "queue", dict)


def no_queue_and_no_accounting(backend: FakeBackend, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backend, "queue", dict)
    patch.setattr(backend, "accounting", lambda ids: {})


def scheduler_down(backend: FakeBackend, patch: pytest.MonkeyPatch) -> None:
    backend.down = True


def accounting_down(backend: FakeBackend, patch: pytest.MonkeyPatch) -> None:
    def fail(ids: Collection[str]) -> Mapping[str, Observation]:
        raise SchedulerDown("slurmdbd does not answer")

    patch.setattr(backend, "queue", dict)
    patch.setattr(backend, "accounting", fail)


def half_a_record_of_an_end(backend: FakeBackend, patch: pytest.MonkeyPatch) -> None:
    half = {
        job.id: replace(job, state=protocol.JobState.COMPLETED, native_state="COMPLETED", complete=False)
        for job in backend.jobs.values()
    }
    patch.setattr(backend, "queue", dict)
    patch.setattr(backend, "accounting", lambda ids: half)


def an_end_in_the_queue_without_accounting(backend: FakeBackend, patch: pytest.MonkeyPatch) -> None:
    ended = {job.id: replace(job, state=protocol.JobState.COMPLETED, complete=False) for job in backend.jobs.values()}
    patch.setattr(backend, "queue", lambda: ended)
    patch.setattr(backend, "accounting", lambda ids: {})


def another_job_under_another_id(backend: FakeBackend, patch: pytest.MonkeyPatch) -> None:
    other = Observation("999", protocol.JobState.COMPLETED, "COMPLETED")
    patch.setattr(backend, "queue", lambda: {"999": other})
    patch.setattr(backend, "accounting", lambda ids: {"999": other})


@pytest.mark.parametrize(
    "lie",
    [
        no_queue,
        no_queue_and_no_accounting,
        scheduler_down,
        accounting_down,
        half_a_record_of_an_end,
        an_end_in_the_queue_without_accounting,
        another_job_under_another_id,
    ],
    ids=lambda lie: lie.__name__,
)
def test_no_lie_of_the_scheduler_ends_a_job(
    scheduler: MarketplaceHpcScheduler,
    transport: MarketplaceHpcTransport,
    home: str,
    backend: FakeBackend,
    tmp_path: Path,
    lie: Lie,
) -> None:
    (tmp_path / "script").write_text("#!/bin/bash\n")
    transport.mkdir(f"{home}/work")
    transport.put(tmp_path / "script", f"{home}/work/run.sh")
    jobid = scheduler.submit_job(f"{home}/work", "run.sh")
    assert isinstance(jobid, str)
    backend.run("101")

    def state() -> JobState:
        state: JobState = scheduler.get_jobs([jobid], as_dict=True)[jobid].job_state
        return state

    wait_for(lambda: state() is JobState.RUNNING)
    with pytest.MonkeyPatch.context() as patch:
        lie(backend, patch)
        asked = time.monotonic()
        while time.monotonic() - asked < 0.3:  # Several rounds of the gateway's questions, which it puts every 0.05 s.
            assert state() is JobState.RUNNING
        backend.down = False
    # And the test could fail: a true end is believed.
    backend.end("101")
    wait_for(lambda: state() is JobState.DONE)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
