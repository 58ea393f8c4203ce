"""A gateway served over real HTTP from a thread of the test's own process: quick to start, every fault within reach."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from aiida_marketplace_hpc.gateway.backends.base import Backend
from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.gateway.server import Server
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.testing.forwarder import bounded
from aiida_marketplace_hpc.transport import forget_connections

ALICE, BOB = "alice.a@example.org", "bob@example.org"
TOKENS = {ALICE: "token-of-alice", BOB: "token-of-bob"}


class ServedGateway:
    """A gateway on a free port of the loopback address; a context manager.

    :param folder: for everything that it keeps: state, homes, access log.
    :param backend: in place of the one that the settings name.
    :param settings: what else to set, by the names of :class:`~aiida_marketplace_hpc.gateway.config.Settings`.
    """

    def __init__(self, folder: Path, backend: Backend | None, /, **settings: Any) -> None:
        self.access_log = folder / "access.jsonl"
        flags: dict[str, Any] = {
            "state": folder / "state",
            "home": str(folder / "home" / "{username}"),
            "dev_token": TOKENS,
            "access_log": self.access_log,
            "poll_interval": 0.05,
            "stop_timeout": 5,
            **settings,
        }
        self.gateway = Gateway(load(flags), backend)
        self._server = Server(self.gateway, announce=False)
        # With the protocol named, asyncio sets TCP_NODELAY; without it each answer waits 40 ms for an acknowledgement.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bounded(self._socket)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(128)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    @property
    def url(self) -> str:
        """The gateway's address."""
        scheme = "https" if self.gateway.settings.certfile else "http"
        return "{}://{}:{}".format(scheme, *self._socket.getsockname())

    def requests(self) -> list[dict[str, Any]]:
        """The requests that were answered so far, as the access log has them."""
        return [line for line in self._logged() if "method" in line]

    def operations(self) -> list[dict[str, Any]]:
        """The operations of ``query`` that have ended so far, as the access log has them."""
        return [line for line in self._logged() if "operation" in line]

    def _logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.access_log.read_text().splitlines()]

    def __enter__(self) -> ServedGateway:
        forget_connections(self.url)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the gateway did not start")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, with all its threads; may be repeated."""
        self._server.should_exit = True
        self._thread.join(timeout=20)
        self._socket.close()
