"""G1, G3: a gateway that is killed before and after each commit and each call of the scheduler, one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aiida_marketplace_hpc.gateway.schema import Job
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.faulty_scheduler import (
    DeferSubmission,
    Late,
    LoseConfirmation,
    LoseSubmission,
    SubmissionFault,
)
from aiida_marketplace_hpc.testing.replica import Killed, Replica
from tests.guarantees.replicas import SETTLING_TIME, Site, Sites

EXIT_CODE = 3
FAULTS: list[SubmissionFault | None] = [
    None,
    LoseSubmission(),
    LoseConfirmation(),
    Late(SETTLING_TIME - 10),
    DeferSubmission(),
]
Life = Callable[[Site, Replica, str], None]


def launched(site: Site, replica: Replica, folder: str) -> None:
    """From its creation to its end."""
    replica.gateway.jobs.reconcile()
    site.launch(replica, folder)
    follow(site, replica)


def cancelled(site: Site, replica: Replica, folder: str) -> None:
    """Cancelled at once."""
    replica.gateway.jobs.reconcile()
    job = site.launch(replica, folder)
    replica.gateway.jobs.cancel(job)
    follow(site, replica)


def cancelled_while_it_runs(site: Site, replica: Replica, folder: str) -> None:
    """Cancelled when it has long begun."""
    replica.gateway.jobs.reconcile()
    job = site.launch(replica, folder)
    for _ in range(8):
        step(site, replica, works=not site.executed(folder))
    replica.gateway.jobs.cancel(site.ledger.get(job.id) or job)
    follow(site, replica)


def step(site: Site, replica: Replica, *, works: bool = True) -> None:
    site.clock.sleep(15)
    replica.gateway.jobs.reconcile()
    if works:
        site.work(EXIT_CODE)


def follow(site: Site, replica: Replica) -> None:
    for _ in range(14):
        step(site, replica)
        if not replica.moments.killed and not site.ledger.active():
            return
        replica.moments.live()


SOONER: dict[Life, list[SubmissionFault | None]] = {
    cancelled: [None, LoseSubmission(), LoseConfirmation()],
    cancelled_while_it_runs: [None],
}
"""What is tried each time; the rest with the services."""


def live_with_a_kill(
    sites: Sites, life: Life, fault: SubmissionFault | None, at: int, rounds: int
) -> tuple[str, Site, Job] | None:
    """Live through one life, with a kill at one moment; ``None`` if there is no such moment.

    :param rounds: how far the batch system comes while no gateway runs; 2: to the end of the job.

    :returns: the moment, and what is there afterwards.
    """
    with sites.new() as site:
        folder = site.write("work")
        if fault is not None:
            site.scheduler.inject(fault)
        first = site.replica()
        first.moments.kill_in(at)
        try:
            life(site, first, folder)
        except Killed:
            pass
        if not first.moments.killed:
            return None
        for _ in range(rounds):
            site.work(EXIT_CODE)
        life(site, site.replica(), folder)  # The client asks again, as it does after a lost connection.
        [job] = site.ledger.of_user(site.alice.id)
        after = f"{at}, after {first.moments.seen[-1] if first.moments.seen else 'nothing'}"
        return after, site, job


def every_moment(
    sites: Sites, life: Life, fault: SubmissionFault | None, rounds: int = 0
) -> list[tuple[str, Site, Job]]:
    found = []
    while (lived := live_with_a_kill(sites, life, fault, len(found), rounds)) is not None:
        found.append(lived)
    print(f"{len(found)} kills")
    assert len(found) >= 6
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("rounds", [0, 2], ids=["goes-on-after", "ends-meanwhile"])
def test_a_launch_that_is_killed_anywhere_runs_once_and_its_end_is_known(
    sites: Sites, fault: SubmissionFault | None, rounds: int
) -> None:
    for moment, site, job in every_moment(sites, launched, fault, rounds):
        assert len(site.batch.executed) == 1, moment
        assert len(site.batch.submissions) == 1, moment
        assert (job.job_state, job.exit_code) == (JobState.FAILED, EXIT_CODE), moment


LIVES = [
    pytest.param(
        life,
        fault,
        id=f"{life.__name__}-{type(fault).__name__}",
        marks=() if fault in SOONER[life] else pytest.mark.services,
    )
    for life in (cancelled, cancelled_while_it_runs)
    for fault in FAULTS
]


@pytest.mark.parametrize(("life", "fault"), LIVES)
def test_a_cancellation_that_is_killed_anywhere_ends_the_job(
    sites: Sites, life: Life, fault: SubmissionFault | None
) -> None:
    for moment, site, job in every_moment(sites, life, fault):
        assert len(site.batch.executed) <= 1, moment
        assert len(site.batch.submissions) <= 1, moment
        assert job.job_state in (JobState.CANCELLED, JobState.FAILED), moment
        assert all(one.state.final for one in site.batch.jobs.values()), moment
        if life is cancelled_while_it_runs and job.job_state is JobState.CANCELLED:
            assert site.batch.cancelled, moment
