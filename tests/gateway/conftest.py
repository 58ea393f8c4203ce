"""A gateway in the test's own process, over a batch system that does what the test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.gateway.schema import User
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import TOKENS


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def later() -> list[timedelta]:
    """Time that has passed, for the jobs' clock: append to it."""
    return []


@pytest.fixture
def clock(later: list[timedelta]) -> Callable[[], datetime]:
    return lambda: datetime.now(timezone.utc) + sum(later, timedelta())


@pytest.fixture
def gateway(tmp_path: Path, database: str, backend: FakeBackend, clock: Callable[[], datetime]) -> Iterator[Gateway]:
    """A gateway whose background does not run: a test calls ``reconcile`` when it wants it."""
    settings = load(
        {
            "state": tmp_path / "state",
            "database": database,
            "home": str(tmp_path / "home" / "{username}"),
            "dev_token": TOKENS,
            "poll_interval": 1e-9,
        }
    )
    gateway = Gateway(settings, backend, now=clock)
    gateway.ledger.migrate()
    gateway.jobs.reconcile()
    yield gateway
    gateway.jobs.close()
    gateway.ledger.close()


@pytest.fixture
def alice(gateway: Gateway) -> User:
    user = gateway.ledger.user_of(Identity("dev", "alice", "alice@example.org", "Alice"))
    gateway.files_of(user).roots.prepare()
    return user


@pytest.fixture
def folder(gateway: Gateway, alice: User) -> str:
    """A folder of Alice's with a job script in it."""
    files = gateway.files_of(alice)
    root = files.roots.by_name("home")
    assert root is not None
    path = f"{root.path}/work"
    files.mkdir(path)
    text = [b"#!/bin/sh\necho done\n"]
    files.write(f"{path}/run.sh", lambda _: text.pop() if text else b"")
    return path
