"""Commands that say what is there: ``ls``, ``du``, ``stat``."""

from __future__ import annotations

import posixpath
import stat as stat_module
from collections.abc import Iterator, Sequence
from datetime import datetime

import click

from aiida_marketplace_hpc.cli.shell import layout
from aiida_marketplace_hpc.cli.shell.cluster import Json, is_folder
from aiida_marketplace_hpc.cli.shell.session import Session, command, operands
from aiida_marketplace_hpc.errors import GatewayError

_TYPES = {"file": "regular file", "directory": "folder", "symlink": "symbolic link", "other": "neither file nor folder"}


@command("ls")
@click.option("-l", "long", is_flag=True, help="Mode, size in bytes, time of the last change and name.")
@click.option("-a", "everything", is_flag=True, help="Names that begin with a dot, too.")
@click.option("-h", "human", is_flag=True, help="Sizes with units.")
@click.option("-d", "itself", is_flag=True, help="A folder itself, not what is in it.")
@click.option("-t", "by_time", is_flag=True, help="The newest first.")
@click.option("-S", "by_size", is_flag=True, help="The largest first.")
@click.option("-r", "reverse", is_flag=True, help="In the opposite order.")
@click.option("-1", "one", is_flag=True, help="One name a line.")
@operands("paths", required=False, metavar="[PATH]...")
def ls(
    session: Session,
    paths: Sequence[str],
    long: bool,
    everything: bool,
    human: bool,
    itself: bool,
    by_time: bool,
    by_size: bool,
    reverse: bool,
    one: bool,
) -> int:
    """List folders and files."""

    def show(entries: Sequence[Json]) -> None:
        if by_time or by_size:
            entries = sorted(entries, key=lambda entry: -float(entry["mtime" if by_time else "size"]))
        for line in _lines(session, entries[::-1] if reverse else entries, long, human, one):
            session.show(line)

    names = list(paths or ["."])
    files: list[Json] = []
    folders: list[tuple[str, list[Json]]] = []
    status = 0
    for name, found in zip(names, _listings(session, names, itself), strict=True):
        if isinstance(found, GatewayError):
            status = session.report("ls", found)
        elif isinstance(found, list):
            folders.append((name, [entry for entry in found if everything or not entry["name"].startswith(".")]))
        else:
            files.append({**found, "name": name})
    show(files)
    for number, (name, entries) in enumerate(folders):
        if len(names) > 1:
            session.show(("\n" if files or number else "") + f"{session.name(name)}:")
        show(entries)
    return status


def _listings(session: Session, names: Sequence[str], itself: bool) -> Iterator[list[Json] | Json | GatewayError]:
    """For each name, in one request for all: the entries of a folder, the attributes of anything else, or an error."""
    operations: list[Json] = []
    for name in names:
        path = session.cluster.path(name)
        operations += [{"op": "stat", "path": path}, {"op": "list", "path": path}][: 1 if itself else 2]
    results = session.cluster.gateway.query(operations)
    if itself:
        yield from results
        return
    for attributes, listing in zip(results[::2], results[1::2], strict=True):
        if not isinstance(listing, GatewayError):
            yield listing["entries"]
        else:  # A folder that cannot be read, a file, a link to one or to nowhere, or nothing.
            yield listing if is_folder(attributes) else attributes


def _lines(session: Session, entries: Sequence[Json], long: bool, human: bool, one: bool) -> list[str]:
    plain = [session.name(entry["name"]) for entry in entries]
    names = plain
    if session.colours:
        names = [layout.coloured(name, entry["mode"]) for name, entry in zip(plain, entries, strict=True)]
    if long:
        rows = layout.long_rows(entries, human, session.clock())
        arrows = [f" -> {session.name(entry['target'])}" if "target" in entry else "" for entry in entries]
        return [f"{row} {name}{arrow}" for row, name, arrow in zip(rows, names, arrows, strict=True)]
    if one or not session.interactive:
        return names
    return layout.columns(names, [layout.width_of(name) for name in plain], session.width)


@command("du")
@click.option("-h", "human", is_flag=True, help="With units.")
@click.option("-s", "summary", is_flag=True, help="Only the totals of what was named.")
@operands("paths", required=False, metavar="[PATH]...")
def du(session: Session, paths: Sequence[str], human: bool, summary: bool) -> int:
    """Add up the sizes of files, for each folder with all that is in it.

    In bytes of content. What symbolic links point to is not counted.
    """
    names = list(paths or ["."])
    cluster = session.cluster
    operations: list[Json] = []
    for path in map(cluster.path, names):
        operations += [{"op": "stat", "path": path}, {"op": "list", "path": path, "recursive": True}]
    results = cluster.gateway.query(operations)
    status = 0
    for name, attributes, listing in zip(names, results[::2], results[1::2], strict=True):
        if isinstance(attributes, GatewayError):
            status = session.report("du", attributes)
        elif not is_folder(attributes):
            session.show(f"{layout.size_text(attributes['size'], human)}\t{session.name(name)}")
        elif isinstance(listing, GatewayError):
            status = session.report("du", listing)
        else:
            for folder, size in _sums(listing["entries"]).items():
                if not folder or not summary:
                    below = posixpath.join(name, folder) if folder else name
                    session.show(f"{layout.size_text(size, human)}\t{session.name(below)}")
    return status


def _sums(entries: Sequence[Json]) -> dict[str, int]:
    """The bytes below each folder, the innermost first; ``""`` is the folder that was listed."""
    order = [entry["name"] for entry in entries if entry["type"] == "directory"]
    sums = dict.fromkeys(["", *order], 0)
    for entry in entries:
        if entry["type"] == "file":
            sums[posixpath.dirname(entry["name"])] += int(entry["size"])
    # A folder is listed before what is in it.
    for name in reversed(order):
        sums[posixpath.dirname(name)] += sums[name]
    return {name: sums[name] for name in [*reversed(order), ""]}


@command("stat")
@click.option("-L", "follow", is_flag=True, help="Look through symbolic links.")
@operands("paths")
def stat(session: Session, paths: Sequence[str], follow: bool) -> int:
    """Print the attributes of files and folders."""
    status = 0
    cluster = session.cluster
    for name, found in zip(paths, cluster.stats([*map(cluster.path, paths)], follow=follow), strict=True):
        if isinstance(found, GatewayError):
            status = session.report("stat", found)
            continue
        arrow = f" -> {session.name(found['target'])}" if "target" in found else ""
        mode = stat_module.S_IMODE(found["mode"])
        rows = [
            ("File", session.name(name) + arrow),
            ("Path", session.name(found["path"])),
            ("Type", _TYPES.get(found["type"], found["type"])),
            ("Size", f"{found['size']} bytes"),
            ("Mode", f"{mode:04o} {stat_module.filemode(found['mode'])}"),
            ("Owner", f"user {found['uid']}, group {found['gid']}"),
            ("Read", _time(found["atime"])),
            ("Changed", _time(found["mtime"])),
        ]
        for label, value in rows:
            session.show(f"{label + ':':9}{value}")
    return status


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", timespec="seconds")
    except (ValueError, OverflowError, OSError):  # Some file systems have times that no calendar has.
        return f"{seconds:.0f} seconds after 1970"
