"""Whether the gateway is up, what it is, and who the caller is to it."""

from __future__ import annotations

from typing import Any

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.bundle import PART
from aiida_marketplace_hpc.gateway.account import SEPARATION
from aiida_marketplace_hpc.gateway.config import MAX_JSON, MIB
from aiida_marketplace_hpc.gateway.maintenance import Notice
from aiida_marketplace_hpc.gateway.routes.call import Answer, Call
from aiida_marketplace_hpc.gateway.submission import MAX_SCRIPT
from aiida_marketplace_hpc.protocol import API_VERSION, EXTENSIONS, MAX_JOBIDS, MAX_OPERATIONS, OLDEST_CLIENT


def heartbeat(call: Call) -> Answer:
    """Answer; the text is the published one, and the rest says to a client what it may ask beyond the nine, and how."""
    notice = call.gateway.maintenance.known
    return {
        "message": "HPC-gateway-App : application running.",
        "api_version": API_VERSION,
        "extensions": list(EXTENSIONS),
        "route": call.route.as_wire(),
        **({} if notice is None else _maintenance(notice)),
    }


def _maintenance(notice: Notice | None) -> dict[str, Any]:
    return {"draining": notice is not None, "notice": None if notice is None else notice.message}


def create_user(call: Call) -> Answer:
    """Register the caller and make their home; may be repeated."""
    caller = call.caller
    caller.prepare()
    return {
        "_id": caller.user.id,
        "email": caller.user.email,
        "home": caller.home,
        "message": "Success: Create user in database.",
        "name": caller.user.name,
        "username": caller.user.username,
    }


def get_info(call: Call) -> Answer:
    """Say everything that a client needs to know before it works with the gateway."""
    caller, settings = call.caller, call.gateway.settings
    authenticator = call.gateway.authenticator
    caller.prepare()
    return {
        "name": settings.name,
        "version": __version__,
        "api_version": API_VERSION,
        "oldest_client": OLDEST_CLIENT,
        "extensions": list(EXTENSIONS),
        "machines": [_machine(call, name) for name in settings.machines],
        **_maintenance(call.gateway.maintenance.notice()),
        "policy": settings.policy.model_dump(mode="json"),
        "account_mode": settings.account_mode,
        "account_note": SEPARATION[settings.account_mode],
        "auth": {
            "method": authenticator.method,
            "issuer": authenticator.issuer,
            "audience": list(settings.audience),
            "refresh_margin": authenticator.refresh_margin,
        },
        "username": caller.user.username,
        "email": caller.user.email,
        "home": caller.home,
        "roots": _roots(call, settings.machine_name),
        "limits": {
            "operations": MAX_OPERATIONS,
            "jobids": MAX_JOBIDS,
            "script": MAX_SCRIPT,
            "json": MAX_JSON,
            "request": settings.request_limit * MIB,
            "form": min(settings.request_limit, settings.form_limit) * MIB,
            "part": PART,
            "whole": caller.files.largest_whole,
            "requests_at_once": settings.requests_at_once or None,
            "requests_per_second": settings.requests_per_second or None,
            "jobs": settings.jobs_per_user or None,
        },
        "route": call.route.as_wire(),
    }


def _machine(call: Call, name: str) -> dict[str, Any]:
    """One of the machines; of several, each with its roots: those of the default one stand beside the list, too."""
    backend = call.gateway.backend
    about = {**backend.on(name).describe(), "name": name, "backend": backend.name}
    about["problem"] = call.gateway.watch.problem_of(name)
    return about if len(call.gateway.settings.machines) == 1 else {**about, "roots": _roots(call, name)}


def _roots(call: Call, machine: str) -> list[dict[str, Any]]:
    gateway, caller = call.gateway, call.caller
    return [
        {
            "name": gateway.settings.address_of(machine, root.name),
            "path": root.path,
            "read_only": root.read_only,
            # Where there are several machines, their disks are not here.
            "free": caller.files.roots.free(root),
        }
        for root in gateway.roots_of(caller.user, machine)
    ]
