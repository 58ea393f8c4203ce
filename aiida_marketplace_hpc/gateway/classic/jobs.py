"""Users and jobs as the published gateway keeps them: what a job's folder is, and the job that was last submitted from it.

They have tables of their own in the gateway's database: the jobs of the ledger are watched, and never submitted twice.
"""

from __future__ import annotations

import hashlib
import logging
import re
import uuid
from typing import Any

from sqlalchemy import MetaData, String, Text, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aiida_marketplace_hpc.gateway.backends.base import Backend, BackendError, Submission
from aiida_marketplace_hpc.gateway.classic import firecrest
from aiida_marketplace_hpc.gateway.classic.folder import SCRIPT, JobFolder, Refusal
from aiida_marketplace_hpc.gateway.ledger import Ledger, new_id
from aiida_marketplace_hpc.gateway.schema import User
from aiida_marketplace_hpc.gateway.submission import MAX_SCRIPT

logger = logging.getLogger(__name__)

_JOBID = re.compile(r"[0-9a-fA-F]{24}")


class _Base(DeclarativeBase):
    metadata = MetaData()


class ClassicUser(_Base):
    """Somebody who has called ``createOrUpdateCollection``: before that nobody can have jobs."""

    __tablename__ = "classic_users"

    user_id: Mapped[str] = mapped_column(String(24), primary_key=True)


class ClassicJob(_Base):
    """A folder with a job script, and the last job that was submitted from it."""

    __tablename__ = "classic_jobs"

    id: Mapped[str] = mapped_column(String(24), primary_key=True)
    user_id: Mapped[str] = mapped_column(String(24), index=True)
    folder: Mapped[str] = mapped_column(Text)
    scheduler_id: Mapped[str | None] = mapped_column(String(64))
    """Of its last launch; those of earlier ones are forgotten."""

    def as_wire(self) -> dict[str, Any]:
        """The job as ``listJobs`` shows it."""
        shown: dict[str, Any] = {
            "_id": self.id,
            "remote_folder": self.folder,
            "state": "ACTIVATED" if self.scheduler_id else "CREATED",
            "user_id": self.user_id,
        }
        if self.scheduler_id:
            shown["f7t_job_id"] = int(self.scheduler_id)
        return shown


class ClassicJobs:
    """All published jobs. May be used by many threads.

    :param ledger: whose database has them.
    """

    def __init__(self, ledger: Ledger, backend: Backend) -> None:
        self._ledger = ledger
        self._backend = backend

    def start(self) -> None:
        """Make the tables where they are missing; may be repeated."""
        with self._ledger.engine.execution_options(writes=True).begin() as connection:
            _Base.metadata.create_all(connection)

    def register(self, user: User) -> None:
        """Let somebody have jobs; may be repeated."""
        with self._ledger.writing() as session:
            session.merge(ClassicUser(user_id=user.id))

    def is_registered(self, user: User) -> bool:
        """Whether somebody may have jobs."""
        with self._ledger.reading() as session:
            return session.get(ClassicUser, user.id) is not None

    def of_user(self, user: User) -> list[ClassicJob]:
        """All jobs of a user."""
        with self._ledger.reading() as session:
            return list(session.scalars(select(ClassicJob).where(ClassicJob.user_id == user.id)))

    def get(self, user: User, jobid: str) -> ClassicJob | None:
        """A job, if it is this user's."""
        if not _JOBID.fullmatch(jobid):
            return None
        with self._ledger.reading() as session:
            job = session.get(ClassicJob, jobid.lower())
        return job if job is not None and job.user_id == user.id else None

    def new(self, user: User, home: str) -> ClassicJob:
        """Think a job up, whose folder is not there; :meth:`add` makes it count."""
        return ClassicJob(id=new_id(), user_id=user.id, folder=f"{home}/{uuid.uuid4()}", scheduler_id=None)

    def add(self, job: ClassicJob) -> None:
        """Keep a new job."""
        with self._ledger.writing() as session:
            session.add(job)

    def launch(self, job: ClassicJob, folder: JobFolder) -> None:
        """Submit the script as it is in this moment. Each call is one more job of the scheduler's.

        :raises Refusal: the scheduler does not take it, or it is not known whether it has; the log says which.
        """
        script = folder.script(MAX_SCRIPT)
        submission = Submission(
            jobid=job.id,
            folder=job.folder,
            script=f"{job.folder}/{SCRIPT}",
            script_text=script,
            script_digest=f"sha-256:{hashlib.sha256(script).hexdigest()}",
            guard=None,
            comment="",
        )
        try:
            scheduler_id = self._backend.submit(submission)
        except BackendError as exc:
            logger.warning("job %s was not submitted: %s: %s", job.id, type(exc).__name__, exc)
            raise Refusal(firecrest.PLAIN) from exc
        with self._ledger.writing() as session:
            job.scheduler_id = scheduler_id
            session.merge(job)

    def cancel(self, job: ClassicJob) -> None:
        """Ask for the end of the job that was submitted last. What was submitted before it goes on.

        :raises Refusal: it has ended, or the scheduler does not answer.
        """
        id = job.scheduler_id or ""
        try:
            found = self._backend.queue().get(id)
            if found is None or found.state.final:
                raise Refusal(firecrest.PLAIN)
            self._backend.cancel(id, job.folder)
        except BackendError as exc:
            logger.warning("job %s was not cancelled: %s", job.id, exc)
            raise Refusal(firecrest.PLAIN) from exc
