"""The content of a folder on the cluster as far as it is known here: entries by their paths relative to it."""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

MAGIC = re.compile(r"[*?\[]")
_LINKS = 40
"""How many links are followed one after another before they count as a circle."""


@dataclass(frozen=True)
class Inline:
    """Bytes that the journal holds, and the job script carries or unpacks.

    :param path: of the node that has them.
    """

    path: str


@dataclass(frozen=True)
class Piece:
    """Bytes in the folder of a gateway's job, under the name that their digest gives them."""

    jobid: str
    size: int
    digest: str


@dataclass(frozen=True)
class Pieces:
    """A file that was uploaded in pieces.

    :param digest: hexadecimal SHA-256 of all of it.
    """

    pieces: tuple[Piece, ...]
    digest: str


@dataclass(frozen=True)
class InJob:
    """A file in the folder of a job that was launched.

    :param path: relative to that.
    :param digest: hexadecimal SHA-256, where it is known.
    :param handed_out: it is to be had only as ``pieces``.
    :param exact: its size is final.
    """

    jobid: str
    path: str
    digest: str | None = None
    handed_out: bool = False
    pieces: tuple[str, ...] = ()
    exact: bool = True


Content = Inline | Pieces | InJob


@dataclass(frozen=True)
class Entry:
    """Something in a folder.

    :param kind: ``file``, ``directory``, ``symlink`` or ``other``.
    :param mode: permission bits; ``None``: what a new file gets.
    :param mtime: seconds since the epoch; of what lies on the cluster by its clock.
    :param target: where a link points, as it is written.
    :param leads_to: the kind of what a link leads to, if that is known.
    :param content: of a file, or of the file that a link leads to.
    """

    kind: str
    mode: int | None = None
    size: int = 0
    mtime: float = 0.0
    target: str | None = None
    leads_to: str | None = None
    content: Content | None = None

    def leading_to(self, kind: str, size: int, mode: int, content: Content | None) -> Entry:
        """The same link, of which is known what it leads to."""
        return replace(self, leads_to=kind, size=size, mode=mode, content=content)

    def followed(self) -> Entry:
        """What the link leads to, as an entry of its own."""
        return replace(self, kind=self.leads_to or "other", target=None, leads_to=None)

    @property
    def permissions(self) -> int:
        """The permission bits, or what they mostly are."""
        if self.mode is not None:
            return self.mode
        return 0o755 if self.kind == "directory" else 0o644


class Tree(dict[str, Entry]):
    """Entries by path; the folder itself is not among them."""

    def find(self, path: str, follow: bool = True) -> Entry | None:
        """The entry at a path.

        :param path: relative, normalised; empty: the folder itself.
        :param follow: look through a link at the end of the path; links on the way are always followed.
        """
        place = self.resolve(path, follow)
        if place == "":
            return Entry("directory")
        if place is None:
            return None
        entry = self.get(place)
        if entry is not None and entry.kind == "symlink" and follow:
            return entry.followed() if entry.leads_to else None
        return entry

    def resolve(self, path: str, follow: bool = True) -> str | None:
        """The path without links inside the folder, as far as they stay in it; ``None`` if it is not there."""
        parts = path.split("/") if path else []
        place = ""
        hops = 0
        while parts:
            part = parts.pop(0)
            if part == "..":
                if not place:
                    return None
                place = posixpath.dirname(place)
                continue
            if part in ("", "."):
                continue
            below = posixpath.join(place, part)
            entry = self.get(below)
            if entry is None:
                return None
            if entry.kind == "symlink" and (parts or follow):
                hops += 1
                target = entry.target or ""
                if hops > _LINKS:
                    return None
                if posixpath.isabs(target) or not self._stays(place, target):
                    # What lies behind it may be known by this very path.
                    place = below
                    continue
                parts = target.split("/") + parts
                continue
            place = below
        return place

    def _stays(self, place: str, target: str) -> bool:
        return not posixpath.normpath(posixpath.join(place, target)).startswith("..")

    def children(self, path: str) -> dict[str, Entry]:
        """The entries directly in a folder, by name, in their order."""
        place = self.resolve(path)
        if place is None:
            return {}
        prefix = f"{place}/" if place else ""
        return {
            below[len(prefix) :]: entry
            for below, entry in sorted(self.items())
            if below.startswith(prefix) and below != place and "/" not in below[len(prefix) :]
        }

    def walk(self, path: str) -> Iterator[tuple[str, Entry]]:
        """Everything below a folder, relative to it, parents first; links are not followed."""
        place = self.resolve(path)
        if place is None:
            return
        prefix = f"{place}/" if place else ""
        for below, entry in sorted(self.items()):
            if below.startswith(prefix) and below != place:
                yield below[len(prefix) :], entry

    def glob(self, pattern: str) -> list[str]:
        """The paths that match a shell pattern, as :func:`glob.glob` finds them."""
        found = [""]
        for part in pattern.split("/"):
            if not part:
                continue
            below: list[str] = []
            for place in found:
                if not MAGIC.search(part):
                    path = posixpath.join(place, part)
                    if self.find(path, follow=False) is not None:
                        below.append(path)
                    continue
                where = self.find(place)
                if where is None or where.kind != "directory":
                    continue
                below += [
                    posixpath.join(place, name)
                    for name in self.children(place)
                    if (part.startswith(".") or not name.startswith(".")) and fnmatch.fnmatchcase(name, part)
                ]
            found = below
        if pattern.endswith("/"):
            return [f"{path}/" for path in found if (entry := self.find(path)) and entry.kind == "directory"]
        return found
