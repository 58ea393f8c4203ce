"""What an outage or a kill leaves behind in AiiDA and on a gateway, found from a loaded profile.

Nothing is changed here; ``marketplace-hpc computer`` shows what was found and acts on it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from aiida.orm import CalcJobNode, Computer, ProcessNode, QueryBuilder

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.gateway import HpcGateway

ENDED = ("finished", "excepted", "killed")
"""The states of an AiiDA process that has ended."""
GAVE_UP = "Pausing after failed transport task"
"""How the status of a process begins that AiiDA itself has paused, when all attempts of a transport task had failed."""


@dataclass(frozen=True)
class AbandonedJob:
    """A job that has not ended, and for which no calculation of the profile waits.

    :param client_ref: the UUID of its calculation.
    :param pk: the calculation; ``None``: the profile does not have it.
    :param process_state: how the calculation ended.
    """

    jobid: str
    state: str
    scheduler_id: str | None
    folder: str
    client_ref: str
    pk: int | None = None
    process_state: str | None = None

    def document(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def abandoned_jobs(gateway: HpcGateway) -> tuple[list[AbandonedJob], list[AbandonedJob]]:
    """Find the caller's jobs that have not ended and for which no calculation of the profile waits.

    Jobs without a reference to a calculation are left out: AiiDA has not submitted them.

    :return: those whose calculation has ended, and those whose calculation the profile does not have: another one may.
    :raises MarketplaceHpcError: the gateway does not answer.
    """
    # The jobs are read first: a calculation that ends in between has a job that has ended, and which a cancellation does not
    # harm. The other way round a new job would belong to nobody.
    jobs = {job["jobid"]: job for job in gateway.active_jobs() if job["client_ref"]}
    query = QueryBuilder().append(
        CalcJobNode,
        filters={"uuid": {"in": sorted({job["client_ref"] for job in jobs.values()})}},
        project=["uuid", "id", "attributes.process_state"],
    )
    known = {row[0]: (row[1], row[2]) for row in query.all()} if jobs else {}
    orphans, unknown = [], []
    for job in jobs.values():
        facts = {name: job[name] for name in ("jobid", "state", "scheduler_id", "folder", "client_ref")}
        if job["client_ref"] not in known:
            unknown.append(AbandonedJob(**facts))
            continue
        pk, process_state = known[job["client_ref"]]
        if process_state in ENDED:
            orphans.append(AbandonedJob(**facts, pk=pk, process_state=process_state))
    return orphans, unknown


def given_up(computer: Computer) -> list[ProcessNode]:
    """Find the calculations on a computer that AiiDA has paused because a transport task failed again and again.

    What somebody else has paused is not among them.
    """
    filters = {
        "attributes.paused": True,
        "attributes.process_state": {"!in": list(ENDED)},
        "attributes.process_status": {"like": f"{GAVE_UP}%"},
    }
    query = QueryBuilder().append(Computer, filters={"id": computer.pk}, tag="computer")
    query.append(CalcJobNode, with_computer="computer", filters=filters)
    found: list[ProcessNode] = query.all(flat=True)
    return found
