"""``marketplace-hpc job``."""

from __future__ import annotations

from typing import Any

import click

from aiida_marketplace_hpc.cli.common import Settings, client_options, connect, emit, table
from aiida_marketplace_hpc.cli.job_run import run
from aiida_marketplace_hpc.errors import NotFound, NotSupported

_COLUMNS = ("jobid", "state", "scheduler_id", "name", "exit_code", "folder")
_SHOWN = (
    "jobid",
    "state",
    "scheduler_state",
    "reason",
    "message",
    "name",
    "folder",
    "script",
    "client_ref",
    "request_id",
    "machine",
    "scheduler_id",
    "partition",
    "account",
    "nodes",
    "exit_code",
    "signal",
    "created_at",
    "submitted_at",
    "started_at",
    "ended_at",
    "time_limit",
    "elapsed",
    "age",
)
_PUBLISHED = ("job_name", "ntasks_per_node", "partition", "image", "executable_cmd")


@click.group()
def job() -> None:
    """Create, launch, watch and cancel jobs."""


job.add_command(run)


@job.command()
@click.option(
    "--folder", metavar="DIR", help="An existing folder on the cluster (absolute path), which becomes the job's."
)
@click.option("--script", metavar="NAME", help="The job script in that folder.")
@click.option("--launch", is_flag=True, help="Submit it at once.")
@click.option("--client-ref", metavar="TEXT", help="A reference of your own, such as the UUID of an AiiDA node.")
@click.option("--key", metavar="TEXT", help="Create no second job for the same key.")
@click.option("--job-name", metavar="NAME", help="Name of a job from a container image.")
@click.option("--ntasks-per-node", type=click.IntRange(min=1), help="Its tasks per node.")
@click.option("--partition", metavar="NAME", help="Its partition.")
@click.option("--image", metavar="URL", help="Its container image.")
@click.option("--executable-cmd", metavar="CMD", help="The command to run in the image.")
@client_options()
@click.pass_obj
def create(settings: Settings, /, launch: bool, folder: str | None, script: str | None, **options: Any) -> None:
    """Create a job.

    Either of a folder that is on the cluster already (--folder, --script), or of a container image (--job-name,
    --ntasks-per-node, --partition, --image, --executable-cmd); the job's folder is then made, for files to be uploaded.
    """
    fields = {
        name: value for name, value in {"folder": folder, "script": script, **options}.items() if value is not None
    }
    published = [name for name in _PUBLISHED if name in fields]
    if folder or script:
        if not (folder and script):
            raise click.UsageError("--folder and --script belong together")
        if published:
            raise click.UsageError("--folder and the options of a container image exclude each other")
    elif missing := [name for name in _PUBLISHED if name not in fields]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise click.UsageError(f"give --folder and --script, or the options of a container image; missing: {names}")
    with connect(settings) as gateway:
        jobid = gateway.create_job({**fields, "launch": True} if launch and folder else fields)
        # The published request has no word for launching; a second request does it on any gateway.
        document = gateway.launch_job(jobid) if launch and not folder else {"jobid": jobid}
    emit(settings, document, jobid)


@job.command("list")
@click.option("--active", is_flag=True, help="Only jobs that have not ended.")
@client_options()
@click.pass_obj
def list_(settings: Settings, active: bool) -> None:
    """List your jobs."""
    with connect(settings) as gateway:
        if not active:
            try:
                jobs = gateway.list_jobs()
            except NotSupported:
                active = True
                click.echo("Through the MarketPlace only jobs that have not ended can be listed.", err=True)
        if active:
            listed = gateway.active_jobs()
            emit(settings, {"jobs": listed}, _table(listed))
            return
    rows = [
        [
            jobid,
            row.get("job_state") or row.get("state"),
            row.get("scheduler_id"),
            row.get("name"),
            row.get("remote_folder"),
        ]
        for jobid, row in jobs.items()
    ]
    emit(settings, {"jobs": jobs}, table(rows, ["JOBID", "STATE", "SCHEDULER_ID", "NAME", "FOLDER"]))


@job.command()
@click.argument("jobids", metavar="JOBID...", nargs=-1, required=True)
@client_options()
@click.pass_obj
def state(settings: Settings, jobids: tuple[str, ...]) -> None:
    """Say how jobs are. The exit code is 1 if one of them is unknown."""
    with connect(settings) as gateway:
        answer = gateway.job_states(jobids)
    known = [answer["jobs"][jobid] for jobid in jobids if jobid in answer["jobs"]]
    if known or not settings.json:
        emit(settings, answer, _table(known) if known else None)
    if answer["unknown"]:
        error = NotFound(f"you have no job {', '.join(answer['unknown'])} on this gateway")
        if settings.json and known:
            click.echo(f"Error: {error}", err=True)
            click.get_current_context().exit(1)
        raise error


@job.command()
@click.argument("jobid")
@click.option(
    "--wait", type=click.IntRange(0, 10), default=0, metavar="SECONDS", help="Wait so long for its end (at most 10)."
)
@client_options()
@click.pass_obj
def show(settings: Settings, jobid: str, wait: int) -> None:
    """Show one job with the scheduler's accounting."""
    with connect(settings) as gateway:
        shown = gateway.show_job(jobid, wait=wait)
    lines = [[name, shown[name]] for name in _SHOWN if shown.get(name) not in (None, "")]
    text = table(lines, [])
    accounting = shown.get("accounting")
    if accounting:
        text += "\n\n" + table(accounting["rows"], accounting["columns"])
    emit(settings, shown, text)


@job.command()
@click.argument("jobid")
@client_options()
@click.pass_obj
def launch(settings: Settings, jobid: str) -> None:
    """Submit a job. A job that was submitted is not submitted again."""
    with connect(settings) as gateway:
        answer = gateway.launch_job(jobid)
    emit(settings, answer, f"{jobid} {answer.get('state', 'submitted')}")


@job.command()
@click.argument("jobid")
@client_options()
@click.pass_obj
def cancel(settings: Settings, jobid: str) -> None:
    """Cancel a job. A job that has ended stays as it is."""
    with connect(settings) as gateway:
        answer = gateway.cancel_job(jobid)
    ends = ", will be cancelled" if answer.get("cancel_requested") and not answer.get("final") else ""
    emit(settings, answer, f"{jobid} {answer.get('state') or answer.get('message', 'cancelled')}{ends}")


def _table(jobs: list[dict[str, Any]]) -> str:
    return table([[row.get(column) for column in _COLUMNS] for row in jobs], [column.upper() for column in _COLUMNS])
