"""The roots of a caller on a file system that the gateway does not see: the words of a path are all that is known of it."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence

from aiida_marketplace_hpc.errors import FileError, Forbidden, InvalidRequest
from aiida_marketplace_hpc.gateway.firecrest.client import Cluster, UnusableName
from aiida_marketplace_hpc.gateway.firecrest.failures import explained
from aiida_marketplace_hpc.gateway.roots import PRIVATE, Root

_MAX_PATH = 4096
_MAX_NAME = 255


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
        writable = next(root for root in self._roots if not root.read_only)
        return f"{writable.path}/{PRIVATE}/staging"

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
