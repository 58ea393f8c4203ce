"""What is repeated, when, and for how long."""

from __future__ import annotations

import pytest

from aiida_marketplace_hpc.client.retry import Attempt, RetryPolicy, delay, may_repeat, run
from aiida_marketplace_hpc.errors import (
    Busy,
    ConfigurationError,
    ConnectionFailed,
    DeadlineExceeded,
    IntegrityError,
    MarketplaceHpcError,
    NotFound,
    Phase,
    ServerFault,
    TokenUnavailable,
    Unavailable,
)

NOT_SENT = ConnectionFailed("x", phase=Phase.NOT_SENT)
MAYBE = ConnectionFailed("x", phase=Phase.MAYBE_SENT)


def from_a_proxy() -> Unavailable:
    error = Unavailable("x")
    error.phase = Phase.MAYBE_SENT
    return error


@pytest.mark.parametrize(
    ("error", "repeatable", "once"),
    [
        (NOT_SENT, True, True),
        (MAYBE, True, False),
        (DeadlineExceeded("x"), True, False),
        (Busy("x"), True, True),
        (Unavailable("x"), True, True),
        (from_a_proxy(), True, False),
        (IntegrityError("x"), True, False),
        (ServerFault("x"), False, False),
        (ServerFault("x", retryable=True), True, True),
        (NotFound("x"), False, False),
        (ConfigurationError("x"), False, False),
        (TokenUnavailable("x"), False, False),
    ],
)
def test_what_may_be_repeated(error: MarketplaceHpcError, repeatable: bool, once: bool) -> None:
    assert may_repeat(error, repeatable=True) is repeatable
    assert may_repeat(error, repeatable=False) is once


def after(error: MarketplaceHpcError, number: int = 1, elapsed: float = 0.0, took: float = 0.0) -> float | None:
    return delay(RetryPolicy(), Attempt(number, error, True, elapsed, took), lambda: 1.0)


def test_delays_double_up_to_a_limit() -> None:
    assert [delay(RetryPolicy(attempts=9), Attempt(n, MAYBE, True, 0, 0), lambda: 1.0) for n in range(1, 8)] == [
        0.25,
        0.5,
        1.0,
        2.0,
        4.0,
        4.0,
        4.0,
    ]


def test_delays_are_spread() -> None:
    assert delay(RetryPolicy(), Attempt(1, MAYBE, True, 0, 0), lambda: 0.0) == 0.125


def test_a_busy_gateway_is_given_the_time_it_asks_for() -> None:
    assert after(Busy("x", retry_after=3)) == 3.25
    assert after(Busy("x", retry_after=60)) is None


def test_no_attempt_is_begun_that_may_end_after_the_budget() -> None:
    assert after(MAYBE, elapsed=9, took=9) == 0.25
    assert after(MAYBE, elapsed=11, took=11) is None
    assert after(MAYBE, elapsed=20) is None


def test_attempts_are_counted() -> None:
    assert after(MAYBE, number=4) is not None
    assert after(MAYBE, number=5) is None


def test_the_runner_sleeps_and_raises_the_last_error() -> None:
    now, naps, errors = 0.0, [], [Busy("1", retry_after=2), Unavailable("2"), NotFound("3")]

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        naps.append(seconds)

    def attempt() -> None:
        raise errors.pop(0)

    with pytest.raises(NotFound, match="3"):
        run(attempt, repeatable=False, policy=RetryPolicy(), clock=lambda: now, sleep=sleep, random=lambda: 1.0)
    assert naps == [2.25, 0.5]


@pytest.mark.parametrize("under_way", [True, False])
def test_what_the_gateway_is_at_work_on_is_waited_for(under_way: bool) -> None:
    now, asked = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def attempt() -> str:
        nonlocal asked
        asked += 1
        if asked < 1000:
            raise Busy("1", under_way=under_way)
        return "there"

    def ran() -> str:
        return run(attempt, repeatable=True, policy=RetryPolicy(), clock=lambda: now, sleep=sleep, random=lambda: 1.0)

    if under_way:
        assert ran() == "there"
        assert 1000 < now < 1500
    else:
        with pytest.raises(Busy):
            ran()
        assert now < 20


def test_the_runner_returns_what_succeeds() -> None:
    errors = [NOT_SENT]

    def attempt() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert run(attempt, repeatable=False, policy=RetryPolicy(), sleep=lambda _: None) == "done"
