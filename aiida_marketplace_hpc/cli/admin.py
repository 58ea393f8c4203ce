"""``marketplace-hpc gateway admin``: what an operator decides, on the gateway's database, whether a gateway runs or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aiida_marketplace_hpc.errors import ConfigurationError, Unavailable
from aiida_marketplace_hpc.protocol import JobState

if TYPE_CHECKING:
    from aiida_marketplace_hpc.gateway.ledger import Ledger

DatabaseFlags = tuple[Path | None, dict[str, Any]]
"""The file of settings, and the flags that were given."""
_ENDS = [state.value for state in JobState if state.final and state is not JobState.REFUSED]


@click.group()
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="The gateway's TOML file.")
@click.option(
    "--state", type=click.Path(path_type=Path, file_okay=False), help="The folder for the gateway's own data."
)
@click.option("--database", metavar="URL", help="The database.  [default: SQLite in the state folder]")
@click.pass_context
def admin(ctx: click.Context, /, config: Path | None, **flags: Any) -> None:
    """Look after the users and jobs of a gateway, on its database.

    The database is named as for `gateway serve`: by these options, the environment or the file.
    """
    ctx.obj = config, {name: value for name, value in flags.items() if value is not None}


@contextmanager
def opened_ledger(settings: DatabaseFlags, *, migrate: bool = False, create: bool = False) -> Iterator[Ledger]:
    """The ledger that the flags name.

    :param create: make one of SQLite if there is none.
    :param migrate: bring it to this version's schema first: it may be that of an older one.
    :raises click.ClickException: if there is none, it is of a newer version, or the database does not answer.
    """
    try:
        from aiida_marketplace_hpc.gateway.config import load
        from aiida_marketplace_hpc.gateway.ledger import Ledger
    except ImportError as exc:
        raise click.ClickException(
            f"the gateway's own packages are missing ({exc}): pip install 'aiida-marketplace-hpc[gateway]'"
        ) from exc
    config, flags = settings
    try:
        # Only the database counts here; what `serve` insists on does not. No root lies below such a home.
        url = load({"home": "/dev/null/{username}", **flags}, config).database_url
    except ConfigurationError as exc:
        raise click.ClickException(exc.message) from exc
    path = url.partition(":///")[2]
    if url.startswith("sqlite") and not create and not Path(path).exists():
        raise click.ClickException(f"there is no database {path}: give --state, --database or --config as for serve")
    try:
        ledger = Ledger(url)
        try:
            if migrate:
                ledger.migrate()
            yield ledger
        finally:
            ledger.close()
    except (ConfigurationError, Unavailable) as exc:
        raise click.ClickException(exc.message) from exc


@admin.command("end-job")
@click.argument("jobid")
@click.option("--state", type=click.Choice(_ENDS), default=JobState.NODE_FAIL.value, show_default=True)
@click.option("--reason", default="", metavar="TEXT", help="Why, for the job's owner to read.")
@click.pass_obj
def end_job(settings: DatabaseFlags, jobid: str, state: str, reason: str) -> None:
    """Record the end of a job of which the scheduler has lost the record.

    The gateway never takes silence for an end. An operator who knows that the job does not run any more says so here; nothing
    is cancelled.
    """
    with opened_ledger(settings) as ledger:
        job = ledger.get(jobid)
        if job is None:
            raise click.ClickException(f"there is no job {jobid}")
        if job.job_state.final:
            raise click.ClickException(f"job {jobid} has ended already ({job.state})")
        if not job.job_state.active:
            raise click.ClickException(f"job {jobid} was never launched")
        ended = ledger.end(job, JobState(state), f"ended by the operator{f': {reason}' if reason else ''}")
        if ended is None:
            raise click.ClickException(f"job {jobid} has changed in this moment: look again")
    click.echo(f"{jobid} {ended.state}")
