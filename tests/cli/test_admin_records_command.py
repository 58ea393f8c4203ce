"""``marketplace-hpc gateway admin``: looking at the rows of a database, writing them out, removing old ones, checking."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import text

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.ledger import Ledger, newest_revision
from aiida_marketplace_hpc.gateway.schema import Job, User
from aiida_marketplace_hpc.protocol import JobState

pytestmark = pytest.mark.databases
DAY = timedelta(days=1)


@pytest.fixture
def alice(ledger: Ledger) -> User:
    return ledger.user_of(Identity("dev", "alice", "alice@example.org", "Alice"))


def admin(ledger: Ledger, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["gateway", "admin", "--database", ledger.url, *arguments])


def add(ledger: Ledger, user: User, number: int, state: JobState, age: timedelta) -> str:
    """A job that was made, and has ended if it has, so long ago."""
    then = datetime.now(timezone.utc) - age
    job = Job(
        id=f"{number:024x}",
        user_id=user.id,
        key=str(number),
        folder=f"/home/{user.username}/{number}",
        script="run.sh",
        machine="m",
        backend="slurm",
        created_at=then,
        state=state.value,
        attempt=1,
        fence=1,
        cancel_requested=False,
        search_first=False,
        scheduler_id=str(number),
        ended_at=then if state.final and state is not JobState.REFUSED else None,
    )
    return ledger.add(job).id


def test_jobs_are_shown_by_what_they_have(ledger: Ledger, alice: User) -> None:
    bob = ledger.user_of(Identity("dev", "bob", "bob@example.org", "Bob"))
    first = add(ledger, alice, 1, JobState.FAILED, 3 * DAY)
    second = add(ledger, alice, 2, JobState.RUNNING, 2 * DAY)
    third = add(ledger, bob, 3, JobState.QUEUED, DAY)

    def shown(*arguments: str) -> list[str]:
        done = admin(ledger, "jobs", *arguments)
        assert done.exit_code == 0, done.output
        return [line.split()[0] for line in done.stdout.splitlines()[1:]]

    assert shown() == [third, second, first]
    assert shown("--user", "ALICE@example.org") == [second, first]
    assert shown("--living") == [third, second]
    assert shown("--state", "FAILED", "--state", "QUEUED") == [third, first]
    assert shown("--below", "/home/alice") == [second, first]
    assert shown("--below", "/home/alic") == []
    assert shown("--since", f"{datetime.now(timezone.utc) - 2.5 * DAY:%Y-%m-%d %H:%M:%S}") == [third, second]
    assert shown("--limit", "1") == [third]
    assert "newest 1" in admin(ledger, "jobs", "--limit", "1").stderr


def test_old_ends_are_forgotten_and_nothing_else(ledger: Ledger, alice: User) -> None:
    old = [add(ledger, alice, n, state, 40 * DAY) for n, state in enumerate((JobState.FAILED, JobState.REFUSED), 1)]
    kept = [
        add(ledger, alice, n, state, age)
        for n, (state, age) in enumerate(
            [
                (JobState.RUNNING, 400 * DAY),
                (JobState.SUBMITTING, 400 * DAY),
                (JobState.CREATED, 400 * DAY),
                (JobState.COMPLETED, 20 * DAY),
            ],
            10,
        )
    ]
    assert "30 days" in admin(ledger, "purge", "--older-than", "29").output
    assert admin(ledger, "purge", "--older-than", "30", "--dry-run").output == "2 jobs would be forgotten\n"
    assert admin(ledger, "purge", "--older-than", "30").output == "2 jobs forgotten\n"
    assert admin(ledger, "purge", "--older-than", "30").output == "0 jobs forgotten\n"
    assert {job.id for job in ledger.of_user(alice.id)} == set(kept)
    assert not set(old) & set(kept)


def test_everything_is_written_out(ledger: Ledger, alice: User) -> None:
    jobid = add(ledger, alice, 1, JobState.RUNNING, DAY)
    user, job = (json.loads(line) for line in admin(ledger, "export").output.splitlines())
    assert (user["type"], user["email"], user["blocked"]) == ("user", "alice@example.org", False)
    assert (job["type"], job["id"], job["user_id"], job["state"]) == ("job", jobid, user["id"], "RUNNING")
    assert datetime.fromisoformat(job["created_at"]).tzinfo is not None
    assert set(job) == {"type", *Job.__mapper__.column_attrs.keys()}


def test_a_database_in_order_is_said_to_be(ledger: Ledger, alice: User) -> None:
    add(ledger, alice, 1, JobState.RUNNING, DAY)
    done = admin(ledger, "check")
    assert done.exit_code == 0, done.output
    assert "jobs: 1 RUNNING" in done.output


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("DROP INDEX uq_jobs_living", "uq_jobs_living"),
        ("UPDATE alembic_version SET version_num = '0001'", "gateway admin migrate"),
        ("UPDATE jobs SET scheduler_id = NULL", "without an id"),
        ("UPDATE jobs SET created_at = '2999-01-01 00:00:00'", "in the future"),
    ],
)
def test_what_is_wrong_is_found(ledger: Ledger, alice: User, damage: str, named: str) -> None:
    add(ledger, alice, 1, JobState.RUNNING, DAY)
    with ledger.engine.execution_options(writes=True).begin() as connection:
        connection.execute(text(damage))
    done = admin(ledger, "check")
    assert done.exit_code == 1
    assert named in done.output


def test_a_database_is_made_and_brought_up_to_date(database: str) -> None:
    ledger = Ledger(database)
    ledger.migrate("0002")
    assert admin(ledger, "migrate").output == f"schema 0002 -> {newest_revision()}\n"
    assert admin(ledger, "migrate").output == f"schema {newest_revision()}\n"
    ledger.close()


def test_a_database_that_does_not_answer_is_said() -> None:
    url = "postgresql+psycopg://somebody:pass-word@127.0.0.1:1/x"
    done = CliRunner().invoke(main, ["gateway", "admin", "--database", url, "check"])
    assert done.exit_code == 1
    assert "does not answer" in done.output
    assert "pass-word" not in done.output
