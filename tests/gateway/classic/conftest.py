"""A classic gateway over real HTTP, whose jobs run on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from classic_asker import Asker

from aiida_marketplace_hpc.gateway.backends.local import LocalBackend
from aiida_marketplace_hpc.testing.served import ServedGateway


@pytest.fixture(scope="module")
def classic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    folder = tmp_path_factory.mktemp("classic")
    with ServedGateway(folder, LocalBackend(folder / "spool"), classic=True, machine="cluster") as served:
        yield served


@pytest.fixture
def ask(classic: ServedGateway) -> Asker:
    return Asker(classic.url)
