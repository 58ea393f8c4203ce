"""The same operations on aiida-core's local transport and on ours: the same trees, results and exception types."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tests.plugin.cases import ACROSS, CASES
from tests.plugin.comparison import Asynchronous, Side, assert_same, on_a_loop_with_a_portal, outcome
from tests.plugin.conftest import Pair

Action = Callable[[Side], Any]

ACTIONS: dict[str, Action] = {
    **{
        name: lambda side, case=case: case(side.transport, str(side.remote), str(side.local))
        for name, case in CASES.items()
    },
    **{
        name: lambda side, case=case: case(side.transport, str(side.remote), str(side.local), str(side.other))
        for name, case in ACROSS.items()
    },
}


def asynchronously(action: Action) -> Action:
    """Let the transport's asynchronous methods do it."""

    def done(side: Side) -> Any:
        loop = asyncio.new_event_loop()
        try:
            return action(dataclasses.replace(side, transport=Asynchronous(side.transport, loop)))
        finally:
            loop.close()

    return done


@pytest.mark.parametrize("name", ACTIONS)
def test_ours_does_what_the_local_transport_does(name: str, pair: Pair) -> None:
    assert_same(outcome(ACTIONS[name], pair.ours), outcome(ACTIONS[name], pair.reference))


@pytest.mark.parametrize("name", ACTIONS)
def test_the_asynchronous_forms_do_the_same(name: str, pair: Pair) -> None:
    action = asynchronously(ACTIONS[name])
    assert_same(outcome(action, pair.ours), outcome(action, pair.reference))


@pytest.mark.parametrize("name", ACTIONS)
def test_the_synchronous_forms_on_a_loop_do_the_same(name: str, pair: Pair) -> None:
    found = outcome(lambda side: on_a_loop_with_a_portal(lambda: ACTIONS[name](side)), pair.ours)
    assert_same(found, outcome(ACTIONS[name], pair.reference))
