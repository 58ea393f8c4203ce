"""``marketplace-hpc doctor``: check what lies between here and the cluster, one thing after the other.

``checks`` is how checks are made and told; ``way`` (address, TLS, clock), ``identity`` (token), ``service`` (gateway, folders,
scheduler) and ``computer`` (a computer in AiiDA) are what is checked.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from aiida_marketplace_hpc.cli.common import Settings, client_options, connect, emit, exit_code, mark
from aiida_marketplace_hpc.cli.doctor import identity, service, way
from aiida_marketplace_hpc.cli.doctor.checks import Checks

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.gateway import HpcGateway


@click.command()
@client_options()
@click.option(
    "--computer", metavar="LABEL", help="Check also this computer in AiiDA, whose gateway and token are then taken."
)
@click.option(
    "-p", "--profile", metavar="PROFILE", help="The AiiDA profile of --computer.  [default: AiiDA's own default]"
)
@click.pass_context
def doctor(ctx: click.Context, computer: str | None, profile: str | None) -> None:
    """Check address, TLS, connection, clock, token, gateway, folders and scheduler, and say what to do about what fails.

    Writes a small file to each folder that can be written, and deletes it again. The exit code is that of the first fault.
    """
    settings = ctx.ensure_object(Settings)
    checks = Checks()
    if computer is None:
        gateway = checks.run("address", lambda: connect(settings), way.said, needed=True)
    else:
        gateway = _of_a_computer(computer, profile, checks)
    if gateway is not None:
        with gateway:
            way.check_tls(gateway, checks)
            # Through the MarketPlace even a heartbeat needs a token.
            steps = (identity.check, way.check_connection) if gateway.app_id else (way.check_connection, identity.check)
            for step in steps:
                step(gateway, checks)
            service.check(gateway, checks)
            if computer is not None:
                from aiida_marketplace_hpc.cli.doctor.computer import check

                check(computer, gateway, checks)
    lines = [f"{mark(check.good)} {check.name}: {check.text}" for check in checks.all]
    document: dict[str, Any] = {"ok": checks.failure is None, "checks": [asdict(check) for check in checks.all]}
    emit(settings, document, "\n".join(lines))
    if checks.failure is not None:
        ctx.exit(exit_code(checks.failure))


def _of_a_computer(label: str, profile: str | None, checks: Checks) -> HpcGateway | None:
    from aiida_marketplace_hpc.cli.computer import gateway_of, load

    found = checks.run(
        "computer", lambda: gateway_of(load(label, profile)), lambda _: f"{label} is configured", needed=True
    )
    if found is not None:
        checks.run("address", lambda: found, way.said)
    return found
