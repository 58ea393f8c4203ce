"""Jobs: creating, launching, cancelling and asking, each safe to repeat.

What a launch leads to is the business of :mod:`~aiida_marketplace_hpc.gateway.submission`, what the scheduler says about jobs
that of :mod:`~aiida_marketplace_hpc.gateway.watch`, and what it has of which the ledger knows nothing that of
:mod:`~aiida_marketplace_hpc.gateway.survey`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from contextlib import suppress
from contextvars import copy_context
from datetime import datetime, timedelta
from typing import Any

from aiida_marketplace_hpc.errors import (
    Busy,
    Conflict,
    FileError,
    GatewayError,
    InvalidRequest,
    NotFound,
    SubmissionRefused,
    Unavailable,
)
from aiida_marketplace_hpc.gateway.backends.base import Backend, BackendError
from aiida_marketplace_hpc.gateway.databases import is_storable
from aiida_marketplace_hpc.gateway.ledger import Ledger, automatic_key, new_id, utc_now
from aiida_marketplace_hpc.gateway.log import about_job
from aiida_marketplace_hpc.gateway.maintenance import Maintenance
from aiida_marketplace_hpc.gateway.metrics import Metrics
from aiida_marketplace_hpc.gateway.policy import Policy
from aiida_marketplace_hpc.gateway.reconcile import Step, next_step
from aiida_marketplace_hpc.gateway.schema import Job, User
from aiida_marketplace_hpc.gateway.storage import AnyFiles
from aiida_marketplace_hpc.gateway.submission import Submissions, read_script
from aiida_marketplace_hpc.gateway.survey import Survey
from aiida_marketplace_hpc.gateway.watch import Watch
from aiida_marketplace_hpc.protocol import JobState

logger = logging.getLogger(__name__)

_THREADS = 4
"""That ask the scheduler for the end of jobs."""
_END_AGAIN = timedelta(seconds=60)
"""After which a cancellation is repeated that the scheduler took: a job has some time to end by itself."""


class Jobs:
    """All jobs of a gateway.

    :param files_of: what a user can do with files on a machine; scripts are read with it, never around it.
    :param machine_of: which machine is meant by what stands in a row.
    :param username_of: see :class:`~aiida_marketplace_hpc.gateway.survey.Survey`.
    :param maintenance: whether anything is submitted now.
    :param policy: what the site wants of job scripts.
    :param patience: seconds that a launch or a cancellation waits for the scheduler's word; what is wanted is carried out
        without it.
    :param retry_interval: seconds between attempts while the scheduler takes no jobs.
    :param most: jobs of one user that have not ended; 0: any number.
    :param now: the time, aware.
    """

    def __init__(
        self,
        ledger: Ledger,
        backend: Backend,
        watch: Watch,
        files_of: Callable[[User, str], AnyFiles],
        username_of: Callable[[str, str, str], str | None],
        *,
        machine_of: Callable[[str], str],
        maintenance: Maintenance | None = None,
        policy: Policy | None = None,
        machine: str = "",
        most: int = 0,
        patience: float = 10.0,
        retry_interval: float = 15.0,
        now: Callable[[], datetime] = utc_now,
        metrics: Metrics | None = None,
    ) -> None:
        self._ledger = ledger
        self._backend = backend
        self._watch = watch
        self._files_of = files_of
        self._maintenance = maintenance or Maintenance(ledger)
        self._machine = machine
        self._machine_of = machine_of
        self._most = most
        self._patience = patience
        self._now = now
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="cancel")
        self._ending: dict[str, datetime] = {}
        """When the scheduler last took the cancellation of a job that has not ended yet."""
        self._metrics = metrics or Metrics()
        retry = timedelta(seconds=retry_interval)
        self._submissions = Submissions(
            ledger,
            backend,
            files_of,
            self._maintenance,
            policy or Policy(),
            retry_interval=retry,
            now=now,
            metrics=self._metrics,
        )
        watch.follow_guard = self._submissions.follow_guard
        self._survey = Survey(ledger, backend, self._submissions, username_of, machine=machine, now=now)

    def close(self) -> None:
        """Let submissions under way end, so that their outcome is recorded."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._submissions.close()

    # Creating

    def create_in_folder(
        self,
        user: User,
        folder: str,
        script: str,
        *,
        client_ref: str | None = None,
        key: str | None = None,
        machine: str = "",
    ) -> Job:
        """Make a job of an existing folder and a script in it; the same again is the same job.

        :param key: makes the request idempotent in place of folder and script digest.
        :param machine: on which it is to run; empty: the default one.
        :raises Conflict: if another job lives in the folder, or the key belongs to another folder or script, or the folder to
            a job on another machine.
        :raises Busy: if it would be one job too many.
        """
        if not script or "/" in script:
            raise InvalidRequest(f"the script is the name of a file in the folder, not {script!r}")
        machine = machine or self._machine
        files = self._files_of(user, machine)
        attributes = files.stat(folder, follow=True)
        if attributes["type"] != "directory":
            raise FileError(f"Not a directory: {folder}", errno="ENOTDIR", path=folder)
        folder = attributes["path"]
        try:
            (folder + script).encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the folder and the script of a job need names in UTF-8") from None
        _, digest = read_script(files, folder, script)
        if key is not None:
            _check_key(key)
            key = f"key:{key}"
            if len(key) > 128:
                raise InvalidRequest("a key has at most 124 characters")
        else:
            key = automatic_key(folder, script, digest)
        job = self._ledger.find_by_key(user.id, key)
        if job is None and key.startswith("auto:"):
            job = self._survey.by_guard(user, files, folder, script, digest, machine)
        if job is None:
            self._require_machine(folder, machine)
            living = self._ledger.active_in_folder(user.id, folder)
            if living is not None and living.key != key:  # The same request may have won meanwhile.
                raise Conflict(
                    f"job {living.id} lives in {folder} with another script ({living.state}); cancel it, or wait for its end"
                )
            self._require_room(user)
            job = self._ledger.add(self._new(user, key, folder, script, digest, client_ref, machine))
        if self._machine_of(job.machine) != machine:
            raise Conflict(
                f"job {job.id} in {folder} is one on {job.machine}: on {machine} use another folder, and key"
            )
        if (job.folder, job.script) != (folder, script) or (job.script_digest != digest and key.startswith("key:")):
            raise Conflict(f"the key belongs to job {job.id}, which has another folder or script")
        return job

    def _require_machine(self, folder: str, machine: str) -> None:
        """Make sure that a folder is no other machine's, which has jobs of the same numbers, and may have the same disk.

        :raises Conflict: it is.
        """
        for job in self._ledger.in_folder(folder) if self._backend.on(machine) is not self._backend else ():
            with suppress(Unavailable):
                if self._machine_of(job.machine) == machine:
                    continue
            raise Conflict(f"a job on another machine has run in {folder}: on {machine} use another folder")

    def create_with_script(
        self, user: User, home: str, text: bytes, *, key: str | None = None, machine: str = ""
    ) -> Job:
        """Make a job with a folder of its own below ``home`` and this script in it, as the published gateway does.

        :param key: the same key with the same script is the same job.
        :param machine: on which it is to run; empty: the default one.
        :raises Busy: if it would be one job too many.
        """
        if key is not None:
            _check_key(key)
        jobid = new_id()
        unique = f"id:{jobid}" if key is None else f"new:{hashlib.sha256(key.encode() + bytes(1) + text).hexdigest()}"
        if existing := self._ledger.find_by_key(user.id, unique):
            return existing
        self._require_room(user)
        folder = f"{home}/{jobid}"
        machine = machine or self._machine
        files = self._files_of(user, machine)
        files.mkdir(folder)
        script = "job.sh"
        left = [text]
        files.write(f"{folder}/{script}", lambda _: left.pop() if left else b"", mode=0o755)
        job = self._new(user, unique, folder, script, None, None, machine)
        job.id = jobid
        added = self._ledger.add(job)
        if added.id != jobid:  # The same request has won meanwhile.
            files.remove(folder, recursive=True)
        return added

    def _require_room(self, user: User) -> None:
        """Count a user's jobs. (Several made at the same instant may each be the last one that has room.)"""
        if self._most and (living := self._ledger.count_living(user.id)) >= self._most:
            self._metrics.limit("jobs_per_user")
            raise Busy(
                f"{living} jobs of yours have not ended, which is the limit of this gateway: wait for some, or cancel those "
                "that you never launched",
                retry_after=10,
            )

    def _new(
        self,
        user: User,
        key: str,
        folder: str,
        script: str,
        digest: str | None,
        client_ref: str | None,
        machine: str = "",
    ) -> Job:
        return Job(
            id=new_id(),
            user_id=user.id,
            key=key,
            folder=folder,
            script=script,
            script_digest=digest,
            client_ref=client_ref,
            machine=machine or self._machine,
            backend=self._backend.name,
            created_at=self._now(),
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
            text, digest = read_script(self._files_of(user, job.machine), job.folder, job.script)
            if job.script_digest not in (None, digest) and not job.key.startswith("id:"):
                raise Conflict(f"{job.folder}/{job.script} was changed since job {job.id} was created: create it again")
            # What the scheduler holds comes first: the job may be among it, if the ledger was lost.
            notice = self._maintenance.notice()
            ready = notice is None and self._survey.wait(job.machine, self._patience)
            why = "waits until the scheduler has said which jobs there are" if notice is None else notice.text
            intended = self._submissions.intend(job, digest, at_once=ready, message=None if ready else why)
            if intended is not None and ready:
                self._submissions.begin(intended, text)
        self._submissions.wait(job.id, self._patience)
        current = self._ledger.get(job.id) or job
        if current.job_state is JobState.REFUSED:
            raise SubmissionRefused(current.message or "the scheduler refused the job")
        return current

    # Cancelling

    def cancel(self, job: Job, *, unlaunched: bool = False) -> Job:
        """Ask for the end of a job; one that has ended stays as it is. May be repeated.

        The wish is durable when this returns, also if the scheduler does not take it in time: then it is tried again.

        :param unlaunched: end a job that was never launched, too: it cannot be launched any more.
        :raises Conflict: if it was never launched.
        """
        if job.job_state is JobState.CREATED and unlaunched:
            values = {
                "state": JobState.CANCELLED,
                "message": "cancelled before it was launched",
                "ended_at": self._now(),
            }
            # Somebody may have launched it in between.
            job = self._ledger.change(job, values) or self._ledger.get(job.id) or job
        # Recorded first, and from here on it is carried out, whatever happens: the reconciler goes on trying.
        current = None
        while current is None:
            if job.job_state.final:
                return job
            if job.job_state is JobState.CREATED:
                raise Conflict(f"Job {job.id} not launched yet.")
            current = self._ledger.change(job, {"cancel_requested": True})
            job = self._ledger.get(job.id) or job  # It may have started, or ended, since it was read.
        with suppress(StillRunning):
            self._threads.submit(copy_context().run, self._carry_out, current).result(self._patience)
        return self._ledger.get(job.id) or current

    def _carry_out(self, job: Job) -> None:
        """Carry out the wish to end a job, as far as the scheduler takes it now."""
        try:
            if job.scheduler_id and not job.job_state.final:
                self._cancel(job)
                self._watch.refresh()
            elif job.job_state is JobState.SUBMITTING and next_step(job, self._now()) is Step.CANCEL:
                self._submissions.give_up(job)
        except (BackendError, GatewayError) as exc:
            logger.warning("job %s is not cancelled yet, it will be tried again: %s", job.id, exc)

    def _end_again(self, job: Job) -> None:
        """Repeat a cancellation that the scheduler did not take, or that has had no effect for long."""
        asked = self._ending.get(job.id)
        if asked is None or self._now() - asked > _END_AGAIN:
            self._cancel(job)

    def _cancel(self, job: Job) -> None:
        self._backend.cancel(job.scheduler_id or "", job.folder)
        self._ending[job.id] = self._now()

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

    def newest(self, user: User, *, limit: int, offset: int = 0) -> list[dict[str, Any]]:
        """Some of the caller's jobs as they go over the wire, newest first."""
        self._watch.refresh()
        return [self.as_wire(job) for job in self._ledger.newest(user.id, limit=limit, offset=offset)]

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
            elapsed = max(0.0, (self._now() - job.started_at).total_seconds())
        document: dict[str, Any] = {
            "jobid": job.id,
            "state": job.state,
            "final": job.job_state.final,
            "cancel_requested": job.cancel_requested,
            "folder": job.folder,
            "script": job.script,
            "script_digest": job.script_digest,
            "client_ref": job.client_ref,
            "request_id": job.request_id,
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
            "message": job.message or (None if job.job_state.final else self._watch.problem_of(job.machine)),
            "age": None if age is None else round(age, 3),
        }
        if accounting:
            document["accounting"] = job.accounting
            document["duplicates"] = list(job.duplicates or ())
        return document

    # Reconciling

    def reconcile(self) -> None:
        """Take each unconfirmed submission and each open cancellation one step further; called again and again."""
        self._maintenance.notice()
        self._watch.refresh()
        if self._watch.queue is not None:
            try:
                self._survey.look(self._watch.queue)
            except BackendError as exc:
                logger.warning("the scheduler's jobs could not be looked through: %s", exc)
        unsettled = self._ledger.unsettled()
        self._metrics.unsettled(len(unsettled))
        self._ending = {job.id: self._ending[job.id] for job in unsettled if job.id in self._ending}
        for job in unsettled:
            with about_job(self._ledger, job):
                try:
                    if job.job_state is not JobState.SUBMITTING:
                        self._end_again(job)
                    elif self._survey.is_done(job.machine):
                        self._submissions.advance(job)
                except (BackendError, GatewayError) as exc:
                    logger.warning("job %s could not be taken further: %s", job.id, exc)


def _check_key(key: str) -> None:
    if not is_storable(key):
        raise InvalidRequest("a key has characters of Unicode, and no zero byte")


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
