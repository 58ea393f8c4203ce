"""How checks are made: in order, each with what was found or what to do, and none that makes no sense any more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from aiida_marketplace_hpc.errors import MarketplaceHpcError

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    :param good: ``None``: it was not, because something before it failed.
    :param text: what was found, or what is wrong and what to do.
    """

    name: str
    good: bool | None
    text: str


class Checks:
    """All checks so far, and the first failure among them."""

    def __init__(self) -> None:
        self.all: list[Check] = []
        self.failure: MarketplaceHpcError | None = None
        self._stopped = False

    def run(self, name: str, find: Callable[[], T], say: Callable[[T], str], *, needed: bool = False) -> T | None:
        """Make one check, unless a needed one has failed; return what it found.

        :param say: makes the text for a person of it.
        :param needed: those that follow make no sense without it.
        """
        if self._stopped:
            self.all.append(Check(name, None, "not checked"))
            return None
        try:
            found = find()
            self.all.append(Check(name, True, say(found)))
            return found
        except OSError as exc:
            error: MarketplaceHpcError = MarketplaceHpcError(str(exc))
        except MarketplaceHpcError as exc:
            error = exc
        self.all.append(Check(name, False, str(error)))
        self.failure = self.failure or error
        self._stopped = needed
        return None
