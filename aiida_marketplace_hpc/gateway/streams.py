"""Bytes between the event loop, on which they come and go, and the threads in which files are read and written.

While one piece is worked on in a thread, the next is on its way on the loop; what is small crosses over once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from aiida_marketplace_hpc.errors import IntegrityError, TooLarge
from aiida_marketplace_hpc.gateway.routes.call import Stream

PIECE = 1024 * 1024
"""Bytes that cross over at a time."""
STALLED = 10.0
"""Seconds without a byte after which a transfer is given up: a dead client must not hold what it was writing to."""
_CHUNK = 6
"""How much longer one chunk may take on its way out: over a line of 5 kB/s it does. Who takes nothing at all is cut off
before, by :mod:`~aiida_marketplace_hpc.gateway.connections`."""
RATE = 512.0
"""Bytes in a second that count as progress: less is a client that only wants to keep the gateway busy."""


def response(stream: Stream) -> Response:
    """The answer that sends a stream; for a thread, as its first piece is read at once."""
    headers = dict(stream.headers)
    if stream.size is not None:
        headers["Content-Length"] = str(stream.size)
    try:
        first, ended = _piece(stream.chunks)
    except BaseException:
        stream.chunks.close()
        raise
    if ended:
        stream.chunks.close()
        return Response(b"".join(first), media_type=stream.media_type, headers=headers)
    return _Streamed(first, stream.chunks, media_type=stream.media_type, headers=headers)


def _piece(chunks: Generator[bytes, None, None]) -> tuple[list[bytes], bool]:
    """The next chunks, and whether that was all."""
    piece: list[bytes] = []
    size = 0
    while size < PIECE:
        chunk = next(chunks, None)
        if chunk is None:
            return piece, True
        piece.append(chunk)
        size += len(chunk)
    return piece, False


class _Streamed(StreamingResponse):
    """Reads the next piece while one is being sent; closes the file also when the client goes away in the middle."""

    def __init__(self, first: list[bytes], chunks: Generator[bytes, None, None], **options: Any) -> None:
        super().__init__(chunks, **options)
        self._first = first
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._chunks.close()  # Also if nothing was sent at all.

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        upcoming = self._upcoming()
        piece, ended = self._first, False
        try:
            while True:
                for chunk in piece:
                    with anyio.fail_after(_CHUNK * STALLED):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                if ended:
                    break
                # Shielded: a thread cannot be cancelled, and it is at work on the chunks.
                piece, ended = await asyncio.shield(upcoming)
                if not ended:
                    upcoming = self._upcoming()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError as exc:
            raise ClientDisconnect from exc
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.wait([upcoming])
            upcoming.exception()  # Else asyncio complains that nobody looked.

    def _upcoming(self) -> asyncio.Future[tuple[list[bytes], bool]]:
        return asyncio.ensure_future(run_in_threadpool(_piece, self._chunks))


class Patience:
    """How long a client is waited for: as long as bytes come, however slowly, but not for ever for one now and then.

    :attr:`left` is in seconds. Waiting takes from it, bytes give to it.
    """

    def __init__(self) -> None:
        self.left = STALLED

    def note(self, waited: float, received: int) -> None:
        """Note so many seconds and bytes."""
        self.left = min(STALLED, self.left - waited + received / RATE)


def bounded(request: Request, limit: int) -> Request:
    """The same request, whose body has at most ``limit`` bytes and goes on coming.

    :raises TooLarge: it is announced to be larger; reading it raises this, too.
    """
    too_large = TooLarge(
        f"the body of such a request has at most {limit} bytes here: send less at once, or ask who runs the gateway"
    )
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > limit:
        raise too_large
    patience = Patience()
    total = 0
    receive = request.receive

    async def bounded_receive() -> Message:
        nonlocal total
        started = anyio.current_time()
        try:
            with anyio.fail_after(max(0.0, patience.left)):
                message = await receive()
        except TimeoutError as exc:
            raise broken() from exc
        received = len(message.get("body", b""))
        patience.note(anyio.current_time() - started, received)
        total += received
        if total > limit:
            raise too_large
        return message

    return Request(request.scope, bounded_receive)


async def whole(request: Request) -> bytes:
    """A body that is small.

    :raises IntegrityError: it broke off, or stalled.
    """
    try:
        return await request.body()
    except ClientDisconnect as exc:
        raise broken() from exc


def broken() -> IntegrityError:
    """The error for a body that does not come to its end."""
    return IntegrityError("the connection broke off inside the body; nothing was written")


class Incoming:
    """A body that arrives on the event loop, read by a worker thread; one piece is gathered while another is worked on."""

    def __init__(self, request: Request) -> None:
        self._stream = request.stream()
        self._loop = asyncio.get_running_loop()
        self._upcoming: Future[deque[bytes]] | None = None
        self._chunks: deque[bytes] = deque()
        self._ended = False
        self._broken: Exception | None = None

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes, ``b""`` at the end; for a worker thread."""
        if not self._chunks and not self._ended:
            self._chunks = (self._upcoming or self._gathering()).result()
            self._ended = not self._chunks
            self._upcoming = None if self._ended else self._gathering()
        if not self._chunks:
            return b""
        chunk = self._chunks.popleft()
        if len(chunk) > size:
            self._chunks.appendleft(chunk[size:])
            chunk = chunk[:size]
        return chunk

    def _gathering(self) -> Future[deque[bytes]]:
        return asyncio.run_coroutine_threadsafe(self._gather(), self._loop)

    async def _gather(self) -> deque[bytes]:
        chunks: deque[bytes] = deque()
        size = 0
        try:
            while size < PIECE and self._broken is None:
                chunk = await anext(self._stream)
                if chunk:
                    chunks.append(chunk)
                    size += len(chunk)
        except StopAsyncIteration:
            pass
        except (ClientDisconnect, IntegrityError) as exc:
            self._broken = exc
        if self._broken is not None and not chunks:  # What came before is of use.
            raise broken() from self._broken
        return chunks

    def close(self) -> None:
        """Leave the rest unread."""
        if self._upcoming is not None:
            self._upcoming.cancel()
