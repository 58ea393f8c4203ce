"""What a gateway said about itself: asked once for all threads, and kept for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from aiida_marketplace_hpc.errors import NotFound, NotSupported

Json = dict[str, Any]

INFO_AGE = 300.0
"""Seconds for which an answer of ``getInfo`` is used again."""
_CLASSIC_AGE = 30.0  # A proxy may answer 404 while its gateway restarts; the safe ways of a classic one do no harm.


@dataclass(frozen=True)
class Root:
    """A folder on the cluster below which the gateway reaches everything.

    :param path: absolute.
    :param free: bytes, or ``None`` where it is not known.
    """

    name: str
    path: str
    read_only: bool = False
    free: int | None = None


class InfoCache:
    """The answer of ``getInfo``.

    :param url: the gateway's address, for messages.
    :param ask: asks for it.
    :param clock: the seconds of a monotonic clock.
    """

    def __init__(self, url: str, ask: Callable[[], Json], clock: Callable[[], float]) -> None:
        self._url, self._ask, self._clock = url, ask, clock
        self._lock = threading.Lock()
        self._known: tuple[float, Json | NotSupported] | None = None  # and until when it holds
        self._asking: Future[Json | NotSupported] | None = None

    def get(self, refresh: bool = False) -> Json:
        """Return the answer. May be repeated; threads that call it at the same time share one request.

        :param refresh: ask again now.
        :raises NotSupported: this is a classic gateway, or the url is wrong.
        """
        with self._lock:
            if not refresh and self._known is not None and self._clock() < self._known[0]:
                return _raised(self._known[1])
            asking = self._asking
            if asking is None:
                mine: Future[Json | NotSupported] = Future()
                self._asking = mine
        if asking is not None:
            return _raised(asking.result())
        try:
            answer = self._answer()
        except BaseException as exc:
            with self._lock:
                self._asking = None
            mine.set_exception(exc)
            raise
        with self._lock:
            self._asking = None
            age = _CLASSIC_AGE if isinstance(answer, NotSupported) else INFO_AGE
            self._known = (self._clock() + age, answer)
        mine.set_result(answer)
        return _raised(answer)

    def forget(self) -> None:
        """Ask again when the answer is wanted next: something did not fit it."""
        with self._lock:
            self._known = None

    def roots(self) -> tuple[Root, ...]:
        """Return the folders that the gateway reaches."""
        return tuple(
            Root(str(root["name"]), str(root["path"]), bool(root.get("read_only")), root.get("free"))
            for root in self.get().get("roots", ())
        )

    def _answer(self) -> Json | NotSupported:
        try:
            return self._ask()
        except NotSupported as exc:
            return exc
        except NotFound as exc:
            return NotSupported(
                f"{self._url} does not say what it is: it is a classic gateway, which cannot do that, or the url is wrong",
                request_id=exc.request_id,
            )


def _raised(answer: Json | NotSupported) -> Json:
    # A new exception each time: one object raised by several threads would collect all their tracebacks.
    if isinstance(answer, NotSupported):
        error = NotSupported(answer.message, request_id=answer.request_id)
        error.phase = answer.phase
        raise error
    return answer
