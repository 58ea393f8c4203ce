"""What the guarantees are tried on: a gateway over real HTTP with a batch system that lies on demand."""

from __future__ import annotations

import pytest

from aiida_marketplace_hpc.transport import MarketplaceHpcTransport


@pytest.fixture
def home(transport: MarketplaceHpcTransport) -> str:
    return str(transport.normalize("."))
