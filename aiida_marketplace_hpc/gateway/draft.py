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

from aiida_marketplace_hpc.gateway.protection import Protection
from aiida_marketplace_hpc.gateway.roots import PRIVATE, Place

UNFINISHED = "unfinished"
"""The folder in a root's private one where files lie until they are whole."""


class Draft:
    """A file being written, out of sight; :meth:`commit` gives it its name, leaving the block without it leaves nothing.

    :param protection: refuses names that belong to a live job.
    """

    def __init__(self, place: Place, protection: Protection, overwrite: bool = True) -> None:
        self._place = place
        self._protection = protection
        self._overwrite = overwrite
        self._hash = hashlib.sha256()
        self._committed = False
        self.size = 0

    @property
    def digest(self) -> str:
        return f"sha-256:{self._hash.hexdigest()}"

    def __enter__(self) -> Draft:
        self._existing = existing_target(self._place, self._protection, self._overwrite)
        self._folder = private_folder(self._place)
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

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    def fileno(self) -> int:
        """The descriptor, to write to directly; what comes in that way does not count in :attr:`size` and :attr:`digest`."""
        return self._file.fileno()

    def sync(self) -> None:
        """Send to the disk what was written so far, so that :meth:`commit` does not wait for all of it."""
        self._file.flush()
        os.fdatasync(self._file.fileno())

    def commit(self, mode: int | None = None) -> None:
        if mode is None and self._existing is not None:
            mode = stat.S_IMODE(self._existing.st_mode)
        if mode is not None:
            os.fchmod(self._file.fileno(), mode & 0o7777)
        self._file.flush()
        os.fsync(self._file.fileno())
        place = self._place
        check_target(place, self._protection)
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


def existing_target(place: Place, protection: Protection, overwrite: bool) -> os.stat_result | None:
    """What is there under the name that a file is to get.

    :raises OSError: a folder is there, or anything and it must not be replaced; or the folder above is gone or read-only.
    :raises FileError: the name belongs to a live job.
    """
    if place.only_folder:  # A folder that is not there, or the walk would have gone into it.
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    try:
        existing = place.lstat()
    except FileNotFoundError:
        existing = None
        os.stat(".", dir_fd=place.folder)  # The folder may be gone: say so before anything is sent.
    if existing is not None and stat.S_ISDIR(existing.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if existing is not None and not overwrite:
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=place.folder, effective_ids=True):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    protection.check_target(place, exists=existing is not None)
    return existing


def check_target(place: Place, protection: Protection) -> None:
    """The last look before a file gets its name: the folder may have been renamed, and a job launched, while it was written.

    :raises FileError: the name belongs to a live job.
    """
    try:
        place.lstat()
    except FileNotFoundError:
        protection.check_target(place, exists=False)
    else:
        protection.check_target(place, exists=True)


def private_folder(place: Place) -> int:
    """Open the folder for unfinished files of the place's root; it is made where it is missing."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with opened(place.root.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) as root:
        with suppress(FileExistsError):
            os.mkdir(PRIVATE, 0o700, dir_fd=root)
        with opened(PRIVATE, flags, root) as private:
            with suppress(FileExistsError):
                os.mkdir(UNFINISHED, 0o700, dir_fd=private)
            return os.open(UNFINISHED, flags, dir_fd=private)


@contextmanager
def opened(name: str, flags: int, folder: int | None = None) -> Iterator[int]:
    """An open descriptor for the time of a ``with`` block."""
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
