"""The files of examples/computer, used as they say: word for word, but for where things are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from aiida_marketplace_hpc.testing.aiida_profile import AiidaProfile
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine

pytestmark = pytest.mark.services  # It takes long.

EXAMPLE = Path(__file__).parents[2] / "examples" / "computer"


@pytest.fixture(scope="module")
def gateway(cluster_machine: Machine) -> Iterator[GatewayProcess]:
    with GatewayProcess(cluster_machine, roots={"system": "/usr:ro"}) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def profile(gateway: GatewayProcess, aiida_installations: Callable[..., AiidaProfile]) -> Iterator[AiidaProfile]:
    token = {"MP_ACCESS_TOKEN": gateway.token}
    with aiida_installations(env=token) as profile:
        yield profile


def configured(step: str) -> list[str]:
    return ["--non-interactive", "--config", str(EXAMPLE / f"{step}.yaml")]


@pytest.fixture(scope="module")
def set_up(profile: AiidaProfile, gateway: GatewayProcess) -> AiidaProfile:
    """After the three steps, with a running daemon."""
    work_dir = ["--work-dir", f"{gateway.home}/aiida"]
    profile.verdi("computer", "setup", *configured("computer-setup"), *work_dir)
    url = ["--url", gateway.url]
    profile.verdi("computer", "configure", "marketplace_hpc", "cluster", *configured("computer-configure"), *url)
    profile.verdi("code", "create", "core.code.installed", *configured("code-bash"))
    profile.start_daemon()
    return profile


def test_after_the_three_steps_the_cluster_calculates(set_up: AiidaProfile) -> None:
    assert "all 6 tests succeeded" in set_up.verdi("computer", "test", "cluster").stdout
    assert "all tests succeeded" in set_up.verdi("code", "test", "bash@cluster").stdout
    assert "4 + 5 = 9" in set_up.python(EXAMPLE / "add.py", "bash@cluster").stdout


def test_the_study_of_the_demo_runs_on_any_computer(set_up: AiidaProfile, tmp_path: Path) -> None:
    """As the demo says at its end."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("there is no python3 below the gateway's read-only root; to enable it: apt install python3")
    module = [sys.executable, "-m", "aiida_marketplace_hpc.demo.submit"]
    done = subprocess.run(
        [*module, "python3@cluster", "--python", python, "--output", str(tmp_path / "result")],
        env=set_up.environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{set_up.daemon_log()}"
    assert "8 of 8 temperatures done" in done.stdout
    assert (tmp_path / "result" / "ising.txt").read_text() in done.stdout
    assert (tmp_path / "result" / "ising.png").read_bytes().startswith(b"\x89PNG")
    unknown = subprocess.run([*module, "python3@nowhere"], env=set_up.environment, capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "verdi computer list" in unknown.stderr


def test_the_file_holds_the_answers_of_the_interactive_setup_in_their_order(profile: AiidaProfile) -> None:
    answers = yaml.safe_load((EXAMPLE / "computer-setup.yaml").read_text())
    answers["label"] = "typed"
    texts = ("prepend_text", "append_text")  # They are written in an editor.
    typed = "".join(
        f"{'!' if value in (None, '') else value}\n" for name, value in answers.items() if name not in texts
    )
    profile.verdi("computer", "setup", input=typed.replace("False\n", "n\n"), env={"EDITOR": "true", "VISUAL": "true"})
    profile.verdi("computer", "setup", *configured("computer-setup"), "--label", "from-file")

    def shown(label: str) -> list[str]:
        lines = profile.verdi("computer", "show", label).stdout.splitlines()
        return [line for line in lines if not line.startswith(("Label", "PK", "UUID"))]

    assert shown("typed") == shown("from-file")
