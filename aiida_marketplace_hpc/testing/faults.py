"""What a :class:`~aiida_marketplace_hpc.testing.proxy.FaultyProxy` can do to a request, and when it does it.

A fault that happens inside a body happens to the first bodies that are long enough; ``after=0`` means before anything is
passed on, not even the head.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NoReturn, TypeVar

_KIND = TypeVar("_KIND")


@dataclass
class ProxiedRequest:
    """One request that reached the proxy; its figures grow while it is under way.

    :param path: without the query, which is ``query``.
    :param body: bytes of the body that have come so far.
    :param status: what the client was answered; ``None``: nothing yet, or nothing at all.
    :param answer: bytes of the answer's body that were passed on so far.
    :param faults: what was done to it.
    """

    method: str
    path: str
    query: str
    body: int = 0
    status: int | None = None
    answer: int = 0
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class Refuse:
    """Answer with an HTML page, as proxies do whose server is away; the server never sees the request."""

    status: int = 502


@dataclass(frozen=True)
class LoseAnswer:
    """Let the server do what was asked, throw its answer away and send an HTML page."""

    status: int = 504


@dataclass(frozen=True)
class CutRequest:
    """Reset the connection when so many bytes of a request's body were passed on.

    The server sees a reset, too, and loses what it has not read by then.
    """

    after: int


@dataclass(frozen=True)
class CutAnswer:
    """Pass on only so many bytes of an answer's body.

    :param how: ``reset`` the connection; ``close`` it, so that the announced length is not reached; or make it look
        ``whole``: with a ``Content-Length`` of what was passed on, or the end of a chunked body.
    """

    after: int
    how: Literal["reset", "close", "whole"] = "reset"


@dataclass(frozen=True)
class FlipInRequest:
    """Invert the byte at this position of a request's body."""

    at: int


@dataclass(frozen=True)
class FlipInAnswer:
    """Invert the byte at this position of an answer's body."""

    at: int


@dataclass(frozen=True)
class Duplicate:
    """Send the request to the server twice, one after the other, and answer with the second answer."""


@dataclass(frozen=True)
class StallRequest:
    """Pass nothing on any more after so many bytes of a request's body; the connection stays open."""

    after: int


@dataclass(frozen=True)
class StallAnswer:
    """Pass nothing on any more after so many bytes of an answer's body; the connection stays open."""

    after: int


@dataclass(frozen=True)
class Delay:
    """Hold a whole request before the server sees it, or its answer before the client does, whether the client waits or goes.

    What comes meanwhile overtakes it.

    :param seconds: after which it is passed on; ``None``: when :meth:`release` is called.
    """

    what: Literal["request", "answer"] = "request"
    seconds: float | None = None
    _released: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)

    def release(self) -> None:
        """Pass it on. May be repeated."""
        self._released.set()

    def wait(self, ended: threading.Event) -> None:
        """Wait until it is to be passed on, or until something has ended."""
        _wait(self._released, self.seconds, ended)


@dataclass(frozen=True)
class DeliverAgain:
    """Pass a request on, and when :meth:`release` is called once more; nobody gets the second answer.

    ``statuses`` has the second answer's status when it has come.
    """

    statuses: list[int] = field(default_factory=list, compare=False)
    _released: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)

    def release(self) -> None:
        """Deliver it again. May be repeated, without an effect."""
        self._released.set()

    def wait(self, ended: threading.Event) -> None:
        """Wait until it is to be delivered again, or until something has ended."""
        _wait(self._released, None, ended)


Fault = (
    Refuse
    | LoseAnswer
    | CutRequest
    | CutAnswer
    | FlipInRequest
    | FlipInAnswer
    | Duplicate
    | StallRequest
    | StallAnswer
    | Delay
    | DeliverAgain
)


class Injected:
    """A fault that waits for its requests.

    :param times: to how many requests it happens; ``None``: to all.
    :param only: says of a request whether it may be hit; its body has not been read then.
    """

    def __init__(self, fault: Fault, times: int | None, only: Callable[[ProxiedRequest], bool] | None) -> None:
        self.fault = fault
        self._times = times
        self._only = only
        self._lock = threading.Lock()
        self._hit = 0

    @property
    def hit(self) -> int:
        """To how many requests it has happened so far."""
        return self._hit

    def may_hit(self, request: ProxiedRequest) -> bool:
        """Whether it is there for this request."""
        return self._left() and (self._only is None or self._only(request))

    def claim(self, request: ProxiedRequest) -> bool:
        """Take it for this request, now that it is to happen; ``False`` if others have used it up."""
        with self._lock:
            if not self._left():
                return False
            self._hit += 1
        request.faults.append(self.fault)
        return True

    def withdraw(self) -> None:
        """Let it happen no more."""
        with self._lock:
            self._times = self._hit

    def _left(self) -> bool:
        return self._times is None or self._hit < self._times


class FaultsOfRequest:
    """The faults that wait for one request."""

    def __init__(self, injected: list[Injected], request: ProxiedRequest) -> None:
        self._injected = injected
        self._request = request

    def waiting(self, kind: type[_KIND]) -> tuple[_KIND, Callable[[], bool]] | None:
        """The first fault of a kind, and how to claim it when it is to happen."""
        for injected in self._injected:
            if isinstance(injected.fault, kind):
                return injected.fault, functools.partial(injected.claim, self._request)
        return None

    def claim(self, kind: type[_KIND]) -> _KIND | None:
        """A fault of a kind that happens now."""
        found = self.waiting(kind)
        return found[0] if found is not None and found[1]() else None

    def at(
        self,
        kind: type[CutRequest | CutAnswer | StallRequest | StallAnswer],
        body: Iterable[bytes],
        act: Callable[[], NoReturn],
    ) -> Iterable[bytes]:
        """A body in which something is done at the place that the fault says."""
        found = self.waiting(kind)
        return body if found is None else acting(body, found[0].after, found[1], act)

    def flip(self, kind: type[FlipInRequest | FlipInAnswer], body: Iterable[bytes]) -> Iterable[bytes]:
        """A body in which the byte at the place that the fault says is inverted."""
        found = self.waiting(kind)
        return body if found is None else _flipped(body, found[0].at, found[1])


def acting(
    body: Iterable[bytes], after: int, claim: Callable[[], bool], act: Callable[[], NoReturn]
) -> Iterator[bytes]:
    """Pass ``after`` bytes of a body on, then act if that may be claimed."""
    if not after and claim():
        act()
    position = 0
    for piece in body:
        if position < after <= position + len(piece) and claim():
            yield piece[: after - position]
            act()
        position += len(piece)
        yield piece


def _wait(event: threading.Event, seconds: float | None, ended: threading.Event) -> None:
    deadline = None if seconds is None else time.monotonic() + seconds
    while not ended.is_set() and (deadline is None or time.monotonic() < deadline):
        if event.wait(0.02):
            return


def _flipped(body: Iterable[bytes], at: int, claim: Callable[[], bool]) -> Iterator[bytes]:
    position = 0
    for piece in body:
        if position <= at < position + len(piece) and claim():
            changed = bytearray(piece)
            changed[at - position] ^= 0xFF
            yield bytes(changed)
        else:
            yield piece
        position += len(piece)
