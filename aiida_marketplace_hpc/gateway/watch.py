"""One question to the scheduler for everybody: what it says about all active jobs, written into the ledger."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime

from aiida_marketplace_hpc.gateway.backends.base import Backend, BackendError
from aiida_marketplace_hpc.gateway.ledger import Job, Ledger, utc_now
from aiida_marketplace_hpc.gateway.reconcile import Evidence, changes, needs_accounting

logger = logging.getLogger(__name__)


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
    ) -> None:
        self._ledger = ledger
        self._backend = backend
        self._interval = interval
        self._patience = patience
        self._clock = clock
        self._round = threading.Lock()
        self._asked: float | None = None
        self._seen: dict[str, float] = {}
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
            return (utc_now() - job.observed_at).total_seconds()
        return None

    def refresh(self) -> None:
        """Ask the scheduler, unless that was done within the interval; never raises, never takes long."""
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
        self._asked = self._clock()
        if not jobs:
            self.problem = None
            return
        try:
            # The queue is read first: a job that ends between the two questions is then in the second answer.
            queue = self._backend.queue()
            unclear = {
                job.scheduler_id: job.folder for job in jobs if job.scheduler_id and needs_accounting(job, queue)
            }
            accounting = self._backend.accounting(unclear) if unclear else {}
        except BackendError as exc:
            self.problem = str(exc)
            logger.warning("the scheduler gives no answer, states stay as they are: %s", exc)
            return
        self.problem = None
        now, moment = utc_now(), self._clock()
        for job in jobs:
            identifier = job.scheduler_id or ""
            evidence = Evidence(queue.get(identifier), accounting.get(identifier))
            if evidence.best is not None:
                self._seen[job.id] = moment
            self._record(job, evidence, now)

    def _record(self, job: Job, evidence: Evidence, now: datetime) -> None:
        new = changes(job, evidence)
        if not new:
            return
        changed = self._ledger.change(job, {**new, "observed_at": now})
        if changed is not None and "state" in new:
            logger.info("job %s (scheduler id %s): %s -> %s", job.id, job.scheduler_id, job.state, changed.state)
            if changed.job_state.final:
                self._seen.pop(job.id, None)
