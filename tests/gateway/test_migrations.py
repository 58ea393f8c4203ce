"""A database of any earlier version becomes one of this version, with all that is in it, whoever starts at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime, timezone

import pytest
from sqlalchemy import text

from aiida_marketplace_hpc.errors import ConfigurationError, Unavailable
from aiida_marketplace_hpc.gateway.ledger import Ledger, newest_revision
from aiida_marketplace_hpc.protocol import JobState

pytestmark = pytest.mark.databases

USER = (
    "INSERT INTO users (id, issuer, subject, email, name, username, created_at) "
    "VALUES ('u1', 'i', 's', 'a@b', 'Ä', 'a', '2026-01-02 03:04:05.678901')"
)
JOB = (
    "INSERT INTO jobs (id, user_id, key, folder, script, machine, backend, created_at, state, cancel_requested, attempt, "
    "fence, search_first, scheduler_id, accounting, lease_until) "
    "VALUES ('{id}', 'u1', 'key-{id}', '/home/a/{id}', 'run.sh', 'm', 'slurm', '2026-01-02 03:04:05', '{state}', false, 1, "
    "2, false, '17', '{{\"rows\": [[\"ä\"]]}}', '2026-01-02 03:04:06')"
)


@pytest.fixture
def first(database: str) -> Iterator[Ledger]:
    """The ledger as the first released version has left it: with a user, a job that has ended, and one that lives."""
    ledger = Ledger(database)
    ledger.migrate("0001")
    with ledger.engine.execution_options(writes=True).begin() as connection:
        for statement in (USER, JOB.format(id="j1", state="FAILED"), JOB.format(id="j2", state="RUNNING")):
            connection.execute(text(statement.replace(":", r"\:")))
    yield ledger
    ledger.close()


def check(ledger: Ledger) -> None:
    assert ledger.revision() == newest_revision()
    [user] = ledger.users()
    assert (user.name, user.registered, user.blocked) == ("Ä", False, False)
    assert user.created_at == datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)
    ended, lives = (ledger.get(jobid) for jobid in ("j1", "j2"))
    assert ended is not None
    assert lives is not None
    assert (ended.job_state, ended.accounting, ended.duplicates) == (JobState.FAILED, {"rows": [["ä"]]}, None)
    assert (lives.job_state, lives.scheduler_id, lives.fence) == (JobState.RUNNING, "17", 2)
    assert ledger.change(lives, {"state": JobState.COMPLETED}) is not None


def test_what_the_first_version_has_written_is_there(first: Ledger) -> None:
    assert first.revision() == "0001"
    first.migrate()
    check(first)


def test_gateways_that_start_at_once_upgrade_it_once(first: Ledger) -> None:
    gateways = [Ledger(first.url) for _ in range(4)]
    start = threading.Barrier(len(gateways))
    problems: list[BaseException] = []

    def upgrade(ledger: Ledger) -> None:
        start.wait()
        try:
            ledger.migrate()
        except BaseException as exc:  # noqa: BLE001 - whatever it is, the test's own thread reports it.
            problems.append(exc)
        finally:
            ledger.close()

    threads = [threading.Thread(target=upgrade, args=(ledger,)) for ledger in gateways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    check(first)


def test_a_database_of_a_newer_version_is_left_alone(first: Ledger) -> None:
    first.migrate()
    with first.engine.execution_options(writes=True).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigurationError, match=r"9999.*upgrade this gateway"):
        first.migrate()
    assert first.revision() == "9999"


def test_an_upgrade_that_stumbles_leaves_everything_as_it_was(first: Ledger) -> None:
    with first.engine.execution_options(writes=True).begin() as connection:
        connection.execute(text("CREATE TABLE invitations (x INTEGER)"))  # The third step will want to make it.
    # SQLite has one class for whatever an SQL statement meets.
    with pytest.raises(Exception, match=r"invitations|does not answer") as stumbled:
        first.migrate()
    assert isinstance(stumbled.value, Unavailable) == first.url.startswith("sqlite")
    assert first.revision() == "0001"
    with first.engine.execution_options(writes=True).begin() as connection:
        connection.execute(text("DROP TABLE invitations"))
    first.migrate()
    check(first)
