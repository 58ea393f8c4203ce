"""A batch system that misbehaves as real ones do, around any backend: an imitation in memory, or a real one."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal

from aiida_marketplace_hpc.gateway.backends.base import (
    Backend,
    BackendError,
    Deferred,
    Observation,
    Refused,
    SchedulerDown,
    Submission,
    Trace,
    Unknown,
)
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.clock import Clock, RealClock

Question = Literal["cancel", "queue", "accounting", "find", "traces"]

# What can become of a submission


@dataclass(frozen=True)
class LoseSubmission:
    """Nothing is submitted, and it cannot be known."""


@dataclass(frozen=True)
class LoseConfirmation:
    """It is submitted, and it cannot be known."""


@dataclass(frozen=True)
class Late:
    """It cannot be known whether it was submitted; it was not, but will be after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class RefuseSubmission:
    """It is refused for good."""


@dataclass(frozen=True)
class DeferSubmission:
    """It is refused for now."""


@dataclass(frozen=True)
class Hang:
    """The submitter waits until :meth:`release`, before the submission or between it and its answer."""

    when: Literal["before", "after"]
    _released: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)

    def release(self) -> None:
        """Let it go on. May be repeated."""
        self._released.set()

    @property
    def released(self) -> bool:
        return self._released.is_set()

    def wait(self) -> None:
        """Wait until it is released."""
        self._released.wait()


# What can become of a question


@dataclass(frozen=True)
class NoAnswer:
    """It fails; nothing is done."""


@dataclass(frozen=True)
class LostAnswer:
    """What was asked is done, and the answer does not come."""


@dataclass(frozen=True)
class Slow:
    """It takes so many seconds."""

    seconds: float


@dataclass(frozen=True)
class EmptyAnswer:
    """It is answered: nothing there."""


@dataclass(frozen=True)
class PartOfAnswer:
    """Every other job is missing."""


@dataclass(frozen=True)
class HalfRecords:
    """Each job is said to have ended, by a record that is not complete."""


@dataclass(frozen=True)
class Lag:
    """Jobs younger than so many seconds are missing."""

    seconds: float


SubmissionFault = LoseSubmission | LoseConfirmation | Late | RefuseSubmission | DeferSubmission | Hang
QuestionFault = NoAnswer | LostAnswer | Slow | EmptyAnswer | PartOfAnswer | HalfRecords | Lag


class FaultyScheduler(Backend):
    """A backend that does as another one does, until a test injects a fault.

    An :class:`EmptyAnswer`, :class:`PartOfAnswer` or :class:`Lag` of ``find`` breaks what a backend has to keep (unless it
    lasts no longer than the settling time): two jobs can follow, of which the guard lets one run.

    :param clock: by which faults last; by default the machine's.
    """

    def __init__(self, backend: Backend, clock: Clock | None = None) -> None:
        self.backend = backend
        self._clock: Clock = clock or RealClock()
        self._lock = threading.Lock()
        self._submissions: list[SubmissionFault] = []
        self._questions: dict[Question, QuestionFault] = {}
        self._hanging: dict[threading.Thread, Hang] = {}
        self.happened: list[tuple[str, SubmissionFault, datetime]] = []
        """What has happened to submissions so far: the gateway's id of the job, the fault, and when."""

    def hangs(self, thread: threading.Thread) -> bool:
        """Whether this thread's submission hangs now."""
        hang = self._hanging.get(thread)
        return hang is not None and not hang.released

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the backend it is around."""
        return self.backend.name

    def inject(self, fault: SubmissionFault) -> None:
        """Let a fault happen to the next submission; several wait for one submission each, in their order."""
        with self._lock:
            self._submissions.append(fault)

    def disturb(self, fault: QuestionFault, *questions: Question) -> None:
        """Let a fault happen to each of these questions until :meth:`heal`; it takes the place of one that does."""
        with self._lock:
            self._questions.update(dict.fromkeys(questions, fault))

    def heal(self) -> None:
        """Withdraw every fault that has not happened; what hangs goes on hanging."""
        with self._lock:
            self._submissions.clear()
            self._questions.clear()

    def release(self) -> None:
        """Let everything go on that hangs."""
        for hang in list(self._hanging.values()):
            hang.release()

    def submit(self, submission: Submission) -> str:
        with self._lock:
            fault = self._submissions.pop(0) if self._submissions else None
            if fault is not None:
                self.happened.append((submission.jobid, fault, self._clock.now()))
        match fault:
            case LoseSubmission():
                raise Unknown("the scheduler did not answer the submission")
            case Late(seconds):
                self._clock.after(seconds, lambda: self._deliver(submission))
                raise Unknown("the scheduler has not answered the submission yet")
            case RefuseSubmission():
                raise Refused("the scheduler does not take such jobs")
            case DeferSubmission():
                raise Deferred("the scheduler takes no jobs now")
            case Hang("before"):
                self._hang(fault)
        identifier = self.backend.submit(submission)
        match fault:
            case LoseConfirmation():
                raise Unknown("the answer to the submission was lost")
            case Hang("after"):
                self._hang(fault)
        return identifier

    def _hang(self, hang: Hang) -> None:
        self._hanging[threading.current_thread()] = hang
        hang.wait()
        del self._hanging[threading.current_thread()]

    def _deliver(self, submission: Submission) -> None:
        with suppress(BackendError):  # Nobody is there any more to be told.
            self.backend.submit(submission)

    def cancel(self, id: str, folder: str | None = None) -> None:
        fault = self._before("cancel")
        self.backend.cancel(id, folder)
        self._after("cancel", fault)

    def queue(self) -> Mapping[str, Observation]:
        fault = self._before("queue")
        return {job.id: job for job in self._bent(fault, self.backend.queue().values())}

    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        fault = self._before("accounting")
        return {job.id: job for job in self._bent(fault, self.backend.accounting(folders).values())}

    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        fault = self._before("find")
        return self._bent(fault, self.backend.find(folder, since))

    def traces(self, ids: Collection[str]) -> Mapping[str, Trace]:
        fault = self._before("traces")
        traces = self.backend.traces(ids)
        self._after("traces", fault)
        return {} if isinstance(fault, EmptyAnswer) else traces

    def _before(self, question: Question) -> QuestionFault | None:
        fault = self._questions.get(question)
        if isinstance(fault, NoAnswer):
            raise SchedulerDown(f"the scheduler does not answer ({question})")
        if isinstance(fault, Slow):
            self._clock.sleep(fault.seconds)
        return fault

    def _after(self, question: str, fault: QuestionFault | None) -> None:
        if isinstance(fault, LostAnswer):
            raise SchedulerDown(f"the answer of the scheduler was lost ({question})")

    def _bent(self, fault: QuestionFault | None, jobs: Collection[Observation]) -> list[Observation]:
        """An answer as the fault has it."""
        self._after("jobs", fault)
        answer = list(jobs)
        match fault:
            case EmptyAnswer():
                return []
            case PartOfAnswer():
                return answer[::2]
            case HalfRecords():
                return [_half(job) for job in answer]
            case Lag(seconds):
                latest = self._clock.now() - timedelta(seconds=seconds)
                return [job for job in answer if job.submitted_at is None or job.submitted_at <= latest]
        return answer

    @property
    def submission_limit(self) -> float:
        return self.backend.submission_limit

    @property
    def settling_time(self) -> float:
        return self.backend.settling_time

    def start(self) -> None:
        self.backend.start()

    def stop(self) -> None:
        self.backend.stop()

    def describe(self) -> dict[str, object]:
        return self.backend.describe()


def _half(job: Observation) -> Observation:
    return replace(job, state=JobState.COMPLETED, native_state="COMPLETED", complete=False, ended_at=None)
