"""The example with Quantum ESPRESSO: silicon through the daemon, on processes of the gateway and on a real Slurm."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from aiida_marketplace_hpc.testing.aiida_profile import AiidaProfile
from aiida_marketplace_hpc.testing.fixtures import give_up
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.install import install
from aiida_marketplace_hpc.testing.machine import Machine, RigError

pytestmark = pytest.mark.services

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "quantum_espresso"
PSEUDO_FOLDER = Path("/usr/share/espresso/pseudo")
SILICON = -15.847365
"""Ry; what Quantum ESPRESSO 6.7 finds when it is run by hand."""


@pytest.fixture(scope="module", autouse=True)
def _quantum_espresso() -> None:
    try:
        install("quantum-espresso")
    except RigError as exc:
        give_up(exc)


@pytest.fixture(scope="module", params=["local", "slurm"])
def gateway(request: pytest.FixtureRequest, cluster_machine: Machine) -> Iterator[GatewayProcess]:
    env = request.getfixturevalue("slurm_cluster").env if request.param == "slurm" else {}
    with GatewayProcess(cluster_machine, backend=request.param, roots={"system": "/usr:ro"}, env=env) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def profile(gateway: GatewayProcess, aiida_installations: Callable[..., AiidaProfile]) -> Iterator[AiidaProfile]:
    token = {"MP_ACCESS_TOKEN": gateway.token}
    with aiida_installations(import_path=[EXAMPLE], env=token) as profile:
        setup, configure = (str(EXAMPLES / "computer" / f"computer-{step}.yaml") for step in ("setup", "configure"))
        work_dir = ["--work-dir", f"{gateway.home}/aiida"]
        profile.verdi("computer", "setup", "-n", "--config", setup, *work_dir)
        url = ["--url", gateway.url]
        profile.verdi("computer", "configure", "marketplace_hpc", "cluster", "-n", "--config", configure, *url)
        profile.start_daemon()
        yield profile


def run_example(profile: AiidaProfile, *options: str) -> str:
    """Run it as its README says, and return what it printed."""
    command = [sys.executable, str(EXAMPLE / "run.py"), "cluster", "--timeout", "120", *options]
    done = subprocess.run(command, env=profile.environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{profile.daemon_log()}"
    return done.stdout


def energies(said: str) -> list[float]:
    return [float(number) for number in re.findall(r"^(-\d+\.\d+) Ry", said, re.MULTILINE)]


def remote_folder(profile: AiidaProfile, said: str) -> str:
    found = re.search(r"PwJob<(\d+)>", said)
    assert found is not None
    facts = profile.python(
        "import json, sys\n"
        "from aiida.orm import load_node\n"
        "node = load_node(int(sys.argv[1]))\n"
        "print(json.dumps([node.get_remote_workdir(), node.get_detailed_job_info()['job']['state']]))",
        found[1],
    )
    folder, state = json.loads(facts.stdout.splitlines()[-1])
    assert state == "COMPLETED"
    return str(folder)


@pytest.mark.timeout(400)  # The first one on a machine installs Slurm.
def test_silicon_with_a_pseudopotential_linked_from_a_read_only_root(
    profile: AiidaProfile, gateway: GatewayProcess
) -> None:
    said = run_example(profile, "--processes", str(min(2, os.cpu_count() or 1)))
    through_gateway, by_hand = energies(said)
    assert through_gateway == pytest.approx(by_hand, abs=1e-6)
    assert through_gateway == pytest.approx(SILICON, abs=1e-4)
    linked = gateway.machine.tree(remote_folder(profile, said))["pseudo"]
    assert (linked.type, linked.target) == ("l", str(PSEUDO_FOLDER))


@pytest.mark.parametrize("gateway", ["local"], indirect=True)
def test_silicon_with_a_pseudopotential_sent_along(profile: AiidaProfile, gateway: GatewayProcess) -> None:
    said = run_example(profile, "--send-pseudo", str(PSEUDO_FOLDER / "Si.pz-vbc.UPF"), "--no-by-hand")
    (energy,) = energies(said)
    assert energy == pytest.approx(SILICON, abs=1e-4)
    tree = gateway.machine.tree(remote_folder(profile, said))
    assert tree["pseudo"].type == "d"
    assert tree["pseudo/Si.pz-vbc.UPF"].size == (PSEUDO_FOLDER / "Si.pz-vbc.UPF").stat().st_size


@pytest.fixture(scope="module")
def pw_job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pw_job", EXAMPLE / "pw_job.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONVERGED = """
     convergence has been achieved in   7 iterations
!    total energy              =     -15.84736537 Ry
   JOB DONE.
"""


def test_the_energy_is_read(pw_job: ModuleType) -> None:
    assert pw_job.read_energy(CONVERGED) == {"total": -15.84736537, "iterations": 7}


@pytest.mark.parametrize("missing", ["convergence has been achieved", "!    total energy", "JOB DONE"])
def test_an_energy_that_is_not_converged_is_none(pw_job: ModuleType, missing: str) -> None:
    assert pw_job.read_energy(CONVERGED.replace(missing, "")) is None
