"""What takes long: removing and measuring whole folders, copying content; relative to open folders, no link followed."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from aiida_marketplace_hpc.gateway.descriptors import LIST, SYNC_EVERY, Advance, ignore_progress, too_deep
from aiida_marketplace_hpc.gateway.draft import opened

_DEEPEST = 900
"""Folders in folders; each holds a descriptor and a frame while what is below it is removed."""
_BATCH = 10_000
_PIECE = 16 * 1024 * 1024
"""Bytes that the kernel copies at once: a second's work for a slow disk."""
_CHUNK = 1024 * 1024


def remove_tree(
    folder: int, name: str, advance: Advance = ignore_progress, *, force: bool = False, depth: int = 0
) -> None:
    """Remove a folder with all that is in it.

    :param folder: descriptor of the folder that it is in.
    :param advance: is told each entry that is gone.
    :param force: also what the permission bits of folders forbid.
    :raises OSError: at the first entry that cannot be removed; what was removed by then is gone.
    """
    if depth > _DEEPEST:
        raise too_deep()
    if force:
        os.chmod(name, 0o700, dir_fd=folder)
    with opened(name, LIST, folder) as inside:
        # In batches: the names of a million files are not held at once.
        while entries := _batch(inside):
            for entry, is_folder in entries:
                if is_folder:
                    remove_tree(inside, entry, advance, force=force, depth=depth + 1)
                else:
                    os.unlink(entry, dir_fd=inside)
                    advance(1)
    os.rmdir(name, dir_fd=folder)
    advance(1)


def _batch(folder: int) -> list[tuple[str, bool]]:
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in islice(entries, _BATCH)]


@dataclass
class Usage:
    """What files take.

    :param size: bytes as ``stat`` says them, of folders and links, too.
    :param allocated: bytes on the disk.
    :param entries: files, folders, links, the one that was asked for included; a file with several names counts once.
    """

    size: int = 0
    allocated: int = 0
    entries: int = 0


def measure(folder: int, name: str, advance: Advance = ignore_progress) -> Usage:
    """Measure a file, or a folder with all that is in it; no link is followed.

    :param folder: descriptor of the folder that it is in.
    :param advance: is told each entry.
    """
    usage = Usage()
    _measure(folder, name, usage, set(), advance, 0)
    return usage


def _measure(folder: int, name: str, usage: Usage, seen: set[tuple[int, int]], advance: Advance, depth: int) -> None:
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    is_folder = stat.S_ISDIR(found.st_mode)
    if not is_folder and found.st_nlink > 1:
        if (found.st_dev, found.st_ino) in seen:
            return
        seen.add((found.st_dev, found.st_ino))
    usage.size += found.st_size
    usage.allocated += found.st_blocks * 512
    usage.entries += 1
    advance(1)
    if is_folder:
        if depth > _DEEPEST:
            raise too_deep()
        with opened(name, LIST, folder) as inside, os.scandir(inside) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # Removed while we look.
                    _measure(inside, entry.name, usage, seen, advance, depth + 1)


def copy_content(source: int, goal: int, advance: Advance = ignore_progress) -> None:
    """Copy the content of an open file into an empty one; in the kernel, and without copying at all, where it can.

    :param advance: is told the bytes.
    """
    position = unsynced = 0
    in_kernel = True
    while True:
        count = _copy_in_kernel(source, goal) if in_kernel else _copy_by_hand(source, goal)
        if count is None or (count == 0 and in_kernel and position == 0):
            # Some file systems cannot, and some say that there is nothing where there is.
            in_kernel = False
            continue
        if count == 0:
            return
        position += count
        unsynced += count
        advance(count)
        if unsynced >= SYNC_EVERY:
            os.fdatasync(goal)
            unsynced = 0


def _copy_in_kernel(source: int, goal: int) -> int | None:
    try:
        return os.copy_file_range(source, goal, _PIECE)
    except OSError as exc:
        if exc.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY):
            return None
        raise


def _copy_by_hand(source: int, goal: int) -> int:
    chunk = os.read(source, _CHUNK)
    left = memoryview(chunk)
    while left:
        left = left[os.write(goal, left) :]
    return len(chunk)
