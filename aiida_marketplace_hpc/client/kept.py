"""Downloads that are not finished: what arrived of a large file is kept, so that it goes on from there in another process.

AiiDA repeats a retrieval into a new folder, so the bytes lie outside of it, in a folder of the user's own: in the cache folder
(``XDG_CACHE_HOME``) or below the temporary folder, whichever is on the destination's file system, so that a complete
file needs only a rename. A file is known by the gateway, its path there, its size and version, and by this start of the
machine: what was not flushed to the disk before a crash is not trusted. All of it is bounded in age and size.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from aiida_marketplace_hpc.bundle import PART

KEEP_FROM = 8 * 1024 * 1024
"""Bytes from which on a file's unfinished download is kept."""
_AGE = 3 * 86400.0
_SIZE = 100 * 1024**3
_NAME = "aiida-marketplace-hpc"


class Kept:
    """One unfinished download, locked for this process until :meth:`close`.

    ``held`` bytes are there.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._moved = False
        held = os.fstat(file.fileno()).st_size
        self.held = held if held == size else held - held % PART
        file.truncate(self.held)
        file.seek(self.held)

    def write(self, part: bytes) -> None:
        """Keep the next part, which was verified."""
        self._file.write(part)
        self.held += len(part)

    def discard(self) -> None:
        """Begin anew."""
        self._file.truncate(0)
        self._file.seek(0)
        self.held = 0

    def move_to(self, path: Path, mode: int | None) -> None:
        """Give the whole file its name.

        :param mode: permission bits; ``None``: what a new file gets.
        """
        if mode is not None:
            os.fchmod(self._file.fileno(), mode)
        try:
            os.replace(self._path, path)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            beside = path.parent / f".marketplace-hpc-{os.getpid()}-{self._path.name}.part"
            try:
                shutil.copyfile(self._path, beside)
                shutil.copymode(self._path, beside)
                os.replace(beside, path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            self._path.unlink()
        self._moved = True

    def close(self) -> None:
        """Let go of it; what is held stays, unless there is nothing."""
        if not self._moved and not self.held:
            self._path.unlink(missing_ok=True)
        self._file.close()


def kept(source: str, version: str, size: int, destination: Path) -> Kept | None:
    """Open the unfinished download of a file; ``None`` if another process is at it, or nothing can be kept here.

    :param source: where the file is, the gateway included.
    :param destination: the folder it is to go to in the end.
    """
    name = hashlib.sha256(
        "\n".join((source, version, str(size), _boot())).encode("utf-8", "surrogateescape")
    ).hexdigest()
    try:
        folder = _folder(destination)
        _sweep(folder)
        path = folder / name
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by Kept.close.
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            return Kept(path, file, size)
    except OSError:
        pass
    file.close()
    return None


def _folder(destination: Path) -> Path:
    device = os.stat(destination).st_dev
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _NAME / "unfinished"
    temporary = Path(tempfile.gettempdir()) / f"{_NAME}-{os.getuid()}"
    usable: list[Path] = []
    for folder in (cache, temporary):
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = os.lstat(folder)
            # In a temporary folder somebody else may have put something of that name.
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
                if status.st_dev == device:
                    return folder
                usable.append(folder)
    if not usable:
        raise FileNotFoundError(errno.ENOENT, "there is no folder for unfinished downloads")
    return usable[0]


def _sweep(folder: Path) -> None:
    """Remove what is too old, and of the rest the oldest where it is too much."""
    now = time.time()
    left = _SIZE
    with suppress(OSError):
        entries = sorted(((entry.stat(), entry.path) for entry in os.scandir(folder)), key=lambda e: -e[0].st_mtime)
        for status, path in entries:
            left -= status.st_size
            if now - status.st_mtime > _AGE or left < 0:
                with suppress(OSError), _locked(path):
                    os.unlink(path)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    return ""
