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


def _never(_: Paths) -> bool:
    """Such operations are not among the random ones."""
    return False


def _links_over_something(paths: Paths) -> bool:
    goals = (paths[1], *(os.path.join(paths[1], os.path.basename(source)) for source in _sources(paths[0])))
    return any(map(os.path.isdir, goals)) and any(
        os.path.islink(os.path.join(folder, name))
        for source in _sources(paths[0])
        for folder, folders, names in os.walk(source)
        for name in (*folders, *names)
    )


def _leads_back(top: str, goal: str) -> bool:
    """Whether a walk that follows links comes back to where it was, or to the goal."""
    pending = [(top, ())] if os.path.isdir(top) else []
    while pending:
        folder, above = pending.pop()
        real = os.path.realpath(folder)
        if real in above or (above and _below(goal, real)):
            return True
        pending += [(entry.path, (*above, real)) for entry in os.scandir(folder) if entry.is_dir()]
    return False


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
        ("copy", "copytree", "put", "puttree", "get", "gettree"),
        "a link inside leads back to a folder that it lies in, or to the destination, and is dereferenced",
        "refused; core.local goes round until the operating system or Python stops it, and so may never end",
        lambda paths: any(_leads_back(source, paths[1]) for source in _sources(paths[0])),
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
        "refused; core.local says nothing, and there is no folder",
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
    Difference(
        ("put", "puttree", "get", "gettree"),
        "a link in a folder comes where something is already",
        "it takes the place of a file or link, so that a transfer can be repeated; core.local refuses",
        _links_over_something,
    ),
    Difference(
        ("get", "gettree"),
        "a file in a folder comes where there is a local link",
        "it takes the place of the link; core.local writes through it. A gateway is not to choose where on your machine "
        "something is written",
        _never,
    ),
    Difference(
        ("copy", "put", "get"),
        "something in the middle of a folder, or of several things, fails",
        "nothing after it is done; core.local goes on with the rest and then raises",
        _never,
    ),
    Difference(
        ("put", "get", "copy"),
        "a file that cannot be written, or has several names, is replaced",
        "the name gets a new file when it has arrived whole; core.local writes into the old one",
        _never,
    ),
    Difference(
        ("listdir",),
        "the folder's name ends with a blank, or has characters that mean something in a regular expression",
        "the names in it; core.local cuts the blank off, and reads the name as an expression where there is a pattern",
        _never,
    ),
    Difference(
        ("listdir_withattributes",),
        "there is a pattern",
        "it is heeded, as by core.ssh_async; core.local lists everything",
        _never,
    ),
    Difference(
        ("path_exists",),
        "the path is empty",
        "there is nothing; to core.local it is the home",
        _never,
    ),
    Difference(
        ("putfile", "getfile"),
        "the switches are given without their names",
        "dereference comes first, as with core.ssh_async; with core.local it is overwrite",
        _never,
    ),
    Difference(
        ("rename", "copyfile"),
        "a path is relative",
        "it is taken from the home, as everywhere; core.local looks in the daemon's own working directory",
        _never,
    ),
    Difference(
        ("makedirs_async",),
        "the folder appears between path_exists_async and makedirs_async, called one right after the other by one task",
        "it is accepted: the first calculations in a new work directory would otherwise fail, and be tried again after 20 s",
        _never,
    ),
)


def difference(step: Step, side: Side) -> Difference | None:
    """The row that concerns an operation, if any."""
    paths = step.paths(side)
    return next((row for row in DIFFERENCES if step.method in row.methods and row.concerns(paths)), None)
