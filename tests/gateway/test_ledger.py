"""Users and the schema."""

from __future__ import annotations

import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from aiida_marketplace_hpc.errors import Unavailable
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.ledger import Ledger, folder_name
from aiida_marketplace_hpc.gateway.schema import Base, Job, User
from aiida_marketplace_hpc.gateway.service import Gateway

pytestmark = pytest.mark.databases


def test_the_migrations_make_the_schema_that_the_code_uses(database: str) -> None:
    ledger = Ledger(database)
    ledger.migrate()
    ledger.migrate()
    with ledger.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    ledger.close()


def test_users_of_an_older_ledger_are_neither_registered_nor_blocked(database: str) -> None:
    ledger = Ledger(database)
    ledger.migrate("0002")
    insert = (
        "INSERT INTO users (id, issuer, subject, email, name, username, created_at) "
        "VALUES ('1', 'i', 's', 'a@b', 'A', 'a', '2026-01-01')"
    )
    with ledger.engine.execution_options(writes=True).begin() as connection:
        connection.exec_driver_sql(insert)
    ledger.migrate()
    [user] = ledger.users()
    assert (user.username, user.registered, user.blocked) == ("a", False, False)
    ledger.close()


def test_an_identity_is_one_user(gateway: Gateway) -> None:
    first = gateway.ledger.user_of(Identity("dev", "1", "x.y@a.org", "X"))
    again = gateway.ledger.user_of(Identity("dev", "1", "renamed@a.org", "X"))
    assert first.id == again.id
    assert first.username == "x_y"


def test_two_people_never_share_a_folder(gateway: Gateway) -> None:
    addresses = ["x.y@a.org", "x.y@b.org", "x_y@c.org", "x/y@d.org"]
    names = [gateway.ledger.user_of(Identity("dev", address, address, "")).username for address in addresses]
    assert len(set(names)) == len(addresses)
    assert all("/" not in name for name in names)


def jobs_of(gateway: Gateway, user: User, number: int) -> list[Job]:
    made = [gateway.jobs._new(user, f"k{n}", f"/f/{n}", "run.sh", None, None) for n in range(number)]
    return [gateway.ledger.add(job) for job in made]


def test_two_who_change_many_jobs_do_not_wait_for_each_other_for_ever(gateway: Gateway, alice: User) -> None:
    jobs = jobs_of(gateway, alice, 20)
    start = threading.Barrier(2)
    problems: list[Exception] = []

    def change(order: list[Job]) -> None:
        start.wait()
        try:
            for number in range(20):
                gateway.ledger.change_all([(job, {"reason": str(number)}) for job in order])
        except Unavailable as exc:
            problems.append(exc)

    threads = [threading.Thread(target=change, args=(order,)) for order in (jobs, jobs[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_one_job_of_which_odd_things_are_said_keeps_no_other_from_being_recorded(gateway: Gateway, alice: User) -> None:
    odd, plain = jobs_of(gateway, alice, 2)
    said = {
        "partition": "p," * 200,
        "account": "a\0b",
        "name": "\ud800",
        "nodes": "n" * 10_000,
        "scheduler_state": "S" * 100,
        "time_limit": 10**12,
        "exit_code": 3,
    }
    assert len(gateway.ledger.change_all([(odd, said), (plain, {"reason": "Priority"})])) == 2
    job = gateway.ledger.get(odd.id)
    assert job is not None
    assert (job.partition, job.account, job.exit_code) == (("p," * 200)[:255], "ab", 3)
    assert job.time_limit == 2**31 - 1
    assert len(str(job.nodes)) == 10_000
    other = gateway.ledger.get(plain.id)
    assert other is not None
    assert other.reason == "Priority"


def test_an_id_that_is_none_is_nobodys(gateway: Gateway, alice: User) -> None:
    for jobid in ("", "\0", "\udcff", "x" * 5000):
        assert gateway.ledger.get(jobid, alice.id) is None
        assert gateway.ledger.get_many([jobid], alice.id) == {}


def test_a_database_that_is_not_there_is_unavailable_and_repeats_no_password() -> None:
    ledger = Ledger("postgresql://name:pass-word@127.0.0.1:1/x")
    for ask in (ledger.users, ledger.migrate, ledger.revision):
        with pytest.raises(Unavailable, match="database does not answer") as refused:
            ask()
        assert refused.value.retryable
        assert "pass-word" not in refused.value.message
    ledger.close()


def test_folder_names_lead_nowhere_else() -> None:
    for email in ("../../etc@x", "..@x", "@x", "/@x", ".@x", "-rf@x", "a b;c@x", "ä@x", ""):
        name = folder_name(email)
        assert name
        assert name not in (".", "..")
        assert not set(name) & set("/. ;\0")
        assert not name.startswith("-")
