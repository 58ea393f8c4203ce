"""A batch system in memory that does what a test tells it: behind the same port as the real ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import PurePosixPath

from aiida_marketplace_hpc.gateway.backends.base import Backend, Observation, SchedulerDown, Submission, Trace, is_in
from aiida_marketplace_hpc.protocol import JobState


class FakeBackend(Backend):
    """A batch system whose jobs run when :meth:`run` and end when :meth:`end` is called.

    Faults are set as attributes: ``down`` (no question is answered), ``stubborn`` (cancelled jobs go on), ``lost`` (jobs that
    the queue does not mention), ``on_submit`` (called instead of answering a submission; it may raise, and call ``accept``
    before or after).
    """

    name = "fake"

    def __init__(self, settling_time: float = 0.0) -> None:
        self._settling_time = settling_time
        self._lock = threading.Lock()
        self.jobs: dict[str, Observation] = {}
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
            self.jobs[identifier] = Observation(
                identifier,
                JobState.QUEUED,
                "PENDING",
                name=PurePosixPath(submission.script).name,
                partition="fake",
                submitted_at=datetime.now(timezone.utc),
                folder=submission.folder,
            )
            self.submitted[identifier] = Trace(
                submission.jobid,
                submission.folder,
                submission.script,
                submission.script_digest,
                submission.client_ref,
                submission.owner,
            )
        return identifier

    def run(self, identifier: str) -> None:
        """Let a job start."""
        self._change(identifier, state=JobState.RUNNING, native_state="RUNNING", nodes="node1")

    def end(self, identifier: str, state: JobState = JobState.COMPLETED, exit_code: int = 0) -> None:
        """Let a job end, and leave the queue."""
        record = [["JobID", "State"], [identifier, state.value]]
        self._change(
            identifier,
            state=state,
            native_state=state.value,
            exit_code=exit_code,
            ended_at=datetime.now(timezone.utc),
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

    def cancel(self, id: str) -> None:
        self._asked("cancel")
        self.cancelled.append(id)
        if id in self.jobs and not self.jobs[id].state.final and not self.stubborn:
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
        return [job for job in self.jobs.values() if job.folder == folder]

    def describe(self) -> dict[str, object]:
        return {"name": "fake", "backend": "fake", "partitions": ["fake"]}

    def _asked(self, question: str) -> None:
        self.questions.append(question)
        if self.down:
            raise SchedulerDown("the fake scheduler is down")
