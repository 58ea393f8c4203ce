"""A batch system in memory that does what a test tells it: behind the same port as the real ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath

from aiida_marketplace_hpc.gateway.backends.base import Backend, Observation, SchedulerDown, Submission, Trace, is_in
from aiida_marketplace_hpc.gateway.backends.wrapper import EXIT_NO_GUARD, EXIT_SECOND_COPY
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.clock import Clock, RealClock

_CLOCK_SKEW = timedelta(seconds=60)
"""As with Slurm, jobs that were submitted a little earlier are found, too."""


class FakeBackend(Backend):
    """A batch system whose jobs run when :meth:`run` and end when :meth:`end` is called.

    A job that starts takes the guard of its submission in its folder, as the real wrapper does, or ends before user code;
    ``executed`` has the ids of those that came to run user code.

    Faults are set as attributes: ``down`` (no question is answered), ``stubborn`` (cancelled jobs go on), ``lost`` (jobs that
    the queue does not mention), ``on_submit`` (called instead of answering a submission; it may raise, and call ``accept``
    before or after). More of them has :class:`~aiida_marketplace_hpc.testing.faulty_scheduler.FaultyScheduler`, around this
    or any other backend.
    """

    name = "fake"

    def __init__(self, settling_time: float = 0.0, *, clock: Clock | None = None) -> None:
        self._settling_time = settling_time
        self._clock: Clock = clock or RealClock()
        self._lock = threading.Lock()
        self._of: dict[str, Submission] = {}
        self.jobs: dict[str, Observation] = {}
        self.executed: list[str] = []
        self.submissions: list[Submission] = []
        self.submitted: dict[str, Trace] = {}
        self.cancelled: list[str] = []
        self.questions: list[str] = []
        self.down = False
        self.stubborn = False
        self.lost: set[str] = set()
        self.on_submit: Callable[[Submission], str] | None = None

    @property
    def settling_time(self) -> float:
        return self._settling_time

    def accept(self, submission: Submission) -> str:
        """Take a job as if it had been submitted properly, and return its id."""
        with self._lock:
            self.submissions.append(submission)
            identifier = str(100 + len(self.submissions))
            self._of[identifier] = submission
            self.jobs[identifier] = Observation(
                identifier,
                JobState.QUEUED,
                "PENDING",
                name=PurePosixPath(submission.script).name,
                partition="fake",
                submitted_at=self._clock.now(),
                folder=submission.folder,
            )
            self.submitted[identifier] = Trace(
                submission.jobid,
                submission.folder,
                submission.script,
                submission.script_digest,
                submission.client_ref,
                submission.owner,
                submission.attempt,
            )
        return identifier

    @property
    def ids(self) -> list[str]:
        """Those of all jobs that were ever submitted, oldest first."""
        return list(self._of)

    def submission_of(self, identifier: str) -> Submission:
        """What a job was submitted as."""
        return self._of[identifier]

    def run(self, identifier: str) -> bool:
        """Let a job start.

        :returns: whether it runs; a second copy of a submission has ended instead.
        """
        submission = self._of[identifier]
        if submission.guard is not None and (refused := _take(submission, identifier)):
            self.end(identifier, JobState.FAILED, refused)
            return False
        self.executed.append(identifier)
        self._change(
            identifier, state=JobState.RUNNING, native_state="RUNNING", nodes="node1", started_at=self._clock.now()
        )
        return True

    def requeue(self, identifier: str) -> None:
        """Put a job that runs back into the queue, under the same id: it runs once more."""
        self._change(identifier, state=JobState.QUEUED, native_state="PENDING", nodes="", started_at=None)

    def forget(self, identifier: str) -> Observation:
        """Let a job be in no answer any more; :meth:`recall` brings it back."""
        with self._lock:
            return self.jobs.pop(identifier)

    def recall(self, job: Observation) -> None:
        """Let a job that was forgotten be in the answers again."""
        with self._lock:
            self.jobs[job.id] = job

    def give_away(self, identifier: str, folder: str) -> None:
        """Give the id of a job that has ended to another one, that runs in another folder and is nobody's here."""
        other = Observation(identifier, JobState.RUNNING, "RUNNING", submitted_at=self._clock.now(), folder=folder)
        with self._lock:
            self.jobs[identifier] = other
            self.lost.discard(identifier)
            self.submitted.pop(identifier, None)

    def end(self, identifier: str, state: JobState = JobState.COMPLETED, exit_code: int = 0) -> None:
        """Let a job end, and leave the queue."""
        record = [["JobID", "State"], [identifier, state.value]]
        self._change(
            identifier,
            state=state,
            native_state=state.value,
            exit_code=exit_code,
            ended_at=self._clock.now(),
            columns=record[0],
            rows=record[1:],
        )
        self.lost.add(identifier)

    def _change(self, identifier: str, **values: object) -> None:
        with self._lock:
            self.jobs[identifier] = replace(self.jobs[identifier], **values)  # type: ignore[arg-type]

    def submit(self, submission: Submission) -> str:
        if self.on_submit is not None:
            return self.on_submit(submission)
        return self.accept(submission)

    def cancel(self, id: str, folder: str | None = None) -> None:
        self._asked("cancel")
        self.cancelled.append(id)
        job = self.jobs.get(id)
        if job is None or job.state.final or (folder is not None and not is_in(job, folder)):
            return
        if not self.stubborn:
            self.end(id, JobState.CANCELLED)

    def queue(self) -> Mapping[str, Observation]:
        self._asked("queue")
        return {identifier: job for identifier, job in self.jobs.items() if identifier not in self.lost}

    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        self._asked("accounting")
        found = {identifier: self.jobs[identifier] for identifier in folders if identifier in self.jobs}
        return {identifier: job for identifier, job in found.items() if is_in(job, folders[identifier])}

    def traces(self, ids: Collection[str]) -> Mapping[str, Trace]:
        self._asked("traces")
        return {identifier: self.submitted[identifier] for identifier in ids if identifier in self.submitted}

    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        self._asked("find")
        earliest = since - _CLOCK_SKEW
        return [
            job
            for job in self.jobs.values()
            if job.folder == folder and (job.submitted_at is None or job.submitted_at >= earliest)
        ]

    def describe(self) -> dict[str, object]:
        return {"name": "fake", "backend": "fake", "partitions": ["fake"]}

    def _asked(self, question: str) -> None:
        self.questions.append(question)
        if self.down:
            raise SchedulerDown("the fake scheduler is down")


def _take(submission: Submission, identifier: str) -> int:
    """Take the guard of a submission, as its wrapper does.

    :returns: the exit code with which the job ends before user code; 0 if it goes on.
    """
    guard = Path(submission.folder, submission.guard or "")
    try:
        with guard.open("x") as file:
            file.write(f"{identifier}\n{submission.script_digest}\n")
    except FileExistsError:
        return 0 if guard.read_text().partition("\n")[0] == identifier else EXIT_SECOND_COPY
    except OSError:
        return EXIT_NO_GUARD
    return 0
