"""G6: no call of ours stalls the event loop, and none goes long without progress before it ends in an error."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
from aiida.schedulers.datastructures import JobState
from plumpy.greenback_bridge import ensure_portal

from aiida_marketplace_hpc import transport as transport_module
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.client.session import Timeouts
from aiida_marketplace_hpc.errors import DeadlineExceeded, MarketplaceHpcError
from aiida_marketplace_hpc.offloop import OffLoop
from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler
from aiida_marketplace_hpc.testing.faults import StallRequest
from aiida_marketplace_hpc.testing.proxy import FaultyProxy
from aiida_marketplace_hpc.testing.served import ServedGateway
from aiida_marketplace_hpc.testing.stalls import LoopWatch, Stall
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

pytestmark = pytest.mark.alone

DAEMON_STOP = 30.0
"""Seconds after which a stopped daemon is killed."""


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Accepts connections and never says a word."""
    monkeypatch.setenv("MP_ACCESS_TOKEN", "some-token")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "http://{}:{}".format(*server.getsockname())


@pytest.fixture
def dribbling_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Answers one byte at a time, without end."""
    monkeypatch.setenv("MP_ACCESS_TOKEN", "some-token")
    ended = threading.Event()

    def answer(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{")
            while not ended.wait(0.05):
                client.sendall(b" ")

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                threads.append(threading.Thread(target=answer, args=(client,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threads = [threading.Thread(target=serve)]
        threads[0].start()
        yield "http://{}:{}".format(*server.getsockname())
        ended.set()
        server.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join()


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


class Worker:
    """What AiiDA does with a computer, each call in a task of its own as on a daemon worker's loop."""

    def __init__(self, transport: MarketplaceHpcTransport, folder: str) -> None:
        self._transport = transport
        self._folder = folder
        self._scheduler = MarketplaceHpcScheduler()
        self._scheduler.set_transport(transport)

    async def submit(self) -> object:
        return self._scheduler.submit_job(self._folder, "script")

    async def poll(self) -> object:
        return self._scheduler.get_jobs(["some-job", "another"], as_dict=True)

    async def kill(self) -> object:
        return self._scheduler.kill_job("some-job")

    async def detail(self) -> object:
        return self._scheduler.get_detailed_job_info("some-job")

    async def monitor(self) -> object:
        return self._transport.listdir(self._folder)

    async def monitor_a_file(self) -> object:
        return self._transport.getfile(f"{self._folder}/script", os.devnull)

    async def stash(self) -> object:
        return await self._transport.copy_async(f"{self._folder}/script", f"{self._folder}/kept")

    async def stash_compressed(self) -> object:
        source = f"{self._folder}/script"
        return await self._transport.compress_async("tar.gz", source, f"{self._folder}/kept.tar.gz", self._folder)

    async def stash_of_whom(self) -> object:
        return self._transport.whoami()

    def all_at_once(self) -> tuple[dict[str, object], dict[str, float], list[Stall]]:
        """Make all calls on one loop: what each returned or raised, after how many seconds, and the stalls of the loop."""
        calls = [
            *(self.submit, self.poll, self.kill, self.detail, self.monitor, self.monitor_a_file),
            *(self.stash, self.stash_compressed, self.stash_of_whom),
        ]
        results: dict[str, object] = {}
        seconds: dict[str, float] = {}

        async def make(call: Callable[[], Awaitable[object]]) -> None:
            await ensure_portal()
            began = time.monotonic()
            try:
                results[call.__name__] = await call()
            except MarketplaceHpcError as exc:
                results[call.__name__] = exc
            seconds[call.__name__] = time.monotonic() - began

        async def main() -> list[Stall]:
            with LoopWatch() as watch:
                await asyncio.gather(*(make(call) for call in calls))
            return watch.stalls

        stalls = asyncio.run(main())
        return results, seconds, stalls


SHORT = Timeouts(connect=1.0, read=1.0, total=1.0)
LIMITS = [pytest.param(SHORT, id="short"), pytest.param(Timeouts(), id="real", marks=pytest.mark.services)]


def expect_no_stall(stalls: list[Stall], seconds: dict[str, float], limits: Timeouts) -> None:
    ours = [stall for stall in stalls if stall.ours > 0]
    longest = max((stall.seconds for stall in stalls), default=0.0)
    print(
        f"\nslowest call {max(seconds.values()):.1f} s; {len(stalls)} stalls above 0.1 s, the longest {longest:.2f} s; "
        f"in our code at most {max((stall.ours for stall in ours), default=0.0):.2f} s of one"
    )
    assert [stall for stall in ours if stall.ours > 0.2] == []
    assert max(seconds.values()) < limits.total + 2


@pytest.mark.parametrize("limits", LIMITS)
def test_no_call_stalls_the_loop_when_the_gateway_hangs(
    served: ServedGateway, monkeypatch: pytest.MonkeyPatch, limits: Timeouts
) -> None:
    """It hangs as soon as the client knows it: in the calls themselves, and not where the client asks what it is."""
    monkeypatch.setattr(transport_module, "HpcGateway", functools.partial(HpcGateway, timeouts=limits))
    with FaultyProxy(served.url) as proxy, MarketplaceHpcTransport(machine="cluster", url=proxy.url) as transport:
        worker = Worker(transport, transport.normalize("."))
        proxy.inject(StallRequest(after=0), times=None)
        results, seconds, stalls = worker.all_at_once()
    assert results.pop("stash_of_whom") == "alice_a"
    expect_errors(results)
    expect_no_stall(stalls, seconds, limits)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("server", ["silent_server", "dribbling_server"])
def test_no_call_stalls_the_loop_when_a_server_never_comes_to_an_end(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, server: str, limits: Timeouts
) -> None:
    url = request.getfixturevalue(server)
    monkeypatch.setattr(transport_module, "HpcGateway", functools.partial(HpcGateway, timeouts=limits))
    with MarketplaceHpcTransport(machine="cluster", url=url) as transport:
        results, seconds, stalls = Worker(transport, "/some/folder").all_at_once()
    expect_errors(results)
    expect_no_stall(stalls, seconds, limits)


def expect_errors(results: dict[str, object]) -> None:
    """Every call has ended in an error, but for the poll, in which nothing is known about any job."""
    polled = results.pop("poll")
    assert isinstance(polled, dict)
    assert {info.job_state for info in polled.values()} == {JobState.UNDETERMINED}
    assert len(polled) == 2
    assert {name for name, result in results.items() if not isinstance(result, MarketplaceHpcError)} == set()


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
