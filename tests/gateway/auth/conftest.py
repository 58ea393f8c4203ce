"""A provider, and a time that passes only when a test says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aiida_marketplace_hpc.testing.clock import VirtualClock
from aiida_marketplace_hpc.testing.oidc import OidcProvider


@pytest.fixture
def provider() -> Iterator[OidcProvider]:
    with OidcProvider() as provider:
        yield provider


@pytest.fixture
def clock() -> VirtualClock:
    """The monotonic clock of the gateway."""
    return VirtualClock()
