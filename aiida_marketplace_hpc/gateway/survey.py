"""What the scheduler holds against what the ledger knows: lost jobs are adopted, second copies are ended.

A ledger can be lost, or restored from an old backup; a submission that was long under way can arrive after it was given up.
Either way the scheduler has a living job that no row of the ledger stands for. Each job says which submission it came from
(:class:`~aiida_marketplace_hpc.gateway.backends.base.Trace`), so that the row can be made again. Until the first survey was
successful nothing is submitted: what is to be submitted may be there already.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import PurePosixPath

from sqlalchemy.exc import IntegrityError

from aiida_marketplace_hpc.errors import Conflict, Unavailable
from aiida_marketplace_hpc.gateway.backends.base import Backend, BackendError, Observation, Trace, is_in
from aiida_marketplace_hpc.gateway.backends.wrapper import GUARD_PREFIX
from aiida_marketplace_hpc.gateway.ledger import Ledger, automatic_key, owner_of
from aiida_marketplace_hpc.gateway.log import about_job, tells_of_job
from aiida_marketplace_hpc.gateway.schema import Job, User
from aiida_marketplace_hpc.gateway.storage import AnyFiles
from aiida_marketplace_hpc.gateway.submission import GATEWAY, Submissions, read_guard, taken
from aiida_marketplace_hpc.protocol import JobState

logger = logging.getLogger(__name__)

_GUARD = re.compile(re.escape(GUARD_PREFIX) + r"([0-9a-f]{24})(?:-\d+)?")


class Survey:
    """Looks through the scheduler's jobs.

    :param username_of: the name in the place of ``{username}`` in an absolute path, empty below a root that is everybody's;
        ``None`` outside of all roots, and where another owner than the second argument is named in the folder. The third is
        the machine.
    :param machine: what the ledger calls the machine; of several the default one.
    :param now: the time, aware.
    """

    def __init__(
        self,
        ledger: Ledger,
        backend: Backend,
        submissions: Submissions,
        username_of: Callable[[str, str, str], str | None],
        *,
        machine: str,
        now: Callable[[], datetime],
    ) -> None:
        self._ledger = ledger
        self._backend = backend
        self._submissions = submissions
        self._username_of = username_of
        self._machine = machine
        self._now = now
        self._settled: set[str] = set()
        self._done: set[Backend] = set()
        self._changed = threading.Condition()

    def is_done(self, machine: str) -> bool:
        """Whether there was a successful one of a machine's jobs since the gateway's start."""
        return self._backend.on(machine) in self._done

    def wait(self, machine: str, seconds: float) -> bool:
        """Wait for the first one; whether it has been."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_done(machine), seconds)

    def look(self, queue: Mapping[str, Observation]) -> None:
        """Go through the scheduler's living jobs that were not there the last time. May be repeated.

        :raises BackendError: the scheduler did not answer; the rest is looked at the next time.
        """
        self._settled &= queue.keys()
        for part in self._backend.parts:
            if part is self._backend:
                self._look_through(part, queue)
                continue
            try:  # Of several machines one does not wait for the other.
                if part.problem is None:
                    mine = {id: one for id, one in queue.items() if one.machine == part.machine}
                    # A queue without a job of this machine's may be from before it answered.
                    self._look_through(part, mine if part in self._done else part.queue())
            except BackendError as exc:
                logger.warning("the jobs of %s could not be looked through: %s", part.machine, exc)

    def _look_through(self, part: Backend, queue: Mapping[str, Observation]) -> None:
        new = {id: one for id, one in queue.items() if id not in self._settled and not one.state.final}
        known = self._ledger.folders_of(new)
        strangers = []
        for id, observation in new.items():
            if any(is_in(observation, folder) for folder in known.get(id, ())):
                self._settled.add(id)
            else:
                strangers.append(id)
        traces = part.traces(strangers) if strangers else {}
        for id in strangers:
            trace = traces.get(id)
            # Without a trace it is somebody's own job; one whose folder is another was forged.
            if trace is None or not is_in(new[id], trace.folder) or self._settle(new[id], trace):
                self._settled.add(id)
        with self._changed:
            self._done.add(part)
            self._changed.notify_all()

    def by_guard(
        self, user: User, files: AnyFiles, folder: str, script: str, digest: str, machine: str = ""
    ) -> Job | None:
        """The job that has run this script in this folder already, as its guard there says, though the ledger has lost it.

        :raises Unavailable: if the scheduler does not say now what became of it.
        :raises Conflict: if the scheduler does not know it any more: nobody can say what became of it.
        """
        for name in files.names(folder, GUARD_PREFIX):
            match = _GUARD.fullmatch(name)
            if match is None or self._ledger.get(match[1]) is not None:
                continue
            identifier, ran = read_guard(files, f"{folder}/{name}")
            if identifier is None or ran != digest:
                continue
            identifier = self._backend.on(machine).id_of(identifier)
            observation = self._observed(identifier, folder, machine)
            if observation is None:
                raise Conflict(
                    f"{folder}/{name} says that this script was run there as {identifier} of the scheduler, which neither the "
                    "gateway nor the scheduler knows any more; to run it again, remove that file or use another folder"
                )
            trace = Trace(match[1], folder, f"{folder}/{script}", digest, None, owner_of(user))
            self._adopt_new(observation, trace, user)
            return self._ledger.get(match[1], user.id)
        return None

    def _observed(self, identifier: str, folder: str, machine: str) -> Observation | None:
        """What the scheduler says about the job of this id in this folder; a guard alone may be its user's own work."""
        try:
            backend = self._backend.on(machine)
            observation = backend.queue().get(identifier)
            if observation is None or not is_in(observation, folder):
                observation = backend.accounting({identifier: folder}).get(identifier)
        except BackendError as exc:
            raise Unavailable(f"what became of the job that ran in {folder} is not known now: {exc}") from exc
        return observation

    def _settle(self, observation: Observation, trace: Trace) -> bool:
        """Bring a job and the ledger together; ``False`` if that is somebody else's work under way."""
        job = self._ledger.get(trace.jobid) or self._by_folder(trace)
        if job is not None and self._backend.on(job.machine) is not self._backend.on(observation.machine):
            return True  # It names a job of another machine: that one it is not.
        if job is None:
            username = self._username_of(trace.folder, trace.owner, observation.machine or self._machine)
            if username is None:
                logger.warning(
                    "%s came from a gateway, but its folder is nobody's, or somebody else's: left alone", observation.id
                )
            else:
                self._adopt_new(observation, trace, self._ledger.user_by_owner(trace.owner, username))
            return True
        if job.scheduler_id == observation.id:
            return True  # Its submission was confirmed while the scheduler was asked for its script.
        if job.duplicates and observation.id in job.duplicates:
            return True
        if job.job_state is JobState.SUBMITTING and job.search_first:
            return False  # Submissions.advance looks for it, or the thread that submits it has its id in a moment.
        given_up = self._submissions.guard_holder(job, trace.attempt) == GATEWAY
        if trace.attempt < job.attempt or given_up:
            self._submissions.end_copy(job, observation.id)
            return True
        if job.job_state in (JobState.CREATED, JobState.REFUSED, JobState.SUBMITTING):
            return self._adopt(job, observation, trace.attempt)
        if not job.job_state.final and self._submissions.guard_holder(job) == observation.id:
            former = job.scheduler_id
            if self._adopt(job, observation, trace.attempt) and former is not None:
                self._submissions.end_copy(job, former)
            return True
        self._submissions.end_copy(job, observation.id)
        return True

    def _by_folder(self, trace: Trace) -> Job | None:
        key = automatic_key(trace.folder, PurePosixPath(trace.script).name, trace.script_digest)
        return next((job for job in self._ledger.in_folder(trace.folder) if job.key == key), None)

    @tells_of_job
    def _adopt(self, job: Job, observation: Observation, attempt: int) -> bool:
        values = {**taken(observation.id, observation.submitted_at), "attempt": attempt}
        try:
            adopted = self._ledger.change(job, values, take_over=True)
        except IntegrityError:
            logger.warning("%s is not adopted: another job lives in %s", observation.id, job.folder)
            return True
        if adopted is not None:
            logger.warning("job %s lives as %s, of which the ledger knew nothing", job.id, observation.id)
        return adopted is not None

    def _adopt_new(self, observation: Observation, trace: Trace, user: User) -> None:
        job = Job(
            id=trace.jobid,
            user_id=user.id,
            key=automatic_key(trace.folder, PurePosixPath(trace.script).name, trace.script_digest),
            folder=trace.folder,
            script=PurePosixPath(trace.script).name,
            script_digest=trace.script_digest,
            client_ref=trace.client_ref,
            machine=observation.machine or self._machine,
            backend=self._backend.name,
            created_at=observation.submitted_at or self._now(),
            cancel_requested=False,
            attempt=trace.attempt,
            fence=1,
            intended_at=observation.submitted_at,
            **{**taken(observation.id, observation.submitted_at), "state": JobState.QUEUED.value},
        )
        with about_job(self._ledger, job):
            try:
                self._ledger.add(job)
            except IntegrityError:
                logger.warning("%s is not adopted: another job lives in %s", observation.id, trace.folder)
            else:
                logger.warning("job %s is adopted as %s: the ledger has lost it", job.id, observation.id)
