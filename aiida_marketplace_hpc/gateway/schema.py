"""The tables of the ledger."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from aiida_marketplace_hpc.protocol import JobState


class _UtcDateTime(TypeDecorator[datetime]):
    """Aware times in UTC, also where the database (SQLite) keeps no zone."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(timezone.utc).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.replace(tzinfo=timezone.utc)


_LARGEST = 2**31 - 1
"""What an integer column of PostgreSQL holds."""


class _Told(TypeDecorator[str]):
    """What somebody or something else said, for people to read: cut to what fits, without what a database cannot hold.

    PostgreSQL takes no zero byte and nothing longer than the column. One word of one job must not keep a whole transaction,
    with the states of everybody's jobs, from being written.
    """

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        if value is None:
            return None
        sound = value.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
        return sound[: getattr(self.impl, "length", None)]


class _ToldText(_Told):
    """The same without a length."""

    impl = Text
    cache_ok = True


class _Count(TypeDecorator[int]):
    """A number that something else said; the greatest that a column holds (68 years, in s) stands for everything beyond."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Any) -> int | None:
        return None if value is None else max(-_LARGEST, min(_LARGEST, value))


LIVING = "state IN ('SUBMITTING', 'QUEUED', 'HELD', 'RUNNING', 'SUSPENDED')"
"""The condition, in SQL, for jobs that were launched and have not ended."""


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
    name: Mapped[str] = mapped_column(_Told(255))
    username: Mapped[str] = mapped_column(String(64), unique=True)
    """The name of this user's folder on the cluster: nobody else's."""
    created_at: Mapped[datetime] = mapped_column(_UtcDateTime)
    registered: Mapped[bool] = mapped_column(Boolean, default=False)
    """Whether an operator has admitted them by name."""
    blocked: Mapped[bool] = mapped_column(Boolean, default=False)


class Invitation(Base):
    """Somebody whom an operator has admitted and who has not come yet."""

    __tablename__ = "invitations"

    who: Mapped[str] = mapped_column(String(255), primary_key=True)
    """Their subject or e-mail address."""
    created_at: Mapped[datetime] = mapped_column(_UtcDateTime)


class Drain(Base):
    """One row while nothing new is submitted, none otherwise."""

    __tablename__ = "drain"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    message: Mapped[str] = mapped_column(_ToldText)
    """For users: why, and until when."""
    since: Mapped[datetime] = mapped_column(_UtcDateTime)


class PageSession(Base):
    """A browser that is signed in: :mod:`aiida_marketplace_hpc.gateway.people.sessions`."""

    __tablename__ = "page_sessions"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    """A digest of what the browser has: the table alone opens nothing."""
    identity: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(_UtcDateTime)
    seen_at: Mapped[datetime] = mapped_column(_UtcDateTime)


class Job(Base):
    """One job: an intention to run a script in a folder, and what became of it."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("user_id", "key", name="uq_jobs_key"),
        Index("ix_jobs_user_state", "user_id", "state"),
        Index("ix_jobs_state", "state"),
        Index("ix_jobs_user_folder", "user_id", "folder"),
        Index("ix_jobs_folder", "folder"),
        Index("ix_jobs_scheduler_id", "scheduler_id"),
        # In a folder there is one living job of a user's at most, whoever asks at the same time.
        Index(
            "uq_jobs_living",
            "user_id",
            "folder",
            unique=True,
            sqlite_where=text(LIVING),
            postgresql_where=text(LIVING),
        ),
    )

    id: Mapped[str] = mapped_column(String(24), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    key: Mapped[str] = mapped_column(String(128))
    """What makes creation idempotent: folder and script digest, or what the client gave."""
    folder: Mapped[str] = mapped_column(Text)
    script: Mapped[str] = mapped_column(String(255))
    script_digest: Mapped[str | None] = mapped_column(String(80))
    client_ref: Mapped[str | None] = mapped_column(String(255))
    request_id: Mapped[str | None] = mapped_column(String(64))
    """Of the request that launched it, or last tried to: the client, the log and the scheduler's comment have it, too."""
    machine: Mapped[str] = mapped_column(String(255))
    backend: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime] = mapped_column(_UtcDateTime)

    state: Mapped[str] = mapped_column(String(20))
    message: Mapped[str | None] = mapped_column(_ToldText)
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
    duplicates: Mapped[list[str] | None] = mapped_column(JSON)
    """The scheduler's ids of second copies, which ended before user code."""
    scheduler_state: Mapped[str | None] = mapped_column(_Told(64))
    observed_at: Mapped[datetime | None] = mapped_column(_UtcDateTime)
    """When the scheduler last said something about this job."""
    reason: Mapped[str | None] = mapped_column(_ToldText)
    name: Mapped[str | None] = mapped_column(_ToldText)
    partition: Mapped[str | None] = mapped_column(_Told(255))
    account: Mapped[str | None] = mapped_column(_Told(255))
    nodes: Mapped[str | None] = mapped_column(_ToldText)
    exit_code: Mapped[int | None] = mapped_column(_Count)
    signal: Mapped[int | None] = mapped_column(_Count)
    submitted_at: Mapped[datetime | None] = mapped_column(_UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(_UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(_UtcDateTime)
    time_limit: Mapped[int | None] = mapped_column(_Count)
    elapsed: Mapped[float | None] = mapped_column(Float)
    accounting: Mapped[dict[str, Any] | None] = mapped_column(JSON)

    @property
    def job_state(self) -> JobState:
        """The state as the enumeration, whichever way the row was loaded."""
        return JobState(self.state)
