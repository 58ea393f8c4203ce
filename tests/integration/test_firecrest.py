"""The main job on a cluster behind FirecREST: AiiDA's daemon, a gateway that does not see the cluster's disk, FirecREST."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sites import Installation, Site, add_behind_firecrest, before_firecrest

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
    with before_firecrest(site, double.machine.home, double.options, double.env) as gateway:
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
    facts = add_behind_firecrest(installation, label)
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


KEEP = "mkdir -p out/empty many/a; printf deep >'out/a b.txt'; printf 1 >many/a/1.dat; printf 2 >many/a/2.log"
KEPT = ["many/*/*.dat", "out"]
BEGINS = {"tar": b"", "tar.gz": b"\x1f\x8b", "tar.bz2": b"BZh", "tar.xz": b"\xfd7zXZ"}


@pytest.mark.parametrize("site", ["local"], indirect=True, scope="session")
@pytest.mark.parametrize(
    "double", [pytest.param("slurm", marks=[pytest.mark.slurm, pytest.mark.services])], indirect=True
)
def test_archives_are_stashed_and_brought_back(
    installation: Installation, label: str, gateway: GatewayProcess, double: FirecrestDouble
) -> None:
    """AiiDA ends a calculation well whose compression failed: the node, the archive and what comes out of it count."""
    machine, home = double.machine, gateway.home.format(username="alice")
    target = f"{home}/kept"
    stash = {
        mode: {"stash_mode": mode, "target_base": target, "source_list": KEPT, "dereference": False} for mode in BEGINS
    }
    said = installation.run(
        "from aiida.plugins import CalculationFactory\n"
        f"own = orm.load_code('bash@{label}')\n"
        f"computer, stash = orm.load_computer({label!r}), {stash!r}\n"
        "def later(name, options, source):\n"
        "    options = {'resources': {'num_machines': 1}, **options}\n"
        "    metadata = {'computer': computer, 'options': options}\n"
        "    return submit(CalculationFactory(name), source_node=source, metadata=metadata)\n"
        f"job = finished(start(own, {KEEP!r}, metadata={{'options': {{'stash': stash['tar.gz']}}}}))\n"
        "while not job.is_sealed:  # It is, a moment after its end.\n    time.sleep(0.05)\n"
        "keeping = [later('core.stash', {'stash': options}, job.outputs.remote_folder) for options in stash.values()]\n"
        "finished(*keeping)\n"
        "kept = [node.outputs.remote_stash for node in keeping]\n"
        f"back = {{'unstash_target_mode': 'NewRemoteData', 'source_list': {KEPT!r}}}\n"
        "bringing = [later('core.unstash', {'unstash': back}, one) for one in kept]\n"
        "finished(*bringing)\n"
        "said = {one.stash_mode.value: [type(one).__name__, one.target_basepath, node.outputs.remote_folder.get_remote_path()]"
        " for one, node in zip(kept, bringing)}\n"
        "print(json.dumps([job.outputs.remote_stash.target_basepath, job.uuid, said]))"
    )
    first, uuid, kept = said
    assert first == f"{target}/{uuid}.tar.gz"
    assert set(kept) == set(BEGINS)
    below = f"{uuid[:2]}/{uuid[2:4]}/{uuid[4:]}"
    expected = {f"{below}/{name}" for name in ("many/a/1.dat", "out/", "out/a b.txt", "out/empty/")}
    for archive, mode in [(first, "tar.gz"), *((path, mode) for mode, (_, path, _) in kept.items())]:
        assert set(machine.run(["tar", "-tf", archive], check=True).stdout.splitlines()) == expected
        assert machine.outside(archive).read_bytes().startswith(BEGINS[mode])
    for kind, _, new in kept.values():
        assert kind == "RemoteStashCompressedData"
        look = 'cd "$1" && find many out -type f -exec head {} + && find out -empty'
        found = machine.run(["sh", "-c", look, "sh", new], check=True).stdout
        assert "==> out/a b.txt <==\ndeep" in found
        assert "==> many/a/1.dat <==\n1" in found
        assert "2.log" not in found
        assert "out/empty" in found
    assert machine.run(["ls", "-A", f"{home}/.marketplace-hpc/staging"], check=True).stdout == ""
