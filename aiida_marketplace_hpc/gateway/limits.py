"""What one user may ask for, so that nobody takes the gateway from all others: requests at once, and in a second.

For each user there is a bucket of tokens, which fills up at a steady rate and holds what comes in ten seconds; a request takes
one. Who finds it empty is told when there will be one again. Of what is admitted, a few requests of each user are worked on at
a time. Used on the event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from aiida_marketplace_hpc.errors import Busy
from aiida_marketplace_hpc.gateway.metrics import Limit

BURST = 10.0
"""Seconds' worth of requests that may come all at once after a rest."""
TURNS = 4
"""Requests of one user that are worked on at a time, where that takes no longer than the work. Threads share one interpreter,
which so few keep busy: with 64 of one user at work, all others got a hundredth of what they get alone."""
PAUSE = 1.0
"""Seconds before a refusal is told: who asks again at once would otherwise keep the gateway busy with refusing."""
_MANY = 1000


@dataclass
class _Use:
    tokens: float
    at: float
    running: int = 0
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(TURNS))


class Limits:
    """The limits of all users; each has the same.

    :param at_once: requests under way; 0: any number.
    :param per_second: requests in a second, on average; 0: any number.
    :param clock: the seconds of a monotonic clock.
    :param hit: told of each request that was one too many, and by which limit.
    """

    def __init__(
        self,
        *,
        at_once: int,
        per_second: float,
        clock: Callable[[], float] = time.monotonic,
        hit: Callable[[Limit], None] = lambda _: None,
    ) -> None:
        self._hit = hit
        self._at_once = at_once
        self._per_second = per_second
        self._most = max(1.0, per_second * BURST)
        self._clock = clock
        self._users: dict[str, _Use] = {}

    def admit(self, user: str) -> None:
        """Count a request that begins; :meth:`release` must follow.

        :raises Busy: it is one too many; nothing was counted.
        """
        now = self._clock()
        use = self._users.get(user)
        if use is None:
            self._forget(now)
            use = self._users[user] = _Use(self._most, now)
        self._fill(use, now)
        if self._at_once and use.running >= self._at_once:
            self._hit("requests_at_once")
            raise Busy(f"you have {use.running} requests under way, which is the limit of this gateway: wait for some")
        if self._per_second and use.tokens < 1:
            self._hit("requests_per_second")
            raise Busy(
                f"more than {self._per_second:g} requests in a second are the limit of this gateway: ask less often",
                retry_after=(1 - use.tokens) / self._per_second,
            )
        use.tokens -= 1
        use.running += 1

    async def enter(self, user: str) -> None:
        """As :meth:`admit`; a refusal is held back for a moment.

        :raises Busy: it is one too many; nothing was counted.
        """
        try:
            self.admit(user)
        except Busy:
            await asyncio.sleep(PAUSE)
            raise

    def turn(self, user: str) -> asyncio.Semaphore:
        """What an admitted request holds while a thread works on it."""
        return self._users[user].turns

    def release(self, user: str) -> None:
        """Count a request that has ended."""
        self._users[user].running -= 1

    def _fill(self, use: _Use, now: float) -> None:
        use.tokens = min(self._most, use.tokens + (now - use.at) * self._per_second)
        use.at = now

    def _forget(self, now: float) -> None:
        """Forget those of whom there is nothing to remember, once they are many."""
        if len(self._users) < _MANY:
            return
        for user, use in list(self._users.items()):
            self._fill(use, now)
            if not use.running and (use.tokens >= self._most or not self._per_second):
                del self._users[user]
