"""A file on its way to its final name.

It is written under the gateway's private folder of the same root, flushed to disk and only then renamed: no reader ever sees
half of it, and of two writers one wins with a whole file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from aiida_marketplace_hpc.gateway.roots import PRIVATE, Place


class Draft:
    """A file being written, out of sight; :meth:`commit` gives it its name, leaving the block without it leaves nothing."""

    def __init__(self, place: Place, overwrite: bool = True) -> None:
        self._place = place
        self._overwrite = overwrite
        self._hash = hashlib.sha256()
        self._committed = False
        self.size = 0

    @property
    def digest(self) -> str:
        return f"sha-256:{self._hash.hexdigest()}"

    def __enter__(self) -> Draft:
        self._existing = self._target()
        self._folder = _private_folder(self._place)
        self._name = secrets.token_hex(16)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            if os.fstat(self._folder).st_dev != os.fstat(self._place.folder).st_dev:
                # A file system mounted below the root: only there can the file be renamed in one step.
                os.close(self._folder)
                self._folder, self._name = os.dup(self._place.folder), f"{PRIVATE}-{self._name}"
            self._file: IO[bytes] = os.fdopen(os.open(self._name, flags, 0o666, dir_fd=self._folder), "wb")
        except BaseException:
            os.close(self._folder)
            raise
        return self

    def _target(self) -> os.stat_result | None:
        if self._place.only_folder:  # A folder that is not there, or the walk would have gone into it.
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            existing = self._place.lstat()
        except FileNotFoundError:
            os.stat(".", dir_fd=self._place.folder)  # The folder may be gone: say so before anything is sent.
            return None
        if stat.S_ISDIR(existing.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not self._overwrite:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        return existing

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    def commit(self, mode: int | None = None) -> None:
        if mode is None and self._existing is not None:
            mode = stat.S_IMODE(self._existing.st_mode)
        if mode is not None:
            os.fchmod(self._file.fileno(), mode & 0o7777)
        self._file.flush()
        os.fsync(self._file.fileno())
        place = self._place
        if self._overwrite:
            os.rename(self._name, place.name, src_dir_fd=self._folder, dst_dir_fd=place.folder)
        else:
            os.link(self._name, place.name, src_dir_fd=self._folder, dst_dir_fd=place.folder)
            os.unlink(self._name, dir_fd=self._folder)
        self._committed = True

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
            if not self._committed:
                os.unlink(self._name, dir_fd=self._folder)
        finally:
            os.close(self._folder)


def _private_folder(place: Place) -> int:
    """Open the folder for unfinished files of the place's root; it is made where it is missing."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with opened(place.root.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) as root:
        with suppress(FileExistsError):
            os.mkdir(PRIVATE, 0o700, dir_fd=root)
        with opened(PRIVATE, flags, root) as private:
            with suppress(FileExistsError):
                os.mkdir("unfinished", 0o700, dir_fd=private)
            return os.open("unfinished", flags, dir_fd=private)


@contextmanager
def opened(name: str, flags: int, folder: int | None = None) -> Iterator[int]:
    """An open descriptor for the time of a ``with`` block."""
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
