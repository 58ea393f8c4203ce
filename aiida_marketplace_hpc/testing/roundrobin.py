"""One address for several gateways: each new connection goes to the next one that takes it."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from aiida_marketplace_hpc.testing.forwarder import Forwarder


class RoundRobin(Forwarder):
    """Passes connections to a free port of 127.0.0.1 on to one server after the other; a context manager.

    Whoever does not take a connection is passed over. A connection that was taken and breaks is the client's to make anew.

    :param urls: of the servers.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._servers = [(parts.hostname or "", parts.port or 80) for parts in map(urlsplit, urls)]
        super().__init__(*self._servers[0])
        self._turns = itertools.count()
        self.served = [0] * len(self._servers)
        """How many connections each server has taken."""

    @property
    def url(self) -> str:
        """The one address."""
        return f"http://127.0.0.1:{self.port}"

    def _reach(self) -> socket.socket:
        first = next(self._turns)
        problem = OSError("there is no server")
        for number in range(len(self._servers)):
            which = (first + number) % len(self._servers)
            try:
                server = socket.create_connection(self._servers[which], timeout=20)
            except OSError as exc:
                problem = exc
            else:
                self.served[which] += 1
                return server
        raise problem
