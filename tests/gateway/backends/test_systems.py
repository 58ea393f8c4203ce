"""Several machines behind one backend, each of which may fail alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from aiida_marketplace_hpc.gateway.backends.base import Deferred, Observation, SchedulerDown, Submission
from aiida_marketplace_hpc.gateway.backends.systems import OVERDUE, SILENCE, Systems
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.machine import wait_until

PATIENCE = 0.3
LONG_AGO = datetime.now(timezone.utc) - timedelta(days=1)


class Machine(FakeBackend):
    """One that may let a question wait."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.free.set()

    def queue(self) -> Mapping[str, Observation]:
        assert self.free.wait(20)
        return super().queue()


class Site:
    """Two machines, of which ``alps`` is the default one; jobs of both have the same numbers."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.folder = folder
        self.alps, self.bora = Machine(), Machine()
        self.systems = Systems({"alps": self.alps, "bora": self.bora}, patience=PATIENCE, clock=lambda: self.now)

    def hang(self) -> None:
        """Let a round of ``bora`` come to nothing after a long time, and the next one wait as well."""
        self.bora.free.clear()
        self.bora.down = True
        self.systems.queue()
        self.now += 20
        self.bora.free.set()
        wait_until(lambda: "time" not in self.problem(), within=10, failure=self.problem)
        self.bora.free.clear()
        self.bora.down = False
        self.systems.queue()

    def problem(self) -> str:
        self.systems.queue()
        return self.systems.problems["bora"]

    def submission(self, name: str) -> Submission:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return Submission(name, str(folder), f"{folder}/run.sh", b"#!/bin/sh\n", "sha-256:0", f".guard-{name}", "")

    def submit(self, machine: str, name: str) -> str:
        return self.systems.on(machine).submit(self.submission(name))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    for machine in (site.alps, site.bora):
        machine.free.set()
    site.systems.stop()


def test_equal_numbers_are_two_jobs(site: Site) -> None:
    ids = site.submit("alps", "a"), site.submit("bora", "b")
    assert ids == ("101", "bora/101")
    queue = site.systems.queue()
    assert {id: (one.id, one.machine, Path(one.folder).name) for id, one in queue.items()} == {
        "101": ("101", "alps", "a"),
        "bora/101": ("bora/101", "bora", "b"),
    }
    assert {id: trace.jobid for id, trace in site.systems.traces(ids).items()} == {"101": "a", "bora/101": "b"}
    for id, one in queue.items():
        found = site.systems.on(one.machine).find(one.folder, LONG_AGO)
        assert [job.id for job in found] == [id]
        assert site.systems.on(one.machine).id_of("101") == id
    site.systems.cancel("bora/101", queue["bora/101"].folder)
    assert (site.alps.cancelled, site.bora.cancelled) == ([], ["101"])
    site.alps.end("101", exit_code=3)
    known = site.systems.accounting({id: one.folder for id, one in queue.items()})
    assert {id: one.exit_code for id, one in known.items() if one.state.final and one.exit_code} == {"101": 3}


def test_a_round_is_one_question_to_each(site: Site) -> None:
    site.submit("bora", "b")
    site.systems.queue()
    assert (site.alps.questions, site.bora.questions) == (["queue"], ["queue"])


def test_one_that_is_down_keeps_nothing_of_the_other_from_being_known(site: Site) -> None:
    ids = site.submit("alps", "a"), site.submit("bora", "b")
    folders = {id: str(site.folder / name) for id, name in zip(ids, "ab", strict=True)}
    site.bora.down = True
    assert list(site.systems.queue()) == ["101"]
    assert list(site.systems.problems) == ["bora"]
    assert list(site.systems.accounting(folders)) == ["101"]
    site.alps.down = True
    with pytest.raises(SchedulerDown, match=r"alps: .*; bora: "):
        site.systems.queue()
    site.alps.down = site.bora.down = False
    assert set(site.systems.queue()) == set(ids)
    assert not site.systems.problems


def test_nobody_waits_twice_for_one_that_hangs_and_its_late_answer_counts(site: Site) -> None:
    site.submit("alps", "a"), site.submit("bora", "b")
    site.bora.free.clear()
    assert list(site.systems.queue()) == ["101"]
    assert "in time" in site.systems.problems["bora"]
    began = time.monotonic()
    assert list(site.systems.queue()) == ["101"]
    assert time.monotonic() - began < PATIENCE
    assert not site.bora.questions
    site.bora.free.set()
    wait_until(lambda: len(site.systems.queue()) == 2, within=10, failure=lambda: "its answer is lost")
    assert site.bora.questions == ["queue"]  # It was not asked once more meanwhile.
    assert not site.systems.problems


def test_one_that_hangs_is_left_alone_for_a_moment_and_its_jobs_wait(site: Site) -> None:
    id = site.submit("bora", "b")
    bora = site.systems.on("bora")
    site.hang()
    assert bora.is_silent
    with pytest.raises(Deferred, match="bora does not answer now"):
        site.submit("bora", "c")
    for question in (
        lambda: bora.cancel(id),
        lambda: bora.find(str(site.folder / "b"), LONG_AGO),
        lambda: bora.traces([id]),
        lambda: bora.accounting({id: str(site.folder / "b")}),
    ):
        with pytest.raises(SchedulerDown, match="bora does not answer now"):
            question()
    assert len(site.bora.submissions) == 1
    site.submit("alps", "a")
    site.now += SILENCE
    site.submit("bora", "c")
    assert len(site.bora.submissions) == 2


def test_one_that_takes_its_time_and_answers_is_not_silent(site: Site) -> None:
    site.submit("bora", "b")
    bora = site.systems.on("bora")
    site.bora.free.clear()
    site.systems.queue()
    assert not bora.is_silent
    site.now += 20
    site.bora.free.set()
    wait_until(lambda: "bora/101" in site.systems.queue(), within=10, failure=lambda: "its answer is lost")
    site.bora.free.clear()
    site.systems.queue()
    assert not bora.is_silent
    site.now += OVERDUE + 1
    site.systems.queue()
    assert bora.is_silent


def test_one_that_fails_at_once_lets_nobody_wait_and_may_be_tried(site: Site) -> None:
    """FirecREST may be unable to list jobs for a day, and take new ones."""
    site.bora.down = True
    site.systems.queue()
    assert site.systems.problems
    site.bora.down = False
    assert site.submit("bora", "b") == "bora/101"


def test_a_fault_in_one_is_not_taken_for_silence(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Mapping[str, Observation]:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(site.bora, "queue", broken)
    for _ in range(2):
        with pytest.raises(KeyError):
            site.systems.queue()
    monkeypatch.undo()
    assert not site.systems.queue()


def test_a_machine_that_there_is_not_any_more_knows_nothing(site: Site) -> None:
    gone = site.systems.on("carme")
    with pytest.raises(Deferred, match="carme is none of this gateway's any more"):
        gone.submit(site.submission("x"))
    for question in (gone.queue, lambda: gone.find("/x", LONG_AGO), lambda: site.systems.cancel("carme/101", "/x")):
        with pytest.raises(SchedulerDown, match="carme"):
            question()
    assert site.systems.accounting({"carme/101": "/x"}) == {}
    assert not site.alps.questions
    # As jobs are called that are from before there were several.
    for name in ("", site.systems.name):
        assert site.systems.on(name) is site.systems.on("alps")


def test_what_it_says_of_itself_is_true_of_all(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "submission_limit", property(lambda self: 7.0 if self is site.bora else 3.0))
    site.bora._settling_time = 9.0
    assert (site.systems.submission_limit, site.systems.settling_time) == (7.0, 9.0)
    assert site.systems.describe()["name"] == "alps"
    assert site.systems.on("bora").describe()["name"] == "bora"
