"""``marketplace-hpc gateway admin drain``: a maintenance during which nothing new is submitted."""

from __future__ import annotations

import click

from aiida_marketplace_hpc.cli.admin import DatabaseFlags, opened_ledger
from aiida_marketplace_hpc.cli.common import printable


@click.group()
def drain() -> None:
    """Submit nothing for a while, for a maintenance.

    What users launch meanwhile waits in the gateway and is submitted afterwards; they are told. Everything else goes on:
    files, states, cancellations, and jobs that were submitted before. All gateways of the database take notice within some
    seconds.
    """


@drain.command()
@click.option("--message", default="", metavar="TEXT", help="Why, and until when, for users to read.")
@click.pass_obj
def on(flags: DatabaseFlags, message: str) -> None:
    """Begin. May be repeated, with another message."""
    from aiida_marketplace_hpc.gateway.maintenance import Maintenance

    with opened_ledger(flags, migrate=True) as ledger:
        Maintenance(ledger).begin(message)
    click.echo("nothing is submitted from now on")


@drain.command()
@click.pass_obj
def off(flags: DatabaseFlags) -> None:
    """End. What has waited is submitted. May be repeated."""
    from aiida_marketplace_hpc.gateway.maintenance import Maintenance

    with opened_ledger(flags, migrate=True) as ledger:
        Maintenance(ledger).end()
    click.echo("jobs are submitted again")


@drain.command()
@click.pass_obj
def status(flags: DatabaseFlags) -> None:
    """Say whether there is a maintenance, since when, and what users are told."""
    from aiida_marketplace_hpc.gateway.maintenance import Maintenance

    with opened_ledger(flags, migrate=True) as ledger:
        notice = Maintenance(ledger).notice()
    click.echo("off" if notice is None else f"on since {notice.since.isoformat()}: {printable(notice.message)}")
