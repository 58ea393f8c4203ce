"""Slurm's configuration is asked for when it is needed, and not too often."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aiida_marketplace_hpc.gateway.backends.base import SchedulerDown
from aiida_marketplace_hpc.gateway.backends.slurm_commands import Answer
from aiida_marketplace_hpc.gateway.backends.slurm_config import (
    MAX_AGE,
    PAUSE,
    Configuration,
    KnownConfiguration,
    parse_config,
)

# Recorded from Slurm 22.05.8, shortened.
RECORDED = """\
Configuration data as of 2026-11-25T21:50:12
AccountingStorageBackupHost = (null)
AccountingStorageEnforce = associations,limits
AccountingStorageHost   = vm
AccountingStorageType   = accounting_storage/slurmdbd
MaxJobCount             = 10000
MessageTimeout          = 10 sec
MinJobAge               = 300 sec

Slurmctld(primary) at vm is UP
"""


@pytest.mark.parametrize(
    ("storage", "accounting"),
    [("accounting_storage/slurmdbd", True), ("accounting_storage/none", False), ("(null)", False)],
)
def test_reads_what_it_needs(storage: str, accounting: bool) -> None:
    text = RECORDED.replace("accounting_storage/slurmdbd", storage).replace("10 sec", "25 sec")
    assert parse_config(Answer(0, text, "")) == Configuration(accounting, 25.0)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(1, "", "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)\n"),
        Answer(None, RECORDED, ""),
        Answer(0, "", ""),
        Answer(0, RECORDED.replace("MessageTimeout", "Other"), ""),
    ],
)
def test_what_is_not_a_whole_answer_says_nothing(answer: Answer) -> None:
    with pytest.raises(SchedulerDown):
        parse_config(answer)


class Slurm:
    """Answers, or does not, and counts."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked = 0
        self.answer: Callable[[], Configuration] = lambda: Configuration(True, 10.0)

    def __call__(self) -> Configuration:
        self.asked += 1
        return self.answer()

    def down(self) -> Configuration:
        raise SchedulerDown("down")


@pytest.fixture
def slurm() -> Slurm:
    return Slurm()


@pytest.fixture
def known(slurm: Slurm) -> KnownConfiguration:
    return KnownConfiguration(slurm, clock=lambda: slurm.now)


def test_is_asked_for_once_and_again_when_it_is_old(slurm: Slurm, known: KnownConfiguration) -> None:
    assert known.last is None
    assert known.get() == known.get() == known.last == Configuration(True, 10.0)
    slurm.now = MAX_AGE - 1
    known.get()
    assert slurm.asked == 1
    slurm.now = MAX_AGE
    known.get()
    assert slurm.asked == 2


def test_without_an_answer_what_was_known_stays(slurm: Slurm, known: KnownConfiguration) -> None:
    slurm.answer = slurm.down
    assert known.get() is None
    assert known.get() is None
    assert slurm.asked == 1
    slurm.answer = lambda: Configuration(False, 20.0)
    slurm.now = PAUSE
    assert known.get() == Configuration(False, 20.0)
    slurm.answer = slurm.down
    slurm.now += MAX_AGE
    assert known.get() == Configuration(False, 20.0)


def test_a_doubt_makes_it_ask_again_but_not_at_once_again(slurm: Slurm, known: KnownConfiguration) -> None:
    known.get()
    known.doubt()
    slurm.now = PAUSE - 1
    known.get()
    assert slurm.asked == 1
    slurm.now = PAUSE
    known.get()
    assert slurm.asked == 2
