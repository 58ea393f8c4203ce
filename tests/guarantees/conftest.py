"""What the guarantees are tried on: a gateway over real HTTP with a batch system that lies on demand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aiida_marketplace_hpc.testing.postgresql import PostgreSql
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport
from tests.conftest import DATABASES
from tests.guarantees.replicas import Sites


@pytest.fixture
def home(transport: MarketplaceHpcTransport) -> str:
    return str(transport.normalize("."))


@pytest.fixture(scope="session", params=DATABASES)
def sites(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    """Makes sites on which gateways are killed and frozen."""
    database = ""
    if request.param == "postgresql":
        server: PostgreSql = request.getfixturevalue("postgresql_server")
        database = server.url(server.create())
    sites = Sites(tmp_path_factory.mktemp("sites"), database)
    yield sites
    sites.close()
