"""The watch over an event loop: it sees a call that blocks, and whose it is."""

from __future__ import annotations

import asyncio
import time

import pytest

from aiida_marketplace_hpc.testing import machine, stalls
from aiida_marketplace_hpc.testing.machine import RigError, wait_until
from aiida_marketplace_hpc.testing.stalls import LoopWatch

pytestmark = pytest.mark.alone


def never() -> bool:
    return False


def test_a_call_that_blocks_is_seen_and_whose_it_is() -> None:
    async def main() -> LoopWatch:
        with LoopWatch() as watch:
            await asyncio.sleep(0.05)
            try:
                wait_until(never, within=0.4, failure=lambda: "as intended")  # A function of the package.
            except RigError:
                pass
            await asyncio.sleep(0.1)
            time.sleep(0.3)
            await asyncio.sleep(0.1)
        return watch

    ours, others = asyncio.run(main()).stalls
    assert ours.ours > 0.2
    assert any("machine.py:wait_until" in line for line in ours.stack)
    assert others.seconds > 0.2
    assert others.ours == 0


def test_a_loop_that_turns_has_no_stalls() -> None:
    async def main() -> LoopWatch:
        with LoopWatch(shortest=1.0) as watch:
            await asyncio.sleep(0.2)
        return watch

    assert asyncio.run(main()).stalls == []


OURS, THEIRS = [f"{machine.__file__}:wait_until"], ["orm/attributes.py:get"]


@pytest.mark.parametrize(
    ("seen", "known"),
    [
        ([OURS], 7.0),
        ([["base_events.py:_run_once", f"{stalls.__file__}:_tick"]], 0.0),
        ([OURS, OURS, OURS], 9.0),
        ([THEIRS, OURS, THEIRS], 0.0),
        ([OURS, THEIRS, THEIRS], 0.0),
        ([THEIRS, OURS, OURS, THEIRS], 1.0),
        ([OURS, OURS, OURS, THEIRS], 5.0 + 2.0),
        ([THEIRS, OURS, OURS], 1.0 + 2.0),
    ],
)
def test_of_a_stall_that_time_is_ours_in_which_every_look_sees_ours(seen: list[list[str]], known: float) -> None:
    """Looked at after 5 seconds, then each second; it ends 2 seconds after the last look."""
    watch = LoopWatch()
    looks = [(105.0 + number, stack) for number, stack in enumerate(seen)]
    watch._add(100.0, looks, looks[-1][0] + 2.0)
    (stall,) = watch.stalls
    assert stall.ours == pytest.approx(known)
    assert stall.seconds == pytest.approx(looks[-1][0] + 2.0 - 100.0)
