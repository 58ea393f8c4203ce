"""Fixtures for all tests: those of ``aiida_marketplace_hpc.testing``, as others get them too."""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

# AiiDA makes its configuration folder when it is imported, in the home of whoever runs this, and warns when it does.
_CONFIGURATION = tempfile.TemporaryDirectory(prefix="mphpc-tests-", ignore_cleanup_errors=True)
os.environ["AIIDA_PATH"] = _CONFIGURATION.name
Path(_CONFIGURATION.name, ".aiida").mkdir()

from aiida_marketplace_hpc.gateway.ledger import Ledger  # noqa: E402
from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler  # noqa: E402
from aiida_marketplace_hpc.testing.backend import FakeBackend  # noqa: E402
from aiida_marketplace_hpc.testing.machine import Machine  # noqa: E402
from aiida_marketplace_hpc.testing.postgresql import PostgreSql  # noqa: E402
from aiida_marketplace_hpc.testing.rabbitmq import RabbitMq  # noqa: E402
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway  # noqa: E402
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport  # noqa: E402

pytest_plugins = ["aiida_marketplace_hpc.testing.fixtures"]


def pytest_configure() -> None:
    """Let what the tests start hear Ctrl-C, Ctrl-\\ and the end of its terminal, also where they run in the background.

    There they may be ignored, which is inherited.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what rests on a real Slurm, so that the mark is never forgotten."""
    for item in items:
        if "slurm_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("slurm")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked ``databases`` on PostgreSQL, too."""
    if "database" in metafunc.fixturenames and metafunc.definition.get_closest_marker("databases"):
        metafunc.parametrize("database", DATABASES, indirect=True)


DATABASES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.services)]


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty database: SQLite, or where the test is marked ``databases`` PostgreSQL, too."""
    if getattr(request, "param", "sqlite") == "sqlite":
        yield f"sqlite:///{tmp_path / 'ledger.sqlite'}"
        return
    server: PostgreSql = request.getfixturevalue("postgresql_server")
    name = server.create()
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def ledger(database: str) -> Iterator[Ledger]:
    """A ledger in that database, empty and up to date."""
    ledger = Ledger(database)
    ledger.migrate()
    yield ledger
    ledger.close()


@pytest.fixture
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Back a database up with its own tools, while it is in use, restore that as another one, and return its address."""
    made: list[str] = []

    def copy(database: str) -> str:
        url = make_url(database)
        if url.get_backend_name() == "sqlite":
            restored = tmp_path / f"restored-{secrets.token_hex(3)}.sqlite"
            with closing(sqlite3.connect(str(url.database))) as now, closing(sqlite3.connect(restored)) as then:
                now.backup(then)
            return f"sqlite:///{restored}"
        server: PostgreSql = request.getfixturevalue("postgresql_server")
        made.append(server.create())
        server.restore(made[-1], server.dump(str(url.database)))
        return server.url(made[-1])

    yield copy
    for name in made:
        request.getfixturevalue("postgresql_server").drop(name)


@pytest.fixture(scope="session")
def broker(cluster_machine: Machine) -> Iterator[RabbitMq]:
    """A real RabbitMQ."""
    from aiida_marketplace_hpc.testing.fixtures import started  # A plugin, which pytest is to import first.

    yield from started("rabbitmq", RabbitMq(cluster_machine))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def served(tmp_path: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedGateway]:
    monkeypatch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])
    with ServedGateway(tmp_path, backend) as served:
        yield served


@pytest.fixture
def transport(served: ServedGateway) -> Iterator[MarketplaceHpcTransport]:
    with MarketplaceHpcTransport(machine="cluster", url=served.url) as transport:
        yield transport


@pytest.fixture
def scheduler(transport: MarketplaceHpcTransport) -> MarketplaceHpcScheduler:
    scheduler = MarketplaceHpcScheduler()
    scheduler.set_transport(transport)
    return scheduler


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1 that it signed itself, and its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fake")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    path.touch(0o600)
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path
