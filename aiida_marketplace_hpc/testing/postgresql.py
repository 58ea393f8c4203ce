"""A real PostgreSQL with data, port and password of its own, which can be killed and started again."""

from __future__ import annotations

import secrets
import shutil
import signal
import subprocess
from pathlib import Path
from urllib.parse import quote

from aiida_marketplace_hpc.testing.machine import (
    Machine,
    NotPossibleHere,
    RigError,
    free_ports,
)
from aiida_marketplace_hpc.testing.server import Server

_DEBIAN = Path("/usr/lib/postgresql")
_USER = "gateway"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "32MB",
    # No machine is switched off here; what a killed server has written is there when it starts again.
    "fsync": "off",
    "full_page_writes": "off",
    "log_min_messages": "warning",
}


class PostgreSql(Server):
    """One server of PostgreSQL; a context manager. Killed, it makes no checkpoint, and has to recover."""

    title = "PostgreSQL"
    # Its own word for an immediate shutdown: SIGKILL would leave its other processes to nobody for a while.
    _deadly = signal.SIGQUIT

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        [self._port] = free_ports(1)

    @staticmethod
    def check_possible() -> None:
        """Raise :class:`NotPossibleHere` where PostgreSQL is not installed."""
        PostgreSql.program("postgres")

    @staticmethod
    def program(name: str) -> str:
        """The path of one of its programs, of the newest version that is installed.

        :raises NotPossibleHere: where PostgreSQL is not installed.
        """
        versions = sorted(_DEBIAN.glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
        found = str(versions[-1]) if versions else shutil.which(name)
        if found is None:
            command = "sudo apt-get install --no-install-recommends postgresql"
            raise NotPossibleHere("PostgreSQL is not installed", command)
        return found

    def url(self, database: str) -> str:
        """The address of a database as SQLAlchemy writes it, with name and password; stays the same over restarts."""
        return f"postgresql+psycopg://{self._authority}/{database}"

    @property
    def _authority(self) -> str:
        return f"{_USER}:{quote(self.password, safe='')}@127.0.0.1:{self._port}"

    def create(self) -> str:
        """Make an empty database and return its name; one for each test."""
        name = f"ledger_{secrets.token_hex(6)}"
        self.query("postgres", f"CREATE DATABASE {name}")
        return name

    def drop(self, database: str) -> None:
        """Remove a database, whoever is connected to it."""
        self.query("postgres", f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")

    def query(self, database: str, statement: str) -> list[tuple[object, ...]]:
        """Carry out one statement by itself, and return its rows."""
        import psycopg

        with psycopg.connect(f"postgresql://{self._authority}/{database}", autocommit=True, connect_timeout=5) as one:
            cursor = one.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def dump(self, database: str) -> bytes:
        """A back-up of a database, as ``pg_dump`` writes it."""
        return self._tool("pg_dump", "--no-owner", database)

    def restore(self, database: str, dump: bytes) -> None:
        """Bring a back-up into an empty database, as ``psql`` does it."""
        self._tool("psql", "--quiet", "--set=ON_ERROR_STOP=1", "--single-transaction", database, stdin=dump)

    def _tool(self, name: str, *arguments: str, stdin: bytes = b"") -> bytes:
        where = {"PGHOST": "127.0.0.1", "PGPORT": str(self._port), "PGUSER": _USER, "PGPASSWORD": self.password}
        done = subprocess.run([self.program(name), *arguments], input=stdin, capture_output=True, env=where, timeout=60)
        if done.returncode:
            raise RigError(f"{name} ended with {done.returncode}: {done.stderr.decode(errors='replace')}")
        return done.stdout

    def _set_up(self) -> None:
        user = self.machine.user
        self._directory = self.machine.make_directory("postgresql", user=user, mode=0o700)
        secret = f"{self._directory}/password"
        self.machine.write(secret, self.password, user=user, mode=0o600)
        arguments = ["--pgdata", f"{self._directory}/data", "--username", _USER, "--pwfile", secret]
        arguments += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"]
        self.machine.run([self.program("initdb"), *arguments], user=user, check=True)

    def _command(self) -> list[str]:
        options = [part for name, value in _SETTINGS.items() for part in ("-c", f"{name}={value}")]
        return [self.program("postgres"), "-D", f"{self._directory}/data", "-p", str(self._port), *options]

    def _lets_in(self) -> bool:
        import psycopg

        try:
            self.query("postgres", "SELECT 1")
        except psycopg.Error:
            return False
        return True
