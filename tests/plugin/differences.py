"""What ours does differently from aiida-core's local transport, on purpose; the documentation has the same list.

Each row says when an operation is concerned, judged by what is on the reference's side before it, so that random sequences
leave it out; what ours does instead is tested in ``test_differences.py``.
"""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Callable
from dataclasses import dataclass

from tests.plugin.comparison import Side
from tests.plugin.sequences import Step

Paths = tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """One row.

    :param reason: why ours is not as aiida-core's local transport is.
    :param concerns: whether an operation is concerned, given its paths on the reference's side.
    """

    methods: tuple[str, ...]
    what: str
    reason: str
    concerns: Callable[[Paths], bool]


def _dangling(path: str) -> bool:
    return os.path.islink(path.rstrip("/")) and not os.path.exists(path.rstrip("/"))


def _loops(path: str) -> bool:
    try:
        os.stat(path)
    except OSError as exc:
        return exc.errno == errno.ELOOP
    return False


def _below(path: str, above: str) -> bool:
    return f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(above)}/")


def _sources(pattern: str) -> list[str]:
    return glob.glob(pattern) if glob.has_magic(pattern) else [pattern]


def _collide(pattern: str, goal: str) -> bool:
    sources = _sources(pattern)
    names = {os.path.basename(source) for source in sources}
    inside = {os.path.realpath(goal), os.path.realpath(os.path.dirname(goal))}
    return len(sources) > 1 and (
        len(names) < len(sources) or any(os.path.realpath(os.path.dirname(source)) in inside for source in sources)
    )


def _folder_without_parent(paths: Paths) -> bool:
    source, goal = paths
    return any(map(os.path.isdir, _sources(source))) and not os.path.isdir(os.path.dirname(goal.rstrip("/")))


DIFFERENCES = (
    Difference(
        ("copy", "copytree"),
        "a folder is copied to a place whose parent is missing",
        "FileNotFoundError as with core.ssh_async, on which AiiDA counts; core.local makes the parents for a folder, but not "
        "for a file",
        _folder_without_parent,
    ),
    Difference(
        ("copy", "copytree"),
        "a folder is copied into itself",
        "refused, as by cp; core.local makes some copy of a copy, or runs until a path is too long",
        lambda paths: any(os.path.isdir(source) and _below(paths[1], source) for source in _sources(paths[0])),
    ),
    Difference(
        ("rename",),
        "a folder is renamed to a place whose parent is missing",
        "refused, as by core.ssh_async; core.local makes the parents for a folder, but not for a file",
        _folder_without_parent,
    ),
    Difference(
        ("rename",),
        "a folder is renamed into itself by way of a link",
        "refused, as without the link; core.local copies the folder into itself and then deletes it",
        lambda paths: os.path.isdir(paths[0]) and _below(paths[1], paths[0]),
    ),
    Difference(
        ("rename",),
        "a link that leads nowhere is renamed, or is what has the new name",
        "renamed, and never overwritten, as by core.ssh_async; to core.local such a link is nothing at all",
        lambda paths: any(map(_dangling, paths)),
    ),
    Difference(
        ("rename", "rmtree"),
        "a link is named with a slash at the end",
        "refused; core.local moves or deletes the content of the folder behind it, and then fails",
        lambda paths: paths[0].endswith("/") and os.path.islink(paths[0].rstrip("/")),
    ),
    Difference(
        ("rmtree",),
        "a link is removed with rmtree",
        "the link is removed, as by rm -r; core.local refuses, or does nothing if the link leads nowhere",
        lambda paths: os.path.islink(paths[0]),
    ),
    Difference(
        ("makedirs",),
        "a folder is made where a file is",
        "refused, as by core.ssh_async; core.local says nothing, and there is no folder",
        lambda paths: os.path.isfile(os.path.normpath(paths[0])),
    ),
    Difference(
        ("normalize", "listdir_withattributes"),
        "links lead in a circle",
        "normalize answers one of the paths in the circle, which need not be the one that core.local stops at; "
        "listdir_withattributes raises an OSError as listdir does, where core.local raises a RuntimeError",
        lambda paths: _loops(paths[0]),
    ),
    Difference(
        ("copy", "get", "put", "symlink"),
        "a pattern matches several things of one name, or things in the destination itself",
        "the order is that of the names; core.local takes the order in which the file system happens to list them",
        lambda paths: len(paths) == 2 and _collide(*paths),
    ),
    Difference(
        ("get",),
        "a pattern that matches one file is downloaded into a folder",
        "into the folder, as by core.ssh_async, and as several files are; core.local tries to write over the folder",
        lambda paths: glob.has_magic(paths[0]) and os.path.isdir(paths[1]),
    ),
)


def difference(step: Step, side: Side) -> Difference | None:
    """The row that concerns an operation, if any."""
    paths = step.paths(side)
    return next((row for row in DIFFERENCES if step.method in row.methods and row.concerns(paths)), None)
