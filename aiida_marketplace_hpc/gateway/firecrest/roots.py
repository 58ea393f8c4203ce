"""The roots of a caller on a file system that the gateway does not see: the words of a path are all that is known of it."""

from __future__ import annotations

import posixpath
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from aiida_marketplace_hpc.errors import FileError, Forbidden, InvalidRequest
from aiida_marketplace_hpc.gateway.firecrest.client import CallFailed, Cluster, UnusableName
from aiida_marketplace_hpc.gateway.firecrest.failures import explained
from aiida_marketplace_hpc.gateway.roots import PRIVATE, Root

_LEFT_BEHIND = 86400.0
"""Seconds after which nobody waits any more for what is staged."""
_STAGED = re.compile(r"([0-9]+)-[0-9a-f]{16}(\.tar\.gz)?")
_MAX_PATH = 4096
_MAX_NAME = 255


def _staging_of(root: Root) -> str:
    return f"{root.path}/{PRIVATE}/staging"


class RemoteRoots:
    """All roots of one caller.

    Where a path leads is known by its words alone: ``..`` is taken away before FirecREST sees it, and a symbolic link is
    followed by the cluster, as the account that the command runs under may.
    """

    def __init__(self, roots: Sequence[Root], cluster: Cluster) -> None:
        self._roots = tuple(roots)
        self._cluster = cluster

    def __iter__(self) -> Iterator[Root]:
        return iter(self._roots)

    def by_name(self, name: str) -> Root | None:
        """The root of that name."""
        return next((root for root in self._roots if root.name == name), None)

    @property
    def staging(self) -> str:
        """A folder on the cluster for what is on its way in or out."""
        return _staging_of(next(root for root in self._roots if not root.read_only))

    def staged(self, root: Root | None = None, suffix: str = "") -> str:
        """A new path on the cluster for what is on its way; whoever takes it removes what is there.

        :param root: where it is to be moved to at one blow; by default the first that can be written to.
        """
        folder = self.staging if root is None else _staging_of(root)
        self._tidy(folder)
        return f"{folder}/{int(time.time())}-{secrets.token_hex(8)}{suffix}"

    def _tidy(self, folder: str) -> None:
        """Remove what a gateway that was killed has left; looks once in some minutes."""
        looked = f"{folder}/*"
        if self._cluster.made.has(looked):
            return
        self._cluster.made.add(looked)
        with suppress(CallFailed):  # There is no such folder yet, or it is not the moment.
            for line in self._cluster.listing(folder):
                staged = _STAGED.fullmatch(str(line["name"]))
                if staged and int(staged[1]) < time.time() - _LEFT_BEHIND:
                    self._cluster.remove(f"{folder}/{staged[0]}")

    def prepare(self) -> None:
        """Make the folders of writable roots that are missing; may be repeated, and costs nothing for some minutes."""
        for path in [self.staging, *(root.path for root in self._roots if not root.read_only)]:
            if not self._cluster.made.has(path) and not (
                f"{self.staging}/".startswith(f"{path}/") and path != self.staging
            ):
                with explained(path):
                    self._cluster.mkdir(path, parents=True)
                self._cluster.made.add(path)

    def free(self, root: Root) -> int | None:
        """Nothing: FirecREST does not say."""
        return None

    def names_of(self, real: str, *, below: bool = False) -> set[str]:
        """The paths under which callers may know a path: the path itself, and the roots below it."""
        return {real, *(root.path for root in self._roots if below and root.path.startswith(f"{real}/"))}

    def locate(self, path: str) -> tuple[Root, str]:
        """The root that an absolute path lies below (the deepest), and the path without ``.``, ``..`` and double slashes.

        :raises Forbidden: if it lies below none, or is the gateway's own.
        :raises InvalidRequest: if FirecREST would not take it for what it is.
        """
        if not path.startswith("/") or "\0" in path:
            raise InvalidRequest(f"{path!r} is no absolute path")
        clean = posixpath.normpath(path).replace("//", "/")
        if len(clean.encode("utf-8", "surrogateescape")) > _MAX_PATH:
            raise FileError(f"the path is longer than {_MAX_PATH} bytes", errno="ENAMETOOLONG", path=path)
        if any(len(part.encode("utf-8", "surrogateescape")) > _MAX_NAME for part in clean.split("/")):
            raise FileError(f"a name in {path} is longer than 255 bytes", errno="ENAMETOOLONG", path=path)
        try:
            self._cluster.usable(clean)
        except UnusableName as exc:
            raise InvalidRequest(str(exc)) from exc
        above = [root for root in self._roots if clean == root.path or clean.startswith(f"{root.path.rstrip('/')}/")]
        if not above:
            known = ", ".join(f"{root.name} ({root.path})" for root in self._roots)
            raise Forbidden(f"{path} lies outside the roots of this gateway: {known}")
        root = max(above, key=lambda root: len(root.path))
        for one in above:
            if f"{clean}/".startswith(f"{one.path.rstrip('/')}/{PRIVATE}/"):
                raise Forbidden(f"{path} is the gateway's own")
        return root, clean

    def writable(self, path: str) -> str:
        """The same path without ``.`` and ``..``.

        :raises Forbidden: below a read-only root, or for a root itself.
        """
        root, clean = self.locate(path)
        if root.read_only:
            raise Forbidden(f"{clean} is below the read-only root {root.name} ({root.path})")
        if clean == root.path:
            raise Forbidden(f"{clean} is a root itself and cannot be changed")
        return clean
