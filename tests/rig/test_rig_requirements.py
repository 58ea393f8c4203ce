"""What happens where a test cannot have what it needs, and how packages get installed."""

from __future__ import annotations

import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aiida_marketplace_hpc.testing import fixtures, install
from aiida_marketplace_hpc.testing.machine import NotPossibleHere

_LACKING = NotPossibleHere("there is no Slurm", "apt-get install slurm")


@pytest.mark.parametrize(
    ("root_on_debian", "setting", "outcome"),
    [
        (True, None, pytest.fail.Exception),
        (True, "0", pytest.skip.Exception),
        (False, None, pytest.skip.Exception),
        (False, "1", pytest.skip.Exception),
    ],
)
def test_services_are_required_as_root_on_debian_only(
    root_on_debian: bool, setting: str | None, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fixtures, "is_root_on_debian", lambda: root_on_debian)
    monkeypatch.delenv("MARKETPLACE_HPC_REQUIRE_SERVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("MARKETPLACE_HPC_REQUIRE_SERVICES", setting)
    with pytest.raises(outcome, match="there is no Slurm; to enable it: apt-get install slurm"):
        fixtures.give_up(_LACKING)


def test_what_is_there_is_not_installed_again() -> None:
    if not Path("/etc/debian_version").exists():
        pytest.skip("only Debian has its packages")
    assert install.install("coreutils", "util-linux") == []


def test_two_at_once_install_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that comes first also forbids and allows daemons; the other finds the package there."""
    policy, there, calls = tmp_path / "policy-rc.d", threading.Event(), []

    def apt(command: str, *packages: str) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        assert policy.exists()
        both.wait(0.2)  # As long as the other one would need to begin.
        there.set()
        return subprocess.CompletedProcess([], 0)

    both = threading.Event()
    monkeypatch.setattr(install, "_POLICY", policy)
    monkeypatch.setattr(install, "_LOCK", tmp_path / "lock")
    monkeypatch.setattr(install, "_apt", apt)
    monkeypatch.setattr(install, "_installed", lambda _: there.is_set())
    monkeypatch.setattr(install, "is_root_on_debian", lambda: True)
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(install.install, "a-package") for _ in range(2)]
    assert sorted(len(one.result()) for one in done) == [0, 1]
    assert calls == ["install"]
    assert not policy.exists()


def test_daemons_are_forbidden_only_while_packages_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(install, "_POLICY", policy)
    with install._no_daemons():
        assert os.access(policy, os.X_OK)
    assert not policy.exists()

    policy.write_text("the machine's own")
    with install._no_daemons():
        assert policy.read_text() == "the machine's own"
    assert policy.exists()
