"""The gateway behind the address: its version, who the caller is to it, its folders, its scheduler."""

from __future__ import annotations

import functools
import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiida_marketplace_hpc.cli.doctor.checks import Checks
from aiida_marketplace_hpc.cli.doctor.identity import accepted
from aiida_marketplace_hpc.errors import IntegrityError, Unavailable

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.gateway import HpcGateway, Root

_OLD = 60.0
"""Seconds after which what the scheduler has said is said to be old."""


def check(gateway: HpcGateway, checks: Checks) -> None:
    """Check the gateway with the token."""
    info = checks.run("gateway", lambda: gateway.info(refresh=True), _gateway, needed=True)
    if info is not None and (gateway.machine or len(info.get("machines", ())) > 1):
        checks.run("machine", lambda: str(gateway.about_machine().get("name")), str, needed=True)
    if info is not None and info.get("auth"):
        checks.run("scopes", lambda: accepted(gateway, info), str)
    checks.run("user", lambda: {**gateway.info(), **gateway.create_user()}, _user, needed=True)
    for root in checks.run("folders", gateway.roots, lambda roots: f"{len(roots)}", needed=True) or ():
        checks.run(f"folder {root.name}", functools.partial(_try, gateway, root), str)
    checks.run("scheduler", lambda: _scheduler(gateway), str)


def _gateway(info: dict[str, Any]) -> str:
    machines = ", ".join(_machine(machine) for machine in info.get("machines", ()))
    shared = "; jobs of all its users run under one account" if info.get("account_mode") == "shared" else ""
    return f"{info.get('name')} {info.get('version')}, {machines or 'no machine'}{shared}"


def _machine(machine: dict[str, Any]) -> str:
    # How a job ended is less certain there: docs/howto/run-a-gateway.md.
    without = ", without accounting" if machine.get("accounting") is False else ""
    return f"{machine.get('name')} ({machine.get('backend')}{without})"


def _user(user: dict[str, Any]) -> str:
    return f"{user.get('username')} ({user.get('email')}), home {user.get('home')}"


def _try(gateway: HpcGateway, root: Root) -> str:
    free = f", {root.free / 1024**3:.1f} GiB free" if root.free is not None else ""
    if root.read_only:
        gateway.ask("stat", path=root.path, follow=True)
        return f"{root.path}, read-only{free}"
    name = f".marketplace-hpc-doctor-{secrets.token_hex(4)}"
    remote = f"{root.path.rstrip('/')}/{name}"
    with tempfile.TemporaryDirectory() as folder:
        local, back = Path(folder, "up"), Path(folder, "down")
        local.write_bytes(secrets.token_bytes(1024))
        gateway.put_file(local, remote)
        try:
            gateway.get(remote, back)
            if back.read_bytes() != local.read_bytes():
                raise IntegrityError(f"a file in {root.path} came back with another content")
        finally:
            gateway.ask("remove", path=remote, missing_ok=True)
    return f"{root.path}, written and read{free}"


def _scheduler(gateway: HpcGateway) -> str:
    jobs = gateway.active_jobs()  # For which the gateway asks the scheduler.
    info = gateway.info(refresh=True)
    problem = gateway.about_machine().get("problem")
    if problem:
        raise Unavailable(
            f"the scheduler does not answer the gateway ({problem}): jobs keep the state that was last known, and "
            "new ones wait; tell the gateway's operator if it stays so"
        )
    if info.get("draining"):
        raise Unavailable(
            f"the gateway is being maintained ({info.get('notice') or 'no more is said'}): jobs that you submit wait there "
            "until it is over, those that were submitted go on"
        )
    ages = [job["age"] for job in jobs if job.get("age") is not None]
    if ages and max(ages) > _OLD:
        raise Unavailable(
            f"the scheduler has said nothing about a job for {max(ages):.0f} s: `marketplace-hpc job list` shows which; "
            "tell the gateway's operator if it stays so"
        )
    return f"{len(jobs)} active jobs" + (f", seen {max(ages):.0f} s ago" if ages else "")
