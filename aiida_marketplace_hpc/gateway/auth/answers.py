"""What was found out about tokens, for a while; and of many who ask the same at once, one goes and asks."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, TypeVar

from aiida_marketplace_hpc.errors import Unavailable

V = TypeVar("V")

_PATIENCE = 15.0
"""Seconds to wait for the one who asks."""


class Answers(Generic[V]):
    """Answers by key; bounded, the oldest go first. May be used by many threads.

    :param size: how many there are at most.
    :param clock: the seconds of a monotonic clock.
    """

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._clock = size, clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[V, float, float]] = OrderedDict()

    def put(self, key: str, value: V, seconds: float) -> None:
        """Keep an answer for so long."""
        now = self._clock()
        with self._lock:
            self._kept.pop(key, None)
            if seconds > 0:
                self._kept[key] = value, now, now + seconds
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)

    def get(self, key: str) -> tuple[V, float] | None:
        """An answer that is still kept, and how many seconds old it is."""
        value = self._kept.get(key)
        if value is None:
            return None
        now = self._clock()
        return (value[0], now - value[1]) if now < value[2] else None

    def drop(self, key: str) -> None:
        """Forget an answer."""
        with self._lock:
            self._kept.pop(key, None)


class Asking(Generic[V]):
    """Lets one thread at a time find out about a key; the others wait for what it finds.

    :param at_once: how many keys are asked about at the same time.
    """

    def __init__(self, at_once: int) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[V]] = {}
        self._places = threading.BoundedSemaphore(at_once)

    def once(self, key: str, ask: Callable[[], V]) -> V:
        """Ask, or wait for who does.

        :param ask: looks first whether the answer has come meanwhile. It answers instead of raising: what one thread raises,
            several would hand on.
        :raises Unavailable: if it takes too long, or too many ask.
        """
        with self._lock:
            found = self._under_way.get(key)
            if found is None:
                mine: Future[V] = Future()
                self._under_way[key] = mine
        if found is not None:
            try:
                return found.result(timeout=_PATIENCE)
            except (FutureTimeout, Unavailable):  # A new one: each says the id of its own request.
                raise _too_slow() from None
        try:
            if not self._places.acquire(timeout=_PATIENCE):
                raise _too_slow()
            try:
                answer = ask()
            finally:
                self._places.release()
            mine.set_result(answer)
            return answer
        except BaseException:
            mine.set_exception(_too_slow())
            raise
        finally:
            with self._lock:
                del self._under_way[key]


def _too_slow() -> Unavailable:
    return Unavailable("who you are could not be found out in time: try again in a moment")
