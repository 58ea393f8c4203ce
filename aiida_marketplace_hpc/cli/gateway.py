"""``marketplace-hpc gateway``: what the owner of a cluster runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from aiida_marketplace_hpc.cli.admin import admin
from aiida_marketplace_hpc.cli.admin_drain import drain
from aiida_marketplace_hpc.cli.admin_records import backup, check, export, jobs, migrate, purge
from aiida_marketplace_hpc.cli.admin_user import user
from aiida_marketplace_hpc.cli.check_config import check_config
from aiida_marketplace_hpc.cli.identity import identity_options
from aiida_marketplace_hpc.cli.registration import openapi
from aiida_marketplace_hpc.cli.relay import relay
from aiida_marketplace_hpc.cli.running import config_option, log_options
from aiida_marketplace_hpc.errors import ConfigurationError


@click.group()
def gateway() -> None:
    """Publish a cluster: serve the gateway."""


admin.add_command(drain)
for command in (backup, check, export, jobs, migrate, purge, user):
    admin.add_command(command)
gateway.add_command(admin)
gateway.add_command(openapi)
gateway.add_command(relay)


@gateway.command()
@click.option("--backend", type=click.Choice(["local", "slurm", "firecrest"]), help="Where jobs run.  [default: local]")
@click.option("--home", metavar="TEMPLATE", help="The users' home on the cluster; {username} is replaced.")
@click.option(
    "--root",
    multiple=True,
    metavar="NAME=TEMPLATE[:ro]",
    help="A further folder that users reach: scratch, projects, read-only software; MACHINE.NAME: on one of several machines. "
    "May be repeated.",
)
@click.option(
    "--allow-shared-home", is_flag=True, default=None, help="Let several users share one home without {username}."
)
@click.option("--host", help="The address to listen on.  [default: localhost]")
@click.option("--port", type=int, help="The port to listen on; 0: any free one.  [default: 5005]")
@click.option("--reload", is_flag=True, help="Start again whenever the code changes; for development.")
@click.option(
    "--state", type=click.Path(path_type=Path, file_okay=False), help="The folder for the gateway's own data."
)
@click.option("--database", metavar="URL", help="The database.  [default: SQLite in the state folder]")
@identity_options
@click.option("--name", help="What the gateway calls itself.")
@click.option("--machine", help="What the machine is called.  [default: the backend's name]")
@click.option("--slots", type=int, help="Jobs that the backend local runs at once.  [default: number of processors]")
@click.option("--firecrest-url", metavar="URL", help="Where FirecREST is, for the backend firecrest.")
@click.option("--firecrest-version", type=click.IntRange(1, 2), help="Which FirecREST that is.  [default: 2]")
@click.option("--firecrest-system", metavar="NAME", help="What FirecREST calls the cluster; several: A,B,…")
@click.option("--firecrest-token-url", metavar="URL", help="Where the gateway gets tokens of its own for FirecREST.")
@click.option(
    "--firecrest-client-id",
    metavar="ID",
    help="The gateway's own name there; the secret comes from MARKETPLACE_HPC_FIRECREST_CLIENT_SECRET or the file.",
)
@click.option("--poll-interval", type=float, help="Seconds for which one answer of the scheduler serves everybody.")
@click.option(
    "--certfile",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Serve HTTPS with this certificate (PEM, with those of its authorities).",
)
@click.option(
    "--keyfile",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The certificate's key, unless it is in the same file.",
)
@click.option(
    "--trusted-proxy",
    multiple=True,
    metavar="ADDRESS",
    help="A reverse proxy, or a network of them, whose X-Forwarded-For and -Proto are believed. May be repeated.",
)
@click.option(
    "--stop-timeout",
    type=int,
    metavar="SECONDS",
    help="How long requests and transfers under way go on when the gateway is asked to stop.  [default: 30]",
)
@click.option(
    "--text-only",
    is_flag=True,
    default=None,
    help="Tell clients that only text survives on the way, as it is behind the published relay.",
)
@click.option(
    "--access-log",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Append a JSON line for each request and operation.",
)
@log_options
@click.option(
    "--metrics",
    is_flag=True,
    default=None,
    help="Show figures for Prometheus at /metrics, to everybody who gets there.",
)
@click.option(
    "--pages/--no-pages",
    default=None,
    help="Show people who sign in with a browser their jobs and files, at /; or do not.  [default: yes]",
)
@click.option(
    "--page-url", metavar="URL", help="Where browsers reach the gateway; needed for signing in at the issuer."
)
@click.option(
    "--page-client",
    metavar="ID",
    help="The client of the issuer with which browsers are signed in. Without it, none is.",
)
@click.option(
    "--page-client-secret-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file with the secret of that client, if it has one.",
)
@click.option(
    "--keep-unfinished", type=float, metavar="DAYS", help="How long an upload that broke off is kept.  [default: 3]"
)
@click.option(
    "--unfinished-limit",
    type=int,
    metavar="GIB",
    help="How much uploads that broke off may take, in each root of a user.  [default: 100]",
)
@click.option(
    "--keep-job-folders",
    type=float,
    metavar="DAYS",
    help="How long after a job's end the folder is kept that the gateway made for it; 0: for ever.  [default: 0]",
)
@click.option("--request-limit", type=int, metavar="MIB", help="The largest body of one request.  [default: 65536]")
@click.option(
    "--form-limit",
    type=int,
    metavar="MIB",
    help="The largest upload in the published form, which is held in the temporary folder.  [default: 1024]",
)
@click.option(
    "--requests-at-once", type=int, help="Requests of one user that may be under way; 0: any number.  [default: 64]"
)
@click.option(
    "--requests-per-second",
    type=float,
    help="Requests of one user in a second, on average over ten; 0: any number.  [default: 200]",
)
@click.option(
    "--jobs-per-user", type=int, help="Jobs of one user that have not ended; 0: any number.  [default: 10000]"
)
@click.option(
    "--archive-members", type=int, help="Files, folders and links that may come out of one archive.  [default: 1000000]"
)
@click.option("--archive-size", type=int, metavar="GIB", help="How much may come out of one archive.  [default: 1024]")
@click.option(
    "--container-runtime",
    metavar="RUNTIME",
    help="What runs container jobs: apptainer or singularity, or the absolute path of one.  [default: singularity]",
)
@click.option("--container-time-limit", metavar="TIME", help="The time limit of container jobs.  [default: 00:10:00]")
@click.option("--container-account", metavar="ACCOUNT", help="The scheduler's account for container jobs.")
@click.option(
    "--container-template",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The job script of container jobs (Jinja), instead of the gateway's own.",
)
@click.option(
    "--classic",
    is_flag=True,
    default=None,
    help="Serve nothing but the published gateway's capabilities, exactly as first published.",
)
@click.option(
    "--classic-file-names",
    type=click.Choice(["secure", "raw"]),
    help="With --classic: rename uploads as FirecREST up to 1.13.0 does, or not.  [default: secure]",
)
@click.option("--classic-file-limit", type=float, metavar="MIB", help="With --classic: the largest file.  [default: 5]")
@click.option(
    "--classic-command-timeout",
    type=float,
    metavar="SECONDS",
    help="With --classic: how long one operation on files may take.  [default: 5]",
)
@click.option(
    "--classic-listing",
    type=click.Choice(["split", "whole"]),
    help="With --classic: list the first word of a name with blanks, or all of it.  [default: split]",
)
@click.option("--connections", type=int, help="Connections at once.  [default: 500]")
@config_option
def serve(config: Path | None, reload: bool, **flags: Any) -> None:
    """Serve a gateway over HTTP.

    Settings come from these flags, from the environment (MARKETPLACE_HPC_ and the name in capitals), and from a TOML file;
    the first that says something wins.
    """
    try:
        from aiida_marketplace_hpc.gateway import server
        from aiida_marketplace_hpc.gateway.config import load
    except ImportError as exc:
        raise click.ClickException(
            f"the gateway's own packages are missing ({exc}): pip install 'aiida-marketplace-hpc[gateway]'"
        ) from exc
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    try:
        server.serve(load(given, config), given, config, reload=reload)
    except ConfigurationError as exc:
        raise click.ClickException(exc.message) from exc


check_config.params[:0] = [option for option in serve.params if option.name != "reload"]
gateway.add_command(check_config)
