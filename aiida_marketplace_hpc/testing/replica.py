"""A gateway that can be killed, or frozen, at each of the moments at which that makes a difference."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from aiida_marketplace_hpc.gateway.backends.base import Backend, Observation, Submission, Trace
from aiida_marketplace_hpc.gateway.config import Settings
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.testing.clock import VirtualClock
from aiida_marketplace_hpc.testing.faulty_scheduler import FaultyScheduler


class Killed(BaseException):
    """The process ends here: nothing that would be done after it is done."""


class Moments:
    """The moments of one process: before and after each commit, submission and cancellation.

    Killed at any other moment, it leaves the same behind as at the one before. ``seen`` names those that have passed, in
    their order.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._lock = threading.Lock()
        self._kill_in: int | None = None
        self._killed = False

    @property
    def killed(self) -> bool:
        """Whether the process has ended."""
        return self._killed

    def kill_in(self, moments: int) -> None:
        """End the process at the moment that many moments from now; 0 is the next one."""
        with self._lock:
            self._kill_in = moments

    def kill(self) -> None:
        """End the process now."""
        self._killed = True

    def live(self) -> None:
        """Go on.

        :raises Killed: if the process has ended.
        """
        if self._killed:
            raise Killed

    def pass_(self, name: str) -> None:
        """Say that a moment has come.

        :raises Killed: if the process ends here, or has ended.
        """
        with self._lock:
            if self._kill_in is not None and not self._killed:
                self._killed = self._kill_in == 0
                self._kill_in -= 1
            if self._killed:
                raise Killed(name)
            self.seen.append(name)


class Watched(Backend):
    """A backend as one process uses it."""

    def __init__(self, backend: Backend, moments: Moments) -> None:
        self._backend = backend
        self._moments = moments

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the backend."""
        return self._backend.name

    def submit(self, submission: Submission) -> str:
        with self._moment("submit"):
            return self._backend.submit(submission)

    def cancel(self, id: str, folder: str | None = None) -> None:
        with self._moment("cancel"):
            self._backend.cancel(id, folder)

    def queue(self) -> Mapping[str, Observation]:
        self._moments.live()
        return self._backend.queue()

    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        self._moments.live()
        return self._backend.accounting(folders)

    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        self._moments.live()
        return self._backend.find(folder, since)

    def traces(self, ids: Collection[str]) -> Mapping[str, Trace]:
        self._moments.live()
        return self._backend.traces(ids)

    @contextmanager
    def _moment(self, name: str) -> Iterator[None]:
        self._moments.pass_(f"before {name}")
        try:
            yield
        finally:
            self._moments.pass_(f"after {name}")

    @property
    def submission_limit(self) -> float:
        return self._backend.submission_limit

    @property
    def settling_time(self) -> float:
        return self._backend.settling_time

    def start(self) -> None:
        self._backend.start()

    def stop(self) -> None:
        self._backend.stop()

    def describe(self) -> dict[str, object]:
        return self._backend.describe()


class _InStep(ThreadPoolExecutor):
    """Threads of which none does anything while the test's own thread goes on: each has ended, or hangs, by then."""

    def __init__(self, hangs: Callable[[threading.Thread], bool]) -> None:
        super().__init__(max_workers=32, thread_name_prefix="submit")
        self._hangs = hangs
        self._under_way: list[tuple[Future[Any], list[threading.Thread]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        threads: list[threading.Thread] = []

        def run() -> Any:
            threads.append(threading.current_thread())
            return fn(*args, **kwargs)

        future = super().submit(run)
        self._under_way = [*(pair for pair in self._under_way if not pair[0].done()), (future, threads)]
        self.settle()
        return future

    def settle(self) -> None:
        for future, threads in self._under_way:
            while not future.done() and not (threads and self._hangs(threads[0])):
                time.sleep(0.0002)


class Replica:
    """One gateway of several on one database, or one in a row of restarts, in the test's own process.

    Everything that it does happens one after the other, in calls of the test: its background does not run (a test calls
    ``gateway.jobs.reconcile`` when it wants it), and a launch or a cancellation is answered when it has ended, or hangs.
    Killed, it does nothing any more.

    :param scheduler: what the gateway uses; replicas share it.
    :param clock: the time it lives in. Each question to the scheduler is asked: no answer is kept for a while.
    """

    def __init__(self, settings: Settings, scheduler: FaultyScheduler, clock: VirtualClock) -> None:
        self.moments = Moments()
        self.gateway = gateway = Gateway(settings, Watched(scheduler, self.moments), now=clock.now)
        self._writing = gateway.ledger.writing
        gateway.ledger.writing = self._watched_writing  # type: ignore[method-assign]
        self._threads = _InStep(scheduler.hangs)
        gateway.jobs._submissions._threads = gateway.jobs._threads = self._threads
        gateway.jobs._patience = 0.0
        gateway.watch._clock = clock.monotonic
        gateway.watch._interval = 0.0

    @contextmanager
    def _watched_writing(self) -> Iterator[Session]:
        self.moments.pass_("before commit")
        with self._writing() as session:
            yield session
        self.moments.pass_("after commit")

    def settle(self) -> None:
        """Wait until each of its threads has ended, or hangs: after something that hung was released."""
        self._threads.settle()

    def close(self) -> None:
        """End it; what hangs must have been released."""
        self.moments.kill()
        self.gateway.jobs.close()
