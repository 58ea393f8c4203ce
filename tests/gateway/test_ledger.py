"""Users and the schema."""

from __future__ import annotations

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.ledger import Ledger, folder_name
from aiida_marketplace_hpc.gateway.schema import Base
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


def test_folder_names_lead_nowhere_else() -> None:
    for email in ("../../etc@x", "..@x", "@x", "/@x", ".@x", "-rf@x", "a b;c@x", "ä@x", ""):
        name = folder_name(email)
        assert name
        assert name not in (".", "..")
        assert not set(name) & set("/. ;\0")
        assert not name.startswith("-")
