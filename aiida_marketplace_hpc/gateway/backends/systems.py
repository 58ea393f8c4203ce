"""Several machines behind one backend: each is asked by itself, and one that does not answer keeps nothing from the others.

The ids of the default machine's jobs stay as they are, those of all others have the machine's name before them
(``NAME/NUMBER``): two machines give the same numbers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import datetime
from typing import NoReturn

from aiida_marketplace_hpc.gateway.backends.base import (
    Backend,
    BackendError,
    Deferred,
    Observation,
    SchedulerDown,
    Submission,
    Trace,
)

logger = logging.getLogger(__name__)

PATIENCE = 8.0
"""Seconds that a round of questions waits for a machine, once; what it answers later counts in a later round. FirecREST gives
a command of Slurm's 5."""
OVERDUE = 60.0
"""Seconds after which an answer is not expected any more. With many accounts a round may take its time."""
_AT_THE_END = 2.0
"""Seconds that an answer is waited for when the gateway stops."""
SILENCE = 10.0
"""Seconds for which a silent machine is not tried by whoever else needs it."""


class OneOfSeveral(Backend):
    """The jobs of one machine, under ids that no other one has.

    While the machine is silent, nothing is sent to it but questions for all of its jobs: threads that wait for it are missing
    elsewhere.

    :param prefix: comes before each id; empty for the default machine.
    """

    def __init__(
        self, machine: str, backend: Backend, prefix: str, *, patience: float, clock: Callable[[], float]
    ) -> None:
        self.name = backend.name
        self.machine = machine
        self._backend = backend
        self._prefix = prefix
        self._patience = patience
        self._clock = clock
        self._began = 0.0
        self._took = 0.0
        self._looked_at = 0.0
        self._slow = False
        self._failed = False
        self._has_answered = False
        self._asking: Future[Mapping[str, Observation]] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"queue {machine}")

    def has(self, id: str) -> bool:
        """Whether an id is of this machine."""
        return id.startswith(self._prefix) if self._prefix else "/" not in id

    def id_of(self, number: str) -> str:
        return f"{self._prefix}{number}"

    def begin(self) -> None:
        """Ask for the queue, in a thread, unless that is under way."""
        if self._asking is None:
            self._began = self._clock()
            self._asking = self._thread.submit(self._timed_queue)

    def _timed_queue(self) -> Mapping[str, Observation]:
        try:
            return self.queue()
        finally:
            self._took = self._clock() - self._began

    def answer(self) -> Mapping[str, Observation] | None:
        """What came of it; ``None`` where there is no answer, for which :attr:`problem` then says the reason.

        A machine that was too slow is not waited for before it was quick again.
        """
        asked = self._asking
        assert asked is not None  # noqa: S101 - begin() comes before.
        remaining = 0.0 if self._slow else max(0.0, self._began + self._patience - self._clock())
        self._looked_at = self._clock()
        if not wait([asked], remaining).done:
            self._slow, self.problem = True, "it has not answered in time"
            return None
        self._asking, self._slow = None, self._took >= self._patience
        try:
            found = asked.result()
        except BackendError as exc:
            self._failed, self.problem = True, str(exc)
            return None
        self._failed, self._has_answered, self.problem = False, True, None
        return found

    @property
    def is_silent(self) -> bool:
        now = self._clock()
        overdue = self._asking is not None and now - self._began > OVERDUE
        return self._slow and (self._failed or overdue) and now - self._looked_at < SILENCE

    def submit(self, submission: Submission) -> str:
        self._require_answers(Deferred)
        return self.id_of(self._backend.submit(submission))

    def cancel(self, id: str, folder: str | None = None) -> None:
        self._require_answers(SchedulerDown)
        self._backend.cancel(self._number(id), folder)

    def queue(self) -> Mapping[str, Observation]:
        return self._named(self._backend.queue())

    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        self._require_answers(SchedulerDown)
        return self._named(self._backend.accounting({self._number(id): folder for id, folder in folders.items()}))

    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        self._require_answers(SchedulerDown)
        return list(self._named({one.id: one for one in self._backend.find(folder, since)}).values())

    def traces(self, ids: Collection[str]) -> Mapping[str, Trace]:
        self._require_answers(SchedulerDown)
        found = self._backend.traces([self._number(id) for id in ids])
        return {self.id_of(number): trace for number, trace in found.items()}

    @property
    def submission_limit(self) -> float:
        return self._backend.submission_limit

    @property
    def settling_time(self) -> float:
        return self._backend.settling_time

    def start(self) -> None:
        self._backend.start()

    def stop(self) -> None:
        if (asking := self._asking) is not None:
            wait([asking], _AT_THE_END)  # A call whose connection is closed under it leaves that open.
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._backend.stop()

    def describe(self) -> dict[str, object]:
        if self.problem is not None or not self._has_answered:
            return {"name": self.machine, "backend": self.name}
        return {**self._backend.describe(), "name": self.machine}

    def _require_answers(self, error: type[BackendError]) -> None:
        if self.is_silent:
            raise error(f"the machine {self.machine} does not answer now")

    def _number(self, id: str) -> str:
        return id.removeprefix(self._prefix)

    def _named(self, jobs: Mapping[str, Observation]) -> dict[str, Observation]:
        return {
            self.id_of(number): replace(one, id=self.id_of(one.id), machine=self.machine)
            for number, one in jobs.items()
        }


class Systems(Backend):
    """Several machines of one kind.

    :param backends: that of each machine by its name, the default one first.
    :param patience: see :data:`PATIENCE`.
    :param clock: the seconds of a monotonic clock.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        *,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        default = next(iter(backends))
        self._parts = {
            machine: OneOfSeveral(
                machine, backend, "" if machine == default else f"{machine}/", patience=patience, clock=clock
            )
            for machine, backend in backends.items()
        }
        self._default = self._parts[default]
        self.name = self._default.name

    def on(self, machine: str) -> Backend:
        if machine in ("", self.name):  # As the default one was called while there was no other.
            return self._default
        return self._parts.get(machine) or _Gone(machine, self.name)

    @property
    def parts(self) -> Sequence[Backend]:
        return tuple(self._parts.values())

    @property
    def problems(self) -> Mapping[str, str]:
        """The machines that did not answer in the last :meth:`queue`, each with the reason."""
        return {machine: part.problem for machine, part in self._parts.items() if part.problem is not None}

    def submit(self, submission: Submission) -> str:
        """Submit to the default machine; :meth:`on` is for the others."""
        return self._default.submit(submission)

    def cancel(self, id: str, folder: str | None = None) -> None:
        part = next((part for part in self._parts.values() if part.has(id)), None)
        (part or _Gone(id.partition("/")[0], self.name)).cancel(id, folder)

    def queue(self) -> Mapping[str, Observation]:
        """All jobs of the machines that answer; :attr:`problems` says which do not.

        :raises SchedulerDown: none of them answers.
        """
        for part in self._parts.values():
            part.begin()
        answers = [part.answer() for part in self._parts.values()]
        if all(answer is None for answer in answers):
            raise SchedulerDown("; ".join(f"{machine}: {problem}" for machine, problem in self.problems.items()))
        for machine, problem in self.problems.items():
            logger.warning("the jobs of %s are not known now: %s", machine, problem)
        return {id: one for answer in answers if answer is not None for id, one in answer.items()}

    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        """What the machines that answer have on record."""
        found: dict[str, Observation] = {}
        for part in self._parts.values():
            mine = {id: folder for id, folder in folders.items() if part.has(id)}
            if mine and part.problem is None:
                try:
                    found.update(part.accounting(mine))
                except SchedulerDown as exc:
                    part.problem = str(exc)
        return found

    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        """Look on the default machine; :meth:`on` is for the others."""
        return self._default.find(folder, since)

    def traces(self, ids: Collection[str]) -> Mapping[str, Trace]:
        found: dict[str, Trace] = {}
        for part in self._parts.values():
            if mine := [id for id in ids if part.has(id)]:
                found.update(part.traces(mine))
        return found

    @property
    def submission_limit(self) -> float:
        return max(part.submission_limit for part in self._parts.values())

    @property
    def settling_time(self) -> float:
        return max(part.settling_time for part in self._parts.values())

    def start(self) -> None:
        for part in self._parts.values():
            part.start()

    def stop(self) -> None:
        for part in self._parts.values():
            part.stop()

    def describe(self) -> dict[str, object]:
        return self._default.describe()


class _Gone(Backend):
    """A machine that jobs in the ledger are on, and that the gateway does not have any more: nothing is known of it."""

    def __init__(self, machine: str, name: str) -> None:
        self.machine = machine
        self.name = name
        self.problem = f"the machine {machine} is none of this gateway's any more"

    def submit(self, submission: Submission) -> str:
        raise Deferred(self.problem or "")

    def cancel(self, id: str, folder: str | None = None) -> None:
        self._raise()

    def queue(self) -> Mapping[str, Observation]:
        self._raise()

    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        self._raise()

    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        self._raise()

    def traces(self, ids: Collection[str]) -> Mapping[str, Trace]:
        self._raise()

    def describe(self) -> dict[str, object]:
        return {"name": self.machine, "backend": self.name}

    def _raise(self) -> NoReturn:
        raise SchedulerDown(self.problem or "")
