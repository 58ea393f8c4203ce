"""Random sequences of operations on aiida-core's local transport and on ours: after each, everything is the same."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests.plugin.comparison import assert_same, assert_same_problem, outcome
from tests.plugin.conftest import NewPair
from tests.plugin.differences import difference
from tests.plugin.sequences import Step, Thing, clear, steps, things

MANY = (
    "copy",
    "copyfile",
    "copytree",
    "put",
    "putfile",
    "puttree",
    "get",
    "getfile",
    "gettree",
    "makedirs",
    "rename",
    "symlink",
)
"""Operations that involve several places: which of two faults is found first is not promised."""

COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": False,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def compare(new_pair: NewPair, there: list[Thing], sequence: list[Step]) -> None:
    """Do a sequence on both sides, up to the first step after which they may differ."""
    pair = new_pair(seeded=False)
    try:
        for side in pair:
            for thing in there:
                thing.make(side)
        for step in sequence:
            known = difference(step, pair.reference)
            if known is not None:
                note(f"left out: {step}: {known.what}")
                continue
            note(repr(step))
            expected = outcome(step, pair.reference)
            found = outcome(step, pair.ours)
            precisely = step.method not in MANY
            if step.method == "copy" and type(expected.problem) is FileNotFoundError:
                assert isinstance(found.problem, FileNotFoundError)  # AiiDA goes on when there is nothing to copy.
            if expected.problem is not None and step.method in MANY:
                assert_same_problem(found.problem, expected.problem, precisely=precisely)
                return  # How much of many things was done before the first that failed is not promised.
            assert_same(found, expected, precisely=precisely)
    finally:
        for side in pair:
            clear(side)


@given(there=things, sequence=st.lists(steps, min_size=1, max_size=8))
@settings(max_examples=150, derandomize=True, **COMMON)
def test_sequences_have_the_same_outcome(new_pair: NewPair, there: list[Thing], sequence: list[Step]) -> None:
    compare(new_pair, there, sequence)


@pytest.mark.services
@pytest.mark.timeout(1800)
@given(there=things, sequence=st.lists(steps, min_size=1, max_size=12))
@settings(max_examples=1_000, derandomize=True, **COMMON)
def test_very_many_sequences_have_the_same_outcome(new_pair: NewPair, there: list[Thing], sequence: list[Step]) -> None:
    compare(new_pair, there, sequence)
