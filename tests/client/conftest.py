"""A fake gateway and a client of it, for the tests of the client and of its command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.gateway import HpcGateway
from tests.client.fake_gateway import FakeGateway


@pytest.fixture(autouse=True)
def _plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "requests_ca_bundle", "curl_ca_bundle"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("MP_HOST", "MP_APP_ID", "MP_ACCESS_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeGateway]:
    """A gateway that runs."""
    server = FakeGateway(tmp_path / "cluster")
    yield server
    server.close()


@pytest.fixture
def naps() -> list[float]:
    """The seconds for which the client would have slept."""
    return []


@pytest.fixture
def client_of(naps: list[float]) -> Iterator[Callable[..., HpcGateway]]:
    """Make clients that do not sleep."""
    made: list[HpcGateway] = []

    def make(url: str, **options: object) -> HpcGateway:
        options.setdefault("token_source", StaticToken("good"))
        gateway = HpcGateway(url, sleep=naps.append, **options)  # type: ignore[arg-type]
        made.append(gateway)
        return gateway

    yield make
    for gateway in made:
        gateway.close()


@pytest.fixture
def gateway(fake: FakeGateway, client_of: Callable[..., HpcGateway]) -> HpcGateway:
    """A client of the fake gateway."""
    return client_of(fake.url)
