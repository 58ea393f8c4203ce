"""What an operator does with the rows of a ledger: look, write them out, remove old ones, and check that all is well."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, delete, func, or_, select, text

from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.databases import answering
from aiida_marketplace_hpc.gateway.ledger import Ledger, newest_revision, utc_now
from aiida_marketplace_hpc.gateway.schema import Base, Job, User
from aiida_marketplace_hpc.protocol import JobState

KEEP = timedelta(days=30)
"""How old the end of a job is at least before it may be forgotten: clients may ask for it until then."""
_AT_ONCE = 1000
_ENDS = tuple(state.value for state in JobState if state.final)
_CLOCK = timedelta(seconds=5)
"""How far the clocks of the gateway and of its database may be apart."""
_ENDED = func.coalesce(Job.ended_at, Job.observed_at, Job.created_at)
"""When a job ended; jobs that were refused have no end but were made some time."""


@dataclass(frozen=True)
class Filter:
    """Which jobs; what is not said does not matter.

    :param who: e-mail address, subject or id of their user.
    :param states: one of these states.
    :param below: their folder is this one, or below it.
    :param since: made then or later.
    """

    who: str = ""
    states: Collection[JobState] = ()
    below: str = ""
    since: datetime | None = None

    @property
    def conditions(self) -> list[ColumnElement[bool]]:
        """What is true of these jobs and their users."""
        wanted: list[ColumnElement[bool]] = []
        if self.who:
            wanted.append(
                or_(User.id == self.who, User.subject == self.who, func.lower(User.email) == self.who.lower())
            )
        if self.states:
            wanted.append(Job.state.in_([state.value for state in self.states]))
        if self.below:
            folder = self.below.rstrip("/")
            wanted.append(or_(Job.folder == folder, func.substr(Job.folder, 1, len(folder) + 1) == f"{folder}/"))
        if self.since is not None:
            wanted.append(Job.created_at >= self.since)
        return wanted


def find_jobs(ledger: Ledger, wanted: Filter, most: int = 0) -> list[tuple[Job, User]]:
    """Jobs and whose they are, newest first.

    :param most: how many at most; 0: all.
    """
    query = select(Job, User).join(User, Job.user_id == User.id).where(*wanted.conditions)
    query = query.order_by(Job.created_at.desc(), Job.id)
    with ledger.reading() as session:
        return [(job, user) for job, user in session.execute(query.limit(most) if most else query)]


def export(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Every user and then every job, oldest first, with all columns; ``type`` says which it is."""
    for kind, order in ((User, User.created_at), (Job, Job.created_at)):
        query = select(kind).order_by(order, kind.id).execution_options(yield_per=_AT_ONCE)
        with ledger.reading() as session:
            for row in session.scalars(query):
                columns = {column.key: _plain(getattr(row, column.key)) for column in kind.__mapper__.column_attrs}
                yield {"type": kind.__name__.lower(), **columns}


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def purge(ledger: Ledger, older_than: timedelta, *, dry_run: bool = False) -> int:
    """Forget jobs that ended long ago; never those that live or may be launched. May be repeated.

    Their folders stay. A client that asks for such a job is told that there is none; the guard in its folder still keeps the
    same script from being run there again.

    :param older_than: how long ago, :data:`KEEP` or more.
    :param dry_run: count only.
    :returns: how many.
    :raises ValueError: if that is too short.
    """
    if older_than < KEEP:
        raise ValueError(f"ends are kept for {KEEP.days} days at least")
    old = (Job.state.in_(_ENDS), utc_now() - older_than > _ENDED)
    if dry_run:
        with ledger.reading() as session:
            return session.scalar(select(func.count()).select_from(Job).where(*old)) or 0
    number = 0
    while True:
        # In pieces: no gateway has to wait long for one of them.
        with ledger.writing() as session:
            ids = session.scalars(select(Job.id).where(*old).limit(_AT_ONCE)).all()
            # Looked at once more: a job that was refused may have been launched again in between.
            done = int(session.execute(delete(Job).where(Job.id.in_(ids), *old)).rowcount)  # type: ignore[attr-defined]
        number += done
        if not done:
            return number


def back_up(ledger: Ledger, file: Path) -> None:
    """Copy a ledger in SQLite into a new file, while gateways use it; what is committed is in the copy whole.

    :raises ConfigurationError: if there is such a file, or the database is a PostgreSQL, which has ``pg_dump``.
    """
    path = ledger.engine.url.database
    if ledger.engine.dialect.name != "sqlite" or not path:
        raise ConfigurationError("only SQLite is backed up by this: for PostgreSQL use pg_dump")
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as exc:
        raise ConfigurationError(f"the file {file} cannot be made: {exc.strerror}") from exc
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(file)) as copy:
        source.backup(copy)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    :param problem: what is wrong, and what to do; empty if nothing is.
    """

    name: str
    found: str
    problem: str = ""


def check(ledger: Ledger) -> list[Check]:
    """Look whether a ledger is in order: its schema, its integrity, its clock, its rows. Changes nothing.

    :raises Unavailable: if the database does not answer.
    """
    revision, newest = ledger.revision(), newest_revision()
    wrong = (
        "" if revision == newest else f"this version wants {newest}: run `gateway admin migrate`, or start a gateway"
    )
    checks = [Check("connection", ledger.engine.dialect.name), Check("schema", str(revision), wrong)]
    if wrong:
        return checks
    return [*checks, _tables(ledger), _integrity(ledger), _clock(ledger), *_rows(ledger)]


def _tables(ledger: Ledger) -> Check:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with answering(), ledger.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    problem = f"it is not what this version has made: {differences}; restore a back-up" if differences else ""
    return Check("tables", f"{len(Base.metadata.tables)}", problem)


def _integrity(ledger: Ledger) -> Check:
    if ledger.engine.dialect.name != "sqlite":
        return Check("integrity", "PostgreSQL checks each page itself, where it was set up with data checksums")
    with answering(), ledger.engine.connect() as connection:
        said = [str(row[0]) for row in connection.execute(text("PRAGMA integrity_check"))]
        said += [f"row without its parent: {row}" for row in connection.execute(text("PRAGMA foreign_key_check"))]
    return Check("integrity", said[0], "" if said == ["ok"] else f"{'; '.join(said[:5])}; restore a back-up")


def _clock(ledger: Ledger) -> Check:
    if ledger.engine.dialect.name == "sqlite":
        return Check("clock", "the one of this machine")
    with answering(), ledger.engine.connect() as connection:
        before, theirs = utc_now(), connection.scalar(text("SELECT clock_timestamp()"))
    apart = abs(theirs - before)
    problem = "" if apart < _CLOCK else "leases of several gateways rest on like clocks: let both machines use NTP"
    return Check("clock", f"{apart.total_seconds():.1f} s from the one of this machine", problem)


def _rows(ledger: Ledger) -> Sequence[Check]:
    with ledger.reading() as session:
        users = session.scalar(select(func.count()).select_from(User)) or 0
    counted = {state.value: number for state, number in ledger.count().items()}
    late = [job.id for job in ledger.active() if job.created_at > utc_now() + _CLOCK]
    living = [job for job in ledger.active() if job.job_state is not JobState.SUBMITTING and not job.scheduler_id]
    problem = ""
    if late:
        problem = f"jobs that are made in the future: {', '.join(late[:5])}; the clock was changed"
    elif living:
        problem = f"jobs that live without an id of the scheduler's: {', '.join(job.id for job in living[:5])}"
    states = ", ".join(f"{number} {state}" for state, number in sorted(counted.items())) or "none"
    return [Check("users", str(users)), Check("jobs", states, problem)]
