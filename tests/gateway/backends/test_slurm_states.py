"""Every state of Slurm's has a meaning, and none that is not known counts as an end."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta, timezone

import pytest

from aiida_marketplace_hpc.gateway.backends.base import Observation
from aiida_marketplace_hpc.gateway.backends.slurm_states import STATES, combine, read_state
from aiida_marketplace_hpc.protocol import JobState

# The sections JOB STATE CODES of squeue(1) and sacct(1), from 20.11 to 25.11.
_MANUAL_TEXT = """
BOOT_FAIL CANCELLED COMPLETED CONFIGURING COMPLETING DEADLINE EXPEDITING FAILED LAUNCH_FAILED NODE_FAIL OUT_OF_MEMORY
PENDING POWER_UP_NODE PREEMPTED RECONFIG_FAIL REQUEUED REQUEUE_FED REQUEUE_HOLD RESIZING RESV_DEL_HOLD REVOKED RUNNING
SIGNALING SPECIAL_EXIT STAGE_OUT STOPPED SUSPENDED TIMEOUT UPDATE_DB
"""
MANUAL = _MANUAL_TEXT.split()

# JOB_STATE_BASE of slurm.h from JOB_COMPLETE on: only in these has a job ended.
_END_TEXT = "COMPLETED CANCELLED FAILED TIMEOUT NODE_FAIL PREEMPTED BOOT_FAIL DEADLINE OUT_OF_MEMORY"
ENDS = _END_TEXT.split()

NOON = datetime(2026, 11, 22, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize("native", MANUAL)
def test_every_state_of_the_manuals_has_a_meaning(native: str) -> None:
    assert native in STATES
    assert STATES[native].final == (native in ENDS)


def test_the_table_has_no_state_of_its_own() -> None:
    assert sorted(STATES) == sorted(MANUAL)


@pytest.mark.parametrize("native", ["?", "", "NEW_STATE", "completed", "COMPLETED+"])
def test_an_unknown_state_is_alive_and_is_logged(native: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_state(native) is JobState.RUNNING
    assert repr(native) in caplog.text


def test_who_cancelled_a_job_does_not_matter() -> None:
    assert read_state("CANCELLED by 1000") is JobState.CANCELLED


@pytest.mark.parametrize(
    "reason", ["JobHeldUser", "JobHeldAdmin", "Dependency", "DependencyNeverSatisfied", "BeginTime"]
)
def test_a_pending_job_that_waits_for_more_than_its_turn_is_held(reason: str) -> None:
    assert read_state("PENDING", reason) is JobState.HELD
    assert read_state("RUNNING", reason) is JobState.RUNNING
    assert read_state("COMPLETED", reason) is JobState.COMPLETED


@pytest.mark.parametrize("reason", ["", "Priority", "Resources", "QOSMaxJobsPerUserLimit"])
def test_any_other_pending_job_is_queued(reason: str) -> None:
    assert read_state("PENDING", reason) is JobState.QUEUED


def task(state: JobState, minutes: int, *, complete: bool = True) -> Observation:
    began = NOON + timedelta(minutes=minutes)
    return Observation(
        "7",
        state,
        state.value,
        complete=complete,
        exit_code=minutes if state.final else None,
        submitted_at=NOON,
        started_at=began,
        ended_at=began + timedelta(minutes=1) if state.final else None,
    )


def test_an_array_lives_as_long_as_one_of_its_tasks() -> None:
    tasks = [task(JobState.FAILED, 1), task(JobState.QUEUED, 2), task(JobState.COMPLETED, 3)]
    whole = combine(tasks)
    assert whole.state is JobState.QUEUED
    assert whole.ended_at is None
    assert combine([*tasks, task(JobState.RUNNING, 4)]).state is JobState.RUNNING


def test_an_array_has_the_worst_end_of_its_tasks() -> None:
    whole = combine([task(JobState.COMPLETED, 3), task(JobState.FAILED, 2), task(JobState.COMPLETED, 1)])
    assert whole.state is JobState.FAILED
    assert whole.exit_code == 2
    assert whole.started_at == NOON + timedelta(minutes=1)
    assert whole.ended_at == NOON + timedelta(minutes=4)


def test_an_array_is_complete_when_all_of_its_tasks_are() -> None:
    assert not combine([task(JobState.COMPLETED, 1), task(JobState.COMPLETED, 2, complete=False)]).complete


def test_every_state_can_be_combined_with_every_other() -> None:
    for one in set(STATES.values()):
        for other in set(STATES.values()):
            assert combine([task(one, 1), task(other, 2)]).state in {one, other}
