"""What the guarantees are tried on: a gateway over real HTTP with a batch system that lies on demand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aiida_marketplace_hpc.transport import MarketplaceHpcTransport
from tests.guarantees.replicas import Sites


@pytest.fixture
def home(transport: MarketplaceHpcTransport) -> str:
    return str(transport.normalize("."))


@pytest.fixture(scope="session")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    """Makes sites on which gateways are killed and frozen."""
    sites = Sites(tmp_path_factory.mktemp("sites"))
    yield sites
    sites.close()
