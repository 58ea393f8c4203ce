"""``marketplace-hpc computer``: makes computers of an AiiDA profile that are gateways, and looks after them.

The commands work on a profile, as ``verdi`` does. But for ``create``, address and token are the computer's: the options that
name a gateway mean nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from aiida_marketplace_hpc.cli.common import Settings, emit, json_option, table
from aiida_marketplace_hpc.cli.new_computer import create
from aiida_marketplace_hpc.errors import ConfigurationError, MarketplaceHpcError

if TYPE_CHECKING:
    from aiida.orm import Computer

    from aiida_marketplace_hpc.client.gateway import HpcGateway
    from aiida_marketplace_hpc.upkeep import AbandonedJob

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def computer() -> None:
    """Make a gateway a computer in AiiDA, and look after it."""


computer.add_command(create)


def _on_a_computer(command: F) -> F:
    """Give a command the argument ``LABEL`` and the options that all commands of the group have."""
    for decorator in (
        json_option(),
        click.option("-p", "--profile", metavar="PROFILE", help="The AiiDA profile.  [default: AiiDA's own default]"),
        click.argument("label"),
    ):
        command = decorator(command)
    return command


@computer.command()
@_on_a_computer
@click.option(
    "-y", "--yes", is_flag=True, help="Cancel without asking; with --json nothing is asked, or cancelled, else."
)
@click.option("--unknown", is_flag=True, help="Cancel also jobs of calculations that this profile does not have.")
@click.pass_obj
def reconcile(settings: Settings, /, label: str, profile: str | None, yes: bool, unknown: bool) -> None:
    """Find jobs that run on though their calculation has ended, and cancel them.

    A calculation may end without its job: it was killed by force, or while the gateway could not be reached. Jobs of
    calculations that this profile does not have are listed apart and left alone, unless --unknown is given: they may be
    another profile's. Jobs that AiiDA has not submitted are not looked at.

    The exit code is 1 if a job could not be cancelled.
    """
    from aiida_marketplace_hpc.upkeep import abandoned_jobs

    gateway = gateway_of(load(label, profile))
    orphans, others = abandoned_jobs(gateway)
    if not settings.json:
        _show("Jobs whose calculation has ended:", orphans)
        _show("Jobs of calculations that this profile does not have:", others)
    wanted = [*orphans, *(others if unknown else [])]
    if not wanted or not (yes or (not settings.json and click.confirm(f"Cancel {_jobs(len(wanted))}?"))):
        wanted = []
    failed = {job.jobid: said for job in wanted if (said := _cancel(gateway, job)) is not None}
    cancelled = [job.jobid for job in wanted if job.jobid not in failed]
    document = {
        "orphans": [job.document() for job in orphans],
        "unknown": [job.document() for job in others],
        "cancelled": cancelled,
        "failed": failed,
    }
    emit(
        settings, document, f"{_jobs(len(cancelled))} cancelled." if orphans or others else "No job runs on for nobody."
    )
    for jobid, said in failed.items():
        click.echo(f"Error: job {jobid} could not be cancelled: {said}", err=True)
    if failed:
        click.get_current_context().exit(1)


@computer.command()
@_on_a_computer
@click.pass_obj
def resume(settings: Settings, /, label: str, profile: str | None) -> None:
    """Go on with the calculations that AiiDA paused because the gateway could not be reached.

    AiiDA pauses a calculation when all its attempts to upload, submit or retrieve have failed. Calculations that somebody has
    paused stay as they are. The daemon has to run.

    The exit code is 1 if a calculation could not be reached.
    """
    from aiida.engine.processes import control

    from aiida_marketplace_hpc.upkeep import given_up

    loaded = load(label, profile)
    wanted = {node.pk for node in given_up(loaded)}
    if wanted:
        control.play_processes(given_up(loaded), timeout=_PATIENCE)
    left = wanted & {node.pk for node in given_up(loaded)}
    resumed = sorted(wanted - left)
    emit(settings, {"resumed": resumed, "failed": sorted(left)}, f"{_calculations(len(resumed))} resumed.")
    if left:
        click.echo(
            f"Error: {_calculations(len(left))} did not answer; does the daemon run? {', '.join(map(str, sorted(left)))}",
            err=True,
        )
        click.get_current_context().exit(1)


_PATIENCE = 10.0
"""Seconds in which the daemon is to answer."""


def load_aiida_profile(profile: str | None) -> str:
    """Load a profile, and return its name.

    :raises ConfigurationError: there is no such profile.
    """
    from aiida import load_profile
    from aiida.common.exceptions import AiidaException

    try:
        return str(load_profile(profile).name)
    except AiidaException as exc:
        raise ConfigurationError(str(exc)) from exc


def load_if_there(label: str) -> Computer | None:
    """A computer of the loaded profile, or ``None``."""
    from aiida.common.exceptions import NotExistent
    from aiida.orm import load_computer

    try:
        return load_computer(label)
    except NotExistent:
        return None


def load(label: str, profile: str | None) -> Computer:
    """Load the profile and the computer.

    :raises ConfigurationError: there is no such profile or computer.
    """
    name = load_aiida_profile(profile)
    found = load_if_there(label)
    if found is None:
        raise ConfigurationError(f"the AiiDA profile {name} has no computer {label}")
    return found


def gateway_of(computer: Computer) -> HpcGateway:
    """The gateway behind a computer, as its transport uses it.

    :raises ConfigurationError: it is not configured, or no gateway.
    """
    from aiida.common.exceptions import NotExistent

    from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

    try:
        transport = computer.get_transport()
    except NotExistent:
        raise ConfigurationError(
            f"the computer {computer.label} is not configured: run verdi computer configure marketplace_hpc {computer.label}"
        ) from None
    if not isinstance(transport, MarketplaceHpcTransport):
        raise ConfigurationError(
            f"the computer {computer.label} is no gateway: it has the transport {computer.transport_type}"
        )
    return transport.connection.gateway


def _cancel(gateway: HpcGateway, job: AbandonedJob) -> str | None:
    """Cancel a job, and say why it could not be done if so."""
    try:
        gateway.cancel_job(job.jobid)
    except MarketplaceHpcError as exc:
        return str(exc)
    return None


def _show(title: str, jobs: Sequence[AbandonedJob]) -> None:
    if jobs:
        rows = [[job.jobid, job.state, job.scheduler_id, job.pk, job.process_state, job.client_ref] for job in jobs]
        click.echo(f"{title}\n{table(rows, ['JOBID', 'STATE', 'SCHEDULER_ID', 'PK', 'CALCULATION', 'UUID'])}\n")


def _jobs(number: int) -> str:
    return f"{number} job{'' if number == 1 else 's'}"


def _calculations(number: int) -> str:
    return f"{number} calculation{'' if number == 1 else 's'}"
