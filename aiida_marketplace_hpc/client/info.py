"""What a gateway said about itself: asked once for all threads, and kept for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from aiida_marketplace_hpc.errors import ConfigurationError, NotFound, NotSupported

Json = dict[str, Any]

INFO_AGE = 300.0
"""Seconds for which an answer of ``getInfo`` is used again."""
_CLASSIC_AGE = 30.0  # A proxy may answer 404 while its gateway restarts; the safe ways of a classic one do no harm.


@dataclass(frozen=True)
class Root:
    """A folder on the cluster below which the gateway reaches everything.

    :param path: absolute.
    :param free: bytes, or ``None`` where it is not known.
    :param address: what stands for it in place of a job's id; of a machine that is not the gateway's default one it has that
        machine's name before its own.
    """

    name: str
    path: str
    read_only: bool = False
    free: int | None = None
    address: str = ""


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

    def machine(self, name: str) -> Json:
        """Return what is said about a machine; empty: about the default one.

        :raises ConfigurationError: the gateway has none of that name.
        """
        machines: list[Json] = list(self.get().get("machines", ()))
        found = [one for one in machines if name in ("", one.get("name"))]
        if not found and name and machines:
            names = ", ".join(str(one.get("name")) for one in machines)
            several = "s" if len(machines) > 1 else ""
            raise ConfigurationError(
                f"the gateway {self._url} has no machine {name}: it has the machine{several} {names}"
            )
        return found[0] if found else {}

    def roots(self, machine: str = "") -> tuple[Root, ...]:
        """Return the folders that the gateway reaches on a machine; empty: on the default one.

        :raises ConfigurationError: as :meth:`machine`.
        """
        about = self.machine(machine)
        listed = about["roots"] if "roots" in about else self.get().get("roots", ())
        prefix = f"{about.get('name')}."
        return tuple(
            Root(
                str(root["name"]).removeprefix(prefix),
                str(root["path"]),
                bool(root.get("read_only")),
                root.get("free"),
                str(root["name"]),
            )
            for root in listed
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
