"""Renaming without replacing anything, also from one file system to another."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable

from aiida_marketplace_hpc.gateway.descriptors import LIST, MAX_DEPTH, Advance, open_regular, too_deep
from aiida_marketplace_hpc.gateway.draft import opened
from aiida_marketplace_hpc.gateway.roots import Place
from aiida_marketplace_hpc.gateway.staging import staged
from aiida_marketplace_hpc.gateway.trees import copy_content, remove_tree

_NO_REPLACE = 1
_NAME = "moved"

_libc = ctypes.CDLL(None, use_errno=True)


def rename_new(old: Place, new: Place) -> None:
    """Rename in one step; what is there is not replaced, nor what comes there meanwhile.

    :raises OSError: EEXIST if something is there, EXDEV between two file systems.
    """
    call = getattr(_libc, "renameat2", None)
    if call is not None:
        names = os.fsencode(old.name), os.fsencode(new.name)
        if call(old.folder, names[0], new.folder, names[1], _NO_REPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number))
    # Not every file system can do that in one step.
    try:
        new.lstat()
    except FileNotFoundError:
        os.rename(old.name, new.name, src_dir_fd=old.folder, dst_dir_fd=new.folder)
    else:
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))


def move(old: Place, new: Place, advance: Advance, check: Callable[[], None]) -> None:
    """Move a file or folder to another file system: it is copied out of sight, shown in one step, then taken away in one step.

    At every instant the whole of it is at the old place, at the new one, or at both. Permission bits and times are kept.

    :param check: raises if it may not be taken away after all, which copying may have taken long enough for.
    :raises OSError: if it cannot be; the whole of it is at the old place then, and nothing at the new one.
    """
    if f"{new.path}/".startswith(f"{old.path}/"):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    with staged(old.root, old.folder) as trash, staged(new.root, new.folder) as folder:
        copied, aside = Place(new.root, folder, _NAME, new.path), Place(old.root, trash, _NAME, old.path)
        _duplicate(old, copied, advance, 0)
        check()
        _rename_whole(copied, new)
        try:
            _rename_whole(old, aside)
        except OSError:
            _rename_whole(new, copied)
            raise
        # From here on it has been moved, whatever becomes of the rest.
        if stat.S_ISDIR(aside.lstat().st_mode):
            remove_tree(trash, _NAME, advance, force=True)


def _rename_whole(old: Place, new: Place) -> None:
    """The same as :func:`rename_new`, also for a folder in which its owner may not write: such a one cannot change parents."""
    found = old.lstat()
    if not stat.S_ISDIR(found.st_mode):
        rename_new(old, new)
        return
    with opened(old.name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, old.folder) as folder:
        this = f"/proc/self/fd/{folder}"
        os.chmod(this, stat.S_IMODE(found.st_mode) | 0o700)
        try:
            rename_new(old, new)
        finally:
            os.chmod(this, stat.S_IMODE(found.st_mode))


def _duplicate(source: Place, goal: Place, advance: Advance, depth: int) -> None:
    """Copy whatever is at ``source`` to where nobody looks; no link is followed."""
    if depth > MAX_DEPTH:
        raise too_deep()
    advance(1)
    found = source.lstat()
    if stat.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(source.name, dir_fd=source.folder), goal.name, dir_fd=goal.folder)
    elif stat.S_ISDIR(found.st_mode):
        os.mkdir(goal.name, 0o700, dir_fd=goal.folder)
        with opened(source.name, LIST, source.folder) as inside, opened(goal.name, LIST, goal.folder) as made:
            for name in os.listdir(inside):
                below = Place(source.root, inside, name, f"{source.path}/{name}")
                _duplicate(below, Place(goal.root, made, name, f"{goal.path}/{name}"), advance, depth + 1)
            os.fchmod(made, stat.S_IMODE(found.st_mode))
    elif stat.S_ISFIFO(found.st_mode):
        os.mkfifo(goal.name, stat.S_IMODE(found.st_mode), dir_fd=goal.folder)
    else:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open_regular(source) as content, opened(goal.name, flags, goal.folder) as copy:
            copy_content(content.fileno(), copy, advance)
            os.fchmod(copy, stat.S_IMODE(found.st_mode))
            os.fsync(copy)
    times = found.st_atime_ns, found.st_mtime_ns
    os.utime(goal.name, ns=times, dir_fd=goal.folder, follow_symlinks=False)
