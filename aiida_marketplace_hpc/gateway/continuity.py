"""Whether the settings still mean the cluster that living jobs were launched on.

Numbers of jobs say nothing by themselves: asked of another scheduler, a job that lives is one that is not there, which is how
lost submissions look, too.
"""

from __future__ import annotations

from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.config import Settings
from aiida_marketplace_hpc.gateway.ledger import Ledger
from aiida_marketplace_hpc.gateway.schema import Job

_SHOWN = 3


def check_living_jobs(settings: Settings, ledger: Ledger) -> None:
    """Make sure that no living job would be looked for elsewhere than where it runs.

    Jobs of a system that was taken away from several are no fault: they stay as they were last known. What cannot be told
    from the ledger is which system was meant while there was only one.

    :raises ConfigurationError: with what to do, if there is such a job.
    :raises Unavailable: if the database does not answer.
    """
    strange = [job for job in ledger.active() if not _is_where_it_was(job, settings)]
    if not strange:
        return
    shown = ", ".join(
        f"{job.id} (backend {job.backend}, machine {job.machine}, {job.scheduler_id or 'being submitted'})"
        for job in strange[:_SHOWN]
    )
    more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
    raise ConfigurationError(
        "jobs that have not ended run on another cluster than the one that backend, firecrest_system and machine mean "
        f"now: {shown}{more}. Start with the former settings until they have ended (`marketplace-hpc gateway admin drain on` "
        "keeps new ones away), or give the new cluster a database of its own"
    )


def _is_where_it_was(job: Job, settings: Settings) -> bool:
    if job.backend != settings.backend:
        return False
    if settings.backend != "firecrest":
        return True  # One scheduler, whatever the machine is called.
    machine, slash, _ = (job.scheduler_id or "").rpartition("/")
    default = settings.machine_name
    if len(settings.systems) == 1:
        return not slash and job.machine in ("", settings.backend, default, *settings.systems)
    if job.machine in ("", settings.backend, default):
        return not slash
    if job.machine not in settings.machines:
        return True
    return job.scheduler_id is None or machine == job.machine
