"""The ledger: users and jobs in a database. It is the truth about jobs; the scheduler is evidence.

Every change of a job is one short transaction that names the state (and the fence) it starts from, so that two threads or
two gateways on one database never both win. See :mod:`~aiida_marketplace_hpc.gateway.reconcile` for which changes there are.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    DateTime,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.protocol import JobState


class _UtcDateTime(TypeDecorator[datetime]):
    """Aware times in UTC, also where the database (SQLite) keeps no zone."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(timezone.utc).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.replace(tzinfo=timezone.utc)


class Base(DeclarativeBase):
    """The schema; :mod:`aiida_marketplace_hpc.gateway.migrations` brings a database to it."""


class User(Base):
    """Somebody who has used the gateway."""

    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("issuer", "subject", name="uq_users_identity"),)

    id: Mapped[str] = mapped_column(String(24), primary_key=True)
    issuer: Mapped[str] = mapped_column(String(255))
    subject: Mapped[str] = mapped_column(String(255))
    email: Mapped[str] = mapped_column(String(255))
    name: Mapped[str] = mapped_column(String(255))
    username: Mapped[str] = mapped_column(String(64), unique=True)
    """The name of this user's folder on the cluster: nobody else's."""
    created_at: Mapped[datetime] = mapped_column(_UtcDateTime)


class Job(Base):
    """One job: an intention to run a script in a folder, and what became of it."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("user_id", "key", name="uq_jobs_key"),
        Index("ix_jobs_user_state", "user_id", "state"),
        Index("ix_jobs_state", "state"),
        Index("ix_jobs_user_folder", "user_id", "folder"),
    )

    id: Mapped[str] = mapped_column(String(24), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    key: Mapped[str] = mapped_column(String(128))
    """What makes creation idempotent: folder and script digest, or what the client gave."""
    folder: Mapped[str] = mapped_column(Text)
    script: Mapped[str] = mapped_column(String(255))
    script_digest: Mapped[str | None] = mapped_column(String(80))
    client_ref: Mapped[str | None] = mapped_column(String(255))
    machine: Mapped[str] = mapped_column(String(255))
    backend: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime] = mapped_column(_UtcDateTime)

    state: Mapped[str] = mapped_column(String(20))
    message: Mapped[str | None] = mapped_column(Text)
    """Why it is in this state, in the scheduler's words where it has some."""
    cancel_requested: Mapped[bool] = mapped_column(Boolean, default=False)

    attempt: Mapped[int] = mapped_column(Integer, default=0)
    """How often the job was launched on purpose; repeating a request is no attempt."""
    fence: Mapped[int] = mapped_column(Integer, default=0)
    """Grows whenever somebody takes the submission over; who holds an older number must not record anything."""
    lease_until: Mapped[datetime | None] = mapped_column(_UtcDateTime)
    """Until then the submitter may be at work; after it, it is taken for dead."""
    intended_at: Mapped[datetime | None] = mapped_column(_UtcDateTime)
    """When this attempt's submission was first intended: a lost one is looked for from here on."""
    search_first: Mapped[bool] = mapped_column(Boolean, default=False)
    """Whether a submission may have happened of which the ledger knows nothing: look before submitting again."""

    scheduler_id: Mapped[str | None] = mapped_column(String(64))
    scheduler_state: Mapped[str | None] = mapped_column(String(64))
    observed_at: Mapped[datetime | None] = mapped_column(_UtcDateTime)
    """When the scheduler last said something about this job."""
    reason: Mapped[str | None] = mapped_column(Text)
    name: Mapped[str | None] = mapped_column(Text)
    partition: Mapped[str | None] = mapped_column(String(255))
    account: Mapped[str | None] = mapped_column(String(255))
    nodes: Mapped[str | None] = mapped_column(Text)
    exit_code: Mapped[int | None] = mapped_column(Integer)
    signal: Mapped[int | None] = mapped_column(Integer)
    submitted_at: Mapped[datetime | None] = mapped_column(_UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(_UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(_UtcDateTime)
    time_limit: Mapped[int | None] = mapped_column(Integer)
    elapsed: Mapped[float | None] = mapped_column(Float)
    accounting: Mapped[dict[str, Any] | None] = mapped_column(JSON)

    @property
    def job_state(self) -> JobState:
        """The state as the enumeration, whichever way the row was loaded."""
        return JobState(self.state)


def new_id() -> str:
    """A new id of a user or job: 24 hexadecimal digits, as on the published gateway, and not to be guessed."""
    return secrets.token_hex(12)


def utc_now() -> datetime:
    """Now, aware."""
    return datetime.now(timezone.utc)


def automatic_key(folder: str, script: str, script_digest: str) -> str:
    """The key of a job that is made of an existing folder and a script in it: the same again is the same job."""
    text = "\0".join((folder, script, script_digest))
    return f"auto:{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()}"


class Ledger:
    """Users and jobs.

    :param url: the database, as SQLAlchemy writes it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _engine(url)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def migrate(self) -> None:
        """Bring the database to this version's schema; may be repeated."""
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
        with self.engine.execution_options(writes=True).begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session to look with; rows stay usable afterwards."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that commits at its end, or leaves everything as it was."""
        with Session(self.engine.execution_options(writes=True), expire_on_commit=False) as session, session.begin():
            yield session

    # Users

    def user_of(self, identity: Identity) -> User:
        """The user of an identity, registered now if they are new; may be repeated."""
        with self.reading() as session:
            known: User | None = session.scalar(_by_identity(identity))
        if known is not None:
            return known
        candidates = [folder_name(identity.email)]
        candidates += [f"{candidates[0]}-{secrets.token_hex(3)}" for _ in range(5)]
        for username in candidates:
            user = User(
                id=new_id(),
                issuer=identity.issuer,
                subject=identity.subject,
                email=identity.email,
                name=identity.name,
                username=username,
                created_at=utc_now(),
            )
            try:
                with self.writing() as session:
                    session.add(user)
                return user
            except IntegrityError:
                # Either somebody registered the same identity meanwhile, or another person has this folder name.
                with self.reading() as session:
                    existing: User | None = session.scalar(_by_identity(identity))
                if existing is not None:
                    return existing
        raise RuntimeError(f"no free folder name for {identity.email}")

    def user(self, user_id: str) -> User:
        """The user of that id.

        :raises KeyError: if there is none.
        """
        with self.reading() as session:
            user = session.get(User, user_id)
        if user is None:
            raise KeyError(user_id)
        return user

    # Jobs

    def users(self) -> list[User]:
        """Everybody who was ever here."""
        with self.reading() as session:
            return list(session.scalars(select(User)))

    def add(self, job: Job) -> Job:
        """Add a job, or return the one that has its key already.

        Two callers at once get the same one.
        """
        try:
            with self.writing() as session:
                session.add(job)
            return job
        except IntegrityError:
            existing = self.find_by_key(job.user_id, job.key)
            if existing is None:
                raise
            return existing

    def find_by_key(self, user_id: str, key: str) -> Job | None:
        """The user's job of that key."""
        with self.reading() as session:
            return session.scalar(select(Job).where(Job.user_id == user_id, Job.key == key))

    def get(self, jobid: str, user_id: str | None = None) -> Job | None:
        """The job of that id, if it is this user's (or anybody's, without ``user_id``)."""
        query = select(Job).where(Job.id == jobid)
        if user_id is not None:
            query = query.where(Job.user_id == user_id)
        with self.reading() as session:
            return session.scalar(query)

    def get_many(self, jobids: Collection[str], user_id: str) -> dict[str, Job]:
        """Those of the jobs that are this user's, by id."""
        found: dict[str, Job] = {}
        ids = list(jobids)
        with self.reading() as session:
            for start in range(0, len(ids), 500):  # Databases limit the number of variables in a statement.
                query = select(Job).where(Job.user_id == user_id, Job.id.in_(ids[start : start + 500]))
                found.update((job.id, job) for job in session.scalars(query))
        return found

    def of_user(self, user_id: str, *, active_only: bool = False) -> list[Job]:
        """The user's jobs, oldest first."""
        query = select(Job).where(Job.user_id == user_id).order_by(Job.created_at, Job.id)
        if active_only:
            query = query.where(Job.state.in_(_ACTIVE))
        with self.reading() as session:
            return list(session.scalars(query))

    def active_in_folder(self, user_id: str, folder: str) -> Job | None:
        """The user's job that lives in this folder."""
        query = select(Job).where(Job.user_id == user_id, Job.folder == folder, Job.state.in_(_ACTIVE))
        with self.reading() as session:
            return session.scalars(query).first()

    def in_folder(self, folder: str) -> list[Job]:
        """Everybody's jobs that have, or had, this folder."""
        with self.reading() as session:
            return list(session.scalars(select(Job).where(Job.folder == folder)))

    def active(self) -> list[Job]:
        """Everybody's jobs that were launched and have not ended."""
        with self.reading() as session:
            return list(session.scalars(select(Job).where(Job.state.in_(_ACTIVE)).order_by(Job.created_at)))

    def change(self, job: Job, values: Mapping[str, Any], *, take_over: bool = False) -> Job | None:
        """Change a job if it is still in the state, and under the fence, in which the caller saw it.

        :param values: new values by column name.
        :param take_over: count the fence up, so that whoever worked under the old number can record nothing any more.
        :returns: the job as it is now, or ``None`` if somebody else was faster; then nothing was changed.
        """
        values = dict(values)
        if "state" in values:
            values["state"] = JobState(values["state"]).value
        if take_over:
            values["fence"] = job.fence + 1
        statement = (
            update(Job)
            .where(Job.id == job.id, Job.state == job.job_state.value, Job.fence == job.fence)
            .values(**values)
            .execution_options(synchronize_session=False)
        )
        with self.writing() as session:
            changed: int = session.execute(statement).rowcount  # type: ignore[attr-defined]
        return self.get(job.id) if changed else None


_ACTIVE: Sequence[str] = tuple(state.value for state in JobState if state.active)


def _by_identity(identity: Identity) -> Any:
    return select(User).where(User.issuer == identity.issuer, User.subject == identity.subject)


def folder_name(email: str) -> str:
    """The folder name that the published gateway gives an e-mail address, made safe: no name leads anywhere else."""
    local = email.split("@", maxsplit=1)[0].replace(".", "_")
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", local).strip("-")[:48]
    return safe or "user"


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True)
    path = url.partition(":///")[2]
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # Transactions begin where we say so, below, not where the driver guesses.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        # A transaction that will write takes the lock at once: one that upgrades from reading fails instead of waiting.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
