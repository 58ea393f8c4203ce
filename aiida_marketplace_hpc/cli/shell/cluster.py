"""The cluster's files as seen from a current folder: names become absolute paths, patterns the paths that match."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aiida_marketplace_hpc.cli.shell.line import Word
from aiida_marketplace_hpc.errors import FileError, GatewayError

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.gateway import HpcGateway

Json = dict[str, Any]

_MAGIC = re.compile(r"[*?\[]")


class CommandError(Exception):
    """A command cannot do what it was asked for; the message says why and what to do."""


class Cluster:
    """A gateway and the folder in which commands work.

    :param gateway: one that offers more than the nine.
    :raises NotSupported: it does not.
    """

    def __init__(self, gateway: HpcGateway) -> None:
        gateway.require("query")
        self.gateway = gateway
        info = gateway.info()
        self.home = gateway.home()
        self.user = str(info["username"])
        self.folder = self.home
        self._previous: str | None = None

    def enter(self, name: str) -> None:
        """Go to a folder. As in other shells, ``..`` leads back to where one came from, also through a symbolic link.

        :raises FileError: it is not there, or no folder.
        :raises Forbidden: it lies outside the roots.
        """
        path = posixpath.normpath(self.path(name))
        if path.startswith("//"):
            path = path[1:]
        if self.gateway.ask("stat", path=path, follow=True)["type"] != "directory":
            raise FileError(f"Not a directory: {path}", errno="ENOTDIR", path=path)
        self._previous, self.folder = self.folder, path

    def back(self) -> None:
        """Go to the folder before this one."""
        if self._previous is None:
            raise CommandError("there is no folder to go back to yet")
        self.enter(self._previous)

    def path(self, name: str) -> str:
        """The absolute path of a name; ``..`` is kept, because only the gateway knows where links lead.

        :raises CommandError: the name is empty.
        """
        if isinstance(name, Word) and name.tilde:
            return self.home + name[1:]
        if not name:
            raise CommandError("an empty name is no file: write . for the current folder")
        return name if name.startswith("/") else f"{self.folder.rstrip('/')}/{name}"

    def shown(self, path: str) -> str:
        """A path with ``~`` for the home."""
        if path == self.home or path.startswith(f"{self.home}/"):
            return f"~{path[len(self.home) :]}"
        return path

    def expand(self, words: Sequence[Word]) -> list[Word]:
        """Put the paths that match in place of each pattern, in one request for all, and the home in place of ``~``.

        What came from a pattern keeps it as :attr:`Word.pattern`.

        :raises CommandError: nothing matches a pattern.
        """
        patterns = {word.pattern: self._absolute_pattern(word.pattern, word.tilde) for word in words if word.pattern}
        operations = [{"op": "glob", "pattern": pattern} for pattern in patterns.values()]
        results = self.gateway.query(operations) if operations else []
        matching: dict[str | None, list[str]] = {}
        for pattern, result in zip(patterns, results, strict=True):
            if isinstance(result, GatewayError):
                raise result
            matching[pattern] = result["paths"]
        expanded: list[Word] = []
        for word in words:
            if word.pattern is None:
                expanded.append(Word(self.path(word)) if word.tilde else word)
                continue
            if not matching[word.pattern]:
                raise CommandError(f"nothing matches {word}: quote it if that is a file's name")
            keep = word.startswith("/") or word.tilde
            expanded += [Word(path if keep else self._relative(path), word.pattern) for path in matching[word.pattern]]
        return expanded

    def _absolute_pattern(self, pattern: str, tilde: bool) -> str:
        """The absolute pattern, without the ``..`` that the gateway does not take in one."""
        pattern = self.path(Word(pattern, tilde=tilde))
        magic = _MAGIC.search(pattern)
        end = pattern.rindex("/", 0, magic.start() if magic else None)
        head, tail = pattern[:end], pattern[end:]
        if ".." in head.split("/"):
            head = str(self.gateway.ask("realpath", path=head)["path"]).rstrip("/")
        return head + tail

    def _relative(self, path: str) -> str:
        above = f"{self.folder.rstrip('/')}/"
        if not path.startswith(above):
            return path
        name = path[len(above) :]
        # A file named -rf is no option.
        return f"./{name}" if name.startswith("-") else name

    def stats(self, paths: Sequence[str], *, follow: bool = True) -> list[Json | GatewayError]:
        """The attributes of many paths in one request, or why there are none."""
        return self.gateway.query([{"op": "stat", "path": path, "follow": follow} for path in paths])

    def stat(self, path: str, *, follow: bool = True) -> Json:
        """The attributes of one path."""
        return self.gateway.ask("stat", path=path, follow=follow)

    def entries(self, path: str, *, recursive: bool = False) -> list[Json]:
        """The entries of a folder, or of all folders below it, with their attributes."""
        entries: list[Json] = self.gateway.ask("list", path=path, recursive=recursive)["entries"]
        return entries

    def read(self, path: str, offset: int, length: int) -> bytes:
        """A piece of a file: fewer bytes than ``length`` only at its end."""
        return self.gateway.read_range(path, offset, length)


def is_folder(attributes: Json | GatewayError) -> bool:
    """Whether there is a folder, of the result of a stat."""
    return not isinstance(attributes, GatewayError) and attributes["type"] == "directory"


def is_missing(attributes: object) -> bool:
    """Whether a result or error says that there is nothing of that name."""
    return isinstance(attributes, FileError) and attributes.errno in ("ENOENT", "ENOTDIR")
