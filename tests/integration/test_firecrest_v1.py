"""The main job on a cluster behind FirecREST version 1: AiiDA's daemon, a gateway, FirecREST 1.13.0 as its double plays it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
from sites import Installation, Site, add_behind_firecrest, before_firecrest

from aiida_marketplace_hpc.testing.firecrest_v1 import FirecrestV1
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

pytestmark = pytest.mark.services


@pytest.fixture(scope="module", params=["processes", pytest.param("slurm", marks=pytest.mark.slurm)])
def double(request: pytest.FixtureRequest) -> Iterator[FirecrestV1]:
    slurm: SlurmCluster | None = request.getfixturevalue("slurm_cluster") if request.param == "slurm" else None
    with FirecrestV1(slurm, tokens=("constant",)) as double:
        yield double


@pytest.fixture(scope="module")
def gateway(double: FirecrestV1, site: Site, request: pytest.FixtureRequest) -> Iterator[GatewayProcess]:
    """A gateway on a machine of its own, with a constant token as the published deployments had one."""
    where = ["--firecrest-version", "1", "--firecrest-url", double.url, "--firecrest-system", double.machine]
    with tempfile.TemporaryDirectory(prefix="mphpc-v1-") as here:
        home = f"{request.getfixturevalue('cluster_machine').home}/v1" if double.slurm else here
        with before_firecrest(site, home, where, {"F7T_TOKEN": "constant"}) as gateway:
            yield gateway


@pytest.fixture(scope="module")
def label(gateway: GatewayProcess, installation: Installation, request: pytest.FixtureRequest) -> str:
    """The computer that is this gateway's cluster."""
    label = f"firecrest-v1-{'slurm' if 'slurm' in request.node.name else 'processes'}-{gateway.pid}"
    installation.add_computer(label, gateway.url, f"{gateway.home}/aiida")
    return label


@pytest.mark.parametrize("site", ["local"], indirect=True, scope="session")
def test_a_calculation_through_the_daemon(installation: Installation, label: str, double: FirecrestV1) -> None:
    before = double.requests.copy()
    add_behind_firecrest(installation, label)
    calls = double.requests - before
    assert calls["POST /compute/jobs/path"] == 1
    # Questions grow with time; what is changed, with work.
    changes = {name: count for name, count in calls.items() if "/utilities/" in name and not name.startswith("GET")}
    assert 0 < sum(changes.values()) < 30, changes


@pytest.mark.parametrize("site", ["local"], indirect=True, scope="session")
def test_the_computer_passes_every_test(installation: Installation, label: str) -> None:
    assert "all 6 tests succeeded" in installation.verdi("computer", "test", label)
