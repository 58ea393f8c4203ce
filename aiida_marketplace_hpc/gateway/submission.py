"""From an intention in the ledger to a job of the scheduler: once, whatever is lost or killed in between.

A launch is written down before it is done. :class:`Submissions` then acts in a thread and records the outcome, under the
fence that the intention has given it. Where an intention is found without an outcome (the gateway was killed, the scheduler's
answer was lost), :meth:`Submissions.advance` takes it one step further: it looks for the job among those of the scheduler,
and submits again only when it is proven that there is none.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy.exc import IntegrityError

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.errors import (
    Busy,
    Conflict,
    FileError,
    GatewayError,
    InvalidRequest,
    Unauthorized,
    Unavailable,
)
from aiida_marketplace_hpc.gateway.backends.base import (
    Backend,
    BackendError,
    Deferred,
    Fault,
    Observation,
    Refused,
    SchedulerDown,
    Submission,
    Unknown,
)
from aiida_marketplace_hpc.gateway.backends.wrapper import EXIT_SECOND_COPY, GUARD_PREFIX
from aiida_marketplace_hpc.gateway.ledger import Ledger, owner_of
from aiida_marketplace_hpc.gateway.log import REQUEST, current, tells_of_job
from aiida_marketplace_hpc.gateway.maintenance import Maintenance
from aiida_marketplace_hpc.gateway.metrics import Metrics
from aiida_marketplace_hpc.gateway.policy import Policy
from aiida_marketplace_hpc.gateway.reconcile import Step, next_step, proven_absent
from aiida_marketplace_hpc.gateway.schema import Job, User
from aiida_marketplace_hpc.gateway.storage import AnyFiles
from aiida_marketplace_hpc.protocol import JobState

logger = logging.getLogger(__name__)

PASSING = (Unavailable, Busy, Unauthorized)
"""What is raised where a disk that is behind another service cannot be looked at just now: it says nothing about any file."""

GATEWAY = "gateway"
"""What stands in the guard of a job that was given up, in place of a job's id."""
MAX_SCRIPT = 4 * 1024 * 1024
"""Bytes: Slurm's own limit for a batch script (``max_script_size``)."""
_THREADS = 4
_WAITING = timedelta(seconds=10)
"""How long a submission may wait for a thread before its lease is renewed."""
_CLOCK_SKEW = timedelta(seconds=5)


class Submissions:
    """Submits what the ledger says is to be submitted.

    :param files_of: what a user can do with files on a machine; scripts are read with it, never around it.
    :param maintenance: while there is one, nothing is submitted that was not under way before.
    :param policy: what the site wants of job scripts.
    :param retry_interval: between attempts while the scheduler takes no jobs.
    :param now: the time, aware.
    """

    def __init__(
        self,
        ledger: Ledger,
        backend: Backend,
        files_of: Callable[[User, str], AnyFiles],
        maintenance: Maintenance,
        policy: Policy,
        *,
        retry_interval: timedelta,
        now: Callable[[], datetime],
        metrics: Metrics,
    ) -> None:
        self._ledger = ledger
        self._backend = backend
        self._files_of = files_of
        self._maintenance = maintenance
        self._policy = policy
        self._retry_interval = retry_interval
        self._now = now
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="submit")
        self._flights: dict[str, Future[None]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let submissions under way end, so that their outcome is recorded."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def intend(self, job: Job, digest: str, *, at_once: bool, message: str | None = None) -> Job | None:
        """Write the intention to submit a job down.

        :param digest: of its script.
        :param at_once: :meth:`begin` follows; else :meth:`advance` is to submit it when it can.
        :param message: why it waits.
        :returns: the job, or ``None`` if somebody else was faster.
        :raises Conflict: if another job lives in the folder by now.
        """
        now = self._now()
        intention = {
            "state": JobState.SUBMITTING,
            "script_digest": digest,
            "attempt": job.attempt + 1,
            "intended_at": now,
            "lease_until": now + self._lease if at_once else now,
            "search_first": at_once,
            "cancel_requested": False,
            "request_id": current(REQUEST),
            "message": message,
        }
        try:
            return self._ledger.change(job, intention, take_over=True)
        except IntegrityError:
            raise Conflict(f"another job lives in {job.folder}; cancel it, or wait for its end") from None

    def begin(self, job: Job, text: bytes, *, again: bool = False) -> None:
        """Submit in a thread of this process, at most once at a time for each job.

        :param again: an earlier submission of the same attempt may still arrive.
        """
        with self._lock:
            if job.id in self._flights:
                return
            future = self._threads.submit(self._submit, job, text, again)
            self._flights[job.id] = future
        future.add_done_callback(lambda ended: self._landed(job.id, ended))

    def _landed(self, jobid: str, flight: Future[None]) -> None:
        self._flights.pop(jobid, None)
        problem = None if flight.cancelled() else flight.exception()
        if isinstance(
            problem, GatewayError
        ):  # The database is gone in this moment: the reconciler finds out what happened.
            logger.warning("job %s: what came of its submission could not be recorded: %s", jobid, problem)

    def under_way(self, jobid: str) -> bool:
        """Whether a thread of this process is submitting the job."""
        with self._lock:
            return jobid in self._flights

    def wait(self, jobid: str, seconds: float) -> None:
        """Wait for a submission that a thread of this process is making."""
        with self._lock:
            flight = self._flights.get(jobid)
        if flight is not None:
            wait_for([flight], timeout=seconds)

    def give_up(self, job: Job) -> None:
        """End a job of which no submission is known, so that none that arrives later runs.

        :raises GatewayError: its guard could not be taken; nothing was changed.
        """
        self._close(
            job,
            {"state": JobState.CANCELLED, "message": "cancelled before it was submitted", "ended_at": self._now()},
        )

    @tells_of_job
    def follow_guard(self, job: Job) -> bool:
        """Make the copy that runs, or ran, user code the job; whether that is another one than the ledger thought.

        Where a gateway gave the job up, and was killed before it could write that down, this is made up for.
        """
        holder, former = self.guard_holder(job), job.scheduler_id
        if holder == GATEWAY:
            return self._give_up_at_last(job)
        if holder in (None, former):
            return False
        if self._ledger.change(job, taken(str(holder), None), take_over=True) is None:
            return False
        logger.warning("job %s: its guard was taken by %s, which is the job", job.id, holder)
        if former is not None:
            self._metrics.duplicate()
            self._ledger.note_duplicate(job.id, former)
        return True

    def _give_up_at_last(self, job: Job) -> bool:
        end: dict[str, Any] = {"state": JobState.REFUSED, "scheduler_id": None}
        if job.cancel_requested:
            end.update(state=JobState.CANCELLED, ended_at=self._now())
        message = "the gateway gave it up before it ran"
        if self._ledger.change(job, {**end, "message": message}, take_over=True) is None:
            return False
        logger.warning("job %s: its guard was taken by a gateway that gave it up", job.id)
        if job.scheduler_id is not None:
            self._metrics.duplicate()
            self._ledger.note_duplicate(job.id, job.scheduler_id)
        return True

    @tells_of_job
    def advance(self, job: Job) -> None:
        """Take a submission that nobody in this process is making one step further; called again and again.

        :raises BackendError: the scheduler did not answer; nothing was changed.
        """
        if self.under_way(job.id):
            return
        now = self._now()
        step = next_step(job, now)
        if step is Step.CANCEL:
            self.give_up(job)
        elif step is Step.SUBMIT and not self._waits_for_maintenance(job):
            self._resubmit(job)
        elif step is Step.LOOK:
            found = self._look(job)
            if found:
                self._adopt(job, found)
            elif self.follow_guard(job):
                return  # It has run, and the scheduler has forgotten it by now.
            elif proven_absent(job, now, self._backend.settling_time) and not self._waits_for_maintenance(job):
                self._metrics.submission("absent")
                logger.warning("job %s: its submission never happened", job.id)
                if job.cancel_requested:
                    self.give_up(job)
                else:
                    self._resubmit(job)

    @tells_of_job
    def end_copy(self, job: Job, identifier: str) -> None:
        """Record that the scheduler has a second copy of a job, and ask for its end; its guard ends it before user code."""
        logger.warning("job %s: %s is a second copy, cancelling it", job.id, identifier)
        self._metrics.duplicate()
        self._ledger.note_duplicate(job.id, identifier)
        try:
            self._backend.cancel(identifier, job.folder)
        except BackendError as exc:
            logger.warning("job %s: the second copy %s could not be cancelled: %s", job.id, identifier, exc)

    def guard_holder(self, job: Job, attempt: int | None = None) -> str | None:
        """The scheduler's id of the copy that runs, or ran, user code; ``None`` if none has started yet.

        :param attempt: of which attempt; by default the present one.
        """
        return self._as_id(job, read_guard(self._files(job), _guard_path(job, attempt))[0])

    def _files(self, job: Job) -> AnyFiles:
        return self._files_of(self._ledger.user(job.user_id), job.machine)

    def _as_id(self, job: Job, holder: str | None) -> str | None:
        """The scheduler's id of the job that a guard names by its number."""
        return holder if holder in (None, GATEWAY) else self._backend.on(job.machine).id_of(str(holder))

    @property
    def _lease(self) -> timedelta:
        return timedelta(seconds=self._backend.submission_limit) + _WAITING

    def _close(self, job: Job, values: Mapping[str, Any]) -> None:
        """End a job that was perhaps submitted: its guard is taken first, and if a copy was faster, that one is the job."""
        holder = self._as_id(job, take_guard(self._files(job), _guard_path(job)))
        if holder is None:
            self._ledger.change(job, values)
        elif self._ledger.change(job, taken(holder, None), take_over=True) is not None:
            logger.warning("job %s: its submission was found again as %s, by its guard", job.id, holder)

    def _refuse(self, job: Job, message: str, *, again: bool) -> None:
        values = {"state": JobState.REFUSED, "message": message, "search_first": False, "lease_until": None}
        if not again:
            self._ledger.change(job, values)
            return
        try:
            self._close(job, values)
        except GatewayError as exc:
            logger.warning("job %s is refused, but its guard cannot be taken: %s", job.id, exc)
            self._ledger.change(job, {"search_first": True, "lease_until": self._now()})

    @tells_of_job
    def _submit(self, job: Job, text: bytes, again: bool) -> None:
        now = self._now()
        if job.lease_until is None or now > job.lease_until - (self._lease - _WAITING):
            # It has waited long for a thread. Whoever takes the submission over now finds a higher fence.
            renewed = self._ledger.change(job, {"lease_until": now + self._lease}, take_over=True)
            if renewed is None:
                return
            job = renewed
        submission = Submission(
            jobid=job.id,
            folder=job.folder,
            script=str(PurePosixPath(job.folder, job.script)),
            script_text=text,
            script_digest=job.script_digest or "",
            guard=guard_of(job.id, job.attempt),
            comment=comment_of(job),
            client_ref=job.client_ref,
            owner=owner_of(self._ledger.user(job.user_id)),
            attempt=job.attempt,
        )
        try:
            submission = replace(submission, options=self._policy.options(text))
            identifier = self._backend.on(job.machine).submit(submission)
        except Refused as exc:
            self._metrics.submission("refused")
            logger.info("job %s refused for good: %s", job.id, exc)
            self._refuse(job, str(exc), again=again)
        except Deferred as exc:
            fault = isinstance(exc, Fault)
            self._metrics.submission("fault" if fault else "deferred")
            if fault:
                logger.error("job %s cannot be submitted until somebody mends the gateway: %s", job.id, exc)
            else:
                logger.warning("job %s refused for now, will be tried again: %s", job.id, exc)
            self._ledger.change(
                job,
                {"message": str(exc), "search_first": False, "lease_until": self._now() + self._retry_interval},
            )
        except Exception as exc:
            # Unknown, or a fault of ours: either way it may have been submitted.
            expected = isinstance(exc, Unknown)
            self._metrics.submission("unknown")
            logger.warning("whether job %s was submitted is not known: %s", job.id, exc, exc_info=not expected)
            self._ledger.change(job, {"message": str(exc), "search_first": True, "lease_until": self._now()})
        else:
            self._confirm(job, identifier, now)

    def _confirm(self, job: Job, identifier: str, submitted_at: datetime) -> None:
        """Record the scheduler's id the moment it exists; whoever lost the fence meanwhile must not leave a second job."""
        self._metrics.submission("taken")
        if self._ledger.change(job, taken(identifier, submitted_at)) is not None:
            logger.info("job %s submitted as %s from %s", job.id, identifier, job.folder)
            return
        current = self._ledger.get(job.id)
        if current is not None and current.scheduler_id != identifier:
            self.end_copy(current, identifier)

    def _look(self, job: Job) -> list[Observation]:
        since = (job.intended_at or job.created_at) - _CLOCK_SKEW
        others = {other.scheduler_id for other in self._ledger.in_folder(job.folder) if other.id != job.id}
        known = others | set(job.duplicates or ())
        machine = self._backend.on(job.machine)
        found = [one for one in machine.find(job.folder, since) if one.id not in known]
        if not found:
            return []
        living = {one.id for one in found if not one.state.final}
        traces = machine.traces(living) if living else {}
        if unexplained := living - traces.keys():
            # Jobs of the user's own have no trace, nor have those that have ended in this moment.
            queue = machine.queue()
            if any(id not in queue or queue[id].state.final for id in unexplained):
                raise SchedulerDown(f"the jobs of {job.folder} have changed while they were looked at")
        holder = self.guard_holder(job)

        def is_ours(one: Observation) -> bool:
            if one.id in living:
                return one.id in traces and traces[one.id].jobid == job.id
            # Of a job that has ended, the guard says whether it ran user code; a second copy did not.
            return one.id == holder or (holder is None and one.exit_code != EXIT_SECOND_COPY)

        ours = [one for one in found if is_ours(one)]
        return sorted(ours, key=lambda one: (one.submitted_at is None, one.submitted_at, one.id))

    def _adopt(self, job: Job, found: list[Observation]) -> None:
        if len(found) > 1:
            # The copy that runs user code is the one whose id is in the guard, not the one that was submitted first.
            holder = self.guard_holder(job)
            found.sort(key=lambda one: one.id != holder)
        first, *others = found
        if self._ledger.change(job, taken(first.id, first.submitted_at), take_over=True) is None:
            return
        self._metrics.submission("found")
        logger.warning("job %s: its submission was found again as %s", job.id, first.id)
        for other in others:
            self.end_copy(job, other.id)

    def _waits_for_maintenance(self, job: Job) -> bool:
        """Whether a job is not to be submitted now, though it could; it says so then."""
        notice = self._maintenance.notice()
        if notice is None or job.cancel_requested:
            return False
        if job.message != notice.text:
            self._ledger.change(job, {"message": notice.text})
        return True

    def _resubmit(self, job: Job) -> None:
        lease = {"lease_until": self._now() + self._lease, "search_first": True}
        taken = self._ledger.change(job, lease, take_over=True)
        if taken is None:
            return
        text = b""
        try:
            text, digest = read_script(self._files(taken), taken.folder, taken.script)
            problem = "was changed" if digest != taken.script_digest else None
        except PASSING as exc:
            self._ledger.change(
                taken,
                {"message": exc.message, "search_first": False, "lease_until": self._now() + self._retry_interval},
            )
            return
        except GatewayError as exc:
            problem = f"cannot be read any more ({exc.message})"
        if problem is not None:
            message = f"the script {taken.folder}/{taken.script} {problem} while the job waited to be submitted"
            self._refuse(taken, message, again=True)
            return
        self.begin(taken, text, again=True)


def taken(identifier: str, submitted_at: datetime | None) -> dict[str, object]:
    """What the ledger says of a job that the scheduler has taken."""
    return {
        "state": JobState.QUEUED,
        "scheduler_id": identifier,
        "submitted_at": submitted_at,
        "search_first": False,
        "lease_until": None,
        "message": None,
    }


def comment_of(job: Job) -> str:
    """What a job's comment says where the batch system has one and the script sets none: what to look for in the logs."""
    words = [f"marketplace-hpc:{job.id}", job.client_ref or "", f"request:{job.request_id}" if job.request_id else ""]
    return " ".join(word for word in words if word)


def guard_of(jobid: str, attempt: int = 1) -> str:
    """The name of the file that a job takes in its folder before it runs the script; each attempt has its own."""
    return f"{GUARD_PREFIX}{jobid}" + (f"-{attempt}" if attempt > 1 else "")


def _guard_path(job: Job, attempt: int | None = None) -> str:
    return f"{job.folder}/{guard_of(job.id, attempt or job.attempt)}"


def take_guard(files: AnyFiles, path: str) -> str | None:
    """Take a guard, so that no copy that comes later runs user code. May be repeated.

    :returns: the scheduler's id of the job that was faster; ``None`` if it is the gateway's now, or if the folder is gone,
        where no copy can run either.
    :raises GatewayError: it could not be taken.
    """
    text = [f"{GATEWAY}\n".encode()]
    try:
        files.forced().write(path, lambda _: text.pop() if text else b"", overwrite=False)
    except FileError as exc:
        if exc.errno in ("ENOENT", "ENOTDIR"):
            return None
        if exc.errno != "EEXIST":
            raise
    else:
        return None
    holder, _ = read_guard(files, path)
    if holder is None:
        raise Unavailable(f"{path} is being written just now")
    return None if holder == GATEWAY else holder


def read_guard(files: AnyFiles, path: str) -> tuple[str | None, str | None]:
    """What a guard says: the scheduler's id of the job that took it, and the digest of the script that it ran.

    :raises GatewayError: the disk does not answer now (:data:`PASSING`), which says nothing about the guard.
    """
    try:
        content, _ = files.read(path)
    except PASSING:
        raise
    except GatewayError:
        return None, None
    with content:
        lines = content.read(1024).decode("ascii", "replace").split("\n")
    # The last piece has no end: it may be half a line, or what follows the last one.
    whole = [line.strip() for line in lines[:-1]]
    return (whole[0] if whole else None), (whole[1] if len(whole) > 1 else None)


def read_script(files: AnyFiles, folder: str, script: str) -> tuple[bytes, str]:
    """The job script and its digest."""
    content, attributes = files.read(f"{folder}/{script}")
    with content:
        if attributes.st_size > MAX_SCRIPT:
            raise InvalidRequest(f"the script {folder}/{script} has more than {MAX_SCRIPT} bytes")
        text = content.read(MAX_SCRIPT + 1)
    return text, bundle.digest_of(text)
