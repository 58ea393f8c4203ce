"""G1, G2, G3 at their edges: submissions that arrive when nobody counts on them any more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aiida_marketplace_hpc.errors import MarketplaceHpcError
from aiida_marketplace_hpc.gateway.backends.base import Refused, Submission
from aiida_marketplace_hpc.gateway.schema import Job
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.faulty_scheduler import (
    DeferSubmission,
    EmptyAnswer,
    Hang,
    Late,
    LoseConfirmation,
    RefuseSubmission,
)
from aiida_marketplace_hpc.testing.replica import Replica
from tests.guarantees.replicas import SCRIPT, SETTLING_TIME, Site, Sites

LONG = 120.0
"""Seconds: more than a lease and the settling time."""


@pytest.fixture
def site(sites: Sites) -> Iterator[Site]:
    with sites.new() as site:
        yield site


@pytest.fixture
def replica(site: Site) -> Replica:
    replica = site.replica()
    replica.gateway.jobs.reconcile()
    return replica


def later(site: Site, replica: Replica, seconds: float = LONG) -> None:
    site.clock.sleep(seconds)
    replica.gateway.jobs.reconcile()


def now(site: Site, job: Job) -> Job:
    found = site.ledger.get(job.id)
    assert found is not None
    return found


def test_a_second_copy_that_arrives_late_ends_before_user_code(site: Site, replica: Replica) -> None:
    site.scheduler.inject(Late(LONG))
    job = site.launch(replica, site.write("work"))
    later(site, replica, LONG - 1)
    first, *_ = site.batch.ids
    site.batch.run(first)
    site.clock.sleep(1)
    _, late = site.batch.ids
    replica.gateway.jobs.reconcile()
    assert now(site, job).duplicates == [late]
    assert not site.batch.jobs[late].exit_code
    site.batch.end(first, JobState.FAILED, 3)
    later(site, replica)
    assert (now(site, job).job_state, now(site, job).exit_code) == (JobState.FAILED, 3)
    assert site.batch.executed == [first]


def taken_over(site: Site, first: Replica) -> tuple[Job, Replica, Hang]:
    """A gateway hangs in its submission until another one has submitted the same."""
    hang = Hang("before")
    site.scheduler.inject(hang)
    job = site.launch(first, site.write("work"))
    second = site.replica()
    later(site, second)
    return job, second, hang


def test_a_gateway_that_is_slow_within_its_lease_is_left_alone(site: Site, replica: Replica) -> None:
    hang = Hang("before")
    site.scheduler.inject(hang)
    job = site.launch(replica, site.write("work"))
    later(site, site.replica(), site.scheduler.submission_limit + SETTLING_TIME)
    assert site.batch.ids == []
    hang.release()
    site.wait_for_threads()
    assert [now(site, job).scheduler_id] == site.batch.ids


def test_a_gateway_that_was_frozen_across_its_lease_changes_nothing_and_ends_its_copy(
    site: Site, replica: Replica
) -> None:
    job, second, hang = taken_over(site, replica)
    [ours] = site.batch.ids
    site.batch.run(ours)
    site.batch.end(ours, JobState.FAILED, 3)
    second.gateway.jobs.reconcile()
    hang.release()
    site.wait_for_threads()
    [_, late] = site.batch.ids
    assert site.batch.cancelled == [late]
    ended = now(site, job)
    assert (ended.job_state, ended.exit_code, ended.scheduler_id) == (JobState.FAILED, 3, ours)
    assert ended.duplicates == [late]


def test_what_a_gateway_learns_after_it_lost_its_lease_counts_no_more(site: Site, replica: Replica) -> None:
    hangs = [Hang("before"), Hang("before")]
    for hang in hangs:
        site.scheduler.inject(hang)
    job = site.launch(replica, site.write("work"))
    later(site, site.replica())  # It submits, too, and hangs.

    def refuse(_: Submission) -> str:
        raise Refused("the scheduler does not take such jobs")

    site.batch.on_submit = refuse
    hangs[0].release()
    site.wait_for_threads()
    assert now(site, job).job_state is JobState.SUBMITTING
    site.batch.on_submit = None
    hangs[1].release()
    site.wait_for_threads()
    assert now(site, job).job_state is JobState.QUEUED


def frozen_while_another_takes_over(site: Site, first: Replica) -> tuple[Job, Replica, str, str]:
    """A gateway that hangs in its submission until another one has submitted the same, then delivers it, and is killed."""
    job, second, hang = taken_over(site, first)
    first.moments.kill()
    hang.release()
    site.wait_for_threads()
    ours, late = site.batch.ids
    assert now(site, job).scheduler_id == ours
    return job, second, ours, late


def test_the_copy_that_runs_is_the_job_even_if_it_is_the_late_one(site: Site, replica: Replica) -> None:
    job, second, ours, late = frozen_while_another_takes_over(site, replica)
    site.batch.run(late)
    second.gateway.jobs.reconcile()
    assert now(site, job).scheduler_id == late
    assert site.batch.jobs[ours].state is JobState.CANCELLED
    site.batch.end(late, JobState.FAILED, 3)
    later(site, second)
    assert (now(site, job).job_state, now(site, job).exit_code) == (JobState.FAILED, 3)


def test_a_copy_that_found_the_guard_taken_is_not_the_end_of_the_job(site: Site, replica: Replica) -> None:
    job, second, ours, late = frozen_while_another_takes_over(site, replica)
    site.batch.run(late)
    site.batch.run(ours)  # ends with 75
    second.gateway.jobs.reconcile()
    assert not now(site, job).job_state.final
    assert site.batch.jobs[late].state is JobState.RUNNING
    site.batch.end(late, JobState.FAILED, 3)
    later(site, second)
    assert (now(site, job).job_state, now(site, job).exit_code) == (JobState.FAILED, 3)


def test_a_copy_that_arrives_after_its_job_was_cancelled_does_not_run(site: Site, replica: Replica) -> None:
    site.scheduler.inject(Late(LONG))
    job = site.launch(replica, site.write("work"))
    replica.gateway.jobs.cancel(job)
    later(site, replica, LONG - 1)
    assert now(site, job).job_state is JobState.CANCELLED
    site.clock.sleep(1)
    [late] = site.batch.ids
    site.batch.run(late)
    later(site, replica)
    assert site.batch.jobs[late].state.final
    assert site.batch.executed == []


def test_a_copy_that_arrives_after_its_job_was_refused_does_not_run(site: Site, replica: Replica) -> None:
    site.scheduler.inject(Late(LONG))
    site.scheduler.inject(RefuseSubmission())
    job = site.launch(replica, site.write("work"))
    later(site, replica, LONG - 1)
    assert now(site, job).job_state is JobState.REFUSED
    site.clock.sleep(1)
    [late] = site.batch.ids
    site.batch.run(late)
    assert site.batch.executed == []


def test_a_script_written_between_creation_and_launch_runs_once(site: Site, replica: Replica) -> None:
    jobs = replica.gateway.jobs
    folder = site.write("work", "#!/bin/sh\n# 1\n")
    older = jobs.create_in_folder(site.alice, folder, SCRIPT)
    site.write("work", "#!/bin/sh\n# 2\n")
    newer = jobs.create_in_folder(site.alice, folder, SCRIPT)
    for job in (older, newer):
        try:
            jobs.launch(site.alice, job)
        except MarketplaceHpcError:
            continue
        for id in site.batch.ids:
            if not site.batch.jobs[id].state.final:
                site.batch.run(id)
                site.batch.end(id)
        later(site, replica)
    digests = [site.batch.submission_of(id).script_digest for id in site.batch.executed]
    assert len(digests) == len(set(digests))


def test_a_duplicate_of_an_earlier_job_is_not_taken_for_a_later_one(site: Site, replica: Replica) -> None:
    site.scheduler.inject(Late(LONG))
    folder = site.write("work", "#!/bin/sh\n# 1\n")
    site.launch(replica, folder)
    later(site, replica, LONG - 1)
    first, *_ = site.batch.ids
    site.batch.run(first)
    site.batch.end(first)
    replica.gateway.jobs.reconcile()
    site.clock.sleep(1)
    _, late = site.batch.ids
    site.batch.run(late)  # ends with 75, before anybody has seen it
    site.write("work", "#!/bin/sh\n# 2\n")
    site.scheduler.inject(LoseConfirmation())
    second = site.launch(replica, folder)
    later(site, replica, 1)
    assert now(site, second).scheduler_id not in (first, late)
    assert not now(site, second).job_state.final


@pytest.mark.parametrize("fault", [Late(5.0), LoseConfirmation()], ids=lambda fault: type(fault).__name__)
def test_where_the_scheduler_denies_a_job_that_it_has_the_guard_lets_one_run(
    site: Site, replica: Replica, fault: Late | LoseConfirmation
) -> None:
    site.scheduler.disturb(EmptyAnswer(), "find", "queue")
    site.scheduler.inject(fault)
    site.launch(replica, site.write("work"))
    later(site, replica)
    assert len(site.batch.ids) == 2
    for id in site.batch.ids:
        site.batch.run(id)
    assert len(site.batch.executed) == 1


def whose_id_was_given_away(site: Site, replica: Replica) -> tuple[Job, str]:
    """A job whose id another job has got before the gateway had seen its end."""
    job = site.launch(replica, site.write("work"))
    [id] = site.batch.ids
    site.batch.run(id)
    site.batch.end(id)
    site.batch.give_away(id, "/elsewhere")
    return job, id


def test_the_job_that_has_its_id_now_says_nothing_about_a_job(site: Site, replica: Replica) -> None:
    job, id = whose_id_was_given_away(site, replica)
    for end in (lambda: None, lambda: site.batch.end(id)):
        end()
        later(site, replica)
        assert now(site, job).job_state is JobState.QUEUED


def test_the_job_that_has_its_id_now_is_not_cancelled_with_it(site: Site, replica: Replica) -> None:
    job, id = whose_id_was_given_away(site, replica)
    replica.gateway.jobs.cancel(job)
    assert not site.batch.jobs[id].state.final


def test_a_job_stays_refused_when_a_copy_of_it_arrives_later(site: Site, replica: Replica) -> None:
    site.scheduler.inject(Late(LONG))
    site.scheduler.inject(RefuseSubmission())
    job = site.launch(replica, site.write("work"))
    later(site, replica, LONG - 1)
    later(site, replica, 1)
    [late] = site.batch.ids
    if not site.batch.jobs[late].state.final:
        site.batch.run(late)
    later(site, replica)
    assert (now(site, job).job_state, now(site, job).exit_code) == (JobState.REFUSED, None)


def test_a_job_that_is_launched_again_is_not_the_copy_of_its_first_attempt(site: Site, replica: Replica) -> None:
    site.scheduler.inject(Late(LONG))
    site.scheduler.inject(RefuseSubmission())
    folder = site.write("work")
    job = site.launch(replica, folder)
    later(site, replica, LONG - 1)
    site.scheduler.inject(DeferSubmission())
    site.launch(replica, folder)
    later(site, replica, 1)  # The copy arrives while the second attempt waits to be submitted.
    later(site, replica, 16)
    for id in site.batch.ids:
        if not site.batch.jobs[id].state.final:
            site.batch.run(id)
    for id in site.batch.executed:
        site.batch.end(id, JobState.FAILED, 3)
    later(site, replica)
    assert len(site.batch.executed) == 1
    assert (now(site, job).job_state, now(site, job).exit_code) == (JobState.FAILED, 3)
