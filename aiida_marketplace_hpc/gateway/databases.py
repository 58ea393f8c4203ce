"""The databases that a ledger can be kept in, and what each of them wants: SQLite, and PostgreSQL for several gateways.

What both have in common is in :mod:`~aiida_marketplace_hpc.gateway.ledger`; what tells them apart is here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, InternalError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from aiida_marketplace_hpc.errors import ConfigurationError, Unavailable

logger = logging.getLogger(__name__)

_POOL = 10
_OVERFLOW = 20
"""Connections of one gateway: that many are kept, that many more are made under load."""
_POOL_TIMEOUT = 10.0
_MIGRATION_LOCK = 0x6D706870
"""The number of an advisory lock; any other would do, as long as all gateways take the same."""
_POSTGRESQL = {
    # Within the 20 seconds after which a client gives a request up.
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    # A gateway that is frozen in the middle of a transaction must not keep the others from the rows that it has locked.
    "options": "-c statement_timeout=15s -c lock_timeout=10s -c idle_in_transaction_session_timeout=10s",
    "application_name": "marketplace-hpc",
}
"""Parameters of libpq, where the address has none of its own:
https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS."""


def parse_url(text: str) -> URL:
    """Read a database's address.

    :raises ConfigurationError: if it is none, or that of a database that the gateway does not know. It never repeats a
        password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "the database is no address such as postgresql+psycopg://NAME:PASSWORD@HOST/DATABASE or sqlite:////PATH"
        ) from None
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigurationError(f"the database is SQLite or PostgreSQL, not {url.get_backend_name()}")
    if url.drivername == "postgresql":  # Which driver it is, is our business.
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "postgresql" and url.drivername != "postgresql+psycopg":
        raise ConfigurationError(
            f"the address of a PostgreSQL begins with postgresql+psycopg://, not {url.drivername}://"
        )
    return url


def shown_url(text: str) -> str:
    """A database's address without its password."""
    return parse_url(text).render_as_string(hide_password=True)


def make_engine(text: str) -> Engine:
    """An engine for a database's address; nothing is connected yet.

    Transactions that will write run under the execution option ``writes``.

    :raises ConfigurationError: if the address makes no sense, or the driver is not installed.
    """
    url = parse_url(text)
    return _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url)


def _postgresql(url: URL) -> Engine:
    missing = {name: value for name, value in _POSTGRESQL.items() if name not in url.query}
    try:
        return create_engine(
            url,
            connect_args=missing,
            pool_pre_ping=True,
            pool_size=_POOL,
            max_overflow=_OVERFLOW,
            pool_timeout=_POOL_TIMEOUT,
        )
    except (ImportError, NoSuchModuleError) as exc:
        raise ConfigurationError(
            f"the driver for PostgreSQL is missing ({exc}): pip install 'aiida-marketplace-hpc[gateway,postgresql]'"
        ) from exc


def _sqlite(url: URL) -> Engine:
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
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


def lock_for_migration(connection: Connection) -> None:
    """Let nobody else change the schema until the transaction of this connection ends; waits for whoever does.

    SQLite needs nothing: its transaction has the only lock there is.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")


@contextmanager
def answering() -> Iterator[None]:
    """Say in our own words that a database does not answer.

    Whether a transaction that was under way is done is not known then, as after any lost answer.

    :raises Unavailable: the database is down, restarts, or is locked by somebody for too long. Asking again is safe wherever
        it is after a lost answer of the gateway.
    """
    try:
        yield
    except NoConnectionFree as exc:
        raise Unavailable("all connections of the gateway to its database are in use") from exc
    except (OperationalError, InterfaceError, InternalError) as exc:
        raise _silent(exc) from exc
    except DBAPIError as exc:
        if not exc.connection_invalidated:
            raise
        raise _silent(exc) from exc


def _silent(error: DBAPIError) -> Unavailable:
    # The words of PostgreSQL's driver name hosts and accounts: they are for the log.
    logger.warning("the database does not answer: %s", str(error.orig).strip())
    return Unavailable(f"the gateway's database does not answer ({type(error.orig).__name__}): try again later")


def is_storable(text: str) -> bool:
    """Whether every database can hold a text: it has no zero byte, and can be written in UTF-8."""
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text)
