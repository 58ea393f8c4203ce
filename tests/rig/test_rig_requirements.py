"""What happens where a test cannot have what it needs, and how packages get installed."""

from __future__ import annotations

import os
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
