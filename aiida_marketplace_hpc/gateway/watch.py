"""One question to the scheduler for everybody: what it says about all active jobs, written into the ledger."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from aiida_marketplace_hpc.errors import GatewayError
from aiida_marketplace_hpc.gateway.backends.base import Backend, BackendError, Observation
from aiida_marketplace_hpc.gateway.ledger import Ledger, utc_now
from aiida_marketplace_hpc.gateway.log import about_job
from aiida_marketplace_hpc.gateway.metrics import Metrics
from aiida_marketplace_hpc.gateway.reconcile import Evidence, about, changes, is_second_copy, needs_accounting
from aiida_marketplace_hpc.gateway.schema import Job
from aiida_marketplace_hpc.protocol import JobState

logger = logging.getLogger(__name__)

_IDLE = 15
"""Times the interval: how often the scheduler is asked while no job is known to live. One may, that came late."""
_STUCK = 60.0
"""Seconds that a round of questions may take: each of Slurm's commands is given up after 15, and few are needed."""


class Watch:
    """Keeps the ledger's view of active jobs young.

    However many callers ask, there is one round of questions at a time and at most one per ``interval``.

    :param interval: seconds for which one round serves everybody.
    :param patience: seconds that a caller waits for a round under way before it takes the last known states.
    """

    def __init__(
        self,
        ledger: Ledger,
        backend: Backend,
        interval: float,
        *,
        patience: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
        metrics: Metrics | None = None,
    ) -> None:
        self._ledger = ledger
        self._backend = backend
        self._interval = interval
        self._patience = patience
        self._clock = clock
        self._now = now
        self._metrics = metrics or Metrics(clock)
        self._round = threading.Lock()
        self._asked: float | None = None
        self._answered: float | None = None
        self._seen: dict[str, float] = {}
        self.queue: Mapping[str, Observation] | None = None
        """All that the scheduler held in the last round in which it answered; ``None``: it has not answered yet."""
        self.follow_guard: Callable[[Job], bool] = lambda _: False
        """Makes the copy that has the guard the job, in place of the one that found it taken."""
        self.problem: str | None = None
        """Why the last round brought no answer, or ``None`` if it did."""

    def age(self, job: Job) -> float | None:
        """Seconds since the scheduler last said something about a job; ``None`` if it was never asked."""
        if job.job_state.final:
            return 0.0
        seen = self._seen.get(job.id)
        if seen is not None:
            return self._clock() - seen
        if job.observed_at is not None:
            return (self._now() - job.observed_at).total_seconds()
        return None

    @property
    def is_partial(self) -> bool:
        """Whether the last round brought no answer about some of several machines."""
        return any(part.problem is not None for part in self._backend.parts)

    def problem_of(self, machine: str) -> str | None:
        """Why the last round brought no answer about a machine, or ``None`` if it did."""
        return self.problem or self._backend.on(machine).problem

    @property
    def answer_age(self) -> float | None:
        """Seconds since the scheduler last answered; ``None``: it has not yet."""
        return None if self._answered is None else self._clock() - self._answered

    @property
    def is_overdue(self) -> bool:
        """Whether nobody has asked the scheduler for so long that whoever is to do so must be stuck."""
        return self.answer_age is not None and self.answer_age > _IDLE * self._interval + _STUCK

    def refresh(self) -> None:
        """Ask the scheduler, unless that was done within the interval. If it does not answer, :attr:`problem` says so.

        :raises Unavailable: if the database does not answer.
        """
        if not self._round.acquire(timeout=self._patience):
            return
        try:
            if self._asked is not None and self._clock() - self._asked < self._interval:
                return
            self._ask()
        finally:
            self._round.release()

    def _ask(self) -> None:
        jobs = [job for job in self._ledger.active() if job.scheduler_id]
        idle = not jobs and self.queue is not None
        if idle and self._answered is not None and self._clock() - self._answered < _IDLE * self._interval:
            return
        self._asked = self._clock()
        try:
            # The queue is read first: a job that ends between the two questions is then in the second answer.
            queue = self._backend.queue()
            unclear = {
                job.scheduler_id: job.folder for job in jobs if job.scheduler_id and needs_accounting(job, queue)
            }
            accounting = self._backend.accounting(unclear) if unclear else {}
        except BackendError as exc:
            self.problem = str(exc)
            self._metrics.asked(answered=False)
            logger.warning("the scheduler gives no answer, states stay as they are: %s", exc)
            return
        self._metrics.asked(answered=True)
        self.problem, self.queue, self._answered = None, queue, self._clock()
        now, moment = self._now(), self._clock()
        changed: list[tuple[Job, dict[str, Any]]] = []
        for job in jobs:
            identifier = job.scheduler_id or ""
            evidence = Evidence(about(job, queue.get(identifier)), accounting.get(identifier))
            if evidence.best is not None:
                self._seen[job.id] = moment
            if is_second_copy(evidence) and self._follows(job):
                continue
            if new := changes(job, evidence):
                changed.append((job, {**new, "observed_at": now}))
        if changed:
            self._record(changed)

    def _follows(self, job: Job) -> bool:
        """Whether what is known is about another copy than the job; also where that is not known now."""
        try:
            return self.follow_guard(job)
        except GatewayError as exc:
            logger.warning("job %s: its guard cannot be read now: %s", job.id, exc)
            return True

    def _record(self, changed: list[tuple[Job, dict[str, Any]]]) -> None:
        recorded = set(self._ledger.change_all(changed))
        for job, new in changed:
            if job.id in recorded and "state" in new:
                with about_job(self._ledger, job):
                    logger.info("job %s (scheduler id %s): %s -> %s", job.id, job.scheduler_id, job.state, new["state"])
                if JobState(new["state"]).final:
                    self._seen.pop(job.id, None)
