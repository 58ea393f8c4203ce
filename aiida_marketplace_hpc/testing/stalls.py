"""A watch over an event loop: when it stood still, for how long, and in whose code.

AiiDA's daemon runs everything on one loop, so a call that blocks holds up all calculations. AiiDA's own work with the database
does so, too; what was on the stack meanwhile tells one from the other.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

Look = tuple[float, list[str]]
"""When the thread was looked at, and the frames that it was in."""

_BEAT = 0.01
_LOOK = 0.02


@dataclass(frozen=True)
class Stall:
    """A time in which an event loop did nothing else.

    :param seconds: how long.
    :param ours: seconds of it for which code of the package is known to have been on the stack: from one look to the next, if
        both saw some.
    :param stack: the innermost frames, ``file:function``, of a moment in the package's code if there was one.
    """

    seconds: float
    ours: float
    stack: tuple[str, ...]


class LoopWatch:
    """Looks at the thread of a running event loop whenever the loop has not turned for a while; a context manager.

    :param package: the name of the package whose time is counted.
    :param shortest: seconds; what is shorter is no stall.
    :param report: called with each stall, in the watch's thread.
    """

    def __init__(
        self,
        package: str = "aiida_marketplace_hpc",
        *,
        shortest: float = 0.1,
        report: Callable[[Stall], None] | None = None,
    ) -> None:
        self.stalls: list[Stall] = []
        self._folder = f"{os.sep}{package}{os.sep}"
        self._shortest = shortest
        self._report = report or (lambda _: None)
        self._beat = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LoopWatch:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to watch the loop that runs in this thread."""
        self._tick(asyncio.get_running_loop())
        watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, args=(watched,), name="loop-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the watch; the last stall is over then."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._beat = time.monotonic()
        if not self._ended.is_set():
            loop.call_later(_BEAT, self._tick, loop)

    def _watch(self, watched: int) -> None:
        while not self._ended.wait(_LOOK):
            began = self._beat
            looks: list[Look] = []
            while began == self._beat and not self._ended.is_set() and time.monotonic() - began > self._shortest:
                frame = sys._current_frames().get(watched)
                stack = [f"{entry.filename}:{entry.name}" for entry in traceback.extract_stack(frame)]
                looks.append((time.monotonic(), stack))
                time.sleep(_LOOK)
            if looks:
                self._add(began, looks, time.monotonic())

    def _add(self, began: float, looks: list[Look], ended: float) -> None:
        ours = [stack for _, stack in looks if self._is_ours(stack)]
        stall = Stall(ended - began, self._known(began, looks, ended), tuple((ours or [looks[0][1]])[0][-12:]))
        self.stalls.append(stall)
        self._report(stall)

    def _known(self, began: float, looks: list[Look], ended: float) -> float:
        """How long code of the package was there for certain.

        A stall of others may begin or end in a call of ours, and where the process gets no time, looks are far apart: one of
        them says nothing about what was there before it and after it.
        """
        seen = [self._is_ours(stack) for _, stack in looks]
        if all(seen):
            return ended - began
        moments = [began, *(moment for moment, _ in looks), ended]
        seen = [seen[0] and seen[1], *seen, seen[-1] and seen[-2]]
        return sum(
            later - earlier
            for earlier, later, before, after in zip(moments, moments[1:], seen, seen[1:], strict=False)
            if before and after
        )

    def _is_ours(self, stack: list[str]) -> bool:
        # The beat of this watch is on the loop, too, and may be what it stands at when the whole process gets no time.
        return any(self._folder in line and not line.startswith(f"{__file__}:") for line in stack)
