"""A computer of AiiDA for a gateway: what it says about itself answers all that ``verdi`` would ask."""

from __future__ import annotations

import posixpath
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aiida_marketplace_hpc.errors import ConfigurationError

if TYPE_CHECKING:
    from aiida.orm import Computer

    from aiida_marketplace_hpc.client.gateway import HpcGateway

_PLUGIN = "marketplace_hpc"
_PREFERRED = ("scratch", "home")
"""The roots in which work directories are made, in this order; else in any that can be written."""
_MPIRUN = {"slurm": "srun -n {tot_num_mpiprocs}"}
_ANY_MPIRUN = "mpirun -np {tot_num_mpiprocs}"


@dataclass(frozen=True)
class NewComputer:
    """The answers.

    :param work_dir: a template, with ``{username}`` where the caller's name on the gateway is in the path.
    :param poll_interval: seconds.
    """

    label: str
    hostname: str
    description: str
    work_dir: str
    mpirun_command: str
    mpiprocs_per_machine: int
    poll_interval: float
    url: str
    app_id: str
    machine: str
    token_source: str

    def document(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def store(self) -> Computer:
        """Make and configure it in the loaded profile, whole or not at all.

        :raises ConfigurationError: AiiDA does not take it.
        """
        from aiida.common.exceptions import AiidaException
        from aiida.manage import get_manager
        from aiida.orm.utils.builders.computer import ComputerBuilder

        from aiida_marketplace_hpc.transport import DEFAULT_MAX_IO, MACHINE

        try:
            with get_manager().get_profile_storage().transaction():
                computer = ComputerBuilder(
                    label=self.label,
                    hostname=self.hostname,
                    description=self.description,
                    transport=_PLUGIN,
                    scheduler=_PLUGIN,
                    shebang="#!/bin/bash",
                    work_dir=self.work_dir,
                    mpirun_command=self.mpirun_command,
                    mpiprocs_per_machine=self.mpiprocs_per_machine,
                    default_memory_per_machine=None,
                    use_double_quotes=False,
                    prepend_text="",
                    append_text="",
                ).new()
                computer.store()
                computer.set_minimum_job_poll_interval(self.poll_interval)
                parameters = {
                    "url": self.url,
                    "app_id": self.app_id,
                    MACHINE: self.machine,
                    "token_source": self.token_source,
                    "max_io_allowed": DEFAULT_MAX_IO,
                    "use_login_shell": False,
                    "safe_interval": 0.0,
                }
                computer.configure(**parameters)
        except (AiidaException, ValueError, ComputerBuilder.ComputerValidationError) as exc:
            raise ConfigurationError(f"AiiDA does not take the computer {self.label}: {exc}") from exc
        return computer


def plan(
    label: str,
    gateway: HpcGateway,
    token_source: str,
    *,
    work_dir: str | None = None,
    mpirun_command: str | None = None,
    mpiprocs_per_machine: int = 1,
) -> NewComputer:
    """Answer everything from what the gateway says, but for what is given.

    :param token_source: as it is written; what a source shows of itself may be less.
    :raises MarketplaceHpcError: the gateway does not say it.
    :raises ConfigurationError: it has no folder that can be written, or no such machine.
    """
    from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

    info = gateway.info(refresh=True)
    gateway.create_user()
    machine = gateway.about_machine()
    return NewComputer(
        label,
        urlsplit(gateway.url).hostname or "gateway",
        f"{info.get('name')} at {gateway.url}",
        work_dir or _work_dir(gateway, str(info.get("username") or "")),
        mpirun_command or _MPIRUN.get(str(machine.get("backend")), _ANY_MPIRUN),
        mpiprocs_per_machine,
        MarketplaceHpcTransport.DEFAULT_MINIMUM_JOB_POLL_INTERVAL,
        gateway.url,
        gateway.app_id,
        gateway.machine,
        token_source,
    )


def _work_dir(gateway: HpcGateway, username: str) -> str:
    writable = {root.name: root for root in gateway.roots() if not root.read_only}
    if not writable:
        raise ConfigurationError(
            "the gateway has no root that can be written, so that no job can run: ask its operator"
        )
    name = next((name for name in _PREFERRED if name in writable), next(iter(writable)))
    parts = [part.replace("{", "{{").replace("}", "}}") for part in writable[name].path.split("/")]
    # Each user of the profile has a name of their own on the gateway.
    return posixpath.join("/".join("{username}" if part == username else part for part in parts) or "/", "aiida")
