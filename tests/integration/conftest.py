"""AiiDA installations, with and without a broker, that use a gateway on each backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sites import SYSTEM, Installation, Site, publish_plugins

from aiida_marketplace_hpc.testing.aiida_profile import AiidaProfile
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine
from aiida_marketplace_hpc.testing.slurm import SlurmCluster
from aiida_marketplace_hpc.testing.slurm_faults import SlurmFaults


@pytest.fixture(scope="session", params=["local", "slurm"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A gateway on each backend, with the system's executables in a read-only root; one after the other for all modules."""
    machine: Machine = request.getfixturevalue("cluster_machine")
    slurm: SlurmCluster | None = request.getfixturevalue("slurm_cluster") if request.param == "slurm" else None
    roots = {"scratch": f"{machine.scratch}/{{username}}", "system": f"{SYSTEM}:ro"}
    faults = SlurmFaults(machine) if slurm else None
    environment = {**slurm.env, **faults.env} if slurm and faults else {}
    apptainer = f"{machine.software}/bin/apptainer"
    machine.write(apptainer, (Path(__file__).parents[1] / "apptainer.sh").read_text(), mode=0o755)
    options = ["--container-runtime", apptainer]
    with GatewayProcess(machine, backend=request.param, roots=roots, env=environment, options=options) as gateway:
        yield Site(gateway, slurm, faults)


@pytest.fixture(scope="session")
def installation(
    site: Site, aiida_installations: Callable[..., AiidaProfile], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """With the ZeroMQ broker and a running daemon."""
    plugins = publish_plugins(tmp_path_factory.mktemp("plugins"))
    with aiida_installations(import_path=[Path(__file__).parent, plugins]) as profile:
        installation = Installation(profile, site)
        installation.set_up()
        installation.start_daemon()
        yield installation
        installation.close()


@pytest.fixture(scope="session")
def localhost(installation: Installation) -> str:
    """The label of the computer that is this machine with aiida-core's own transport; it has the code ``bash``, too."""
    installation.run(
        "where = {'computer': orm.load_computer('localhost'), 'filepath_executable': '/usr/bin/bash'}\n"
        "print(json.dumps(orm.InstalledCode(label='bash', **where).store().pk))"
    )
    return "localhost"


@pytest.fixture(scope="module")
def installation_without_broker(site: Site, aiida_installations: Callable[..., AiidaProfile]) -> Iterator[Installation]:
    """Without any broker, and so without a daemon."""
    with aiida_installations(broker=None, import_path=[Path(__file__).parent]) as profile:
        installation = Installation(profile, site)
        installation.set_up()
        yield installation
        installation.close()
