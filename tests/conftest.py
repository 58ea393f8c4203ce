"""Fixtures for all tests: those of ``aiida_marketplace_hpc.testing``, as others get them too."""

from __future__ import annotations

import pytest

pytest_plugins = ["aiida_marketplace_hpc.testing.fixtures"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what rests on a real Slurm, so that the mark is never forgotten."""
    for item in items:
        if "slurm_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("slurm")
