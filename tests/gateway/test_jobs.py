"""Jobs: one submission whatever is repeated, lost or killed; never an end that did not happen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from aiida_marketplace_hpc.errors import Conflict, InvalidRequest, NotFound, SubmissionRefused
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.backends.base import Deferred, Refused, Submission, Unknown
from aiida_marketplace_hpc.gateway.schema import Job, User
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.gateway.submission import GATEWAY, guard_of
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.backend import FakeBackend

pytestmark = pytest.mark.databases


def launch(gateway: Gateway, user: User, folder: str, **options: str) -> Job:
    return gateway.jobs.launch(user, gateway.jobs.create_in_folder(user, folder, "run.sh", **options))


def current(gateway: Gateway, job: Job) -> Job:
    return gateway.jobs.get(gateway.ledger.user(job.user_id), job.id, fresh=True)


def rewrite(gateway: Gateway, user: User, folder: str, text: bytes) -> None:
    left = [text]
    gateway.files_of(user).forced().write(f"{folder}/run.sh", lambda _: left.pop() if left else b"")


def test_the_same_folder_and_script_is_the_same_job(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    first = launch(gateway, alice, folder)
    second = launch(gateway, alice, folder)
    assert first.id == second.id
    assert len(backend.submissions) == 1
    assert backend.submissions[0].script_text == b"#!/bin/sh\necho done\n"


def test_many_at_once_submit_once(gateway: Gateway, backend: FakeBackend, alice: User, folder: str) -> None:
    started = threading.Barrier(8)
    ids: list[str] = []

    def go() -> None:
        started.wait()
        ids.append(launch(gateway, alice, folder).id)

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1
    assert len(backend.submissions) == 1


def test_the_same_request_that_wins_between_two_looks_is_no_conflict(
    gateway: Gateway, alice: User, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = launch(gateway, alice, folder)
    find = gateway.ledger.find_by_key
    calls: list[tuple[str, ...]] = []

    def find_late(*which: str) -> Job | None:
        """The first time, the other one has no row yet."""
        calls.append(which)
        return None if len(calls) == 1 else find(*which)

    monkeypatch.setattr(gateway.ledger, "find_by_key", find_late)
    assert gateway.jobs.create_in_folder(alice, folder, "run.sh").id == job.id


def test_another_script_in_the_folder_of_a_living_job_is_a_conflict(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    job = launch(gateway, alice, folder)
    rewrite(gateway, alice, folder, b"#!/bin/sh\necho other\n")
    with pytest.raises(Conflict, match=job.id):
        launch(gateway, alice, folder)
    backend.end("101")
    assert current(gateway, job).job_state is JobState.COMPLETED
    assert launch(gateway, alice, folder).id != job.id


def test_a_key_belongs_to_its_folder_and_script(gateway: Gateway, alice: User, folder: str) -> None:
    job = launch(gateway, alice, folder, key="mine")
    assert launch(gateway, alice, folder, key="mine").id == job.id
    rewrite(gateway, alice, folder, b"#!/bin/sh\necho other\n")
    with pytest.raises(Conflict, match="key"):
        launch(gateway, alice, folder, key="mine")


def test_a_refused_job_says_why_and_may_be_launched_again(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    def refuse(_: Submission) -> str:
        raise Refused("invalid partition specified: nope")

    backend.on_submit = refuse
    with pytest.raises(SubmissionRefused, match="invalid partition specified: nope"):
        launch(gateway, alice, folder)
    backend.on_submit = None
    job = launch(gateway, alice, folder)
    assert (job.job_state, job.attempt) == (JobState.QUEUED, 2)


def test_a_job_that_is_refused_for_now_waits_and_is_submitted(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, later: list[timedelta]
) -> None:
    def defer(_: Submission) -> str:
        raise Deferred("the controller is down")

    backend.on_submit = defer
    job = launch(gateway, alice, folder)
    assert (job.job_state, job.message) == (JobState.SUBMITTING, "the controller is down")
    backend.on_submit = None
    gateway.jobs.reconcile()
    assert backend.submissions == []  # It rests for a while before the next attempt.
    later.append(timedelta(seconds=30))
    gateway.jobs.reconcile()
    assert settled(gateway, job).job_state is JobState.QUEUED
    assert len(backend.submissions) == 1


def settled(gateway: Gateway, job: Job) -> Job:
    """The job once the submission under way, if any, is over."""
    gateway.jobs.launch(gateway.ledger.user(job.user_id), gateway.ledger.get(job.id))  # type: ignore[arg-type]
    return current(gateway, job)


def test_a_lost_answer_is_found_again_and_not_submitted_twice(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    def lose(submission: Submission) -> str:
        backend.accept(submission)
        raise Unknown("Socket timed out on send/recv operation")

    backend.on_submit = lose
    job = launch(gateway, alice, folder)
    assert job.job_state is JobState.SUBMITTING
    gateway.jobs.reconcile()
    assert current(gateway, job).scheduler_id == "101"
    assert len(backend.submissions) == 1


def test_a_lost_submission_that_ran_and_was_forgotten_is_found_by_its_guard(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, later: list[timedelta]
) -> None:
    def lose(submission: Submission) -> str:
        backend.accept(submission)
        raise Unknown("Socket timed out on send/recv operation")

    backend.on_submit = lose
    job = launch(gateway, alice, folder)
    backend.run("101")
    backend.end("101", JobState.FAILED, 3)
    forgotten = backend.forget("101")
    later.append(timedelta(hours=1))
    gateway.jobs.reconcile()
    assert current(gateway, job).scheduler_id == "101"
    assert len(backend.submissions) == 1
    backend.recall(forgotten)
    ended = gateway.jobs.get(alice, job.id, fresh=True)
    assert (ended.job_state, ended.exit_code) == (JobState.FAILED, 3)


def test_a_submission_that_never_arrived_is_repeated_only_after_settling(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, later: list[timedelta]
) -> None:
    backend._settling_time = 30.0

    def swallow(_: Submission) -> str:
        raise Unknown("Socket timed out on send/recv operation")

    backend.on_submit = swallow
    job = launch(gateway, alice, folder)
    backend.on_submit = None
    gateway.jobs.reconcile()
    later.append(timedelta(seconds=25))
    gateway.jobs.reconcile()
    assert backend.submissions == []
    later.append(timedelta(seconds=10))
    gateway.jobs.reconcile()
    assert settled(gateway, job).job_state is JobState.QUEUED
    assert len(backend.submissions) == 1


def test_while_the_scheduler_is_down_nothing_is_submitted_again(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, later: list[timedelta]
) -> None:
    def lose(submission: Submission) -> str:
        backend.accept(submission)
        raise Unknown("no answer")

    backend.on_submit = lose
    job = launch(gateway, alice, folder)
    backend.down = True
    later.append(timedelta(days=1))
    gateway.jobs.reconcile()
    backend.down = False
    gateway.jobs.reconcile()
    assert current(gateway, job).scheduler_id == "101"
    assert len(backend.submissions) == 1


class Killed(BaseException):
    """The process ends here."""


def test_a_gateway_killed_between_sbatch_and_its_record_finds_the_job(
    gateway: Gateway,
    backend: FakeBackend,
    alice: User,
    folder: str,
    later: list[timedelta],
    clock: Callable[[], datetime],
) -> None:
    def killed(submission: Submission) -> str:
        backend.accept(submission)
        raise Killed

    backend.on_submit = killed
    job = launch(gateway, alice, folder)
    backend.on_submit = None
    after_restart = Gateway(gateway.settings, backend, now=clock)
    try:
        later.append(timedelta(minutes=2))
        after_restart.jobs.reconcile()
        assert current(after_restart, job).scheduler_id == "101"
        assert len(backend.submissions) == 1
    finally:
        after_restart.jobs.close()
        after_restart.ledger.close()


def test_a_submitter_that_lost_its_lease_cancels_its_duplicate(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    def frozen(submission: Submission) -> str:
        first = backend.accept(submission)
        row = gateway.ledger.get(submission.jobid)
        assert row is not None
        # Meanwhile another gateway takes over and submits, too.
        gateway.ledger.change(row, {"state": JobState.QUEUED, "scheduler_id": "999"}, take_over=True)
        return first

    backend.on_submit = frozen
    job = launch(gateway, alice, folder)
    assert current(gateway, job).scheduler_id == "999"
    assert backend.cancelled == ["101"]


def test_of_two_copies_the_one_that_runs_user_code_stays(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    def twice(submission: Submission) -> str:
        backend.accept(submission)
        second = backend.accept(submission)
        Path(folder, submission.guard).write_text(f"{second}\n")
        raise Unknown("Socket timed out on send/recv operation")

    backend.on_submit = twice
    job = launch(gateway, alice, folder)
    gateway.jobs.reconcile()
    assert current(gateway, job).scheduler_id == "102"
    assert backend.cancelled == ["101"]


def test_states_follow_the_scheduler_and_an_end_is_final(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    job = launch(gateway, alice, folder)
    assert current(gateway, job).job_state is JobState.QUEUED
    backend.run("101")
    assert current(gateway, job).job_state is JobState.RUNNING
    backend.end("101", JobState.FAILED, exit_code=3)
    ended = current(gateway, job)
    assert (ended.job_state, ended.exit_code) == (JobState.FAILED, 3)
    backend.jobs.clear()
    assert current(gateway, job).job_state is JobState.FAILED


def test_absence_changes_nothing(gateway: Gateway, backend: FakeBackend, alice: User, folder: str) -> None:
    job = launch(gateway, alice, folder)
    backend.run("101")
    assert current(gateway, job).job_state is JobState.RUNNING
    remembered = dict(backend.jobs)
    backend.jobs.clear()
    for _ in range(3):
        assert current(gateway, job).job_state is JobState.RUNNING
    backend.jobs.update(remembered)
    backend.down = True
    assert current(gateway, job).job_state is JobState.RUNNING
    assert gateway.jobs.as_wire(job)["message"] == "the fake scheduler is down"


def test_one_round_of_questions_serves_everybody(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    jobs = [launch(gateway, alice, folder)]
    gateway.watch._interval = 60.0
    gateway.watch._asked = None
    backend.questions.clear()
    for _ in range(10):
        gateway.jobs.states(alice, [job.id for job in jobs])
    assert backend.questions == ["queue"]


def test_a_job_that_was_given_up_by_a_gateway_that_could_not_say_so_has_not_failed(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    job = launch(gateway, alice, folder)
    Path(folder, guard_of(job.id)).write_text(f"{GATEWAY}\n")
    assert not backend.run("101")
    refused = gateway.jobs.get(alice, job.id, fresh=True)
    assert (refused.job_state, refused.exit_code, refused.duplicates) == (JobState.REFUSED, None, ["101"])
    assert launch(gateway, alice, folder).attempt == 2
    assert backend.run("102")
    backend.end("102", JobState.COMPLETED, 0)
    assert gateway.jobs.get(alice, job.id, fresh=True).job_state is JobState.COMPLETED


def test_cancel_may_be_repeated_and_does_not_change_an_end(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    job = gateway.jobs.create_in_folder(alice, folder, "run.sh")
    with pytest.raises(Conflict, match="not launched yet"):
        gateway.jobs.cancel(job)
    job = gateway.jobs.launch(alice, job)
    assert gateway.jobs.cancel(job).job_state is JobState.CANCELLED
    assert gateway.jobs.cancel(current(gateway, job)).job_state is JobState.CANCELLED
    assert backend.cancelled == ["101"]


def test_a_job_that_is_cancelled_unlaunched_is_never_launched(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    job = gateway.jobs.create_in_folder(alice, folder, "run.sh")
    assert gateway.jobs.cancel(job, unlaunched=True).job_state is JobState.CANCELLED
    assert gateway.jobs.launch(alice, job).job_state is JobState.CANCELLED  # As the launch that was late sees it,
    assert launch(gateway, alice, folder).id == job.id  # and whoever creates it again.
    assert backend.submissions == []


def test_a_launch_that_wins_against_its_cancellation_is_cancelled(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    job = gateway.jobs.create_in_folder(alice, folder, "run.sh")
    gateway.jobs.launch(alice, job)
    assert gateway.jobs.cancel(job, unlaunched=True).job_state is JobState.CANCELLED
    assert backend.cancelled == ["101"]


def test_a_cancellation_is_not_lost_where_the_job_has_started_since_it_was_read(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    read = launch(gateway, alice, folder)
    backend.run("101")
    assert gateway.jobs.get(alice, read.id, fresh=True).job_state is JobState.RUNNING
    backend.down = True
    assert gateway.jobs.cancel(read).cancel_requested
    backend.down = False
    gateway.jobs.reconcile()
    assert current(gateway, read).job_state is JobState.CANCELLED


def test_a_cancellation_is_answered_while_the_scheduler_hangs(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, released, cancel = threading.Event(), threading.Event(), backend.cancel

    def hang(id: str, folder: str | None = None) -> None:
        asked.set()
        assert released.wait(30)
        cancel(id, folder)

    job = launch(gateway, alice, folder)
    monkeypatch.setattr(backend, "cancel", hang)
    gateway.jobs._patience = 0.05
    wanted = gateway.jobs.cancel(job)
    assert (wanted.job_state, wanted.cancel_requested) == (JobState.QUEUED, True)
    assert asked.wait(30)
    released.set()
    gateway.jobs.close()  # Which waits for it.
    assert backend.cancelled == ["101"]


def test_a_cancellation_that_the_scheduler_did_not_take_is_tried_again(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    job = launch(gateway, alice, folder)
    backend.down = True
    wanted = gateway.jobs.cancel(job)
    assert (wanted.job_state, wanted.cancel_requested) == (JobState.QUEUED, True)
    backend.down = False
    gateway.jobs.reconcile()
    assert current(gateway, job).job_state is JobState.CANCELLED


def test_a_cancellation_that_was_taken_is_not_repeated_at_once(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, later: list[timedelta]
) -> None:
    job = launch(gateway, alice, folder)
    backend.run("101")
    backend.stubborn = True
    gateway.jobs.cancel(job)
    gateway.jobs.reconcile()
    assert backend.cancelled == ["101"]
    later.append(timedelta(minutes=2))
    gateway.jobs.reconcile()
    assert backend.cancelled == ["101", "101"]


def test_a_job_that_waits_to_be_submitted_is_cancelled_without_being_submitted(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, later: list[timedelta]
) -> None:
    def defer(_: Submission) -> str:
        raise Deferred("the controller is down")

    backend.on_submit = defer
    job = launch(gateway, alice, folder)
    assert gateway.jobs.cancel(job).job_state is JobState.CANCELLED
    backend.on_submit = None
    later.append(timedelta(hours=1))
    gateway.jobs.reconcile()
    assert backend.submissions == []


def test_somebody_elses_job_is_no_job(gateway: Gateway, alice: User, folder: str) -> None:
    job = launch(gateway, alice, folder)
    bob = gateway.ledger.user_of(Identity("dev", "bob", "bob@example.org", "Bob"))
    with pytest.raises(NotFound):
        gateway.jobs.get(bob, job.id)
    assert gateway.jobs.states(bob, [job.id]) == ({}, [job.id])
    assert gateway.jobs.active(bob) == []


def test_a_script_changed_while_the_job_waited_is_not_run(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, later: list[timedelta]
) -> None:
    def defer(_: Submission) -> str:
        raise Deferred("the controller is down")

    backend.on_submit = defer
    job = launch(gateway, alice, folder)
    backend.on_submit = None
    rewrite(gateway, alice, folder, b"#!/bin/sh\necho other\n")
    later.append(timedelta(minutes=1))
    gateway.jobs.reconcile()
    refused = current(gateway, job)
    assert refused.job_state is JobState.REFUSED
    assert "was changed" in (refused.message or "")
    assert backend.submissions == []


@pytest.mark.parametrize("odd", ["a\0b", "\ud800"])
def test_keys_that_no_database_can_hold_are_refused(gateway: Gateway, alice: User, folder: str, odd: str) -> None:
    with pytest.raises(InvalidRequest, match="key"):
        gateway.jobs.create_in_folder(alice, folder, "run.sh", key=odd)
    with pytest.raises(InvalidRequest, match="key"):
        gateway.jobs.create_with_script(alice, folder, b"", key=odd)
