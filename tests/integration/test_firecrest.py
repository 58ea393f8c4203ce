"""The main job on a cluster behind FirecREST: AiiDA's daemon, a gateway that does not see the cluster's disk, FirecREST."""

from __future__ import annotations

import filecmp
import getpass
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sites import SYSTEM, Installation, Site

from aiida_marketplace_hpc import HpcGateway
from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.transfer import get, put_file
from aiida_marketplace_hpc.testing.firecrest_jobs import Processes, SlurmCommands
from aiida_marketplace_hpc.testing.firecrest_v2 import FirecrestDouble
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine
from aiida_marketplace_hpc.testing.oidc import OidcProvider
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

MIB = 1024 * 1024
LARGE = 160 * MIB
ADD = "node = finish(ArithmeticAdd, x=orm.Int(3), y=orm.Int(4), code=code)\n"


@pytest.fixture(
    scope="module", params=["processes", pytest.param("slurm", marks=[pytest.mark.slurm, pytest.mark.services])]
)
def double(request: pytest.FixtureRequest) -> Iterator[FirecrestDouble]:
    machine: Machine = request.getfixturevalue("cluster_machine")
    jobs: Processes | SlurmCommands
    if request.param == "slurm":
        slurm: SlurmCluster = request.getfixturevalue("slurm_cluster")
        jobs = SlurmCommands(slurm)
    else:
        jobs = Processes(machine)
    with OidcProvider() as provider, FirecrestDouble(machine, jobs, provider) as double:
        yield double


@pytest.fixture(scope="module")
def gateway(double: FirecrestDouble, site: Site) -> Iterator[GatewayProcess]:
    """A gateway on a machine of its own; its user has the token that the daemon has."""
    cluster = double.machine
    with Machine(getpass.getuser()) as machine:  # It has what the tests have; the cluster may not.
        gateway = GatewayProcess(
            machine,
            backend="firecrest",
            users=(),
            home=f"{cluster.home}/{{username}}",
            roots={"system": f"{SYSTEM}:ro"},
            options=[*double.options, "--poll-interval", "0.5"],
            env=double.env,
        )
        gateway.tokens["alice"] = site.gateway.token
        with gateway:
            yield gateway


@pytest.fixture(scope="module")
def label(gateway: GatewayProcess, installation: Installation, request: pytest.FixtureRequest) -> str:
    """The computer that is this gateway's cluster."""
    label = f"firecrest-{'slurm' if 'slurm' in request.node.name else 'processes'}-{gateway.pid}"
    installation.add_computer(label, gateway.url, f"{gateway.home}/aiida")
    return label


@pytest.mark.parametrize("site", ["local"], indirect=True, scope="session")
def test_a_calculation_through_the_daemon(installation: Installation, label: str, double: FirecrestDouble) -> None:
    before = double.calls.copy()
    load = f"code = orm.load_code('bash@{label}')\n"
    total, facts = installation.run(load + ADD + "print(json.dumps([node.outputs.sum.value, facts(node)]))")
    assert total == 7
    assert facts["status"] == 0
    job: dict[str, Any] = facts["detailed"]["job"]
    assert (facts["job_id"], job["client_ref"], job["state"]) == (job["jobid"], facts["uuid"], "COMPLETED")
    assert (job["exit_code"], job["backend"], bool(job["scheduler_id"])) == (0, "firecrest", True)
    assert double.machine.exists(f"{facts['workdir']}/aiida.out")
    if double.machine.outside("/") != Path("/"):
        assert not Path(facts["workdir"]).exists()
    calls = double.calls - before
    assert calls["submit"] == 1
    # Beside the questions about jobs, which grow with time and not with work.
    assert calls.total() - calls["jobs"] < 45, calls


@pytest.mark.parametrize("site", ["local"], indirect=True, scope="session")
def test_the_computer_passes_every_test(installation: Installation, label: str) -> None:
    assert "all 6 tests succeeded" in installation.verdi("computer", "test", label)


@pytest.mark.services
@pytest.mark.skipif(os.getuid() != 0, reason="only root may reset the peak of another process's memory")
@pytest.mark.parametrize("double", ["processes"], indirect=True)
@pytest.mark.parametrize("site", ["local"], indirect=True, scope="session")
def test_a_large_file_is_never_whole_in_the_gateways_memory(gateway: GatewayProcess, tmp_path: Path) -> None:
    small, large, again = tmp_path / "small", tmp_path / "large", tmp_path / "again"
    small.write_bytes(os.urandom(6 * MIB))
    with large.open("wb") as file:
        for _ in range(LARGE // MIB):
            file.write(os.urandom(MIB))
    with HpcGateway(gateway.url, token_source=StaticToken(gateway.token)) as client:
        home = client.info()["home"]
        put_file(client, small, f"{home}/small")
        get(client, f"{home}/small", again)
        gateway.process.forget_peak()
        before = gateway.process.memory("VmRSS")
        put_file(client, large, f"{home}/large")
        get(client, f"{home}/large", again)
    grown = gateway.process.memory("VmHWM") - before
    print(f"\n{LARGE // MIB} MiB up and down: the peak of the gateway grew by {grown / MIB:.1f} MiB")
    assert again.stat().st_size == LARGE
    assert filecmp.cmp(large, again, shallow=False)
    assert grown < 64 * MIB
