"""Connections: how many there are, and an end to all waiting for the other side.

uvicorn ends a connection that is idle after an answer. What it does not end is ended here: one on which no request ever
arrives, or one piece of its head after the other; one on which the rest of a body that nobody reads goes on and on; and one
whose other end takes none of an answer. (A body that is read is bounded where that happens, in
:mod:`~aiida_marketplace_hpc.gateway.streams`.) What uvicorn answers by itself is put into the gateway's words.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from aiida_marketplace_hpc.errors import InvalidRequest
from aiida_marketplace_hpc.gateway import streams
from aiida_marketplace_hpc.gateway.access import FULL, SECURITY_HEADERS, error_response

KEEP_ALIVE = 5
"""Seconds for which an idle connection is kept after an answer."""
_SPARE = 100
"""Connections over the limit that still get an answer, which says so; further ones are closed."""
_TAKEN = 2
"""How much more patience there is with those who take little than with those who send little: progress shows later."""


class Connection(H11Protocol):
    """One connection.

    :param most: connections at once.
    """

    def __init__(self, *arguments: Any, most: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most = most
        self._for_request = _Timer(self.loop)
        self._for_taking = _Timer(self.loop)
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self.app_state = {**self.app_state, FULL: True}
        if len(self.connections) > self._most + _SPARE:
            transport.abort()
            return
        self._for_request.start(streams.STALLED, self._no_request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._for_request.stop()
        self._for_taking.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_busy:
            self._for_request.stop()
            if not self.flow.write_paused:
                self._for_taking.stop()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_busy:
            self._for_request.start(streams.STALLED + KEEP_ALIVE, self._no_request)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_taking()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._for_taking.stop()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._hang_up()

    def shutdown(self) -> None:
        super().shutdown()
        if not self._is_busy:
            self._hang_up()

    def _hang_up(self) -> None:
        """Close at once what has nothing to send: with TLS the other side would be waited for, which may be asleep."""
        if not self._unsent_now():
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP at all, or has too long a head."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # An answer has begun.
            return
        error = InvalidRequest("this is no HTTP request that can be understood", request_id=uuid.uuid4().hex)
        answer = error_response(error)
        answer.headers.update({**SECURITY_HEADERS, "Connection": "close"})
        for event in (
            h11.Response(status_code=400, headers=answer.raw_headers),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _is_busy(self) -> bool:
        """Whether the application is at work on a request."""
        return self.cycle is not None and not self.cycle.response_complete

    def _unsent_now(self) -> int:
        """Bytes that wait for the other side to take what came before them."""
        # Below TLS there is a second buffer, of which asyncio does not tell otherwise.
        below = getattr(getattr(self.transport, "_ssl_protocol", None), "_transport", None)
        return self.transport.get_write_buffer_size() + (below.get_write_buffer_size() if below is not None else 0)

    def _no_request(self) -> None:
        if self._unsent_now():
            self._await_taking()  # The answer to the last one is still on its way.
        else:
            self.transport.abort()

    def _await_taking(self) -> None:
        self._unsent = self._unsent_now()
        self._for_taking.start(_TAKEN * streams.STALLED, self._taken)

    def _taken(self) -> None:
        unsent = self._unsent_now()
        if unsent >= self._unsent:
            self.transport.abort()  # Nothing of it; or all of it, and no request came.
        else:
            self._await_taking()


class _Timer:
    """One of the things that a connection is waiting for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, end: Callable[[], None]) -> None:
        """Call ``end`` after so many seconds, instead of what was to be called."""
        self.stop()
        self._handle = self._loop.call_later(seconds, end)

    def stop(self) -> None:
        """Call nothing."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
