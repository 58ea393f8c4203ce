"""G6: no call of ours stalls the event loop, and none goes long without progress before it ends in an error."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from plumpy.greenback_bridge import ensure_portal

from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.client.session import Timeouts
from aiida_marketplace_hpc.errors import DeadlineExceeded
from aiida_marketplace_hpc.offloop import OffLoop

DAEMON_STOP = 30.0
"""Seconds after which a stopped daemon is killed."""


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Accepts connections and never says a word."""
    monkeypatch.setenv("MP_ACCESS_TOKEN", "some-token")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "http://{}:{}".format(*server.getsockname())


def test_the_limits_are_what_is_promised() -> None:
    limits = Timeouts()
    assert limits.connect <= 20
    assert limits.read <= 20
    assert limits.total <= 20 < DAEMON_STOP


def test_a_server_that_says_nothing_ends_in_an_error_in_time(silent_server: str) -> None:
    gateway = HpcGateway(silent_server, timeouts=Timeouts(connect=0.2, read=0.2, total=0.5))
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        gateway.info()
    assert time.monotonic() - started < 5
    gateway.close()


def test_the_loop_runs_on_while_a_call_hangs(silent_server: str) -> None:
    gateway = HpcGateway(silent_server, timeouts=Timeouts(connect=1, read=1, total=1))
    off_loop = OffLoop(2)

    async def main() -> float:
        await ensure_portal()
        longest = 0.0

        async def tick() -> None:
            nonlocal longest
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.005)
                longest = max(longest, time.monotonic() - before - 0.005)

        ticking = asyncio.ensure_future(tick())
        # As AiiDA calls a scheduler: synchronously, on its loop.
        with pytest.raises(DeadlineExceeded):
            off_loop.run_blocking(gateway.info)
        ticking.cancel()
        return longest

    # A call that blocked would stall it for the whole second.
    assert asyncio.run(main()) < 0.5
    gateway.close()


def test_a_cancelled_submission_is_seen_to_its_end() -> None:
    off_loop = OffLoop(1)
    begun, proceed = threading.Event(), threading.Event()
    recorded: list[str] = []

    def submit() -> str:
        begun.set()
        assert proceed.wait(10)
        return "the job id"

    async def main() -> None:
        await ensure_portal()
        recorded.append(off_loop.run_blocking_to_the_end(submit))
        await asyncio.sleep(10)

    async def stop_the_daemon() -> None:
        task = asyncio.ensure_future(main())
        while not begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        proceed.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(stop_the_daemon())
    assert recorded == ["the job id"]
