"""Shell patterns over whatever can list a folder."""

from __future__ import annotations

import abc
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from aiida_marketplace_hpc.errors import FileError

_MAGIC = re.compile(r"[*?\[]")


class Globbing(abc.ABC):
    """What can be asked for by a pattern."""

    @abc.abstractmethod
    def stat(self, path: str, *, follow: bool = False) -> dict[str, Any]:
        """Attributes of a path; of a link itself unless ``follow``."""

    @abc.abstractmethod
    def _allowed(self, path: str) -> None:
        """Refuse a path outside the roots."""

    @abc.abstractmethod
    def _matching(self, base: str, pattern: str) -> list[str]:
        """The names in a folder that match; none where it cannot be looked at."""

    @abc.abstractmethod
    def _type(self, path: str) -> str | None:
        """What is there, links looked through; nothing if it cannot be looked at."""

    def glob(self, pattern: str) -> list[str]:
        """The paths that match an absolute pattern, spelt as the pattern is, sorted.

        ``*`` does not match a leading dot; links are looked through; below a slash at the end only folders match. ``..`` and
        names without a pattern are taken as they are.
        """
        self._allowed(pattern)
        return sorted(self._glob(pattern))

    def glob_attributes(self, pattern: str) -> list[dict[str, Any]]:
        """The same with the attributes of each path, and of each link ``leads_to``, as in a listing."""
        entries: list[dict[str, Any]] = []
        for path in self.glob(pattern):
            with suppress(FileError):  # Removed while we look.
                entries.append({**self.stat(path), "path": path})
        self._look_through(entries, lambda entry: str(entry["path"]))
        return entries

    def _glob(self, pattern: str) -> Iterator[str]:
        if not _MAGIC.search(pattern):
            if self._type(pattern) is not None:
                yield pattern
            return
        above, name = posixpath.split(pattern)
        for folder in self._glob(above) if _MAGIC.search(above) else [above]:
            if _MAGIC.search(name):
                yield from (posixpath.join(folder, found) for found in self._matching(folder, name))
            elif self._type(posixpath.join(folder, name)) is not None:
                yield posixpath.join(folder, name)

    def _look_through(self, entries: list[dict[str, Any]], path: Callable[[dict[str, Any]], str]) -> None:
        for entry in entries:
            if entry["type"] == "symlink":
                entry["leads_to"] = self._type(path(entry))
