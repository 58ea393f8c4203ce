"""A folder that is filled out of sight; only when it is whole does its content go where it belongs, by renaming."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from aiida_marketplace_hpc.gateway.descriptors import LIST, Advance
from aiida_marketplace_hpc.gateway.draft import opened
from aiida_marketplace_hpc.gateway.protection import Protection
from aiida_marketplace_hpc.gateway.roots import PRIVATE, Root
from aiida_marketplace_hpc.gateway.trees import remove_tree

_ABANDONED = 7 * 24 * 3600.0
"""Seconds after which a folder that nobody removed is one that a gateway left behind when it was killed."""


@contextmanager
def staged(root: Root, beside: int) -> Iterator[int]:
    """Make an empty folder for the time of a ``with`` block; what is left in it at the end is removed.

    :param root: the writable root in whose private folder it lies.
    :param beside: descriptor of a folder on the file system that it must be on, so that its content can be renamed into
        that folder; where that is another one than the root's own, it lies in that folder itself.
    :return: its descriptor.
    """
    with opened(root.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) as top:
        parent = _private_folder(top)
    name = secrets.token_hex(16)
    try:
        if os.fstat(parent).st_dev != os.fstat(beside).st_dev:
            os.close(parent)
            parent, name = os.dup(beside), f"{PRIVATE}-{name}"
        else:
            _sweep(parent)
        os.mkdir(name, 0o700, dir_fd=parent)
        try:
            with opened(name, LIST, parent) as folder:
                yield folder
        finally:
            remove_tree(parent, name, force=True)
    finally:
        os.close(parent)


def _private_folder(top: int) -> int:
    with suppress(FileExistsError):
        os.mkdir(PRIVATE, 0o700, dir_fd=top)
    with opened(PRIVATE, LIST, top) as private:
        with suppress(FileExistsError):
            os.mkdir("staging", 0o700, dir_fd=private)
        return os.open("staging", LIST, dir_fd=private)


def _sweep(folder: int) -> None:
    for name in os.listdir(folder):
        with suppress(OSError):  # Somebody else sweeps, too.
            if time.time() - os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime > _ABANDONED:
                remove_tree(folder, name, force=True)


def merge(
    source: int,
    goal: int,
    advance: Advance,
    protection: Protection,
    *,
    replaces: Callable[[tuple[str, ...]], bool] = lambda _: True,
) -> None:
    """Rename everything in the open folder ``source`` into the open folder ``goal``, both on one file system.

    Folders are merged, everything else replaces what is there. Before anything is renamed it is made sure that all of it
    can be: a file does not replace a folder that has something in it, and nothing replaces what belongs to a live job.

    :param replaces: whether a folder, named by the parts of its path, replaces a file or link; else that is in the way.
    :raises OSError: if it cannot be.
    :raises FileError: if it would change what belongs to a live job.
    """
    _check(source, goal, (), replaces, protection)
    _merge(source, goal, advance, protection)


def _check(
    source: int,
    goal: int,
    at: tuple[str, ...],
    replaces: Callable[[tuple[str, ...]], bool],
    protection: Protection,
) -> None:
    _check_protection(source, goal, protection)
    for name in os.listdir(source):
        there = _mode(goal, name)
        if there is None:
            continue
        if not stat.S_ISDIR(there):
            if _is_folder(source, name) and not replaces((*at, name)):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            continue
        with opened(name, LIST, goal) as old:
            if _is_folder(source, name):
                with opened(name, LIST, source) as new:
                    _check(new, old, (*at, name), replaces, protection)
            elif os.listdir(old):
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))


def _check_protection(source: int, goal: int, protection: Protection) -> None:
    old, new = [], []
    for name in os.listdir(source):
        there = _mode(goal, name)
        if there is None:
            new.append(name)
        elif not stat.S_ISDIR(there):
            old.append(name)
        elif not _is_folder(source, name):
            protection.check_folder(goal, name)
    protection.check_names(goal, old=old, new=new)


def _merge(source: int, goal: int, advance: Advance, protection: Protection) -> None:
    _check_protection(source, goal, protection)
    for name in os.listdir(source):
        there = _mode(goal, name)
        if _is_folder(source, name):
            if there is not None and stat.S_ISDIR(there):
                with opened(name, LIST, source) as new, opened(name, LIST, goal) as old:
                    _merge(new, old, advance, protection)
                os.rmdir(name, dir_fd=source)
                continue
            if there is not None:
                os.unlink(name, dir_fd=goal)
        elif there is not None and stat.S_ISDIR(there):
            os.rmdir(name, dir_fd=goal)
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=goal)
        advance(1)


def _mode(folder: int, name: str) -> int | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None


def _is_folder(folder: int, name: str) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
