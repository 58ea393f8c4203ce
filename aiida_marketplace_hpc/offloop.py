"""Calls that block, made from code that must not: AiiDA's daemon runs everything on one event loop.

Every operation is written once, synchronously. From a coroutine it runs in a bounded pool of threads; a synchronous call that
AiiDA makes *on* its loop awaits the same pooled call through plumpy's portal; where no loop runs in the thread it is called
directly, which needs neither a broker nor a daemon.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from plumpy.greenback_bridge import has_portal, sync_await

P = ParamSpec("P")
R = TypeVar("R")


class OffLoop:
    """A bounded pool of threads for calls that block.

    :param threads: how many calls may be under way at once.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._executor: ThreadPoolExecutor | None = None

    @property
    def _pool(self) -> ThreadPoolExecutor:
        """The pool, with all its threads running: to start one waits for it, and that takes long when others are busy."""
        if self._executor is None:
            pool = ThreadPoolExecutor(max_workers=self._threads, thread_name_prefix="marketplace-hpc")
            together = threading.Barrier(self._threads + 1)
            for _ in range(self._threads):
                pool.submit(together.wait)
            together.wait()
            self._executor = pool
        return self._executor

    def start(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Start a blocking call from the thread of a loop; it goes on whether anybody awaits it or not."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._pool, functools.partial(function, *args, **kwargs))

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Await a blocking call."""
        return await self.start(function, *args, **kwargs)

    async def run_to_the_end(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Await a blocking call, also if the task is cancelled meanwhile: the cancellation waits until the call is over.

        For calls whose outcome must be recorded: a thread cannot be cancelled, it would go on without anybody noting what
        it did.
        """
        call = self.start(function, *args, **kwargs)
        cancelled = False
        while not call.done():
            try:
                # Unlike awaiting the call itself, waiting does not cancel it, and raises nothing of its own.
                await asyncio.wait([call])
            except asyncio.CancelledError:
                cancelled = True
        if cancelled and (task := asyncio.current_task()) is not None:
            # Delivered again at the task's next await, when the caller has recorded the outcome.
            task.cancel()
        return call.result()

    def run_blocking(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Make a blocking call from synchronous code, wherever that runs."""
        if on_loop_with_portal():
            result: R = sync_await(self.run(function, *args, **kwargs))
            return result
        return function(*args, **kwargs)

    def run_blocking_to_the_end(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The same for a call whose outcome must be recorded."""
        if on_loop_with_portal():
            result: R = sync_await(self.run_to_the_end(function, *args, **kwargs))
            return result
        return function(*args, **kwargs)


def on_loop_with_portal() -> bool:
    """Whether this thread runs an event loop whose current task can be awaited from synchronous code."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return bool(has_portal())
