"""Install what tests need from Debian: ``python -m aiida_marketplace_hpc.testing.install slurm quantum-espresso graphviz``."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from aiida_marketplace_hpc.testing.machine import SYSTEM_PATH, NotPossibleHere, RigError, is_root_on_debian

GROUPS = {
    "slurm": ("slurmctld", "slurmd", "slurmdbd", "slurm-client", "munge", "mariadb-server"),
    "quantum-espresso": ("quantum-espresso", "quantum-espresso-data"),
    "rabbitmq": ("rabbitmq-server",),
    "postgresql": ("postgresql",),
    "chromium": ("chromium", "chromium-driver", "fonts-liberation"),
}
"""What a short name stands for; any other name is that of a Debian package."""

_POLICY = Path("/usr/sbin/policy-rc.d")
_LOCK = Path("/var/lib/dpkg/marketplace-hpc-lock")


def install(*names: str) -> list[str]:
    """Install groups and packages that are not installed yet; daemons that they bring are not started.

    May be repeated: what is there costs nothing, and nothing is upgraded.

    :return: the packages that were missing.
    :raises NotPossibleHere: if something is missing and this is not root on Debian.
    :raises RigError: with apt's own words, if it fails.
    """
    wanted = [package for name in names for package in GROUPS.get(name, (name,))]
    missing = [package for package in wanted if not _installed(package)]
    if not missing:
        return []
    if not is_root_on_debian():
        command = f"sudo apt-get install --no-install-recommends {' '.join(missing)}"
        raise NotPossibleHere(f"not installed: {', '.join(missing)}", command)
    with _alone(), _no_daemons():
        # Somebody else may have been faster.
        missing = [package for package in missing if not _installed(package)]
        if not missing:
            return []
        # A machine that has never asked, or asked long ago, does not know where the packages are now.
        if _apt("install", *missing).returncode:
            _checked(_apt("update"))
            _checked(_apt("install", *missing))
    return missing


def _installed(package: str) -> bool:
    argv = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package]
    try:
        return subprocess.run(argv, capture_output=True, text=True).stdout == "installed"
    except FileNotFoundError:
        return False


def _apt(command: str, *packages: str) -> subprocess.CompletedProcess[str]:
    wait = "DPkg::Lock::Timeout=300"  # another test session may be installing
    argv = ["apt-get", command, "--quiet", "--yes", "--option", wait]
    if command == "install":
        argv += ["--no-install-recommends", "--no-upgrade"]
    kept = {name: os.environ[name] for name in ("http_proxy", "https_proxy", "no_proxy") if name in os.environ}
    env = {**kept, "PATH": SYSTEM_PATH, "HOME": "/root", "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run([*argv, *packages], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _checked(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise RigError(
            f"{' '.join(done.args)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other process of tests installs anything: apt's own locks do not cover all that it does."""
    with _LOCK.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _no_daemons() -> Iterator[None]:
    """Forbid packages to start their daemons, by Debian's own hook, unless the machine has a policy of its own."""
    try:
        with _POLICY.open("x") as policy:
            policy.write("#!/bin/sh\nexit 101\n")
    except FileExistsError:
        yield
        return
    try:
        _POLICY.chmod(0o755)
        yield
    finally:
        _POLICY.unlink(missing_ok=True)


def main(arguments: Sequence[str]) -> int:
    """Install, and say what was done."""
    if not arguments:
        sys.stderr.write(f"usage: python -m {__spec__.name} NAME...\nnames: {', '.join(GROUPS)}, or Debian packages\n")
        return 2
    try:
        missing = install(*arguments)
    except RigError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    sys.stdout.write(f"installed: {' '.join(missing)}\n" if missing else "all there already\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
