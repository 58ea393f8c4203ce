"""Lists of operations that are under way and that have ended: what is joined, kept, forgotten, stopped, made to wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aiida_marketplace_hpc.errors import Busy, InvalidRequest, Unavailable
from aiida_marketplace_hpc.gateway.operations import Operations, Running

KEY = "k" * 16


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Work:
    """What a list does: it waits at each step until the test lets it go on."""

    def __init__(self, steps: int = 0) -> None:
        self.calls = 0
        self.steps = steps
        self.may_go = threading.Semaphore(0)
        self.at_step = threading.Semaphore(0)

    def __call__(self, running: Running) -> dict[str, Any]:
        self.calls += 1
        for _ in range(self.steps):
            self.at_step.release()
            assert self.may_go.acquire(timeout=10)
            running.advance(10)
        return {"results": [self.calls]}

    def step(self) -> None:
        """Let it do one step, and wait until it stands at the next."""
        self.may_go.release()
        assert self.at_step.acquire(timeout=10)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(clock: Clock) -> Iterator[Callable[..., Operations]]:
    made: list[Operations] = []

    def make(**options: Any) -> Operations:
        operations = Operations(clock=clock, **options)
        made.append(operations)
        clock.now += 1000.0
        return operations

    yield make
    for operations in made:
        operations.close(timeout=10)


def result(running: Running) -> dict[str, Any]:
    return running.future.result(timeout=10)


def test_the_same_key_joins_what_is_under_way(make: Callable[..., Operations]) -> None:
    operations, work = make(), Work(1)
    first = operations.start("ada", KEY, work)
    assert operations.start("ada", KEY, work, again=3.0) is first
    assert operations.find("ada", KEY) is first
    work.may_go.release()
    assert result(first) == {"results": [1]}
    assert result(operations.start("ada", KEY, work, again=4.0)) == {"results": [1]}
    assert work.calls == 1


def test_a_key_is_a_users_own(make: Callable[..., Operations]) -> None:
    operations, work = make(), Work()
    first = operations.start("ada", KEY, work)
    result(first)
    assert operations.find("bob", KEY) is None
    assert operations.start("bob", KEY, work) is not first


def test_a_key_does_not_stand_for_two_things(make: Callable[..., Operations]) -> None:
    operations, work = make(), Work()
    result(operations.start("ada", KEY, work, mark="mkdir /x"))
    with pytest.raises(InvalidRequest, match="another list"):
        operations.start("ada", KEY, work, mark="mkdir /y")
    assert work.calls == 1


def test_results_of_what_may_be_done_again_are_not_kept(make: Callable[..., Operations]) -> None:
    operations, work = make(), Work()
    result(operations.start("ada", KEY, work, repeatable=True))
    assert operations.find("ada", KEY) is None
    work.steps = 1
    waited_for = operations.start("ada", KEY, work, repeatable=True)
    assert waited_for.meanwhile() == {"pending": {"key": KEY, "progress": 0}}
    work.may_go.release()
    result(waited_for)
    assert operations.find("ada", KEY) is waited_for


def test_a_gateway_that_was_started_lately_does_not_do_twice_what_must_not_be(
    make: Callable[..., Operations], clock: Clock
) -> None:
    operations, work = make(), Work()
    clock.now -= 990.0  # Up for 10 s.
    for again in (0.0, 5.0, 20.0):
        with pytest.raises(Unavailable, match="does not know whether") as raised:
            operations.start("ada", KEY, work, again=again)
        assert raised.value.retryable is False
    assert work.calls == 0
    result(operations.start("ada", "a" * 16, work, again=5.0, repeatable=True))
    result(operations.start("ada", "b" * 16, work))
    clock.now += 30.0  # Up for 40 s: long before it was first asked, on its way included.
    result(operations.start("ada", KEY, work, again=5.0))
    assert work.calls == 3


def test_what_was_forgotten_is_not_done_again(make: Callable[..., Operations], clock: Clock) -> None:
    operations, work = make(keep=300.0, kept=(3, 10_000)), Work()
    keys = [f"{number:016}" for number in range(5)]
    for key in keys:
        result(operations.start("ada", key, work))
        clock.now += 100.0
    with pytest.raises(Unavailable):
        operations.start("ada", keys[1], work, again=399.0)
    # Two are too old.
    assert [operations.find("ada", key) is not None for key in keys] == [False, False, True, True, True]
    result(operations.start("bob", keys[1], work, again=399.0))
    result(operations.start("ada", "x" * 16, work, again=5.0))
    assert work.calls == 7


def test_of_too_many_results_the_oldest_are_forgotten(make: Callable[..., Operations], clock: Clock) -> None:
    operations = make(kept=(3, 10_000))
    keys = [f"{number:016}" for number in range(5)]
    for key in keys:
        result(operations.start("ada", key, lambda _: {}))
        clock.now += 1.0
    with pytest.raises(Unavailable):
        operations.start("ada", keys[0], lambda _: {}, again=5.0)
    assert [operations.find("ada", key) is not None for key in keys] == [False, False, True, True, True]


def test_few_large_results_are_kept(make: Callable[..., Operations], clock: Clock) -> None:
    operations = make(kept=(100, 10_000))
    large = {"results": ["x" * 6000]}
    keys = [f"{number:016}" for number in range(3)]
    for key in keys:
        result(operations.start("ada", key, lambda _: large))
        clock.now += 1.0
    result(operations.start("ada", "y" * 16, lambda _: {}))
    assert [operations.find("ada", key) is not None for key in keys] == [False, False, True]


def test_a_large_result_that_is_still_to_be_fetched_is_kept_all_the_same(make: Callable[..., Operations]) -> None:
    operations, work = make(kept=(100, 10)), Work(1)
    running = operations.start("ada", KEY, work)
    running.meanwhile()
    work.may_go.release()
    result(running)
    result(operations.start("ada", "y" * 16, lambda _: {"results": ["x" * 1000]}))
    assert operations.find("ada", KEY) is running


def test_progress_is_told(make: Callable[..., Operations]) -> None:
    operations, work = make(), Work(3)
    running = operations.start("ada", KEY, work)
    assert work.at_step.acquire(timeout=10)
    for expected in (0, 10):
        assert running.progress == expected
        work.step()
    assert running.meanwhile()["pending"]["progress"] == 20
    work.may_go.release()
    result(running)


def test_long_ones_wait_for_their_turn_and_short_ones_do_not(make: Callable[..., Operations], clock: Clock) -> None:
    operations = make(long_at_once=(1, 1), patience=8.0)
    first, second, short = Work(4), Work(2), Work(2)
    running = operations.start("ada", "a" * 16, first)
    waiting = operations.start("ada", "b" * 16, second)
    assert first.at_step.acquire(timeout=10)
    assert second.at_step.acquire(timeout=10)
    clock.now += 9.0
    first.step()  # It is a long one by now, and has the only place.
    second.may_go.release()  # This one does not come back from its first step.
    assert not second.at_step.acquire(timeout=0.05)
    seen = waiting.progress
    first.step()
    assert waiting.progress != seen  # Its turn comes nearer.
    seen = waiting.progress
    assert waiting.progress == seen
    brief = operations.start("ada", "c" * 16, short)
    short.may_go.release(2)
    result(brief)
    first.may_go.release(2)
    result(running)
    assert second.at_step.acquire(timeout=10)
    second.may_go.release()
    result(waiting)


def test_one_user_leaves_places_to_others(make: Callable[..., Operations], clock: Clock) -> None:
    operations = make(long_at_once=(2, 1), patience=8.0)
    works = [Work(2), Work(2), Work(2)]
    lists = [operations.start(user, KEY[:-1] + str(n), works[n]) for n, user in enumerate(("ada", "ada", "bob"))]
    for work in works:
        assert work.at_step.acquire(timeout=10)
    clock.now += 9.0
    works[0].step()
    works[1].may_go.release()
    assert not works[1].at_step.acquire(timeout=0.05)
    works[2].step()
    for work in (works[0], works[2], works[1]):
        work.may_go.release()
    for running in lists:
        result(running)


def test_a_list_ends_at_its_next_step_when_it_is_told_to(make: Callable[..., Operations]) -> None:
    operations, work = make(), Work(5)
    running = operations.start("ada", KEY, work)
    assert work.at_step.acquire(timeout=10)
    running.stop("nobody wants it any more")
    work.may_go.release()
    with pytest.raises(Unavailable, match="nobody wants it"):
        result(running)


def test_one_that_waits_for_its_turn_ends_when_it_is_told_to(make: Callable[..., Operations], clock: Clock) -> None:
    operations, work = make(long_at_once=(0, 0)), Work(1)
    running = operations.start("ada", KEY, work)
    assert work.at_step.acquire(timeout=10)
    clock.now += 9.0
    work.may_go.release()
    running.stop("enough")
    with pytest.raises(Unavailable, match="enough"):
        result(running)


def test_a_gateway_that_stops_ends_them_all_and_takes_no_more(make: Callable[..., Operations]) -> None:
    operations, work = make(), Work(5)
    running = operations.start("ada", KEY, work)
    assert work.at_step.acquire(timeout=10)
    closing = threading.Thread(target=operations.close)
    closing.start()
    while not running.stopped:
        pass
    work.may_go.release()
    closing.join(timeout=10)
    assert not closing.is_alive()
    with pytest.raises(Unavailable, match="being stopped"):
        result(running)
    with pytest.raises(Unavailable, match="being stopped"):
        operations.start("ada", "x" * 16, work)


def test_too_much_at_once_is_refused(make: Callable[..., Operations]) -> None:
    operations, work = make(at_once=(3, 2)), Work(1)
    lists = [operations.start("ada", None, work), operations.start("ada", None, work)]
    with pytest.raises(Busy):
        operations.start("ada", None, work)
    lists.append(operations.start("bob", None, work))
    with pytest.raises(Busy):
        operations.start("eve", None, work)
    work.may_go.release(3)
    for running in lists:
        result(running)
    work.may_go.release()
    result(operations.start("ada", None, work))


def test_a_fault_is_seen_by_who_waits(make: Callable[..., Operations]) -> None:
    def broken(_: Running) -> dict[str, Any]:
        raise ZeroDivisionError

    running = make().start("ada", KEY, broken)
    with pytest.raises(ZeroDivisionError):
        result(running)
