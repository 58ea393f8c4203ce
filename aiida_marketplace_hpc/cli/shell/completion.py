"""What a half-typed line can become: commands, options, names on the cluster, names on this machine."""

from __future__ import annotations

import os
import posixpath
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from aiida_marketplace_hpc.cli.shell.cluster import CommandError, Json, is_folder
from aiida_marketplace_hpc.cli.shell.line import Unfinished, Word, escape, unfinished
from aiida_marketplace_hpc.cli.shell.moving import here
from aiida_marketplace_hpc.cli.shell.session import COMMANDS, Session, ShellCommand
from aiida_marketplace_hpc.errors import MarketplaceHpcError

_FRESH = 3.0
"""Seconds for which a folder's listing is used again: one word is completed with several strokes of TAB."""


@dataclass(frozen=True)
class Candidate:
    """One way to go on.

    :param text: what to write in place of the last ``back`` characters.
    :param shown: what to call it in a list.
    """

    text: str
    shown: str
    back: int = 0


class Completion:
    """Completes lines of one session. A folder is listed at most once every few seconds.

    :param clock: the seconds of a monotonic clock.
    """

    def __init__(self, session: Session, clock: Callable[[], float] = time.monotonic) -> None:
        self._session = session
        self._clock = clock
        self._listed: dict[str, tuple[float, list[Json]]] = {}

    def candidates(self, text: str) -> list[Candidate]:
        """How a line can go on at its end, in order; what cannot be found out now is no candidate."""
        found, back = unfinished(text), 0
        if found is None and text.endswith("\\"):
            # What two names have in common may end in the middle of an escaped character.
            found, back = unfinished(text[:-1]), 1
        if found is None or found.last.pattern is not None:
            return []
        if found.last.tilde and found.last == "~":
            return [Candidate("/", "~/")]
        return [
            Candidate(escape(name[len(_tail(found.last)) :], found.quote) + _ending(name, found), name.strip(), back)
            for name in self._names(found)
        ]

    def _names(self, found: Unfinished) -> list[str]:
        """The whole last components that fit; a folder's ends with ``/``."""
        if not found.words:
            return _fitting(sorted(COMMANDS.commands), found.last)
        command = COMMANDS.commands.get(str(found.words[0]))
        if not isinstance(command, ShellCommand):
            return []
        if found.last.startswith("-") and not found.quote:
            return _fitting(sorted(option for each in command.params for option in each.opts), found.last)
        kinds = command.completes
        if not kinds:
            return []
        operands = sum(not word.startswith("-") for word in found.words[1:])
        kind = kinds[min(operands, len(kinds) - 1)]
        if kind == "command":
            return _fitting(sorted(COMMANDS.commands), found.last) if not operands else []
        only_folders = command.name in ("cd", "lcd")
        names: set[str] = set()
        if kind in ("remote", "both"):
            names.update(self._remote(found.last, only_folders))
        if kind in ("local", "both"):
            names.update(_local(found.last, only_folders))
        return sorted(names)

    def _remote(self, last: Word, only_folders: bool) -> Iterable[str]:
        cluster = self._session.cluster
        head, tail = posixpath.split(last)
        try:
            folder = cluster.path(Word(head or ".", tilde=last.tilde))
            entries = [entry for entry in self._entries(folder) if _fits(entry["name"], tail)]
            links = [entry["name"] for entry in entries if entry["type"] == "symlink"]
            targets = cluster.stats([posixpath.join(folder, name) for name in links]) if links else []
        except (MarketplaceHpcError, CommandError):
            return []
        folders = {name for name, target in zip(links, targets, strict=True) if is_folder(target)}
        folders.update(entry["name"] for entry in entries if is_folder(entry))
        return _marked([entry["name"] for entry in entries], folders, only_folders)

    def _entries(self, folder: str) -> list[Json]:
        known = self._listed.get(folder)
        if known is None or self._clock() - known[0] > _FRESH:
            known = (self._clock(), self._session.cluster.entries(folder))
            self._listed = {folder: known}
        return known[1]


def _local(last: Word, only_folders: bool) -> Iterable[str]:
    head, tail = posixpath.split(last)
    folder = here(Word(head, tilde=last.tilde)) or "."
    try:
        names = [name for name in os.listdir(folder) if _fits(name, tail)]
    except OSError:
        return []
    return _marked(names, {name for name in names if os.path.isdir(os.path.join(folder, name))}, only_folders)


def _tail(last: str) -> str:
    return posixpath.basename(last)


def _fits(name: str, beginning: str) -> bool:
    return name.startswith(beginning) and (beginning.startswith(".") or not name.startswith("."))


def _fitting(names: Sequence[str], beginning: str) -> list[str]:
    return [name for name in names if name.startswith(beginning)]


def _marked(names: Sequence[str], folders: set[str], only_folders: bool) -> list[str]:
    return [f"{name}/" if name in folders else name for name in names if name in folders or not only_folders]


def _ending(name: str, found: Unfinished) -> str:
    """What closes the word: a blank, but not after a folder, into which one may want to go on."""
    return "" if name.endswith("/") else f"{found.quote} "
