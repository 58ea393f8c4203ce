"""A computer in AiiDA: whether what it says fits the gateway behind it."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING

from aiida_marketplace_hpc.cli.doctor.checks import Checks
from aiida_marketplace_hpc.errors import ConfigurationError

if TYPE_CHECKING:
    from aiida.orm import Computer

    from aiida_marketplace_hpc.client.gateway import HpcGateway

_PLUGIN = "marketplace_hpc"


def check(label: str, gateway: HpcGateway, checks: Checks) -> None:
    """Check a computer of the loaded profile, whose transport is known to be ours."""
    from aiida.orm import load_computer

    computer = load_computer(label)
    checks.run("computer's scheduler", lambda: _scheduler(computer), str)
    checks.run("computer's work directory", lambda: _work_directory(computer, gateway), str)
    checks.run("computer's token", lambda: gateway.token_source.name, _in_the_daemon)


def _scheduler(computer: Computer) -> str:
    if computer.scheduler_type != _PLUGIN:
        raise ConfigurationError(
            f"{computer.label} has the scheduler {computer.scheduler_type}, which needs a shell: make a new computer with "
            f"`marketplace-hpc computer create LABEL`, or with the scheduler {_PLUGIN}"
        )
    return f"{computer.scheduler_type}, asked every {computer.get_minimum_job_poll_interval():g} s at most"


def _work_directory(computer: Computer, gateway: HpcGateway) -> str:
    template = computer.get_workdir()
    path = posixpath.normpath(template.format(username=gateway.info().get("username", "")))
    root = max(
        (root for root in gateway.roots() if _is_below(path, root.path)), key=lambda root: len(root.path), default=None
    )
    if root is None or root.read_only:
        writable = ", ".join(root.path for root in gateway.roots() if not root.read_only)
        raise ConfigurationError(
            f"{path} lies {'below the root ' + root.name + ', which is read-only' if root else 'below none of the roots'}: "
            f"work directories can lie below {writable}; say so with `verdi computer duplicate {computer.label}`"
        )
    return f"{path}, in the root {root.name}"


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root.rstrip('/')}/")


def _in_the_daemon(source: str) -> str:
    if source.startswith("env:"):
        return f"{source}; the daemon has what was set when it was started, and login:NAME renews itself"
    return source
