"""Opening what a :class:`~aiida_marketplace_hpc.gateway.roots.Place` names, and saying what the file system says about it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from aiida_marketplace_hpc.errors import FileError
from aiida_marketplace_hpc.gateway.roots import Place

LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""The flags with which a folder is opened to read or change what is in it."""
MAX_DEPTH = 200
"""Folders in folders that are walked; deeper ones are taken for a loop."""
SYNC_EVERY = 128 * 1024 * 1024
"""Bytes after which what was written is sent to the disk: at the end there is never so much left that it seems to hang."""

Identity = tuple[int, int]
"""What tells a folder from all others, however it is reached."""

Advance = Callable[[int], None]
"""Is told about progress: bytes or entries since it was last called. It may raise, which ends the operation."""


def ignore_progress(_: int) -> None:
    """What an operation that nobody watches tells its progress to."""


def identity_of(found: os.stat_result) -> Identity:
    """The identity of what has these attributes."""
    return found.st_dev, found.st_ino


def open_regular(place: Place) -> BinaryIO:
    """Open a regular file for reading; a link is not followed.

    :raises OSError: for anything else, with EISDIR, ELOOP or EINVAL.
    """
    # Not blocking: opening a named pipe would wait for a writer for ever.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(place.name, flags, dir_fd=place.folder)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(number, os.strerror(number))


def too_deep() -> OSError:
    """What is wrong with folders in folders beyond :data:`MAX_DEPTH`."""
    return OSError(errno.ELOOP, os.strerror(errno.ELOOP))


@contextmanager
def told(path: str) -> Iterator[None]:
    """Turn what the file system says into the error for the caller, about the path that the caller named."""
    try:
        yield
    except OSError as exc:
        raise FileError.from_os_error(exc, path) from exc
