"""Clocks for what misbehaves in time: the real one, and one that passes only when a test says so."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Protocol


class Clock(Protocol):
    """Time, and what is to be done in it."""

    def now(self) -> datetime:
        """The time, aware, in UTC."""

    def sleep(self, seconds: float) -> None:
        """Let so many seconds pass."""

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something when so many seconds have passed, in whichever thread."""


class RealClock:
    """The time of the machine."""

    def now(self) -> datetime:
        return datetime.now(timezone.utc)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()


class VirtualClock:
    """A time of its own, that starts with the machine's and moves on by :meth:`sleep` only.

    What was put off is done by whoever lets the time pass, in its order and each at its own time.
    """

    def __init__(self) -> None:
        self._start = datetime.now(timezone.utc)
        self._passed = 0.0
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._passed)

    def monotonic(self) -> float:
        """Seconds that have passed."""
        return self._passed

    def sleep(self, seconds: float) -> None:
        until = self._passed + seconds
        while self._later and self._later[0][0] <= until:
            moment, _, action = heapq.heappop(self._later)
            self._passed = max(self._passed, moment)
            action()
        self._passed = max(self._passed, until)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (self._passed + seconds, next(self._numbers), action))
