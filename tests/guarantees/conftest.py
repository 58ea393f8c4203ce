"""What the guarantees are tried on: a gateway over real HTTP with a batch system that lies on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from aiida_marketplace_hpc.testing.postgresql import PostgreSql
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport
from tests.conftest import DATABASES
from tests.guarantees.replicas import Sites


@pytest.fixture
def home(transport: MarketplaceHpcTransport) -> str:
    return str(transport.normalize("."))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is tried on sites with both databases.

    Crashes at every moment take minutes, and are the same there: on PostgreSQL only where the environment asks for them.
    """
    if "sites" in metafunc.fixturenames:
        crashes = metafunc.module.__name__.endswith("crash_at_every_moment")
        both = not crashes or "MARKETPLACE_HPC_CRASHES_ON_POSTGRESQL" in os.environ
        metafunc.parametrize("sites", DATABASES if both else DATABASES[:1], indirect=True, scope="session")


@pytest.fixture(scope="session")
def sites(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    """Makes sites on which gateways are killed and frozen."""
    database = ""
    if request.param == "postgresql":
        server: PostgreSql = request.getfixturevalue("postgresql_server")
        database = server.url(server.create())
    sites = Sites(tmp_path_factory.mktemp("sites"), database)
    yield sites
    sites.close()
