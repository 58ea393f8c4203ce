"""``marketplace-hpc gateway admin jobs|export|backup|purge|migrate|check``: the rows of a gateway's database."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import click

from aiida_marketplace_hpc.cli.admin import DatabaseFlags, opened_ledger
from aiida_marketplace_hpc.cli.common import mark, printable, table
from aiida_marketplace_hpc.protocol import JobState

_DAY = 86400.0


@click.command()
@click.option("--user", "who", default="", metavar="WHO", help="Of this user: e-mail address, subject or id.")
@click.option(
    "--state", "states", multiple=True, type=click.Choice([state.value for state in JobState]), help="May be repeated."
)
@click.option("--living", is_flag=True, help="Those that were launched and have not ended.")
@click.option("--below", default="", metavar="FOLDER", help="In this folder of the cluster, or below it.")
@click.option("--since", type=click.DateTime(), help="Made then or later, in UTC.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(min=0), help="How many; 0: all.")
@click.pass_obj
def jobs(
    flags: DatabaseFlags,
    who: str,
    states: tuple[str, ...],
    living: bool,
    below: str,
    since: datetime | None,
    limit: int,
) -> None:
    """Show jobs, newest first."""
    from aiida_marketplace_hpc.gateway.records import Filter, find_jobs

    wanted = {JobState(state) for state in states} | {state for state in JobState if living and state.active}
    moment = None if since is None else since.replace(tzinfo=timezone.utc)
    with opened_ledger(flags, migrate=True) as ledger:
        found = find_jobs(ledger, Filter(who, wanted, below, moment), limit)
    rows = [
        [job.id, user.email, job.state, job.scheduler_id, f"{job.created_at:%Y-%m-%d %H:%M}", job.folder, job.message]
        for job, user in found
    ]
    click.echo(table(rows, ["id", "user", "state", "scheduler", "made", "folder", ""]))
    if limit and len(found) == limit:
        click.echo(f"only the newest {limit}: give --limit for more", err=True)


@click.command()
@click.pass_obj
def export(flags: DatabaseFlags) -> None:
    """Write all users and jobs out, one JSON document a line. For reports, not for a back-up."""
    from aiida_marketplace_hpc.gateway.records import export

    with opened_ledger(flags, migrate=True) as ledger:
        for document in export(ledger):
            click.echo(json.dumps(document))


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.pass_obj
def backup(flags: DatabaseFlags, file: Path) -> None:
    """Copy a database of SQLite into a new FILE, while gateways use it. For PostgreSQL there is pg_dump."""
    from aiida_marketplace_hpc.gateway.records import back_up

    with opened_ledger(flags) as ledger:
        back_up(ledger, file)
    click.echo(f"copied into {file}")


@click.command()
@click.option(
    "--older-than", "days", required=True, type=float, metavar="DAYS", help="How long ago they ended; 30 or more."
)
@click.option("--dry-run", is_flag=True, help="Only say how many there are.")
@click.pass_obj
def purge(flags: DatabaseFlags, days: float, dry_run: bool) -> None:
    """Forget jobs that ended long ago, never those that live. Their folders stay. May be repeated."""
    from aiida_marketplace_hpc.gateway.records import purge

    with opened_ledger(flags, migrate=True) as ledger:
        try:
            number = purge(ledger, timedelta(seconds=days * _DAY), dry_run=dry_run)
        except (ValueError, OverflowError) as exc:
            raise click.BadParameter(str(exc), param_hint="--older-than") from exc
    click.echo(f"{number} jobs {'would be ' if dry_run else ''}forgotten")


@click.command()
@click.pass_obj
def migrate(flags: DatabaseFlags) -> None:
    """Bring the database to this version's schema. A gateway does so itself when it starts. May be repeated."""
    with opened_ledger(flags, create=True) as ledger:
        before = ledger.revision()
        ledger.migrate()
        after = ledger.revision()
    click.echo(f"schema {after}" if before == after else f"schema {before or 'none'} -> {after}")


@click.command()
@click.pass_context
def check(ctx: click.Context, /) -> None:
    """Look whether the database is in order: connection, schema, integrity, clock, rows. Exit code 1 if not."""
    from aiida_marketplace_hpc.gateway.records import check

    flags: DatabaseFlags = ctx.obj
    with opened_ledger(flags) as ledger:
        checks = check(ledger)
    for one in checks:
        said = f"{one.found}: {one.problem}" if one.problem else one.found
        click.echo(f"{mark(not one.problem)} {one.name}: {printable(said)}")
    ctx.exit(int(any(one.problem for one in checks)))
