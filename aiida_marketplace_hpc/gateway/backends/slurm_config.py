"""What the gateway needs to know of Slurm's configuration, asked for when it is needed and again from time to time."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiida_marketplace_hpc.gateway.backends.base import SchedulerDown
from aiida_marketplace_hpc.gateway.backends.slurm_commands import Answer, require_success

MAX_AGE = 600.0
"""Seconds for which an answer is taken for true: Slurm reads its configuration again only when an operator says so."""
PAUSE = 15.0
"""Seconds after a question without an answer in which it is not repeated: one may take long."""

_ACCOUNTING = re.compile(r"^AccountingStorageType\s*=\s*(\S+)", re.MULTILINE)
_TIMEOUT = re.compile(r"^MessageTimeout\s*=\s*(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Configuration:
    """Of one cluster.

    :param accounting: whether there is a database (slurmdbd) that ``sacct`` asks.
    :param message_timeout: seconds after which Slurm's programs give a message up.
    """

    accounting: bool
    message_timeout: float


def config_arguments() -> list[str]:
    """Make the command that shows the configuration."""
    return ["scontrol", "show", "config"]


def parse_config(answer: Answer) -> Configuration:
    """Read the configuration.

    :raises SchedulerDown: if it is not a whole answer.
    """
    require_success("scontrol", answer)
    storage, timeout = _ACCOUNTING.search(answer.stdout), _TIMEOUT.search(answer.stdout)
    if storage is None or timeout is None:
        raise SchedulerDown("scontrol does not say how Slurm is configured")
    return Configuration(storage[1].endswith("slurmdbd"), float(timeout[1]))


class KnownConfiguration:
    """The last known configuration.

    :param ask: asks for it.
    """

    def __init__(self, ask: Callable[[], Configuration], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._lock = threading.Lock()
        self._asked_at = self._again_at = float("-inf")
        self.last: Configuration | None = None
        """What was known last; ``None`` if nothing ever was."""

    def get(self) -> Configuration | None:
        """Say what is known, and ask before if that is old; never raises."""
        with self._lock:
            now = self._clock()
            if now >= self._again_at:
                self._asked_at = now
                try:
                    self.last = self._ask()
                    self._again_at = now + MAX_AGE
                except SchedulerDown:
                    self._again_at = now + PAUSE
            return self.last

    def doubt(self) -> None:
        """Ask again at the next occasion: something does not fit what is known."""
        with self._lock:
            self._again_at = min(self._again_at, self._asked_at + PAUSE)
