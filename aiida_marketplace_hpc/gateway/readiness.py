"""Whether a gateway can do its work now: what a load balancer or a supervisor asks, who have no token.

The heartbeat says only that the process lives, and needs nothing for that. Here is looked at what the work needs. The answer
has words and no details, and a flood of questions is one question to the database in a second.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

from aiida_marketplace_hpc.gateway.ledger import Ledger
from aiida_marketplace_hpc.gateway.watch import Watch

logger = logging.getLogger(__name__)

Condition = Literal["ok", "partial", "failing", "unknown"]
"""``partial``: of several machines some do not answer, which keeps nobody from the others."""

_AGE = 1.0
"""Seconds for which one look at the database serves everybody."""
_PATIENCE = 2.0
"""Seconds after which a database that has not answered is taken for one that does not."""


class Readiness:
    """What is asked at ``/ready``. Used on the event loop only, and never blocks it.

    :attr:`stopping` is set when the gateway was asked to stop.

    :param clock: the seconds of a monotonic clock.
    """

    def __init__(self, ledger: Ledger, watch: Watch, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.stopping = False
        self._ledger = ledger
        self._watch = watch
        self._clock = clock
        self._look: Future[bool] | None = None
        self._began = 0.0

    async def document(self) -> dict[str, Any]:
        """What is answered: ``ready``, and the conditions that it follows from."""
        database, scheduler = await self._database(), self._scheduler()
        return {
            "ready": database == "ok" and scheduler in ("ok", "partial") and not self.stopping,
            "database": database,
            "scheduler": scheduler,
            "scheduler_age": None if (age := self._watch.answer_age) is None else round(age, 3),
            "stopping": self.stopping,
        }

    def _scheduler(self) -> Condition:
        """By its last answer; nothing is asked here."""
        if self._watch.problem is not None or self._watch.is_overdue:
            return "failing"
        if self._watch.answer_age is None:
            return "unknown"
        return "partial" if self._watch.is_partial else "ok"

    async def _database(self) -> Condition:
        if self._look is None or (self._look.done() and self._clock() - self._began > _AGE):
            self._look, self._began = Future(), self._clock()
            # A thread of its own: those for requests may all be waiting for the database.
            threading.Thread(target=self._look_into, args=(self._look,), name="readiness", daemon=True).start()
        done, _ = await asyncio.wait([asyncio.wrap_future(self._look)], timeout=_PATIENCE)
        return "ok" if done and self._look.result() else "failing"

    def _look_into(self, look: Future[bool]) -> None:
        try:
            self._ledger.look()
        except Exception as exc:  # noqa: BLE001 - whatever it is, the database cannot be used.
            logger.warning("the database cannot be used: %s", exc)
            look.set_result(False)
        else:
            look.set_result(True)
