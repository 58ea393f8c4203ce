"""Which change follows from which evidence."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from aiida_marketplace_hpc.gateway.backends.base import Observation
from aiida_marketplace_hpc.gateway.reconcile import Evidence, changes
from aiida_marketplace_hpc.gateway.schema import Job
from aiida_marketplace_hpc.protocol import JobState

RUNNING = Observation("1", JobState.RUNNING, "RUNNING")
QUEUED = Observation("1", JobState.QUEUED, "PENDING")
ENDED = Observation("1", JobState.FAILED, "FAILED", exit_code=2, ended_at=datetime(2026, 1, 1, tzinfo=timezone.utc))
HALF = Observation("1", JobState.COMPLETED, "COMPLETED", complete=False)


def job(state: JobState = JobState.RUNNING) -> Job:
    return Job(id="a" * 24, state=state.value, scheduler_id="1")


@pytest.mark.parametrize(
    ("queue", "accounting", "expected"),
    [
        (None, None, None),
        (RUNNING, None, None),
        (QUEUED, None, "QUEUED"),
        (None, ENDED, "FAILED"),
        (None, HALF, None),
        (RUNNING, HALF, None),
        (RUNNING, ENDED, None),  # Completing, or requeued: it lives.
        (ENDED, None, None),  # The queue alone has no exit code: it waits for the accounting.
        (ENDED, ENDED, "FAILED"),
        (None, RUNNING, None),
        (None, QUEUED, "QUEUED"),  # Requeued: it lives.
    ],
)
def test_a_running_job(queue: Observation | None, accounting: Observation | None, expected: str | None) -> None:
    assert changes(job(), Evidence(queue, accounting)).get("state") == expected


@pytest.mark.parametrize("state", [state for state in JobState if state.final])
def test_an_end_is_final(state: JobState) -> None:
    assert changes(job(state), Evidence(RUNNING, RUNNING)) == {}


def test_an_end_carries_its_record() -> None:
    new = changes(job(), Evidence(None, ENDED))
    assert (new["exit_code"], new["ended_at"], new["accounting"]) == (2, ENDED.ended_at, {"columns": [], "rows": []})
