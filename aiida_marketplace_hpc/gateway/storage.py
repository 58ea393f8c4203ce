"""The port to the cluster's file systems: what requests and jobs ask of them.

There are two: :class:`~aiida_marketplace_hpc.gateway.files.Files` for a gateway that shares a file system with its cluster,
and :class:`~aiida_marketplace_hpc.gateway.firecrest.files.RemoteFiles` for one that reaches it through FirecREST. The first
one's docstrings are the specification; where the second cannot do as much, it says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from aiida_marketplace_hpc.gateway.descriptors import Advance
from aiida_marketplace_hpc.gateway.roots import Root
from aiida_marketplace_hpc.gateway.trees import Usage

if TYPE_CHECKING:
    from aiida_marketplace_hpc.gateway.transfers import Position

Read = Callable[[int], bytes]
"""Reads at most so many bytes of a request's body; ``b""`` is its end."""


class AnyRoots(Protocol):
    """See :class:`~aiida_marketplace_hpc.gateway.roots.Roots`."""

    def __iter__(self) -> Iterator[Root]: ...

    def by_name(self, name: str) -> Root | None: ...

    def prepare(self) -> None: ...

    def free(self, root: Root) -> int | None: ...


class AnyFiles(Protocol):
    """See :class:`~aiida_marketplace_hpc.gateway.files.Files`."""

    @property
    def roots(self) -> AnyRoots: ...

    @property
    def largest_whole(self) -> int | None: ...

    def watched(self, advance: Advance) -> AnyFiles: ...

    def forced(self) -> AnyFiles: ...

    def stat(self, path: str, *, follow: bool = False) -> dict[str, Any]: ...

    def realpath(self, path: str) -> str: ...

    def listing(
        self, path: str, *, recursive: bool = False, pattern: str | None = None, follow: bool = False
    ) -> list[dict[str, Any]]: ...

    def names(self, path: str, prefix: str) -> list[str]: ...

    def glob(self, pattern: str) -> list[str]: ...

    def glob_attributes(self, pattern: str) -> list[dict[str, Any]]: ...

    def checksum(self, path: str) -> dict[str, Any]: ...

    def usage(self, path: str) -> Usage: ...

    def mkdir(self, path: str, *, parents: bool = False, exist_ok: bool = False, mode: int = 0o777) -> None: ...

    def rename(self, path: str, target: str) -> None: ...

    def symlink(self, path: str, target: str) -> None: ...

    def chmod(self, path: str, mode: int) -> None: ...

    def remove(
        self, path: str, *, directory: bool = False, recursive: bool = False, missing_ok: bool = False
    ) -> None: ...

    def copy(
        self, path: str, target: str, *, dereference: bool = False, exact: bool = False, directory: bool = False
    ) -> None: ...

    def read(self, path: str) -> tuple[BinaryIO, os.stat_result]: ...

    def write(
        self,
        path: str,
        read: Read,
        *,
        digest: str | None = None,
        mode: int | None = None,
        overwrite: bool = True,
        into: str | None = None,
        parents: bool = False,
    ) -> dict[str, Any]: ...


class AnyTransfers(Protocol):
    """See :class:`~aiida_marketplace_hpc.gateway.transfers.Transfers`."""

    def forced(self) -> AnyTransfers: ...

    def write_folder(
        self, path: str, read: Read, *, overwrite: bool = True, into: str | None = None, parents: bool = False
    ) -> dict[str, Any]: ...

    def write_parts(
        self,
        path: str,
        read: Read,
        *,
        total: int,
        digest: str,
        offset: int | None = None,
        restart: bool = False,
        mode: int | None = None,
        overwrite: bool = True,
        into: str | None = None,
        parents: bool = False,
    ) -> dict[str, Any]: ...

    def send(
        self, path: str, *, dereference: bool = True, position: Position | None = None, limit: int | None = None
    ) -> Generator[bytes, None, None]: ...
