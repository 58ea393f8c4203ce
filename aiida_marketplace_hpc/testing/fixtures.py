"""Pytest fixtures over the rig: put ``pytest_plugins = ["aiida_marketplace_hpc.testing.fixtures"]`` into a ``conftest.py``.

What a fixture needs and this machine has not is installed where that is allowed (root on Debian), and required there: a test
that cannot have it fails. Elsewhere, and anywhere with ``MARKETPLACE_HPC_REQUIRE_SERVICES=0``, the test is skipped with the
reason and the command that would enable it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import pytest

from aiida_marketplace_hpc.testing.aiida_profile import AiidaProfile
from aiida_marketplace_hpc.testing.cluster import IsolatedCluster
from aiida_marketplace_hpc.testing.firecrest_jobs import Processes
from aiida_marketplace_hpc.testing.firecrest_v2 import FirecrestDouble
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.install import install
from aiida_marketplace_hpc.testing.machine import (
    Machine,
    NotPossibleHere,
    RigError,
    is_root_on_debian,
)
from aiida_marketplace_hpc.testing.oidc import OidcProvider
from aiida_marketplace_hpc.testing.postgresql import PostgreSql
from aiida_marketplace_hpc.testing.rig import Rig
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

R = TypeVar("R", bound=Rig)


def give_up(error: RigError) -> NoReturn:
    """Fail where services are required, skip elsewhere."""
    if is_root_on_debian() and os.environ.get("MARKETPLACE_HPC_REQUIRE_SERVICES", "1") != "0":
        pytest.fail(str(error), pytrace=False)
    pytest.skip(str(error))


@pytest.fixture(scope="session")
def isolated_cluster() -> Iterator[IsolatedCluster]:
    """A part of this machine whose disk the tests cannot see; skipped where that cannot be made."""
    try:
        IsolatedCluster.check_possible()
    except NotPossibleHere as exc:
        pytest.skip(str(exc))
    with IsolatedCluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster_machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """The machine for the cluster's side: isolated where that is possible, else this machine as it is."""
    try:
        IsolatedCluster.check_possible()
    except NotPossibleHere:
        with Machine() as machine:
            yield machine
    else:
        yield request.getfixturevalue("isolated_cluster")


@pytest.fixture(scope="session")
def cluster_user(cluster_machine: Machine) -> str:
    """The account of the cluster's processes."""
    return cluster_machine.user


@pytest.fixture(scope="session")
def slurm_cluster(cluster_machine: Machine) -> Iterator[SlurmCluster]:
    """A real Slurm with accounting on :func:`cluster_machine`."""
    try:
        if is_root_on_debian():
            install("slurm")
        SlurmCluster.check_possible()
        cluster = SlurmCluster(cluster_machine)
        cluster.start()
    except RigError as exc:
        give_up(exc)
    try:
        yield cluster
    finally:
        cluster.stop()


def started(package: str, rig: R) -> Iterator[R]:
    """Install what a rig needs, start it, and end it; for fixtures. Where that is impossible the test is given up."""
    try:
        if is_root_on_debian():
            install(package)
        rig.start()
    except RigError as exc:
        rig.close()
        give_up(exc)
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture(scope="session")
def postgresql_server(cluster_machine: Machine) -> Iterator[PostgreSql]:
    """A real PostgreSQL on :func:`cluster_machine`; make databases in it. A test that kills one starts its own."""
    yield from started("postgresql", PostgreSql(cluster_machine))


@pytest.fixture(scope="session")
def local_gateway(cluster_machine: Machine) -> Iterator[GatewayProcess]:
    """A gateway with the backend ``local``. Leave it running; a test that stops gateways starts its own."""
    with GatewayProcess(cluster_machine) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def slurm_gateway(slurm_cluster: SlurmCluster) -> Iterator[GatewayProcess]:
    """A gateway with the backend ``slurm``. Leave it running; a test that stops gateways starts its own."""
    with GatewayProcess(slurm_cluster.machine, backend="slurm", env=slurm_cluster.env) as gateway:
        yield gateway


@pytest.fixture
def gateway_factory(
    cluster_machine: Machine, request: pytest.FixtureRequest
) -> Iterator[Callable[..., GatewayProcess]]:
    """Start gateways for one test: ``gateway_factory(backend="slurm", …)``, with the parameters of ``GatewayProcess``.

    With ``firecrest``, each has a FirecREST for tests of its own, whose jobs are processes.
    """
    with contextlib.ExitStack() as stack:

        def start(backend: str = "local", **parameters: Any) -> GatewayProcess:
            if backend == "slurm":
                parameters["env"] = {**request.getfixturevalue("slurm_cluster").env, **parameters.get("env", {})}
            if backend == "firecrest":
                provider = stack.enter_context(OidcProvider())
                double = FirecrestDouble(cluster_machine, Processes(cluster_machine), provider)
                stack.enter_context(double)
                parameters["env"] = {**double.env, **parameters.get("env", {})}
                parameters["options"] = [*double.options, *parameters.get("options", [])]
            return stack.enter_context(GatewayProcess(cluster_machine, backend=backend, **parameters))

        yield start


@pytest.fixture(scope="session")
def aiida_installations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., AiidaProfile]]:
    """Make AiiDA installations: ``with aiida_installations(broker=None) as profile: …``, with the parameters of
    ``AiidaProfile``. One that is not ended by its ``with`` is ended with the session.

    Not called ``aiida_profile_factory``: AiiDA's own fixtures have one of that name, on which others of them rest.
    """
    with contextlib.ExitStack() as stack:

        def make(**parameters: Any) -> AiidaProfile:
            profile = AiidaProfile(tmp_path_factory.mktemp("aiida"), **parameters)
            stack.callback(profile.close)
            return profile

        yield make
