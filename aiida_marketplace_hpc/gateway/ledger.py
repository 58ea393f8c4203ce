"""The ledger: users and jobs in a database. It is the truth about jobs; the scheduler is evidence.

Every change of a job is one short transaction that names the state (and the fence) it starts from, so that two threads or
two gateways on one database never both win. See :mod:`~aiida_marketplace_hpc.gateway.reconcile` for which changes there are.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Connection,
    and_,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.databases import answering, is_storable, lock_for_migration, make_engine
from aiida_marketplace_hpc.gateway.schema import Job, User
from aiida_marketplace_hpc.protocol import JobState

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory


def new_id() -> str:
    """A new id of a user or job: 24 hexadecimal digits, as on the published gateway, and not to be guessed."""
    return secrets.token_hex(12)


def utc_now() -> datetime:
    """Now, aware."""
    return datetime.now(timezone.utc)


def automatic_key(folder: str, script: str, script_digest: str) -> str:
    """The key of a job that is made of an existing folder and a script in it: the same again is the same job."""
    whole = "\0".join((folder, script, script_digest))
    return f"auto:{hashlib.sha256(whole.encode('utf-8', 'surrogateescape')).hexdigest()}"


class NameTaken(Exception):
    """Somebody else has the folder name that somebody should get."""


class Ledger:
    """Users and jobs.

    :param url: the database, as SQLAlchemy writes it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = make_engine(url)
        self._emails: dict[str, str] = {}

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def migrate(self, revision: str = "head") -> None:
        """Bring the database to this version's schema, or up to an older one. May be repeated, by several at once.

        :raises ConfigurationError: if it was made by a newer version.
        :raises Unavailable: if the database does not answer; then nothing was changed.
        """
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with answering(), self.engine.execution_options(writes=True).begin() as connection:
            lock_for_migration(connection)
            config.attributes["connection"] = connection
            _require_known(_revision(connection))
            command.upgrade(config, revision)

    def check_version(self) -> None:
        """Make sure that the database is not of a newer version than this one. Changes nothing.

        :raises ConfigurationError: if it is.
        :raises Unavailable: if the database does not answer.
        """
        _require_known(self.revision())

    def revision(self) -> str | None:
        """The revision of the schema that the database has; ``None``: none yet.

        :raises Unavailable: if the database does not answer.
        """
        with answering(), self.engine.connect() as connection:
            return _revision(connection)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session to look with; rows stay usable afterwards.

        :raises Unavailable: if the database does not answer.
        """
        with answering(), Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that commits at its end, or leaves everything as it was.

        :raises Unavailable: if the database does not answer; if it was lost at the very end, all may have been committed.
        """
        writer = self.engine.execution_options(writes=True)
        with answering(), Session(writer, expire_on_commit=False) as session, session.begin():
            yield session

    def look(self) -> None:
        """Read something, whatever it is: the database is there and has the tables, or this raises."""
        with self.reading() as session:
            session.execute(select(Job.id).limit(1)).first()

    # Users

    def user_of(self, identity: Identity, names: Callable[[str, str], Iterable[str]] | None = None) -> User:
        """The user of an identity, added now if they are new; may be repeated.

        Whoever is known keeps their folder, also under another e-mail address.

        :param names: the folder names that they may get, of the one that their address makes and :func:`owner_of` them.
        :raises NameTaken: if somebody else has all of them.
        """
        known = self.find_user(identity)
        if known is not None:
            return self._renamed(known, identity)
        claimed = self._claim(identity)
        if claimed is not None:
            return claimed
        base, owner = folder_name(identity.email), _owner(identity.issuer, identity.subject)
        for username in new_names(base) if names is None else names(base, owner):
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
                # Somebody registered the same identity meanwhile, or their row was made again because a job of theirs lives;
                # or another person has this folder name.
                existing = self._claim(identity)
                if existing is not None:
                    return existing
        raise NameTaken(f"no free folder name for {identity}")

    def find_user(self, identity: Identity) -> User | None:
        """The user of an identity, if they have been here."""
        with self.reading() as session:
            known: User | None = session.scalar(_by_identity(identity))
        return known

    def _renamed(self, user: User, identity: Identity) -> User:
        """Write down what somebody is called by now."""
        if (user.email, user.name) != (identity.email, identity.name):
            with self.writing() as session:
                session.execute(update(User).where(User.id == user.id).values(email=identity.email, name=identity.name))
            user.email, user.name = identity.email, identity.name
        return user

    def user_by_owner(self, owner: str, username: str) -> User:
        """The user that :func:`owner_of` names, made again where the ledger has lost them.

        The row becomes theirs when they come (:meth:`user_of`).

        :param username: their folder name.
        """
        for name in (username or f"lost-{secrets.token_hex(3)}", f"{username or 'lost'}-{secrets.token_hex(3)}"):
            known = next((user for user in self.users() if owner_of(user) == owner), None)
            if known is not None:
                return known
            user = User(
                id=new_id(), issuer=_LOST, subject=owner, email="", name="", username=name, created_at=utc_now()
            )
            try:
                with self.writing() as session:
                    session.add(user)
                return user
            except IntegrityError:  # They have come meanwhile, or somebody else has that folder name by now.
                continue
        raise RuntimeError(f"no free folder name for {username}")

    def _claim(self, identity: Identity) -> User | None:
        """Give somebody the row that was made for them while the ledger did not know them."""
        owner = _owner(identity.issuer, identity.subject)
        named = {"issuer": identity.issuer, "subject": identity.subject, "email": identity.email, "name": identity.name}
        statement = update(User).where(User.issuer == _LOST, User.subject == owner).values(**named)
        with self.writing() as session:
            session.execute(statement)
        return self.find_user(identity)

    def user(self, user_id: str) -> User:
        """The user of that id.

        :raises KeyError: if there is none.
        """
        with self.reading() as session:
            user = session.get(User, user_id)
        if user is None:
            raise KeyError(user_id)
        return user

    def email_of(self, user_id: str) -> str | None:
        """The address of a user, for the log: as it was when first asked for; ``None`` if it cannot be known now."""
        if user_id not in self._emails:
            try:
                self._emails[user_id] = self.user(user_id).email
            except Exception:  # noqa: BLE001 - of whom a line is about must keep nothing from being done.
                return None
        return self._emails[user_id]

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
        if not is_storable(jobid):
            return None
        query = select(Job).where(Job.id == jobid)
        if user_id is not None:
            query = query.where(Job.user_id == user_id)
        with self.reading() as session:
            return session.scalar(query)

    def get_many(self, jobids: Collection[str], user_id: str) -> dict[str, Job]:
        """Those of the jobs that are this user's, by id."""
        found: dict[str, Job] = {}
        with self.reading() as session:
            for part in _parts([jobid for jobid in jobids if is_storable(jobid)]):
                query = select(Job).where(Job.user_id == user_id, Job.id.in_(part))
                found.update((job.id, job) for job in session.scalars(query))
        return found

    def of_user(self, user_id: str, *, active_only: bool = False) -> list[Job]:
        """The user's jobs, oldest first."""
        query = select(Job).where(Job.user_id == user_id).order_by(Job.created_at, Job.id)
        if active_only:
            query = query.where(Job.state.in_(_ACTIVE))
        with self.reading() as session:
            return list(session.scalars(query))

    def newest(self, user_id: str, *, limit: int, offset: int = 0) -> list[Job]:
        """Some of the user's jobs, newest first."""
        query = select(Job).where(Job.user_id == user_id).order_by(Job.created_at.desc(), Job.id.desc())
        with self.reading() as session:
            return list(session.scalars(query.limit(limit).offset(offset)))

    def active_in_folder(self, user_id: str, folder: str) -> Job | None:
        """The user's job that lives in this folder."""
        query = select(Job).where(Job.user_id == user_id, Job.folder == folder, Job.state.in_(_ACTIVE))
        with self.reading() as session:
            return session.scalars(query).first()

    def in_folder(self, folder: str) -> list[Job]:
        """Everybody's jobs that have, or had, this folder."""
        with self.reading() as session:
            return list(session.scalars(select(Job).where(Job.folder == folder)))

    def live_in(self, folders: Collection[str]) -> list[Job]:
        """Everybody's jobs that live in one of these folders."""
        with self.reading() as session:
            return list(session.scalars(select(Job).where(Job.state.in_(_ACTIVE), Job.folder.in_(folders))))

    def live_below(self, folders: Collection[str]) -> list[Job]:
        """Everybody's jobs that live in one of these folders or anywhere below."""
        # Not LIKE, which does not mind capital letters in some databases.
        below = [func.substr(Job.folder, 1, len(folder) + 1) == f"{folder}/" for folder in folders]
        with self.reading() as session:
            return list(
                session.scalars(select(Job).where(Job.state.in_(_ACTIVE), or_(Job.folder.in_(folders), *below)))
            )

    def has_others_below(self, folder: str, jobid: str) -> bool:
        """Whether there is, or was, a job other than this one in a folder or anywhere below."""
        below = func.substr(Job.folder, 1, len(folder) + 1) == f"{folder}/"
        query = select(Job.id).where(Job.id != jobid, or_(Job.folder == folder, below)).limit(1)
        with self.reading() as session:
            return session.scalar(query) is not None

    def active(self) -> list[Job]:
        """Everybody's jobs that were launched and have not ended."""
        with self.reading() as session:
            return list(session.scalars(select(Job).where(Job.state.in_(_ACTIVE)).order_by(Job.created_at)))

    def count(self) -> dict[JobState, int]:
        """How many jobs there are in each state."""
        with self.reading() as session:
            rows = session.execute(select(Job.state, func.count()).group_by(Job.state)).all()
        return {JobState(state): number for state, number in rows}

    def count_living(self, user_id: str) -> int:
        """How many jobs of a user have not ended."""
        query = select(func.count()).where(Job.user_id == user_id, Job.state.in_((*_ACTIVE, JobState.CREATED.value)))
        with self.reading() as session:
            return session.scalar(query) or 0

    def unsettled(self) -> list[Job]:
        """Everybody's jobs whose submission is not confirmed, or whose end is wanted."""
        wanted = or_(Job.state == JobState.SUBMITTING.value, and_(Job.cancel_requested, Job.state.in_(_ACTIVE)))
        with self.reading() as session:
            return list(session.scalars(select(Job).where(wanted).order_by(Job.created_at)))

    def folders_of(self, scheduler_ids: Collection[str]) -> dict[str, list[str]]:
        """The folders of the jobs that have, or had, these ids of the scheduler's."""
        found: dict[str, list[str]] = {}
        ids = list(scheduler_ids)
        with self.reading() as session:
            for part in _parts(ids):
                for id, folder in session.execute(
                    select(Job.scheduler_id, Job.folder).where(Job.scheduler_id.in_(part))
                ):
                    found.setdefault(str(id), []).append(folder)
        return found

    def note_duplicate(self, jobid: str, scheduler_id: str) -> None:
        """Record that the scheduler has a second copy of a job. May be repeated."""
        with self.writing() as session:
            job = session.get(Job, jobid, with_for_update=True)
            if job is not None and scheduler_id not in (job.duplicates or ()):
                job.duplicates = [*(job.duplicates or ()), scheduler_id]

    def change(self, job: Job, values: Mapping[str, Any], *, take_over: bool = False) -> Job | None:
        """Change a job if it is still in the state, and under the fence, in which the caller saw it.

        :param values: new values by column name.
        :param take_over: count the fence up, so that whoever worked under the old number can record nothing any more.
        :returns: the job as it is now, or ``None`` if somebody else was faster; then nothing was changed.
        """
        values = {**values, "fence": job.fence + 1} if take_over else values
        return self.get(job.id) if self.change_all([(job, values)]) else None

    def end(self, job: Job, state: JobState, reason: str) -> Job | None:
        """Record an end that only a person knows of, as :meth:`change` does."""
        values = {
            "state": state,
            "scheduler_state": state.value,
            "message": reason,
            "ended_at": utc_now(),
            "search_first": False,
            "lease_until": None,
        }
        return self.change(job, values, take_over=True)

    def change_all(self, changes: Sequence[tuple[Job, Mapping[str, Any]]]) -> list[str]:
        """Change many jobs in one transaction, each as :meth:`change` does.

        :returns: the ids of those that were changed.
        """
        changed: list[str] = []
        with self.writing() as session:
            # In one order, whoever writes: two transactions that wait for each other's rows would never end.
            for job, values in sorted(changes, key=lambda change: change[0].id):
                given = dict(values)
                if "state" in given:
                    given["state"] = JobState(given["state"]).value
                statement = (
                    update(Job)
                    .where(Job.id == job.id, Job.state == job.job_state.value, Job.fence == job.fence)
                    .values(**given)
                    .execution_options(synchronize_session=False)
                )
                if session.execute(statement).rowcount:  # type: ignore[attr-defined]
                    changed.append(job.id)
        return changed


def newest_revision() -> str:
    """The revision of the schema that this version wants."""
    return str(_scripts().get_current_head())


def _scripts() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(_MIGRATIONS))


def _revision(connection: Connection) -> str | None:
    from alembic.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision()


def _require_known(revision: str | None) -> None:
    if revision is not None and revision not in {script.revision for script in _scripts().walk_revisions()}:
        raise ConfigurationError(
            f"the database has the schema {revision}, which this version (schema {newest_revision()}) does not know: it was "
            "made by a newer one; upgrade this gateway"
        )


def new_names(base: str) -> Iterator[str]:
    """The folder name that an address makes, and some to choose from where another person has it."""
    yield base
    for _ in range(5):
        yield f"{base}-{secrets.token_hex(3)}"


def owner_of(user: User) -> str:
    """What a job says about whose it is: nothing that names them, and enough to know them again."""
    return user.subject if user.issuer == _LOST else _owner(user.issuer, user.subject)


def _owner(issuer: str, subject: str) -> str:
    return hashlib.sha256(f"{issuer}\0{subject}".encode()).hexdigest()


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Databases limit the number of variables in a statement."""
    for start in range(0, len(ids), 500):
        yield ids[start : start + 500]


_MIGRATIONS = Path(__file__).with_name("migrations")
_LOST = "lost"
"""The issuer of a user whom the ledger has lost; no identity has it."""

_ACTIVE: Sequence[str] = tuple(state.value for state in JobState if state.active)


def _by_identity(identity: Identity) -> Any:
    return select(User).where(User.issuer == identity.issuer, User.subject == identity.subject)


def folder_name(email: str) -> str:
    """The folder name that the published gateway gives an e-mail address, made safe: no name leads anywhere else."""
    local = email.split("@", maxsplit=1)[0].replace(".", "_")
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", local).strip("-")[:48]
    return safe or "user"
