"""Lists of operations that are under way, and what came of those that have ended, by user and key.

A list may take longer than a request may, and an answer can be lost. So a client gives each list a key of its own: the same
request again joins the list that is under way, or gets the result that is kept for some minutes. Nothing is done twice, as
long as the gateway remembers. Where it does not (it was started anew, or had to forget) it knows since when it remembers
everything, and a client that asks again says when it first asked.

What takes longer than a request is a *long* list. It has a place among a bounded number of them, or waits for one; lists that
are done in a moment never wait for long ones.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import Any

from aiida_marketplace_hpc.errors import Busy, InvalidRequest, Unavailable
from aiida_marketplace_hpc.gateway.metrics import Limit

Result = dict[str, Any]

PATIENCE = 8.0
"""Seconds after which a request for a list that is not done is answered: not yet."""
KEEP = 300.0
"""Seconds for which the result of a list is kept."""
_TRANSIT = 20.0
"""Seconds that a request may be on its way, in a proxy for instance."""
_UNCLAIMED = 60.0
"""Seconds for which a result that the client has still to fetch is kept, however large it is."""


class Running:
    """One list of operations; :attr:`future` gives its result.

    :param user: whose it is.
    :param key: what the client calls it, if it has a name for it.
    :param mark: tells lists with different content apart.
    :param repeatable: doing it twice is the same as doing it once.
    """

    def __init__(self, operations: Operations, user: str, key: str | None, mark: str, repeatable: bool) -> None:
        self.user = user
        self.key = key
        self.mark = mark
        self.repeatable = repeatable
        self.future: Future[Result] = Future()
        self.future.set_running_or_notify_cancel()
        self.started = operations.clock()
        self.ended: float | None = None
        self.is_pending = False
        """Whether the client was told to ask again."""
        self.size = 0
        """Bytes of the result, about."""
        self.has_place = False
        self._operations = operations
        self._count = 0
        self._waits = False
        self._stop = ""

    @property
    def progress(self) -> int:
        """A number that changes while there is progress: the list's own or, while it waits, that of those before it."""
        return self._operations.total if self._waits else self._count

    @property
    def stopped(self) -> bool:
        """Whether it is to end, or has ended, before its time."""
        return bool(self._stop)

    def advance(self, amount: int) -> None:
        """Note progress: bytes, entries, operations.

        :raises Unavailable: if the list is to end here.
        """
        self._count += amount
        if self.has_place:
            self._operations.total += amount
        elif self._operations.clock() - self.started > self._operations.patience:
            self._waits = True
            self._operations.take_place(self)
            self._waits = False
        if self._stop:
            raise Unavailable(self._stop, retryable=False)

    def stop(self, reason: str) -> None:
        """Ask the list to end at its next step."""
        self._stop = self._stop or reason
        self._operations.wake()

    def meanwhile(self) -> Result:
        """What is answered while it is under way."""
        self.is_pending = True
        return {"pending": {"key": self.key, "progress": self.progress}}

    def run(self, work: Callable[[Running], Result]) -> None:
        """Do the work."""
        try:
            result = work(self)
            self.size = len(json.dumps(result)) if self.is_pending or not self.repeatable else 0
        except BaseException as exc:  # noqa: BLE001 - whoever waits for the result is to see it.
            self._operations.note_end(self)
            self.future.set_exception(exc)
        else:
            self._operations.note_end(self)
            self.future.set_result(result)

    def end(self, now: float) -> None:
        self.ended = now


class Operations:
    """All lists of operations of a gateway.

    :param patience: seconds that a request waits for a list, after which it is a long one.
    :param keep: seconds for which results are kept.
    :param kept: results, and their bytes, that are kept of each user.
    :param at_once: lists under way, for all users and for each.
    :param long_at_once: the same for long ones; more wait for their turn.
    :param clock: the seconds of a monotonic clock.
    :param hit: told of each list that was one too many.
    """

    def __init__(
        self,
        *,
        patience: float = PATIENCE,
        keep: float = KEEP,
        kept: tuple[int, int] = (2000, 16 * 1024 * 1024),
        at_once: tuple[int, int] = (200, 100),
        long_at_once: tuple[int, int] = (16, 8),
        clock: Callable[[], float] = time.monotonic,
        hit: Callable[[Limit], None] = lambda _: None,
    ) -> None:
        self._hit = hit
        self.patience = patience
        self.clock = clock
        self.total = 0
        """Progress of all long ones; only its changes are of interest."""
        self._keep = keep
        self._kept = kept
        self._at_once = at_once
        self._long_at_once = long_at_once
        self._changed = threading.Condition()
        self._known: defaultdict[str, dict[str, Running]] = defaultdict(dict)
        self._alive: set[Running] = set()
        self._places: Counter[str] = Counter()
        self._began = clock()
        self._forgot: dict[str, float] = {}
        self._stopping = ""

    def start(
        self,
        user: str,
        key: str | None,
        work: Callable[[Running], Result],
        *,
        mark: str = "",
        repeatable: bool = False,
        again: float | None = None,
    ) -> Running:
        """Start a list in a thread of its own, or join the one of this user with this key.

        :param work: does it, and returns what is to be answered; it tells its progress to what it is given.
        :param mark: the same for the same content.
        :param repeatable: doing it twice is the same as doing it once.
        :param again: seconds since the client first asked, if it does not do so for the first time.
        :raises Unavailable: if it cannot be known whether it was carried out.
        :raises InvalidRequest: if the key stands for something else.
        :raises Busy: if too much is under way.
        """
        with self._changed:
            self._forget(user)
            known = self._known[user].get(key) if key is not None else None
            if known is not None:
                if known.mark != mark:
                    raise InvalidRequest(
                        "this key stands for another list of operations: each list needs one of its own"
                    )
                return known
            if again is not None and not repeatable and not self._remembers(user, again):
                raise Unavailable(
                    "the gateway was started anew, or had to forget, since it was first asked, and does not know whether "
                    "this was carried out: see how things are before it is done again",
                    retryable=False,
                )
            self._admit(user)
            running = Running(self, user, key, mark, repeatable)
            self._alive.add(running)
            if key is not None:
                self._known[user][key] = running
        # What its lines in the log are about goes along.
        run = partial(copy_context().run, running.run, work)
        threading.Thread(target=run, name="operations", daemon=True).start()
        return running

    def find(self, user: str, key: str) -> Running | None:
        """The list of this user with this key, if it is known."""
        with self._changed:
            return self._known[user].get(key)

    def stop(self) -> None:
        """Ask all lists to end at their next step, and take no new ones."""
        self._stopping = "the gateway is being stopped: this was not carried out to its end"
        with self._changed:
            alive = list(self._alive)
        for running in alive:
            running.stop(self._stopping)

    def close(self, timeout: float = 10.0) -> None:
        """:meth:`stop`, and wait until they have ended; what hangs in the file system is left to the end of the process.

        :param timeout: seconds.
        """
        self.stop()
        with self._changed:
            self._changed.wait_for(lambda: not self._alive, timeout)

    # For the lists themselves

    def take_place(self, running: Running) -> None:
        """Wait for a place among the long ones, or until ``running`` is to end."""
        every, each = self._long_at_once

        def is_free() -> bool:
            return self._places.total() < every and self._places[running.user] < each

        with self._changed:
            self._changed.wait_for(lambda: running.stopped or is_free())
            if is_free():
                self._places[running.user] += 1
                running.has_place = True

    def note_end(self, running: Running) -> None:
        """Give its place to another one, and keep its result if it can still be asked for."""
        with self._changed:
            running.end(self.clock())
            self._alive.discard(running)
            if running.has_place:
                self._places[running.user] -= 1
            if running.key is not None and running.repeatable and not running.is_pending:
                # Whoever missed the answer may have it done again.
                del self._known[running.user][running.key]
            self._changed.notify_all()

    def wake(self) -> None:
        """Let those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    # Remembering; all of it with the lock held

    def _admit(self, user: str) -> None:
        if self._stopping:
            raise Unavailable(self._stopping)
        every, each = self._at_once
        if len(self._alive) >= every or sum(running.user == user for running in self._alive) >= each:
            self._hit("operations")
            raise Busy("too many operations are under way at once")

    def _remembers(self, user: str, again: float) -> bool:
        """Whether a list that a client first asked for so many seconds ago would be known."""
        return self.clock() - again - _TRANSIT > self._forgot.get(user, self._began)

    def _forget(self, user: str) -> None:
        """Forget what is old and, where there is too much, the oldest."""
        now, known = self.clock(), self._known[user]
        ended = [running for running in known.values() if running.ended is not None]
        count, size = len(ended), sum(running.size for running in ended)
        most, largest = self._kept
        for running in ended:
            age = now - (running.ended or now)
            excess = (count > most or size > largest) and not (running.is_pending and age <= _UNCLAIMED)
            if age > self._keep or excess:
                del known[str(running.key)]
                count, size = count - 1, size - running.size
                if not running.repeatable:
                    self._forgot[user] = max(self._forgot.get(user, self._began), running.started)
