"""Uploads that are not finished: what arrived is kept, so that the same bytes sent again, to any name, go on from there.

They lie in the gateway's private folder of a root, where no caller looks, one file for each content, named by its size and
digest. Only whole verified parts are appended, so that the file's length says how much is held, whatever is killed when. Of
several that upload the same content one writes at a time; the others go on from where it has got to.

A content that was completed stays for a while under a second name (a hard link): the same bytes for another name, such as
AiiDA's repeated upload into a new folder, are copied on the cluster instead of sent again. As a job may have changed the file
meanwhile, its digest is checked on the way.

All of it is bounded in age and size.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from aiida_marketplace_hpc.bundle import CHUNK, PART
from aiida_marketplace_hpc.gateway.descriptors import LIST, SYNC_EVERY
from aiida_marketplace_hpc.gateway.draft import (
    UNFINISHED,
    Draft,
    existing_target,
    opened,
    private_folder,
)
from aiida_marketplace_hpc.gateway.protection import Protection
from aiida_marketplace_hpc.gateway.roots import PRIVATE, Place, Root

_COMPLETE = ".complete"
_DRAFT_AGE = 86400.0
_LOCK_INTERVAL = 0.05
_ANNOUNCED = 2.0  # Seconds between asking and sending.
_MAX_STATES = 4096


@dataclass(frozen=True)
class Keep:
    """How long and how much is kept.

    :param unfinished: seconds after the last byte of an unfinished upload.
    :param complete: seconds for which a completed content can be copied instead of sent again: as long as AiiDA repeats an
        upload by itself, 20 + 40 + 80 + 160 s and what the attempts take.
    :param size: bytes in one root, of unfinished uploads and of completed ones whose file was removed; the oldest go first.
    :param patience: seconds that one request may spend on waiting, checking or copying.
    """

    unfinished: float = 3 * 86400.0
    complete: float = 900.0
    size: int = 100 * 1024**3
    patience: float = 5.0


class InUse(Exception):
    """Somebody else is uploading the same content just now.

    :param held: bytes that are there so far.
    """

    def __init__(self, held: int) -> None:
        super().__init__(held)
        self.held = held


class Content:
    """One content on its way, locked for one request.

    ``held`` bytes are there. While ``checking``, what an earlier process left beyond them is still to be read; while
    ``copying``, the rest comes from a completed file. Both go on with the next request.
    """

    def __init__(self, folder: int, name: str, descriptor: int, size: int, keep: Keep) -> None:
        self._folder, self._name, self._descriptor = folder, name, descriptor
        self._keep = keep
        self._deadline = time.monotonic() + keep.patience
        self.size = size
        status = os.fstat(descriptor)
        self._on_disk = status.st_size if status.st_size >= size else status.st_size - status.st_size % PART
        self.held, self._digest = _states.take(name, status)
        self.copying = False
        self._moved = False
        self._unsynced = 0

    @property
    def digest(self) -> str:
        """The digest of what is held."""
        return f"sha-256:{self._digest.hexdigest()}"

    @property
    def right(self) -> bool:
        """Whether what is held is the content that it should be."""
        return self._name == _name(self.held, self.digest)

    def running(self) -> hashlib._Hash:
        """A copy of that digest, to be continued over the next part."""
        return self._digest.copy()

    @property
    def checking(self) -> bool:
        """Whether more is on disk than was read so far."""
        return self.held < self._on_disk

    @property
    def waiting(self) -> bool:
        """Whether the caller is to send the rest."""
        return not (self._moved or self.checking or self.copying)

    def check(self) -> None:
        """Read what an earlier process has left, for as long as one request may take."""
        while self.checking and time.monotonic() < self._deadline:
            chunk = os.pread(self._descriptor, min(CHUNK, self._on_disk - self.held), self.held)
            if not chunk:
                self._on_disk = self.held
            self._digest.update(chunk)
            self.held += len(chunk)

    def append(self, part: bytes, digest: hashlib._Hash) -> None:
        """Keep the next part.

        :param digest: of everything up to its end; that it is right was found out before.
        :raises OSError: the disk is full; what was held before still is.
        """
        left = memoryview(part)
        position = self.held
        while left:
            try:
                count = os.pwrite(self._descriptor, left, position)
            except OSError as exc:
                full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
                if not full or not sweep(self._folder, self._keep, everything=True):
                    raise
            else:
                left, position = left[count:], position + count
        self.held, self._digest, self._on_disk = position, digest.copy(), position
        self._unsynced += len(part)
        if self._unsynced >= SYNC_EVERY:
            os.fdatasync(self._descriptor)
            self._unsynced = 0

    def adopt(self) -> None:
        """Copy on from a file with the same content that was completed lately, for as long as one request may take."""
        try:
            descriptor = os.open(
                self._name + _COMPLETE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder
            )
        except OSError:  # There is none, or its owner took the permission to read away.
            return
        try:
            if os.fstat(descriptor).st_size != self.size:
                return
            while self.held < self.size and time.monotonic() < self._deadline:
                chunk = os.pread(descriptor, min(CHUNK, self.size - self.held), self.held)
                if not chunk:
                    return
                digest = self.running()
                digest.update(chunk)
                self.append(chunk, digest)
            self.copying = self.held < self.size
            if not self.copying and not self.right:
                self.discard()  # A job has written to the file since.
        finally:
            os.close(descriptor)

    def discard(self) -> None:
        """Forget what is held, and any completed file of the same content."""
        with suppress(FileNotFoundError):
            os.unlink(self._name + _COMPLETE, dir_fd=self._folder)
        os.ftruncate(self._descriptor, 0)
        self.held, self._digest, self._on_disk, self.copying = 0, hashlib.sha256(), 0, False

    def move_to(self, place: Place, protection: Protection, mode: int | None, overwrite: bool) -> None:
        """Give the whole content its final name.

        :param mode: permission bits; without it a replaced file's are kept and a new one gets the default.
        :raises OSError: the folder is gone, or refuses; what is held stays.
        :raises FileError: the name belongs to a live job; what is held stays.
        """
        os.fsync(self._descriptor)  # Which may take its time: only then is looked what is there.
        existing = existing_target(place, protection, overwrite)
        if mode is None and existing is not None:
            mode = stat.S_IMODE(existing.st_mode)
        if os.fstat(self._descriptor).st_dev != os.fstat(place.folder).st_dev:
            self._copy_to(place, protection, mode, overwrite)
            return
        if mode is not None:
            os.fchmod(self._descriptor, mode & 0o7777)
        os.fsync(self._descriptor)
        with suppress(FileNotFoundError):
            os.unlink(self._name + _COMPLETE, dir_fd=self._folder)
        if overwrite:
            with suppress(OSError):  # Not every file system has hard links; this one is a convenience.
                os.link(self._name, self._name + _COMPLETE, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            os.rename(self._name, place.name, src_dir_fd=self._folder, dst_dir_fd=place.folder)
        else:
            os.link(self._name, place.name, src_dir_fd=self._folder, dst_dir_fd=place.folder)
            os.rename(self._name, self._name + _COMPLETE, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._moved = True

    def _copy_to(self, place: Place, protection: Protection, mode: int | None, overwrite: bool) -> None:
        # A file system mounted below the root.
        with Draft(place, protection, overwrite) as draft:
            position = 0
            while chunk := os.pread(self._descriptor, CHUNK, position):
                draft.write(chunk)
                position += len(chunk)
            draft.commit(mode)
        os.rename(self._name, self._name + _COMPLETE, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._moved = True

    def close(self) -> None:
        """Let go of it; what is held stays."""
        status = os.fstat(self._descriptor)
        if not self._moved:
            _states.put(self._name, status, self.held, self._digest)
            if not status.st_size:
                os.unlink(self._name, dir_fd=self._folder)
        os.close(self._descriptor)


@contextmanager
def unfinished(place: Place, size: int, digest: str, keep: Keep, *, asking: bool = False) -> Iterator[Content]:
    """The content of that size and digest on its way to ``place``, locked for the time of the block.

    :param digest: ``sha-256:`` and 64 hexadecimal digits, checked before.
    :param asking: nothing is sent yet, but will be.
    :raises InUse: somebody else was writing to it all the time that a request may wait.
    """
    name = _name(size, digest)
    folder = private_folder(place)
    try:
        descriptor = _locked(folder, name, keep, asking)
        if not os.fstat(descriptor).st_size:
            sweep(folder, keep)
        content = Content(folder, name, descriptor, size, keep)
        try:
            yield content
        finally:
            if asking and content.waiting:
                _announced.announce(folder, name)
            content.close()
    finally:
        os.close(folder)


def _name(size: int, digest: str) -> str:
    return f"{size}-{digest.partition(':')[2]}"


def _locked(folder: int, name: str, keep: Keep, asking: bool) -> int:
    deadline = time.monotonic() + keep.patience
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o666, dir_fd=folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (asking and (folder, name) in _announced):
                with suppress(FileNotFoundError):
                    there = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    # Else it was completed or swept out while we waited: what we have open is somebody's file by now.
                    if os.path.samestat(there, os.fstat(descriptor)):
                        _announced.withdraw(folder, name)
                        return descriptor
        except BlockingIOError:
            pass
        held = os.fstat(descriptor).st_size
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise InUse(held)
        time.sleep(_LOCK_INTERVAL)


def sweep(folder: int, keep: Keep, *, everything: bool = False) -> int:
    """Remove what is too old, and of the rest the oldest where it is too much. May be repeated.

    :param folder: descriptor of a root's folder for unfinished files.
    :param everything: whatever nobody is writing to, as the disk is full.
    :return: how many files were removed.
    """
    now = time.time()
    removed = size = 0
    found: list[tuple[float, str, int]] = []
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if name.endswith(_COMPLETE):
                age, limit = now - status.st_ctime, keep.complete
                mine = 0 if status.st_nlink > 1 else status.st_blocks * 512
            else:
                age, mine = now - status.st_mtime, status.st_blocks * 512
                limit = keep.unfinished if "-" in name else _DRAFT_AGE
            if age > limit or (everything and "-" in name):
                removed += _remove(folder, name)
            else:
                found.append((-age, name, mine))
                size += mine
    for _, name, mine in sorted(found):
        if size <= keep.size:
            break
        if mine and "-" in name:
            size -= mine
            removed += _remove(folder, name)
    return removed


def sweep_root(root: Root, keep: Keep) -> int:
    """:func:`sweep` one root, where anything was ever kept in it."""
    try:
        with opened(f"{root.path}/{PRIVATE}/{UNFINISHED}", LIST) as folder:
            return sweep(folder, keep)
    except OSError:
        return 0


def _remove(folder: int, name: str) -> int:
    """Remove a file that nobody is writing to."""
    try:
        if name.endswith(_COMPLETE):
            os.unlink(name, dir_fd=folder)
            return 1
        with opened(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, folder) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=folder)
            return 1
    except OSError:
        return 0


class _States:
    """The digests of what is held, so that it is not read again for each request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, int, int, int], tuple[int, hashlib._Hash]] = OrderedDict()

    def take(self, name: str, status: os.stat_result) -> tuple[int, hashlib._Hash]:
        with self._lock:
            return self._known.pop(self._key(name, status), (0, hashlib.sha256()))

    def put(self, name: str, status: os.stat_result, held: int, digest: hashlib._Hash) -> None:
        with self._lock:
            self._known[self._key(name, status)] = held, digest
            if len(self._known) > _MAX_STATES:
                self._known.popitem(last=False)

    @staticmethod
    def _key(name: str, status: os.stat_result) -> tuple[str, int, int, int]:
        # With the time of the last change: nobody has written to it since but we.
        return name, status.st_dev, status.st_ino, status.st_mtime_ns


class _Announced:
    """Who has asked for a content and is about to send it: others that ask meanwhile need not send it, too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[tuple[int, str], float] = {}

    def announce(self, folder: int, name: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._until = {key: until for key, until in self._until.items() if until > now}
            self._until[os.fstat(folder).st_dev, name] = now + _ANNOUNCED

    def withdraw(self, folder: int, name: str) -> None:
        with self._lock:
            self._until.pop((os.fstat(folder).st_dev, name), None)

    def __contains__(self, key: tuple[int, str]) -> bool:
        with self._lock:
            return self._until.get((os.fstat(key[0]).st_dev, key[1]), 0.0) > time.monotonic()


_states = _States()
_announced = _Announced()
