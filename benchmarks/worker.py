"""A client as a process of its own: one transport of AiiDA, open, which does what it is told and says how long that took.

It reads one JSON object a line, ``{"do": NAME, ...}``, and answers each with one: ``{"seconds": ..., "cpu": ...}`` or
``{"error": ...}``. Only the transport's own asynchronous methods are called, as AiiDA's engine calls them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

Act = Callable[..., Awaitable[object]]


def made(kind: str, parameters: dict[str, Any]) -> Any:
    """A transport, not yet open."""
    if kind == "marketplace_hpc":
        from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

        return MarketplaceHpcTransport(machine="bench", **parameters)
    from aiida.transports.plugins.ssh_async import AsyncSshTransport

    return AsyncSshTransport(**parameters)


def actions(transport: Any) -> dict[str, Act]:
    """What can be asked of a worker."""

    async def put_each(local: str, remote: str) -> None:
        names = sorted(os.listdir(local))
        await asyncio.gather(*(transport.put_async(f"{local}/{name}", f"{remote}/{name}") for name in names))

    async def get_each(remote: str, local: str, names: list[str]) -> None:
        await asyncio.gather(*(transport.get_async(f"{remote}/{name}", f"{local}/{name}") for name in names))

    return {
        "warm": lambda: transport.whoami_async(),
        "makedirs": lambda path: transport.makedirs_async(path, ignore_existing=True),
        "put_file": lambda local, remote: transport.putfile_async(local, remote),
        "get_file": lambda remote, local: transport.getfile_async(remote, local),
        "put_tree": lambda local, remote: transport.puttree_async(local, remote),
        "get_tree": lambda remote, local: transport.gettree_async(remote, local),
        "put_each": put_each,
        "get_each": get_each,
    }


async def serve(transport: Any) -> None:
    await transport.open_async()
    known = actions(transport)
    loop = asyncio.get_running_loop()
    print(json.dumps({"ready": True}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        act = known[order.pop("do")]
        started, cpu = time.perf_counter(), time.process_time()
        try:
            await act(**order)
            answer: dict[str, Any] = {}
        except Exception as exc:  # noqa: BLE001 - told to whoever gave the order.
            answer = {"error": repr(exc)}
        answer |= {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
        print(json.dumps(answer), flush=True)
    await transport.close_async()


def main() -> None:
    kind, parameters = sys.argv[1], json.loads(sys.argv[2])
    asyncio.run(serve(made(kind, parameters)))


if __name__ == "__main__":
    main()
