"""Desired state against observed state: which change of a job follows from what the scheduler says. Pure functions.

::

    CREATED ──launch──> SUBMITTING ──scheduler took it──> QUEUED ⇄ HELD, RUNNING ⇄ SUSPENDED ──> COMPLETED, FAILED, …
                          │  ↑ └─ taken over, when the submitter is dead: look for the job first, then submit again
                          │  └─── refused for now: again later
                          └──refused for good──> REFUSED ──explicit launch──> SUBMITTING

Three rules hold everywhere. *Absence is never evidence*: a job that the scheduler does not mention keeps its state. *A half
record is not believed.* *An end is final.*
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Any

from aiida_marketplace_hpc.gateway.backends.base import Observation, is_in
from aiida_marketplace_hpc.gateway.backends.wrapper import EXIT_SECOND_COPY
from aiida_marketplace_hpc.gateway.schema import Job
from aiida_marketplace_hpc.protocol import JobState


class Step(Enum):
    """What is to be done next about a submission that has not been confirmed."""

    WAIT = "wait"
    LOOK = "look"
    """It may have happened: look for it among the scheduler's jobs."""
    SUBMIT = "submit"
    """It has certainly not happened."""
    CANCEL = "cancel"
    """It has certainly not happened, and nobody wants it any more."""


def next_step(job: Job, now: datetime) -> Step:
    """What to do about a job in the state ``SUBMITTING`` that nobody in this process is working on."""
    resting = job.lease_until is not None and now < job.lease_until
    if job.search_first:
        return Step.LOOK
    if job.cancel_requested:
        return Step.CANCEL
    return Step.WAIT if resting else Step.SUBMIT


def proven_absent(job: Job, now: datetime, settling_time: float) -> bool:
    """Whether a *successful* search that found nothing now proves that there was no submission.

    :param settling_time: seconds after the end of the submitter's lease until the scheduler shows every job it took.
    """
    return job.lease_until is not None and now >= job.lease_until + timedelta(seconds=settling_time)


@dataclass(frozen=True)
class Evidence:
    """What one round of questions brought about one job; ``None`` where a source did not mention it."""

    queue: Observation | None = None
    accounting: Observation | None = None

    @property
    def best(self) -> Observation | None:
        """The observation to believe: the queue about a job that lives, the accounting about an end.

        A job that the queue shows living lives, even if its end is on record already: it may be completing, or have been
        requeued. An end that only the queue shows has no exit code yet and waits for the accounting.
        """
        if self.queue is not None and not self.queue.state.final:
            return self.queue
        if self.accounting is not None and (self.accounting.complete or not self.accounting.state.final):
            return self.accounting
        return None


def about(job: Job, observation: Observation | None) -> Observation | None:
    """An observation under the job's id, if it is about this job: batch systems use ids again."""
    return observation if observation is not None and is_in(observation, job.folder) else None


def needs_accounting(job: Job, queue: Mapping[str, Observation]) -> bool:
    """Whether the queue alone does not say how the job is."""
    observation = about(job, queue.get(job.scheduler_id or ""))
    return observation is None or observation.state.final


def is_second_copy(evidence: Evidence) -> bool:
    """Whether the job has ended as one does that finds its guard taken; a script may end with that exit code, too."""
    best = evidence.best
    return best is not None and best.state.final and best.exit_code == EXIT_SECOND_COPY


def changes(job: Job, evidence: Evidence) -> dict[str, Any]:
    """What is to be written about a job after one round of questions; empty if nothing new is known."""
    observation = evidence.best
    if job.job_state.final or observation is None:
        return {}
    if observation.state is JobState.SUBMITTING or observation.state is JobState.CREATED:
        return {}
    new: dict[str, Any] = {
        "state": observation.state.value,
        "scheduler_state": observation.native_state,
        "reason": observation.reason or None,
        "name": observation.name or job.name,
        "partition": observation.partition or job.partition,
        "account": observation.account or job.account,
        "nodes": observation.nodes or job.nodes,
        "submitted_at": observation.submitted_at or job.submitted_at,
        "started_at": observation.started_at,
        "time_limit": observation.time_limit,
    }
    if observation.state.final:
        new |= {
            "ended_at": observation.ended_at,
            "elapsed": observation.elapsed,
            "exit_code": observation.exit_code,
            "signal": observation.signal,
            "accounting": {
                "columns": list(observation.columns),
                "rows": [list(row) for row in observation.rows],
            },
        }
    return {name: value for name, value in new.items() if value != getattr(job, name)}
