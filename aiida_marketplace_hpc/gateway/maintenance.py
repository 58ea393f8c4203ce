"""Maintenance: nothing new is submitted, everything else goes on; written down in the database, so that all gateways know."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from aiida_marketplace_hpc.errors import Unavailable
from aiida_marketplace_hpc.gateway.ledger import Ledger, utc_now
from aiida_marketplace_hpc.gateway.schema import Drain

_AGE = 1.0
"""Seconds for which what the database has said is believed."""
_THE_ONE = 1


@dataclass(frozen=True)
class Notice:
    """What an operator says about a maintenance.

    :param message: for users; may be empty.
    :param since: when it began.
    """

    message: str
    since: datetime

    @property
    def text(self) -> str:
        """Why a job waits."""
        return "waits: the gateway is being maintained and submits nothing" + (
            f": {self.message}" if self.message else ""
        )


class Maintenance:
    """Whether the gateways of a database submit jobs.

    :param ledger: the database.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: float | None = None
        self._known: Notice | None = None

    def begin(self, message: str) -> None:
        """Let nothing be submitted any more, from a few seconds on. May be repeated, with another message."""
        with self._ledger.writing() as session:
            there = session.get(Drain, _THE_ONE)
            if there is None:
                session.add(Drain(id=_THE_ONE, message=message, since=utc_now()))
            else:
                there.message = message
        self._asked = None

    def end(self) -> None:
        """Let jobs be submitted again; those that have waited are, within seconds. May be repeated."""
        with self._ledger.writing() as session:
            there = session.get(Drain, _THE_ONE)
            if there is not None:
                session.delete(there)
        self._asked = None

    @property
    def known(self) -> Notice | None:
        """What :meth:`notice` has said last; takes no time, whatever the database does."""
        return self._known

    def notice(self) -> Notice | None:
        """What is said about the maintenance now; ``None`` if there is none. A second old at most.

        While the database does not answer, it is what was known last.
        """
        with self._lock:
            if self._asked is None or self._clock() - self._asked > _AGE:
                try:
                    self._known = self._read()
                except Unavailable:
                    pass
                self._asked = self._clock()
            return self._known

    def _read(self) -> Notice | None:
        with self._ledger.reading() as session:
            there = session.get(Drain, _THE_ONE)
        return None if there is None else Notice(there.message, there.since)
