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
from starlette.types import Receive, Scope, Send

from aiida_marketplace_hpc.errors import IntegrityError
from aiida_marketplace_hpc.gateway.routes.call import Stream

PIECE = 1024 * 1024
"""Bytes that cross over at a time."""
STALLED = 10.0
"""Seconds without a byte after which a transfer is given up: a dead client must not hold what it was writing to."""


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
                    with anyio.fail_after(STALLED):
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


async def whole(request: Request) -> bytes:
    """A body that is small.

    :raises IntegrityError: it broke off, or stalled.
    """
    try:
        with anyio.fail_after(STALLED):
            return await request.body()
    except (ClientDisconnect, TimeoutError) as exc:
        raise _broken() from exc


def _broken() -> IntegrityError:
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
                with anyio.fail_after(STALLED):
                    chunk = await anext(self._stream)
                if chunk:
                    chunks.append(chunk)
                    size += len(chunk)
        except StopAsyncIteration:
            pass
        except (ClientDisconnect, TimeoutError) as exc:
            self._broken = exc
        if self._broken is not None and not chunks:  # What came before is of use.
            raise _broken() from self._broken
        return chunks

    def close(self) -> None:
        """Leave the rest unread."""
        if self._upcoming is not None:
            self._upcoming.cancel()
