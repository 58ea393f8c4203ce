"""A line to a server that is longer than it looks: bytes pass unchanged, later, and are counted.

Knows nothing of what it carries: HTTP, SSH, anything over TCP. Of a long line it shows what protocols feel: each byte arrives
half a round trip later, and a connection takes one round trip to come about. It limits neither what passes in a second nor
what is under way.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

PIECE = 256 * 1024
_WAITING = 4 * 1024 * 1024
"""Bytes that may lie here although their time has come, because the other side does not take them."""


class Forwarder:
    """Passes connections to a free port of 127.0.0.1 on to a server; a context manager.

    A reset of one side becomes a reset of the other, an end of sending an end of sending.

    :param host: of the server.
    :param port: of the server.
    :param round_trip: seconds that are added to each round trip; may be changed while it runs.
    """

    def __init__(self, host: str, port: int, *, round_trip: float = 0.0) -> None:
        self.round_trip = round_trip
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        bounded(self._listener)
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = threading.Event()
        self._sent = 0
        self._received = 0
        self._connections = 0

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    @property
    def sent(self) -> int:
        """Bytes that have come from clients so far."""
        return self._sent

    @property
    def received(self) -> int:
        """Bytes that have come from the server so far."""
        return self._received

    @property
    def connections(self) -> int:
        """How many connections clients have made so far."""
        return self._connections

    def __enter__(self) -> Forwarder:
        self._start(self._accept)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut all connections and end. May be repeated."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        while True:
            with self._lock:
                for endpoint in self._sockets:
                    with contextlib.suppress(OSError):
                        endpoint.shutdown(socket.SHUT_RDWR)
                thread = next(iter(self._threads), None)
            if thread is None:
                return
            thread.join(0.1)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        def run() -> None:
            try:
                target(*args)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="forwarder", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._connections += 1
            self._start(self._connect, client)

    def _connect(self, client: socket.socket) -> None:
        no_delay(client)
        # The handshake, which the client has had for nothing; what it sends meanwhile waits.
        if self._closed.wait(self.round_trip):
            client.close()
            return
        try:
            server = self._reach()
        except OSError:
            reset_on_close(client)
            client.close()
            return
        server.settimeout(None)
        no_delay(server)
        bounded(server)
        with self._lock:
            self._sockets |= {client, server}
        up = _Direction(self, client, server, "up")
        down = _Direction(self, server, client, "down")
        for thread in (up.deliver, down.take, down.deliver):
            self._start(thread)
        up.take()
        for direction in (up, down):
            direction.over.wait()
        with self._lock:
            self._sockets -= {client, server}
        client.close()
        server.close()

    def _reach(self) -> socket.socket:
        """Connect to the server.

        :raises OSError: if that fails.
        """
        return socket.create_connection(self._server, timeout=20)

    def count(self, way: Literal["up", "down"], size: int) -> None:
        """Note bytes that have come in."""
        with self._lock:
            if way == "up":
                self._sent += size
            else:
                self._received += size


class _Direction:
    """What flows from one socket to another: one thread takes it in, one gives it out when its time has come."""

    def __init__(
        self, forwarder: Forwarder, source: socket.socket, goal: socket.socket, way: Literal["up", "down"]
    ) -> None:
        self._forwarder = forwarder
        self._source = source
        self._goal = goal
        self._way: Literal["up", "down"] = way
        self._changed = threading.Condition()
        self._queue: deque[tuple[float, bytes | Literal["end", "reset"]]] = deque()
        self._size = 0
        self._broken = False
        self._taken = threading.Event()
        self.over = threading.Event()

    def take(self) -> None:
        """Read the source to its end."""
        last: Literal["end", "reset"] = "end"
        try:
            while not self._broken:
                try:
                    piece = self._source.recv(PIECE)
                except OSError:
                    last = "reset"
                    break
                if not piece:
                    break
                self._forwarder.count(self._way, len(piece))
                self._append(piece)
        finally:
            self._append(last)
            self._taken.set()

    def _append(self, item: bytes | Literal["end", "reset"]) -> None:
        with self._changed:
            self._queue.append((time.monotonic() + self._forwarder.round_trip / 2, item))
            self._size += len(item)
            self._changed.notify_all()
            # What is due at this moment is about to go, and on a long line that may be much.
            grace = min(0.05, self._forwarder.round_trip)
            while self._size > _WAITING and self._queue[0][0] < time.monotonic() - grace and not self._broken:
                self._changed.wait(0.05)

    def deliver(self) -> None:
        """Give out what was taken, until its end."""
        try:
            while True:
                with self._changed:
                    while not self._queue:
                        self._changed.wait()
                    due, item = self._queue[0]
                    while (early := due - time.monotonic()) > 0:
                        self._changed.wait(early)
                if isinstance(item, str):
                    self._end(item)
                    return
                try:
                    self._goal.sendall(item)
                except OSError:
                    # Nobody is there any more: the source learns it as it would from the network.
                    with self._changed:
                        self._broken = True
                        self._changed.notify_all()
                    reset_on_close(self._source)
                    _wake(self._source)
                    return
                with self._changed:
                    self._queue.popleft()
                    self._size -= len(item)
                    self._changed.notify_all()
        finally:
            self._taken.wait()
            self.over.set()

    def _end(self, how: str) -> None:
        if how == "end":
            with contextlib.suppress(OSError):
                self._goal.shutdown(socket.SHUT_WR)
        else:
            reset_on_close(self._goal)
            _wake(self._goal)


def reset_on_close(endpoint: socket.socket) -> None:
    """Let ``endpoint.close()`` reset the connection, which the other side notices as an error and not as an end."""
    with contextlib.suppress(OSError):
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _wake(endpoint: socket.socket) -> None:
    """End whatever waits for bytes of this socket, without telling the other side anything."""
    with contextlib.suppress(OSError):
        endpoint.shutdown(socket.SHUT_RD)


def no_delay(endpoint: socket.socket) -> None:
    """Send what is there at once, however little it is."""
    endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def bounded(endpoint: socket.socket) -> None:
    """Take in little more than is read, on any machine; a listening socket hands it on to those that it accepts.

    How much may be on its way is else a setting of the system, of 32 MiB in places.
    """
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024 * 1024)
