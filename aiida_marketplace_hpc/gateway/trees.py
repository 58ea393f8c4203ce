"""Whole folders at once: removing and measuring them, relative to open folders, no link followed."""

from __future__ import annotations

import os
from itertools import islice

from aiida_marketplace_hpc.gateway.descriptors import LIST, Advance, ignore_progress, too_deep
from aiida_marketplace_hpc.gateway.draft import opened

_DEEPEST = 900
"""Folders in folders; each holds a descriptor and a frame while what is below it is removed."""
_BATCH = 10_000


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
