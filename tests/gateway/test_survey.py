"""A ledger that was lost, or is behind, learns from the scheduler which jobs there are, before anything is submitted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from aiida_marketplace_hpc.errors import Conflict, Unavailable
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.backends.base import Observation, Submission, Trace, Unknown
from aiida_marketplace_hpc.gateway.backends.systems import Systems
from aiida_marketplace_hpc.gateway.ledger import utc_now
from aiida_marketplace_hpc.gateway.schema import Job, User
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.gateway.submission import guard_of
from aiida_marketplace_hpc.gateway.survey import Survey
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.backend import FakeBackend

pytestmark = pytest.mark.databases

ALICE = Identity("dev", "alice", "alice@example.org", "Alice")


def launch(gateway: Gateway, user: User, folder: str, **options: str) -> Job:
    return gateway.jobs.launch(user, gateway.jobs.create_in_folder(user, folder, "run.sh", **options))


def start(gateway: Gateway, folder: str, job: Job, identifier: str) -> None:
    """What the wrapper does when a job starts."""
    Path(folder, guard_of(job.id)).write_text(f"{identifier}\n{job.script_digest}\n")


@pytest.fixture
def without_ledger(
    gateway: Gateway, backend: FakeBackend, clock: Callable[[], datetime], tmp_path: Path
) -> Iterator[Callable[[], Gateway]]:
    """Start the gateway again with an empty database."""
    made: list[Gateway] = []

    def make() -> Gateway:
        settings = gateway.settings.model_copy(update={"database": f"sqlite:///{tmp_path}/new{len(made)}.sqlite"})
        new = Gateway(settings, backend, now=clock)
        new.ledger.migrate()
        made.append(new)
        return new

    yield make
    for new in made:
        new.jobs.close()
        new.ledger.close()


def test_a_lost_ledger_adopts_living_jobs_and_submits_none_again(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, without_ledger: Callable[[], Gateway]
) -> None:
    job = launch(gateway, alice, folder, client_ref="node-of-aiida")
    backend.run("101")
    anew = without_ledger()
    anew.jobs.reconcile()
    user = anew.ledger.user_of(ALICE)
    assert user.username == alice.username
    adopted = anew.jobs.get(user, job.id)
    assert (adopted.scheduler_id, adopted.script_digest) == ("101", job.script_digest)
    assert (adopted.folder, adopted.client_ref) == (folder, "node-of-aiida")
    assert launch(anew, user, folder).id == job.id
    assert len(backend.submissions) == 1
    backend.end("101", JobState.FAILED, exit_code=3)
    assert anew.jobs.get(user, job.id, fresh=True).exit_code == 3


def test_an_adopted_job_is_its_owners_alone(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, without_ledger: Callable[[], Gateway]
) -> None:
    job = launch(gateway, alice, folder)
    anew = without_ledger()
    anew.jobs.reconcile()
    namesake = anew.ledger.user_of(Identity("dev", "other", "alice@elsewhere.org", "Another Alice"))
    assert namesake.username != alice.username
    assert anew.jobs.states(namesake, [job.id]) == ({}, [job.id])
    assert [one["jobid"] for one in anew.jobs.active(anew.ledger.user_of(ALICE))] == [job.id]


def test_an_owner_who_comes_in_the_moment_in_which_a_job_of_theirs_is_adopted_is_one_user(
    without_ledger: Callable[[], Gateway],
) -> None:
    ledger = without_ledger().ledger

    def names(base: str, owner: str) -> list[str]:
        adopted.append(ledger.user_by_owner(owner, "alice"))
        return [base]

    adopted: list[User] = []
    user = ledger.user_of(ALICE, names)
    assert [user.id] == [one.id for one in adopted] == [one.id for one in ledger.users()]
    assert (user.username, user.email) == ("alice", ALICE.email)


def test_a_forged_trace_gives_nobody_somebody_elses_folder_name(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, without_ledger: Callable[[], Gateway]
) -> None:
    launch(gateway, alice, folder)
    gateway.homes.claim(alice)
    backend.submitted["101"] = replace(backend.submitted["101"], owner="somebody else")
    anew = without_ledger()
    anew.jobs.reconcile()
    assert anew.ledger.users() == []
    assert anew.ledger.user_of(ALICE, anew.homes.names).username == alice.username


def test_until_the_scheduler_has_answered_nothing_is_submitted(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, without_ledger: Callable[[], Gateway]
) -> None:
    job = launch(gateway, alice, folder)
    anew = without_ledger()
    anew.jobs._patience = 0.05
    user = anew.ledger.user_of(ALICE)
    backend.down = True
    anew.jobs.reconcile()
    waiting = launch(anew, user, folder)
    assert waiting.job_state is JobState.SUBMITTING
    assert "which jobs there are" in (waiting.message or "")
    assert len(backend.submissions) == 1
    backend.down = False
    anew.jobs.reconcile()
    # It lives already: the request that came before that was known has the same job now.
    assert anew.jobs.get(user, waiting.id).scheduler_id == "101"
    assert len(backend.submissions) == 1
    assert job.id != waiting.id


def test_what_waited_for_the_first_answer_is_submitted_after_it(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, without_ledger: Callable[[], Gateway]
) -> None:
    anew = without_ledger()
    anew.jobs._patience = 0.05
    user = anew.ledger.user_of(ALICE)
    backend.down = True
    anew.jobs.reconcile()
    waiting = launch(anew, user, folder)
    backend.down = False
    anew.jobs.reconcile()
    anew.jobs._submissions.wait(waiting.id, 10)
    assert anew.jobs.get(user, waiting.id).job_state is JobState.QUEUED
    assert len(backend.submissions) == 1


def test_a_job_that_ended_before_the_ledger_was_lost_does_not_run_again(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, without_ledger: Callable[[], Gateway]
) -> None:
    job = launch(gateway, alice, folder)
    start(gateway, folder, job, "101")
    backend.end("101", JobState.FAILED, exit_code=4)
    anew = without_ledger()
    anew.jobs.reconcile()
    user = anew.ledger.user_of(ALICE)
    again = launch(anew, user, folder)
    assert again.id == job.id
    assert anew.jobs.get(user, job.id, fresh=True).exit_code == 4
    assert len(backend.submissions) == 1


def test_a_guard_that_nobody_can_explain_is_a_conflict_and_not_a_second_run(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, without_ledger: Callable[[], Gateway]
) -> None:
    job = launch(gateway, alice, folder)
    start(gateway, folder, job, "101")
    backend.jobs.clear()
    anew = without_ledger()
    anew.jobs.reconcile()
    user = anew.ledger.user_of(ALICE)
    backend.down = True
    with pytest.raises(Unavailable, match="not known now"):
        launch(anew, user, folder)
    backend.down = False
    with pytest.raises(Conflict, match=guard_of(job.id)):
        launch(anew, user, folder)
    Path(folder, guard_of(job.id)).unlink()
    assert launch(anew, user, folder).job_state is JobState.QUEUED


def test_a_forged_guard_gives_nobody_somebody_elses_job(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    launch(gateway, alice, folder)
    bob = gateway.ledger.user_of(Identity("dev", "bob", "bob@example.org", "Bob"))
    files = gateway.files_of(bob)
    files.roots.prepare()
    root = files.roots.by_name("home")
    assert root is not None
    own = f"{root.path}/work"
    files.mkdir(own)
    Path(own, "run.sh").write_text("#!/bin/sh\necho done\n")
    digest = gateway.jobs.create_in_folder(alice, folder, "run.sh").script_digest
    Path(own, guard_of("f" * 24)).write_text(f"101\n{digest}\n")
    with pytest.raises(Conflict):
        gateway.jobs.create_in_folder(bob, own, "run.sh")
    assert gateway.jobs.of_user(bob) == []


def test_a_row_that_is_behind_learns_that_its_job_lives(
    gateway: Gateway,
    backend: FakeBackend,
    alice: User,
    folder: str,
    clock: Callable[[], datetime],
    copied: Callable[[str], str],
) -> None:
    job = gateway.jobs.create_in_folder(alice, folder, "run.sh")
    backup = copied(gateway.settings.database_url)
    gateway.jobs.launch(alice, job)
    settings = gateway.settings.model_copy(update={"database": backup})
    restored = Gateway(settings, backend, now=clock)
    try:
        assert restored.jobs.get(alice, job.id).job_state is JobState.CREATED
        restored.jobs.reconcile()
        assert restored.jobs.get(alice, job.id).scheduler_id == "101"
        assert restored.jobs.launch(alice, job).id == job.id
        assert len(backend.submissions) == 1
    finally:
        restored.jobs.close()
        restored.ledger.close()


@pytest.mark.parametrize("started", [False, True])
def test_a_job_that_is_confirmed_while_the_scheduler_is_asked_for_its_script_is_no_second_copy_of_itself(
    gateway: Gateway,
    backend: FakeBackend,
    alice: User,
    folder: str,
    started: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway.jobs.reconcile()
    job = launch(gateway, alice, folder)
    if started:
        start(gateway, folder, job, "101")
    # What the survey has read before.
    monkeypatch.setattr(gateway.ledger, "folders_of", lambda ids: {})
    gateway.jobs.reconcile()
    after = gateway.jobs.get(alice, job.id)
    assert (after.job_state, after.scheduler_id, after.duplicates) == (JobState.QUEUED, "101", None)
    assert backend.cancelled == []


def test_a_second_copy_that_comes_late_is_ended_and_recorded(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    job = launch(gateway, alice, folder)
    late = backend.accept(backend.submissions[0])
    for _ in range(2):
        gateway.jobs.reconcile()
    assert backend.cancelled == [late]
    current = gateway.jobs.get(alice, job.id)
    assert (current.scheduler_id, current.duplicates) == ("101", [late])
    assert gateway.jobs.as_wire(current, accounting=True)["duplicates"] == [late]


def test_a_copy_that_has_the_guard_is_the_job(gateway: Gateway, backend: FakeBackend, alice: User, folder: str) -> None:
    job = launch(gateway, alice, folder)
    late = backend.accept(backend.submissions[0])
    start(gateway, folder, job, late)
    gateway.jobs.reconcile()
    current = gateway.jobs.get(alice, job.id)
    assert (current.scheduler_id, current.duplicates) == (late, ["101"])
    assert backend.cancelled == ["101"]


def test_a_submission_that_arrives_after_its_cancellation_is_ended(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str, later: list[timedelta]
) -> None:
    lost: list[Submission] = []

    def lose(submission: Submission) -> str:
        lost.append(submission)
        raise Unknown("Socket timed out")

    backend.on_submit = lose
    job = launch(gateway, alice, folder)
    gateway.jobs.cancel(job)
    later.append(timedelta(hours=1))
    gateway.jobs.reconcile()
    assert gateway.jobs.get(alice, job.id).job_state is JobState.CANCELLED
    late = backend.accept(lost[0])
    gateway.jobs.reconcile()
    assert backend.cancelled == [late]
    assert gateway.jobs.get(alice, job.id).duplicates == [late]


def test_a_users_own_job_in_the_same_folder_is_left_alone(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    launch(gateway, alice, folder)
    own = backend.accept(backend.submissions[0])
    backend.submitted.pop(own)
    gateway.jobs.reconcile()
    assert backend.cancelled == []
    backend.questions.clear()
    gateway.jobs.reconcile()
    assert "traces" not in backend.questions  # It is looked at once.


def test_a_job_that_has_the_id_of_an_old_one_is_another_job(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    job = launch(gateway, alice, folder)
    backend.run("101")
    gateway.jobs.reconcile()
    stranger = replace(
        backend.jobs["101"], folder="/somewhere/else", state=JobState.COMPLETED, native_state="COMPLETED"
    )
    backend.jobs["101"] = stranger
    backend.submitted.pop("101")
    gateway.jobs.reconcile()
    assert gateway.jobs.get(alice, job.id, fresh=True).job_state is JobState.RUNNING


def test_in_a_folder_lives_one_job_whoever_asks_at_the_same_time(
    gateway: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    jobs: list[Job] = []
    for number in range(2):
        Path(folder, "run.sh").write_text(f"#!/bin/sh\necho {number}\n")
        jobs.append(gateway.jobs.create_in_folder(alice, folder, "run.sh"))
    both = threading.Barrier(2)
    conflicts: list[Conflict] = []

    def go(job: Job) -> None:
        both.wait()
        try:
            gateway.jobs.launch(alice, job)
        except Conflict as exc:
            conflicts.append(exc)

    threads = [threading.Thread(target=go, args=[job]) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conflicts) == 1
    assert len(backend.submissions) == 1


def test_a_machine_of_several_has_been_looked_through_when_its_own_jobs_were_asked_for(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue without any job of its may be from before it answered."""
    backends = {"alps": FakeBackend(), "bora": FakeBackend()}
    systems = Systems(backends)
    seen: list[tuple[str, str]] = []
    folder = str(tmp_path)
    systems.on("bora").submit(Submission("a" * 24, folder, f"{folder}/run.sh", b"#!/bin/sh\n", "", None, ""))
    survey = Survey(gateway.ledger, systems, gateway.jobs._submissions, lambda *_: None, machine="alps", now=utc_now)

    def settle(one: Observation, trace: Trace) -> bool:
        seen.append((one.id, trace.jobid))
        return True

    monkeypatch.setattr(survey, "_settle", settle)
    assert not survey.is_done("bora")
    survey.look({})
    assert seen == [("bora/101", "a" * 24)]
    assert survey.is_done("bora")
    assert not survey.is_done("carme")
    systems.stop()
