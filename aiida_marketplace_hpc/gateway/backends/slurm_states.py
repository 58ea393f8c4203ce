"""Slurm's words for the states of a job, and what they mean to the gateway."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from aiida_marketplace_hpc.gateway.backends.base import Observation
from aiida_marketplace_hpc.protocol import JobState

_LOGGER = logging.getLogger(__name__)

STATES: dict[str, JobState] = {
    "BOOT_FAIL": JobState.NODE_FAIL,
    "CANCELLED": JobState.CANCELLED,
    "COMPLETED": JobState.COMPLETED,
    "COMPLETING": JobState.RUNNING,
    "CONFIGURING": JobState.QUEUED,
    "DEADLINE": JobState.DEADLINE,
    "EXPEDITING": JobState.RUNNING,
    "FAILED": JobState.FAILED,
    "LAUNCH_FAILED": JobState.HELD,
    "NODE_FAIL": JobState.NODE_FAIL,
    "OUT_OF_MEMORY": JobState.OUT_OF_MEMORY,
    "PENDING": JobState.QUEUED,
    "POWER_UP_NODE": JobState.QUEUED,
    "PREEMPTED": JobState.PREEMPTED,
    "RECONFIG_FAIL": JobState.HELD,
    "REQUEUED": JobState.QUEUED,
    "REQUEUE_FED": JobState.QUEUED,
    "REQUEUE_HOLD": JobState.HELD,
    "RESIZING": JobState.RUNNING,
    "RESV_DEL_HOLD": JobState.HELD,
    # The job was taken over by another cluster of a federation: it may well be running there.
    "REVOKED": JobState.RUNNING,
    "RUNNING": JobState.RUNNING,
    "SIGNALING": JobState.RUNNING,
    "SPECIAL_EXIT": JobState.HELD,
    "STAGE_OUT": JobState.RUNNING,
    "STOPPED": JobState.SUSPENDED,
    "SUSPENDED": JobState.SUSPENDED,
    "TIMEOUT": JobState.TIMEOUT,
    "UPDATE_DB": JobState.RUNNING,
}
"""Every state and every state flag in the manuals of squeue and sacct."""

_HOLDING_REASONS = ("JobHeld", "Dependency", "BeginTime", "JobHoldMaxRequeue", "ReservationDeleted")

# Of several tasks of one job, the state that says most about the whole: first the living ones, then the worst end.
_PRECEDENCE = (
    JobState.RUNNING,
    JobState.SUSPENDED,
    JobState.QUEUED,
    JobState.HELD,
    JobState.NODE_FAIL,
    JobState.OUT_OF_MEMORY,
    JobState.TIMEOUT,
    JobState.DEADLINE,
    JobState.PREEMPTED,
    JobState.FAILED,
    JobState.CANCELLED,
    JobState.COMPLETED,
)


def read_state(native: str, reason: str = "") -> JobState:
    """Map a state of Slurm's, as ``squeue`` or ``sacct`` prints it in full (``CANCELLED by 1000`` included).

    A word that is not known is taken for a living job: that is wrong for a while at worst, while a living job that is
    reported as finished is wrong for good.
    """
    words = native.split()
    state = STATES.get(words[0]) if words else None
    if state is None:
        _LOGGER.warning("Slurm reports the unknown job state %r: taken as running", native)
        return JobState.RUNNING
    if native == "PENDING" and reason.startswith(_HOLDING_REASONS):
        return JobState.HELD
    return state


def combine(observations: Sequence[Observation]) -> Observation:
    """Make one observation of the tasks of a job array, or of the components of a heterogeneous job.

    It lives as long as one of them lives; then it has the worst end of them all.
    """
    if len(observations) == 1:
        return observations[0]
    leader = min(observations, key=lambda observation: _PRECEDENCE.index(observation.state))
    final = leader.state.final
    return replace(
        leader,
        complete=all(observation.complete for observation in observations),
        submitted_at=min((each.submitted_at for each in observations if each.submitted_at), default=None),
        started_at=min((each.started_at for each in observations if each.started_at), default=None),
        ended_at=max((each.ended_at for each in observations if each.ended_at), default=None) if final else None,
    )
