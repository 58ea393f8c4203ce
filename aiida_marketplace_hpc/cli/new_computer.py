"""``marketplace-hpc computer create``: a gateway as a computer of an AiiDA profile, from an address and a login."""

from __future__ import annotations

import os

import click

from aiida_marketplace_hpc.cli.common import Settings, client_options, emit
from aiida_marketplace_hpc.client.auth import DEFAULT_SOURCE
from aiida_marketplace_hpc.errors import ConfigurationError, TokenUnavailable


@click.command()
@client_options()
@click.option("-p", "--profile", metavar="PROFILE", help="The AiiDA profile.  [default: AiiDA's own default]")
@click.option(
    "--work-dir", metavar="TEMPLATE", help="Where calculations run; {username} is replaced.  [default: aiida in a root]"
)
@click.option("--mpirun-command", metavar="COMMAND", help="[default: srun or mpirun, as the gateway's backend has it]")
@click.option("--mpiprocs-per-machine", type=click.IntRange(1), default=1, show_default=True, metavar="N")
@click.argument("label")
@click.pass_obj
def create(
    settings: Settings,
    /,
    label: str,
    profile: str | None,
    work_dir: str | None,
    mpirun_command: str | None,
    mpiprocs_per_machine: int,
) -> None:
    """Make a gateway a computer in AiiDA, and configure it.

    All that is needed is the gateway's address and a login; the gateway says the rest. The login is the one that is named as
    the computer, or the only one, unless --token-source says where the token is.
    """
    from aiida_marketplace_hpc.cli.computer import load_aiida_profile, load_if_there
    from aiida_marketplace_hpc.client.gateway import HpcGateway
    from aiida_marketplace_hpc.new_computer import plan

    name = load_aiida_profile(profile)
    if load_if_there(label) is not None:
        raise ConfigurationError(
            f"the AiiDA profile {name} has a computer {label}: choose another label, or change that one with "
            f"`verdi computer configure marketplace_hpc {label}`"
        )
    source = _token_source(settings, label)
    with HpcGateway(settings.url, app_id=settings.app_id, token_source=source, machine=settings.machine) as gateway:
        new = plan(
            label,
            gateway,
            source,
            work_dir=work_dir,
            mpirun_command=mpirun_command,
            mpiprocs_per_machine=mpiprocs_per_machine,
        )
    new.store()
    emit(
        settings,
        {"profile": name, **new.document()},
        f"The AiiDA profile {name} has the computer {label}: {new.url}, work directory {new.work_dir}, token from "
        f"{new.token_source}.\nTry it: verdi computer test {label}",
    )


def _token_source(settings: Settings, label: str) -> str:
    from aiida_marketplace_hpc.client.logins import LoginStore

    if settings.token_source != DEFAULT_SOURCE:
        return settings.token_source
    names = LoginStore().names()
    if label in names:
        return f"login:{label}"
    if len(names) == 1:
        return f"login:{names[0]}"
    if os.environ.get(DEFAULT_SOURCE.partition(":")[2]):
        return DEFAULT_SOURCE
    if names:
        raise ConfigurationError(
            f"there are several logins ({', '.join(names)}): say which, with --token-source login:NAME"
        )
    raise TokenUnavailable(
        f"there is no login: run `marketplace-hpc login {label}`, or say where the token is with --token-source"
    )
