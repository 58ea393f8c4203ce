"""Whether a failed attempt is repeated, and when: pure checks over what is known, and a runner that alone sleeps.

What may be repeated follows from how far the request got. Not sent: always. Perhaps sent: only what does nothing twice.
Answered: what the gateway itself calls retryable; what it was too busy for (429) was not carried out, and is asked again after
the time that it names. All attempts of a call share one budget of time, because a daemon that is
asked to stop is killed 30 s later.
"""

from __future__ import annotations

import random as random_module
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from aiida_marketplace_hpc.errors import Busy, IntegrityError, MarketplaceHpcError, Phase

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how fast.

    :param attempts: the greatest number of attempts, with the first; those that were told to come back later do not count.
    :param budget: seconds from the start of the call within which the last attempt should have ended.
    :param first_delay: seconds before the second attempt; each further delay is twice the one before.
    :param longest_delay: seconds, at most.
    """

    attempts: int = 5
    budget: float = 20.0
    first_delay: float = 0.25
    longest_delay: float = 4.0


@dataclass(frozen=True)
class Attempt:
    """One attempt that failed.

    :param number: counted from 1.
    :param repeatable: doing the request twice is the same as doing it once.
    :param elapsed: seconds since the call began.
    :param took: seconds that this attempt took.
    """

    number: int
    error: MarketplaceHpcError
    repeatable: bool
    elapsed: float
    took: float


def may_repeat(error: MarketplaceHpcError, repeatable: bool) -> bool:
    """Whether repeating the request is safe and can help."""
    if not error.retryable:
        return False
    # Wrong bytes are an answer, too, but of a folder a part may have been written.
    if isinstance(error, IntegrityError) or error.phase is Phase.MAYBE_SENT:
        return repeatable
    return True


def delay(policy: RetryPolicy, attempt: Attempt, random: Callable[[], float]) -> float | None:
    """Return the seconds to wait before the next attempt, or ``None`` to give up.

    :param random: gives numbers from 0 to 1, so that many clients do not come back all at once.
    """
    if not may_repeat(attempt.error, attempt.repeatable):
        return None
    # Whoever is told to come back later does, as long as there is time: that was no attempt that failed.
    if attempt.number >= policy.attempts and not isinstance(attempt.error, Busy):
        return None
    seconds = min(policy.longest_delay, policy.first_delay * 2.0 ** (attempt.number - 1)) * (0.5 + random() / 2)
    if isinstance(attempt.error, Busy):
        seconds += attempt.error.retry_after
    # The next attempt may take as long as this one: where the name server or a dead host eats seconds, one is enough.
    if attempt.elapsed + seconds + attempt.took > policy.budget:
        return None
    return seconds


def run(
    attempt: Callable[[], T],
    *,
    repeatable: bool,
    policy: RetryPolicy,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    random: Callable[[], float] = random_module.random,
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """Call ``attempt`` until it succeeds or :func:`delay` gives up, and then raise its last error.

    :param repeatable: doing the request twice is the same as doing it once.
    :param progress: how far the attempts have got; one that got further than all before counts as the first again, as does one
        that was told that the gateway is at work on it.
    """
    began = clock()
    number = 1
    furthest = progress()
    while True:
        started = clock()
        try:
            return attempt()
        except MarketplaceHpcError as error:
            now = clock()
            if progress() > furthest or (isinstance(error, Busy) and error.under_way):
                furthest = max(furthest, progress())
                # As if it had begun just now: what came before was of use.
                began, started, number = now, now, 1
            seconds = delay(policy, Attempt(number, error, repeatable, now - began, now - started), random)
            if seconds is None:
                raise
        sleep(seconds)
        number += 1
