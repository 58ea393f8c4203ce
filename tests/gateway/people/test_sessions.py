"""How long somebody stays signed in, and what is left of that in the database."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select

from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.ledger import Ledger
from aiida_marketplace_hpc.gateway.people.sessions import IDLE, LONGEST, Sessions
from aiida_marketplace_hpc.gateway.schema import PageSession
from aiida_marketplace_hpc.gateway.service import Gateway

WHO = Identity("dev", "alice", "alice@example.org", "Alice", email_verified=True, claims={"groups": ["hpc"]})
MOMENT = timedelta(seconds=1)


@pytest.fixture
def sessions(gateway: Gateway, clock: Callable[[], datetime]) -> Sessions:
    return Sessions(gateway.ledger, clock)


def test_a_session_says_who_has_signed_in_with_all_that_the_issuer_said(sessions: Sessions) -> None:
    found = sessions.find(sessions.begin(WHO))
    assert found == WHO
    assert found is not None
    assert found.claims == WHO.claims


def test_nobody_has_a_session_that_never_began(sessions: Sessions) -> None:
    sessions.begin(WHO)
    assert sessions.find("") is None
    assert sessions.find("x" * 43) is None


def test_a_session_that_is_not_used_is_over(sessions: Sessions, later: list[timedelta]) -> None:
    secret = sessions.begin(WHO)
    later.append(IDLE - MOMENT)
    assert sessions.find(secret) == WHO
    later.append(IDLE - MOMENT)
    assert sessions.find(secret) == WHO
    later.append(IDLE)
    assert sessions.find(secret) is None


def test_a_session_is_over_after_the_longest_time_however_it_is_used(
    sessions: Sessions, later: list[timedelta]
) -> None:
    secret = sessions.begin(WHO)
    passed = timedelta()
    while passed + IDLE / 2 < LONGEST:
        later.append(IDLE / 2)
        passed += IDLE / 2
        assert sessions.find(secret) == WHO
    later.append(LONGEST - passed)
    assert sessions.find(secret) is None


def test_one_browser_is_signed_out_and_the_other_is_not(sessions: Sessions) -> None:
    one, other = sessions.begin(WHO), sessions.begin(WHO)
    sessions.end(one)
    sessions.end(one)
    assert sessions.find(one) is None
    assert sessions.find(other) == WHO


def test_gateways_on_one_database_share_sessions(gateway: Gateway, sessions: Sessions) -> None:
    secret = sessions.begin(WHO)
    other = Ledger(gateway.ledger.url)
    try:
        assert Sessions(other).find(secret) == WHO
        Sessions(other).end(secret)
    finally:
        other.close()
    assert sessions.find(secret) is None


def test_the_database_has_no_secret_and_forgets_what_is_over(
    gateway: Gateway, sessions: Sessions, later: list[timedelta]
) -> None:
    secret = sessions.begin(WHO)
    later.append(IDLE + MOMENT)
    kept = sessions.begin(WHO)
    with gateway.ledger.reading() as session:
        [row] = session.scalars(select(PageSession))
    assert secret not in str(vars(row))
    assert kept not in str(vars(row))
