"""One gateway for all tests of a module that only need folders of their own."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.register_assert_rewrite("tests.plugin.comparison")

from aiida.transports.plugins.local import LocalTransport  # noqa: E402

from aiida_marketplace_hpc.testing.backend import FakeBackend  # noqa: E402
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway  # noqa: E402
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport  # noqa: E402
from tests.plugin.comparison import Side  # noqa: E402

MEMORY = Path("/dev/shm")
"""A second file system, where there is one."""


class Pair(NamedTuple):
    """The same folders for the transport that is the reference and for ours."""

    reference: Side
    ours: Side


NewPair = Callable[..., Pair]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Path]:
    """A folder on another file system than the tests' temporary folder."""
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory, elsewhere: Path) -> Iterator[ServedGateway]:
    """A gateway with the roots ``home`` and, on another file system, ``scratch``."""
    folder = tmp_path_factory.mktemp("gateway")
    with (
        pytest.MonkeyPatch.context() as patch,
        ServedGateway(folder, FakeBackend(), root=(f"scratch={elsewhere}/ours/{{username}}",)) as served,
    ):
        patch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])
        yield served


@pytest.fixture(scope="module")
def new_pair(lasting: ServedGateway, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewPair]:
    """Make new folders for both sides, of the same names relative to the remote home."""
    with new_pairs(tmp_path_factory.mktemp("differential"), elsewhere, url=lasting.url) as make:
        yield make


@contextmanager
def new_pairs(base: Path, elsewhere: Path, name: str = "case", **where: str) -> Iterator[NewPair]:
    """The same for a gateway that is reached in another way.

    :param name: what its folders are called, which are those of no other.
    :param where: parameters of our transport.
    """
    numbers = itertools.count()
    with (
        pytest.MonkeyPatch.context() as patch,
        MarketplaceHpcTransport(machine="cluster", **where) as ours,
    ):
        patch.setenv("HOME", str(base / "home"))  # The local transport takes relative remote paths from there.
        (base / "home").mkdir()
        home = Path(ours.normalize("."))
        with LocalTransport(machine="localhost") as reference:

            def make(seeded: bool = True) -> Pair:
                folder = f"{name}{next(numbers)}/in"  # A link to `..` stays in the case.
                pair = Pair(
                    Side(reference, base / "home" / folder, elsewhere / "reference" / folder, base / "here" / folder),
                    Side(ours, home / folder, elsewhere / "ours" / home.name / folder, base / "here-ours" / folder),
                )
                for side in pair:
                    side.make(seeded)
                return pair

            yield make


@pytest.fixture
def pair(new_pair: NewPair) -> Pair:
    """Seeded folders on both sides."""
    return new_pair()
