"""G1, G2, G3: two gateways on one database, their clients, a scheduler, and everything that goes wrong, in any order.

After each step the invariants hold; at the end of each run everything is mended, time passes, and every job has its true end.
"""

from __future__ import annotations

import logging
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aiida_marketplace_hpc.bundle import digest_of
from aiida_marketplace_hpc.errors import MarketplaceHpcError
from aiida_marketplace_hpc.gateway.backends.base import Observation
from aiida_marketplace_hpc.gateway.jobs import Jobs
from aiida_marketplace_hpc.gateway.schema import Job
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.faulty_scheduler import (
    DeferSubmission,
    EmptyAnswer,
    HalfRecords,
    Hang,
    Lag,
    Late,
    LoseConfirmation,
    LoseSubmission,
    LostAnswer,
    NoAnswer,
    PartOfAnswer,
    Question,
    QuestionFault,
    RefuseSubmission,
    Slow,
    SubmissionFault,
)
from aiida_marketplace_hpc.testing.replica import Killed, Replica
from tests.guarantees.replicas import SCRIPT, SETTLING_TIME, Site, Sites

FOLDERS = ("a", "b")
REPLICAS = 2
LAG = 8.0
BREAKING: dict[Question, tuple[QuestionFault, ...]] = {
    "queue": (NoAnswer(), LostAnswer(), Slow(10), EmptyAnswer(), PartOfAnswer(), HalfRecords(), Lag(LAG)),
    "accounting": (NoAnswer(), LostAnswer(), Slow(10), EmptyAnswer(), PartOfAnswer(), HalfRecords()),
    # What is not there is not there: so far a backend has to tell the truth.
    "find": (NoAnswer(), LostAnswer(), Slow(10), Lag(LAG)),
    "cancel": (NoAnswer(), LostAnswer(), Slow(10)),
    "traces": (NoAnswer(), LostAnswer(), Slow(10)),
}
VERY_LATE = 120.0
"""Seconds: more than any lease and the settling time."""
SUBMISSION_FAULTS: tuple[Callable[[], SubmissionFault], ...] = (
    LoseSubmission,
    LoseConfirmation,
    lambda: Late(2.0),
    lambda: Late(SETTLING_TIME - LAG - 1),
    lambda: Late(VERY_LATE),
    RefuseSubmission,
    DeferSubmission,
    lambda: Hang("before"),
    lambda: Hang("after"),
)


MakesFault = Callable[[], SubmissionFault]
REPLICA = st.integers(0, REPLICAS - 1)
SUBMISSION = st.one_of(st.none(), st.sampled_from(SUBMISSION_FAULTS))
VERSION = st.integers(0, 2)
WHICH = st.integers(0, 3)
SECONDS = st.sampled_from([1.0, 16.0, 35.0, 100.0])
ELSEWHERE = "/elsewhere"
_Thing = TypeVar("_Thing")


class JobsUnderFaults(RuleBasedStateMachine):
    """Everything is addressed by small numbers, taken modulo what there is."""

    sites: Sites

    def __init__(self) -> None:
        super().__init__()
        self._ledger: list[Job] | None = None
        self._stack = ExitStack()
        self.site: Site = self._stack.enter_context(self.sites.new())
        self.replicas: list[Replica | None] = [self._started() for _ in range(REPLICAS)]
        self.hangs: list[Hang] = []
        self.released: dict[int, datetime] = {}
        self.unwanted: set[tuple[str, int]] = set()
        """Jobs, and which attempt, that were cancelled."""
        self.forgotten: list[Observation] = []
        self.truth: dict[str, tuple[JobState, int | None]] = {}
        self.ends: dict[str, tuple[str, int | None]] = {}

    # The clients

    @initialize(replica=REPLICA, fault=SUBMISSION)
    def begin(self, replica: int, fault: MakesFault | None) -> None:
        self.launch(replica, "a", 0, fault)

    @rule(replica=REPLICA, folder=st.sampled_from(FOLDERS), version=VERSION)
    def create(self, replica: int, folder: str, version: int) -> None:
        self._write(folder, version)
        self._ask(replica, lambda jobs: self._create(jobs, folder))

    @rule(replica=REPLICA, folder=st.sampled_from(FOLDERS), version=VERSION, fault=SUBMISSION)
    def launch(self, replica: int, folder: str, version: int, fault: MakesFault | None) -> None:
        self._write(folder, version)
        self._break_next(fault)
        self._ask(replica, lambda jobs: jobs.launch(self.site.alice, self._create(jobs, folder)))

    @rule(replica=REPLICA, which=WHICH, fault=SUBMISSION)
    def launch_by_id(self, replica: int, which: int, fault: MakesFault | None) -> None:
        job = _pick(self._jobs(), which)
        if job is not None and self._has_its_script(job):
            self._break_next(fault)
            self._ask(replica, lambda jobs: jobs.launch(self.site.alice, job))

    @rule(replica=REPLICA, which=WHICH, unlaunched=st.booleans())
    def cancel(self, replica: int, which: int, unlaunched: bool) -> None:
        if job := _pick(self._jobs(), which):
            self._ask(replica, lambda jobs: jobs.cancel(job, unlaunched=unlaunched))
            if self.replicas[replica] is not None:
                # Done, or refused for now: then the wish is recorded.
                self.unwanted |= {(one.id, one.attempt) for one in self._jobs() if one.id == job.id}

    @rule(replica=REPLICA)
    def poll(self, replica: int) -> None:
        ids = [job.id for job in self._jobs()]
        self._ask(replica, lambda jobs: jobs.states(self.site.alice, ids))

    # The gateways

    @rule(replica=REPLICA, seconds=SECONDS, fault=SUBMISSION)
    def time_passes_and_a_gateway_reconciles(self, replica: int, seconds: float, fault: MakesFault | None) -> None:
        self.site.clock.sleep(seconds)
        self._break_next(fault)
        self._ask(replica, lambda jobs: jobs.reconcile())

    @rule(replica=REPLICA, moments=st.integers(0, 6))
    def kill_soon(self, replica: int, moments: int) -> None:
        running = self.replicas[replica]
        if running is not None:
            running.moments.kill_in(moments)

    # The scheduler

    @rule(data=st.data(), question=st.sampled_from(sorted(BREAKING)))
    def break_questions(self, data: st.DataObject, question: Question) -> None:
        self.site.scheduler.disturb(data.draw(st.sampled_from(BREAKING[question])), question)

    @rule(fault=st.sampled_from([NoAnswer(), EmptyAnswer(), PartOfAnswer(), HalfRecords()]))
    def break_all_that_is_said_about_states(self, fault: QuestionFault) -> None:
        self.site.scheduler.disturb(fault, "queue", "accounting")

    @rule()
    def heal(self) -> None:
        self.site.scheduler.heal()

    @precondition(lambda self: self.hangs)
    @rule()
    def release(self) -> None:
        self._release(self.hangs.pop(0))

    @rule()
    def a_job_starts(self) -> None:
        """In their order, as Slurm does for one user and partition; what happens else is in ``test_g1_g2_g3_races``."""
        if job := _pick(self._held(JobState.QUEUED), 0):
            self._start(job.id)

    @rule(which=WHICH, exit_code=st.integers(0, 2))
    def a_job_ends(self, which: int, exit_code: int) -> None:
        if job := _pick(self._held(JobState.RUNNING), which):
            self._end(job.id, exit_code)

    @rule(which=WHICH, what=st.sampled_from(["requeue", "forget", "recall", "give away"]))
    def ids_change_their_meaning(self, which: int, what: str) -> None:
        batch = self.site.batch
        running, ended = self._held(JobState.RUNNING), [job for job in batch.jobs.values() if job.state.final]
        # Given away once their end is known: the accounting shows only the newest job of an id.
        known = {job.scheduler_id for job in self._jobs() if job.job_state.final}
        if what == "requeue" and (job := _pick(running, which)):
            batch.requeue(job.id)
        elif what == "forget" and (job := _pick(ended, which)):
            self.forgotten.append(batch.forget(job.id))
        elif what == "recall" and self.forgotten:
            batch.recall(self.forgotten.pop(0))
        elif what == "give away" and (job := _pick([job for job in ended if job.id in known], which)):
            batch.give_away(job.id, ELSEWHERE)

    # What holds after each step

    @invariant()
    def a_script_is_executed_once(self) -> None:
        ran: dict[tuple[str, str], set[str]] = defaultdict(set)
        for id in self.site.batch.executed:
            submission = self.site.batch.submission_of(id)
            ran[submission.folder, submission.script_digest].add(id)
        assert all(len(ids) == 1 for ids in ran.values()), ran

    @invariant()
    def there_is_one_job_of_the_scheduler_but_for_the_documented_race(self) -> None:
        copies = Counter(submission.jobid for submission in self.site.batch.submissions)
        for jobid, number in copies.items():
            assert number <= 1 + self._races(jobid), (jobid, number)

    @invariant()
    def nothing_that_lives_is_reported_finished(self) -> None:
        for job in self._jobs():
            if job.job_state.final:
                living = [id for id in self._copies(job) if id in self.site.batch.executed and self._lives(id)]
                assert not living or self._was_given_up_in_a_race(job), (job.state, living)
                if job.scheduler_id in self._copies(job):
                    assert not self._lives(job.scheduler_id), job.state

    @invariant()
    def an_end_never_changes(self) -> None:
        for job in self._jobs():
            if job.job_state.final and job.job_state is not JobState.REFUSED:
                assert self.ends.setdefault(job.id, (job.state, job.exit_code)) == (job.state, job.exit_code)

    # And in the end

    def teardown(self) -> None:
        try:
            to_be_cancelled = {
                job.id
                for job in self._jobs()
                if (job.id, job.attempt) in self.unwanted and job.job_state.active and not self._has_ended(job)
            }
            self._mend()
            self._let_everything_end()
            for job in self._jobs():
                self._check_end(job)
                assert job.id not in to_be_cancelled or job.job_state in (JobState.CANCELLED, JobState.REFUSED)
        finally:
            self._stack.close()

    def _mend(self) -> None:
        self.site.scheduler.heal()
        while self.hangs:
            self._release(self.hangs.pop(0))
        for job in self.forgotten:
            self.site.batch.recall(job)
        for replica in self.replicas:
            if replica is not None:
                replica.moments.kill()
        self.replicas = [self._started() for _ in range(REPLICAS)]

    def _let_everything_end(self) -> None:
        for _ in range(30):
            self.site.clock.sleep(31)
            for number in range(REPLICAS):
                self._ask(number, lambda jobs: jobs.reconcile())
            for job in self._held(JobState.RUNNING):
                self._end(job.id, 0)
            for job in self._held(JobState.QUEUED):
                self._start(job.id)
            for check in (
                self.a_script_is_executed_once,
                self.there_is_one_job_of_the_scheduler_but_for_the_documented_race,
                self.nothing_that_lives_is_reported_finished,
                self.an_end_never_changes,
            ):
                check()
            living = [id for job in self._jobs() for id in self._copies(job) if self._lives(id)]
            if not self.site.ledger.active() and not living:
                return
        raise AssertionError(f"these never end: {[(job.id, job.state) for job in self.site.ledger.active()]}, {living}")

    def _check_end(self, job: Job) -> None:
        executed = [id for id in self._copies(job) if id in self.site.batch.executed]
        if job.job_state is JobState.CREATED:
            assert not executed
        elif job.job_state is JobState.REFUSED:
            assert self._was_refused(job) or "was changed" in (job.message or ""), job.message
            assert not executed
        elif executed and not self._was_given_up_in_a_race(job):
            assert (job.job_state, job.exit_code) == self.truth[executed[0]], (job.id, executed, self.truth)
        elif not executed and not (self._was_refused(job) and self._races(job.id)):  # See test_g1_g2_g3_races.
            assert job.job_state is JobState.CANCELLED, (job.job_state, job.exit_code, self._copies(job))

    # How

    def _started(self) -> Replica:
        replica = self.site.replica()
        with suppress(MarketplaceHpcError):
            replica.gateway.jobs.reconcile()
        self._ledger = None
        return replica

    def _ask(self, number: int, what: Callable[[Jobs], object]) -> None:
        """Ask a gateway for something; it may refuse, or be killed meanwhile."""
        replica = self.replicas[number] or self._started()
        self.replicas[number] = replica
        try:
            what(replica.gateway.jobs)
        except MarketplaceHpcError as exc:
            note(f"refused: {exc}")
        except Killed as exc:
            note(f"killed {exc}")
        self._bury()
        self._learn()

    def _bury(self) -> None:
        self.replicas = [None if one is not None and one.moments.killed else one for one in self.replicas]

    def _release(self, hang: Hang) -> None:
        self.released[id(hang)] = self.site.clock.now()
        hang.release()
        self.site.wait_for_threads()
        self._bury()
        self._learn()

    def _learn(self) -> None:
        """Take down how jobs have ended, and that the ledger may have changed."""
        self._ledger = None
        for id, job in self.site.batch.jobs.items():
            if job.state.final:
                self.truth.setdefault(id, (job.state, job.exit_code))

    def _start(self, id: str) -> None:
        self.site.batch.run(id)
        self._learn()

    def _end(self, id: str, exit_code: int) -> None:
        self.site.batch.end(id, JobState.FAILED if exit_code else JobState.COMPLETED, exit_code)
        self._learn()

    def _create(self, jobs: Jobs, folder: str) -> Job:
        return jobs.create_in_folder(self.site.alice, self._path(folder), SCRIPT)

    def _write(self, folder: str, version: int) -> None:
        """Write another script, unless a job lives in the folder: then the gateway refuses that.

        Nor where a copy may still arrive: see ``test_g1_g2_g3_races``.
        """
        there = [job for job in self._jobs() if job.folder == self._path(folder)]
        if not any(job.job_state.active or self._races(job.id) for job in there):
            self.site.write(folder, f"#!/bin/sh\n# {version}\n")

    def _has_its_script(self, job: Job) -> bool:
        """Whether the script is the one of which the job was made; see ``test_g1_g2_g3_races`` for what happens else."""
        return digest_of(Path(job.folder, job.script).read_bytes()) == job.script_digest

    def _break_next(self, fault: MakesFault | None) -> None:
        if fault is not None:
            made = fault()
            if isinstance(made, Hang):
                self.hangs.append(made)
            self.site.scheduler.inject(made)

    def _path(self, folder: str) -> str:
        return str(self.site.home / folder)

    def _jobs(self) -> list[Job]:
        """As they are in the ledger, which only gateways change."""
        if self._ledger is None:
            jobs = self.site.ledger.of_user(self.site.alice.id)
            # Ids are random, and a run has to be the same when it is repeated.
            self._ledger = sorted(jobs, key=lambda job: (job.created_at, job.key))
        return self._ledger

    def _held(self, state: JobState) -> list[Observation]:
        return [job for job in list(self.site.batch.jobs.values()) if job.state is state and job.folder != ELSEWHERE]

    def _copies(self, job: Job) -> list[str]:
        batch = self.site.batch
        return [id for id in batch.ids if batch.submission_of(id).jobid == job.id]

    def _lives(self, id: str) -> bool:
        job = self.site.batch.jobs.get(id)
        return job is not None and not job.state.final and job.folder != ELSEWHERE

    def _has_ended(self, job: Job) -> bool:
        return any(id in self.truth for id in self._copies(job))

    def _was_refused(self, job: Job) -> bool:
        return any(id == job.id and isinstance(fault, RefuseSubmission) for id, fault, _ in self._happened)

    @property
    def _happened(self) -> list[tuple[str, SubmissionFault, datetime]]:
        return self.site.scheduler.happened

    def _races(self, jobid: str) -> int:
        """How often a submission was under way longer than its submitter can live, and a request to the scheduler."""
        longest = self.site.scheduler.submission_limit + SETTLING_TIME
        races = 0
        for submitted, fault, began in self._happened:
            if submitted == jobid and isinstance(fault, Late):
                races += fault.seconds >= longest
            elif submitted == jobid and isinstance(fault, Hang) and fault.when == "before":
                ended = self.released.get(id(fault), self.site.clock.now())
                races += (ended - began).total_seconds() >= longest
        return races

    def _was_given_up_in_a_race(self, job: Job) -> bool:
        return job.job_state in (JobState.CANCELLED, JobState.REFUSED) and bool(self._races(job.id))


def _pick(things: list[_Thing], which: int) -> _Thing | None:
    return things[which % len(things)] if things else None


def run(sites: Sites, examples: int, number: int | None) -> None:
    if sites.database == "postgresql":  # What it adds are its transactions, which are the same in every run.
        examples = max(1, examples // 10)
    machine = type("Machine", (JobsUnderFaults,), {"sites": sites})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine if number is None else seed(number)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            derandomize=number is None,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_whatever_happens_in_any_order(sites: Sites) -> None:
    run(sites, 90, None)


@pytest.mark.services
@pytest.mark.timeout(1800)
def test_whatever_happens_in_any_order_for_long(sites: Sites) -> None:
    number = int(os.environ.get("MARKETPLACE_HPC_SEED", "0")) or random.randrange(10**6)
    examples = int(os.environ.get("MARKETPLACE_HPC_EXAMPLES", "300"))
    print(f"\nseed {number}: {examples} runs")
    run(sites, examples, number)
