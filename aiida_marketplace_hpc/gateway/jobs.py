"""Jobs: creating, launching, cancelling and asking, each safe to repeat.

A launch writes the intention into the ledger before anything else happens, then acts, then records the outcome. Whoever
finds an intention without an outcome (:meth:`Jobs.reconcile`, after a crash or a lost answer) looks for the job among those
of the scheduler before it acts again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from typing import Any

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.errors import (
    Conflict,
    FileError,
    GatewayError,
    InvalidRequest,
    NotFound,
    SubmissionRefused,
    Unavailable,
)
from aiida_marketplace_hpc.gateway.backends.base import (
    Backend,
    BackendError,
    Deferred,
    Observation,
    Refused,
    SchedulerDown,
    Submission,
    Unknown,
)
from aiida_marketplace_hpc.gateway.files import Files
from aiida_marketplace_hpc.gateway.ledger import Job, Ledger, User, automatic_key, new_id, utc_now
from aiida_marketplace_hpc.gateway.reconcile import Step, next_step, proven_absent
from aiida_marketplace_hpc.gateway.watch import Watch
from aiida_marketplace_hpc.protocol import JobState

logger = logging.getLogger(__name__)

MAX_SCRIPT = 4 * 1024 * 1024
"""Bytes: Slurm's own limit for a batch script (``max_script_size``)."""
_CLOCK_SKEW = timedelta(seconds=5)


class Jobs:
    """All jobs of a gateway.

    :param files_of: what a user can do with files; scripts are read with it, never around it.
    :param launch_wait: seconds that a launch waits for the scheduler's word before it answers ``SUBMITTING``.
    :param retry_interval: seconds between attempts while the scheduler takes no jobs.
    """

    def __init__(
        self,
        ledger: Ledger,
        backend: Backend,
        watch: Watch,
        files_of: Callable[[User], Files],
        *,
        machine: str = "",
        launch_wait: float = 10.0,
        retry_interval: float = 15.0,
    ) -> None:
        self._ledger = ledger
        self._backend = backend
        self._watch = watch
        self._files_of = files_of
        self._machine = machine
        self._lease = timedelta(seconds=backend.submission_limit)
        self._launch_wait = launch_wait
        self._retry_interval = timedelta(seconds=retry_interval)
        self._submitters = ThreadPoolExecutor(max_workers=4, thread_name_prefix="submit")
        self._flights: dict[str, Future[None]] = {}
        self._flights_lock = threading.Lock()

    def close(self) -> None:
        """Let submissions under way end, so that their outcome is recorded."""
        self._submitters.shutdown(wait=True, cancel_futures=True)

    # Creating

    def create_in_folder(
        self,
        user: User,
        folder: str,
        script: str,
        *,
        client_ref: str | None = None,
        key: str | None = None,
    ) -> Job:
        """Make a job of an existing folder and a script in it; the same again is the same job.

        :param key: makes the request idempotent in place of folder and script digest.
        :raises Conflict: if another job lives in the folder, or the key belongs to another folder or script.
        """
        if not script or "/" in script:
            raise InvalidRequest(f"the script is the name of a file in the folder, not {script!r}")
        files = self._files_of(user)
        attributes = files.stat(folder, follow=True)
        if attributes["type"] != "directory":
            raise FileError(f"Not a directory: {folder}", errno="ENOTDIR", path=folder)
        folder = attributes["path"]
        try:
            (folder + script).encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the folder and the script of a job need names in UTF-8") from None
        _, digest = _read_script(files, folder, script)
        if key is not None:
            key = f"key:{key}"
            if len(key) > 128:
                raise InvalidRequest("a key has at most 124 characters")
        else:
            key = automatic_key(folder, script, digest)
        job = self._ledger.find_by_key(user.id, key)
        if job is None:
            living = self._ledger.active_in_folder(user.id, folder)
            if living is not None:
                raise Conflict(
                    f"job {living.id} lives in {folder} with another script ({living.state}); cancel it, or wait for its end"
                )
            job = self._ledger.add(self._new(user, key, folder, script, digest, client_ref))
        if (job.folder, job.script) != (folder, script) or (job.script_digest != digest and key.startswith("key:")):
            raise Conflict(f"the key belongs to job {job.id}, which has another folder or script")
        return job

    def create_with_script(self, user: User, home: str, text: bytes) -> Job:
        """Make a job with a folder of its own below ``home`` and this script in it, as the published gateway does."""
        jobid = new_id()
        folder = f"{home}/{jobid}"
        files = self._files_of(user)
        files.mkdir(folder)
        script = "job.sh"
        left = [text]
        files.write(f"{folder}/{script}", lambda _: left.pop() if left else b"", mode=0o755)
        job = self._new(user, f"id:{jobid}", folder, script, None, None)
        job.id = jobid
        return self._ledger.add(job)

    def _new(self, user: User, key: str, folder: str, script: str, digest: str | None, client_ref: str | None) -> Job:
        return Job(
            id=new_id(),
            user_id=user.id,
            key=key,
            folder=folder,
            script=script,
            script_digest=digest,
            client_ref=client_ref,
            machine=self._machine,
            backend=self._backend.name,
            created_at=utc_now(),
            state=JobState.CREATED.value,
            cancel_requested=False,
            attempt=0,
            fence=0,
            search_first=False,
        )

    # Launching

    def launch(self, user: User, job: Job) -> Job:
        """Submit a job, unless it was; answers when the intention is durable and the scheduler has spoken, or has not in time.

        May be repeated. A job that was refused is tried again; that is a new attempt in the same row.

        :raises SubmissionRefused: with the scheduler's words, if it refuses the job for good.
        """
        if job.job_state in (JobState.CREATED, JobState.REFUSED):
            text, digest = _read_script(self._files_of(user), job.folder, job.script)
            now = utc_now()
            intended = self._ledger.change(
                job,
                {
                    "state": JobState.SUBMITTING,
                    "script_digest": digest,
                    "attempt": job.attempt + 1,
                    "intended_at": now,
                    "lease_until": now + self._lease,
                    "search_first": True,
                    "cancel_requested": False,
                    "message": None,
                },
                take_over=True,
            )
            if intended is not None:
                self._fly(intended, text)
        with self._flights_lock:
            flight = self._flights.get(job.id)
        if flight is not None:
            wait_for([flight], timeout=self._launch_wait)
        current = self._ledger.get(job.id) or job
        if current.job_state is JobState.REFUSED:
            raise SubmissionRefused(current.message or "the scheduler refused the job")
        return current

    def _fly(self, job: Job, text: bytes) -> None:
        """Submit in a thread of this process, at most once at a time for each job."""
        with self._flights_lock:
            if job.id in self._flights:
                return
            future = self._submitters.submit(self._submit, job, text)
            self._flights[job.id] = future
        future.add_done_callback(lambda _: self._flights.pop(job.id, None))

    def _submit(self, job: Job, text: bytes) -> None:
        submission = Submission(
            jobid=job.id,
            folder=job.folder,
            script=str(PurePosixPath(job.folder, job.script)),
            script_text=text,
            script_digest=job.script_digest or "",
            guard=guard_of(job),
            comment=f"marketplace-hpc:{job.id}" + (f" {job.client_ref}" if job.client_ref else ""),
            client_ref=job.client_ref,
        )
        now = utc_now()
        try:
            identifier = self._backend.submit(submission)
        except Refused as exc:
            logger.info("job %s refused for good: %s", job.id, exc)
            self._ledger.change(
                job, {"state": JobState.REFUSED, "message": str(exc), "search_first": False, "lease_until": None}
            )
        except Deferred as exc:
            logger.warning("job %s refused for now, will be tried again: %s", job.id, exc)
            self._ledger.change(
                job,
                {"message": str(exc), "search_first": False, "lease_until": utc_now() + self._retry_interval},
            )
        except Exception as exc:
            # Unknown, or a fault of ours: either way it may have been submitted.
            expected = isinstance(exc, Unknown)
            logger.warning("whether job %s was submitted is not known: %s", job.id, exc, exc_info=not expected)
            self._ledger.change(job, {"message": str(exc), "search_first": True, "lease_until": utc_now()})
        else:
            self._confirm(job, identifier, now)

    def _confirm(self, job: Job, identifier: str, submitted_at: datetime) -> None:
        """Record the scheduler's id the moment it exists; whoever lost the fence meanwhile must not leave a second job."""
        recorded = self._ledger.change(
            job,
            {
                "state": JobState.QUEUED,
                "scheduler_id": identifier,
                "submitted_at": submitted_at,
                "search_first": False,
                "lease_until": None,
                "message": None,
            },
        )
        if recorded is not None:
            logger.info("job %s submitted as %s from %s", job.id, identifier, job.folder)
            return
        current = self._ledger.get(job.id)
        if current is not None and current.scheduler_id != identifier:
            logger.warning("job %s was taken over meanwhile; cancelling the duplicate %s", job.id, identifier)
            try:
                self._backend.cancel(identifier)
            except BackendError:
                logger.exception(
                    "the duplicate %s could not be cancelled; its guard ends it before user code", identifier
                )

    # Cancelling

    def cancel(self, job: Job, *, unlaunched: bool = False) -> Job:
        """Ask for the end of a job; one that has ended stays as it is. May be repeated.

        :param unlaunched: end a job that was never launched, too: it cannot be launched any more.
        :raises Conflict: if it was never launched.
        :raises Unavailable: if the scheduler did not take the request; the wish is recorded and tried again.
        """
        if job.job_state is JobState.CREATED and unlaunched:
            values = {"state": JobState.CANCELLED, "message": "cancelled before it was launched", "ended_at": utc_now()}
            # Somebody may have launched it in between.
            job = self._ledger.change(job, values) or self._ledger.get(job.id) or job
        if job.job_state.final:
            return job
        if job.job_state is JobState.CREATED:
            raise Conflict(f"Job {job.id} not launched yet.")
        # Recorded first: a submission still under way is cancelled as soon as its outcome is known.
        current = self._ledger.change(job, {"cancel_requested": True}) or self._ledger.get(job.id) or job
        if current.scheduler_id and not current.job_state.final:
            self._cancel(current)
            self._watch.refresh()
        elif current.job_state is JobState.SUBMITTING and next_step(current, utc_now()) is Step.CANCEL:
            self._give_up(current)
        return self._ledger.get(job.id) or current

    def _cancel(self, job: Job) -> None:
        try:
            self._backend.cancel(job.scheduler_id or "")
        except SchedulerDown as exc:
            raise Unavailable(
                f"the scheduler does not take the cancellation now, it will be tried again: {exc}"
            ) from exc

    def _give_up(self, job: Job) -> None:
        self._ledger.change(
            job, {"state": JobState.CANCELLED, "message": "cancelled before it was submitted", "ended_at": utc_now()}
        )

    # Asking

    def states(self, user: User, jobids: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """The caller's jobs of these ids as they go over the wire, and the ids that are none of theirs."""
        self._watch.refresh()
        jobs = self._ledger.get_many(set(jobids), user.id)
        return {jobid: self.as_wire(job) for jobid, job in jobs.items()}, [one for one in jobids if one not in jobs]

    def active(self, user: User) -> list[dict[str, Any]]:
        """The caller's jobs that were launched and have not ended."""
        self._watch.refresh()
        return [self.as_wire(job) for job in self._ledger.of_user(user.id, active_only=True)]

    def of_user(self, user: User) -> list[Job]:
        """All of the caller's jobs, oldest first."""
        return self._ledger.of_user(user.id)

    def get(self, user: User, jobid: str, *, fresh: bool = False) -> Job:
        """The caller's job of that id.

        :param fresh: ask the scheduler first if its word is old.
        :raises NotFound: if it is nobody's or somebody else's; the answer is the same.
        """
        if fresh:
            self._watch.refresh()
        job = self._ledger.get(jobid, user.id)
        if job is None:
            raise NotFound(f"you have no job {jobid} on this gateway")
        return job

    def as_wire(self, job: Job, *, accounting: bool = False) -> dict[str, Any]:
        """A job as it goes over the wire: :data:`aiida_marketplace_hpc.protocol.JOB_FIELDS`."""
        age = self._watch.age(job)
        elapsed = job.elapsed
        if elapsed is None and job.started_at is not None and not job.job_state.final:
            elapsed = max(0.0, (utc_now() - job.started_at).total_seconds())
        document: dict[str, Any] = {
            "jobid": job.id,
            "state": job.state,
            "final": job.job_state.final,
            "folder": job.folder,
            "script": job.script,
            "script_digest": job.script_digest,
            "client_ref": job.client_ref,
            "machine": job.machine,
            "backend": job.backend,
            "name": job.name,
            "scheduler_id": job.scheduler_id,
            "scheduler_state": job.scheduler_state,
            "reason": job.reason,
            "partition": job.partition,
            "account": job.account,
            "nodes": job.nodes,
            "exit_code": job.exit_code,
            "signal": job.signal,
            "created_at": _iso(job.created_at),
            "submitted_at": _iso(job.submitted_at),
            "started_at": _iso(job.started_at),
            "ended_at": _iso(job.ended_at),
            "time_limit": job.time_limit,
            "elapsed": elapsed,
            "message": job.message or (None if job.job_state.final else self._watch.problem),
            "age": None if age is None else round(age, 3),
        }
        if accounting:
            document["accounting"] = job.accounting
        return document

    # Reconciling

    def reconcile(self) -> None:
        """Take each unconfirmed submission and each open cancellation one step further; called again and again."""
        for job in self._ledger.active():
            try:
                if job.job_state is JobState.SUBMITTING:
                    with self._flights_lock:
                        flying = job.id in self._flights
                    if not flying:
                        self._advance(job)
                elif job.cancel_requested and job.scheduler_id:
                    self._backend.cancel(job.scheduler_id)
            except (BackendError, GatewayError) as exc:
                logger.warning("job %s could not be taken further: %s", job.id, exc)
        self._watch.refresh()

    def _advance(self, job: Job) -> None:
        now = utc_now()
        step = next_step(job, now)
        if step is Step.CANCEL:
            self._give_up(job)
        elif step is Step.SUBMIT:
            self._resubmit(job, now)
        elif step is Step.LOOK:
            found = self._look(job)
            if found:
                self._adopt(job, found)
            elif proven_absent(job, now, self._backend.settling_time):
                logger.warning("job %s: its submission never happened", job.id)
                if job.cancel_requested:
                    self._give_up(job)
                else:
                    self._resubmit(job, now)

    def _look(self, job: Job) -> list[Observation]:
        since = (job.intended_at or job.created_at) - _CLOCK_SKEW
        known = {other.scheduler_id for other in self._ledger.in_folder(job.folder) if other.id != job.id}
        found = [one for one in self._backend.find(job.folder, since) if one.id not in known]
        return sorted(found, key=lambda one: (one.submitted_at is None, one.submitted_at, one.id))

    def _adopt(self, job: Job, found: list[Observation]) -> None:
        first, *others = self._guard_holder_first(job, found)
        adopted = self._ledger.change(
            job,
            {
                "state": JobState.QUEUED,
                "scheduler_id": first.id,
                "submitted_at": first.submitted_at,
                "search_first": False,
                "lease_until": None,
                "message": None,
            },
            take_over=True,
        )
        if adopted is None:
            return
        logger.warning("job %s: its submission was found again as %s", job.id, first.id)
        for other in others:
            logger.warning("job %s: cancelling the duplicate %s", job.id, other.id)
            self._backend.cancel(other.id)

    def _guard_holder_first(self, job: Job, found: list[Observation]) -> list[Observation]:
        """Of several copies, the one that runs user code is the one whose id is in the guard, not the one submitted first."""
        if len(found) > 1:
            try:
                content, _ = self._files_of(self._ledger.user(job.user_id)).read(f"{job.folder}/{guard_of(job)}")
                with content:
                    holder = content.readline(64).decode("ascii", "replace").strip()
                found.sort(key=lambda one: one.id != holder)
            except GatewayError:
                pass  # No copy has started yet: whichever stays will take the guard.
        return found

    def _resubmit(self, job: Job, now: datetime) -> None:
        taken = self._ledger.change(job, {"lease_until": now + self._lease, "search_first": True}, take_over=True)
        if taken is None:
            return
        text = b""
        try:
            text, digest = _read_script(self._files_of(self._ledger.user(taken.user_id)), taken.folder, taken.script)
            problem = "was changed" if digest != taken.script_digest else None
        except GatewayError as exc:
            problem = f"cannot be read any more ({exc.message})"
        if problem is not None:
            message = f"the script {taken.folder}/{taken.script} {problem} while the job waited to be submitted"
            self._ledger.change(
                taken, {"state": JobState.REFUSED, "message": message, "search_first": False, "lease_until": None}
            )
            return
        self._fly(taken, text)


def guard_of(job: Job) -> str:
    """The name of the file that a job takes in its folder before it runs the script; the job's id is written into it."""
    return f".marketplace-hpc-{job.id}"


def _read_script(files: Files, folder: str, script: str) -> tuple[bytes, str]:
    """The job script and its digest."""
    content, attributes = files.read(f"{folder}/{script}")
    with content:
        if attributes.st_size > MAX_SCRIPT:
            raise InvalidRequest(f"the script {folder}/{script} has more than {MAX_SCRIPT} bytes")
        text = content.read(MAX_SCRIPT + 1)
    return text, bundle.digest_of(text)


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
