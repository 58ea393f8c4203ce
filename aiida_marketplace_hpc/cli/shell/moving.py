"""Commands that move files between here and the cluster: ``get``, ``put``."""

from __future__ import annotations

import glob
import os
import posixpath
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from aiida_marketplace_hpc.cli.common import Settings, progress_bar
from aiida_marketplace_hpc.cli.shell.changing import live_option
from aiida_marketplace_hpc.cli.shell.cluster import CommandError, Json, is_folder
from aiida_marketplace_hpc.cli.shell.line import Word
from aiida_marketplace_hpc.cli.shell.session import Session, command, operands
from aiida_marketplace_hpc.client.folder import Progress, inside_if_folder, walk
from aiida_marketplace_hpc.errors import GatewayError

_keep_option = click.option("-n", "--no-clobber", "keep", is_flag=True, help="Replace nothing.")


@command("get", expands=False, completes=("remote", "local"))
@_keep_option
@click.option("-P", "--keep-links", is_flag=True, help="Fetch symbolic links inside a folder as links.")
@operands("words", metavar="REMOTE... [LOCAL]")
def get(session: Session, words: Sequence[Word], keep: bool, keep_links: bool) -> int:
    """Download files and folders.

    To LOCAL, or into it if that is a folder; by default into the local folder (lpwd). With more than one name, the last one
    is LOCAL. A file gets its name only when it is there as a whole.
    """
    cluster = session.cluster
    local = Path(here(words[-1])) if len(words) > 1 else Path()
    names = cluster.expand(words[:-1] if len(words) > 1 else words)
    if len(names) > 1 and not local.is_dir():
        raise CommandError(f"{local} is no folder on this machine: {len(names)} things cannot get one name")

    def one(name: str) -> str:
        path = cluster.path(name)
        base = posixpath.basename(path.rstrip("/"))
        if base in ("", ".", ".."):
            base = posixpath.basename(cluster.stat(path)["path"]) or "root"
        with _progress(session, base, lambda: _remote_size(session, path)) as progress:
            received = cluster.gateway.get(
                path,
                inside_if_folder(local, base),
                dereference=not keep_links,
                overwrite=not keep,
                progress=progress,
            )
        return str(received.path)

    return _each(session, "get", names, one)


@command("put", expands=False, completes=("local", "both"))
@_keep_option
@click.option("-P", "--keep-links", is_flag=True, help="Send symbolic links inside a folder as links.")
@live_option
@operands("words", metavar="LOCAL... [REMOTE]")
def put(session: Session, words: Sequence[Word], keep: bool, keep_links: bool, live: bool) -> int:
    """Upload files and folders.

    To REMOTE, or into it if that is a folder; by default into the current folder (pwd). With more than one name, the last one
    is REMOTE. A file gets its name only when it is there as a whole.
    """
    cluster = session.cluster
    target = cluster.folder
    sources = [path for word in (words[:-1] if len(words) > 1 else words) for path in local_paths(word)]
    if len(words) > 1:
        goals = cluster.expand(words[-1:])
        if len(goals) > 1:
            raise CommandError(f"{words[-1]} matches {len(goals)} names on the cluster: name one")
        target = cluster.path(goals[0])
        if (len(sources) > 1 or target.endswith("/")) and not is_folder(cluster.stats([target])[0]):
            raise CommandError(f"{goals[0]} is no folder on the cluster: make it with mkdir first")

    def one(name: str) -> str:
        local = Path(name)
        base = local.absolute().name if local.name not in ("", "..") else local.resolve().name
        with _progress(session, base, lambda: _local_size(local)) as progress:
            options: dict[str, Any] = {"into": base, "overwrite": not keep, "force": live, "progress": progress}
            if local.is_dir():
                answer = cluster.gateway.put_tree(local, target, dereference=not keep_links, **options)
            else:
                mode = stat.S_IMODE(local.stat().st_mode)
                answer = cluster.gateway.put_file(local, target, mode=mode, **options)
        return str(answer["path"])

    return _each(session, "put", sources, one)


def _each(session: Session, command_name: str, names: Sequence[str], move: Callable[[str], str]) -> int:
    """Move one after the other; what cannot be moved is said, and the next one comes."""
    status = 0
    for name in names:
        try:
            there = move(name)
        except GatewayError as exc:
            status = session.report(command_name, exc)
        except OSError as exc:
            session.complain(f"{command_name}: {exc.filename or name}: {exc.strerror or exc}")
            status = 1
        else:
            session.show(session.name(there))
    return status


def here(word: str) -> str:
    """A name on this machine."""
    if isinstance(word, Word) and word.tilde:
        return os.path.expanduser("~") + word[1:]
    return str(word)


def local_paths(word: Word) -> list[str]:
    """What a word names on this machine.

    :raises CommandError: nothing matches its pattern.
    """
    if word.pattern is None:
        return [here(word)]
    found = sorted(glob.glob(here(Word(word.pattern, tilde=word.tilde))))
    if not found:
        raise CommandError(f"nothing matches {word} on this machine (in {Path.cwd()}): quote it if that is a name")
    return found


@contextmanager
def _progress(session: Session, name: str, size: Callable[[], int | None]) -> Iterator[Progress | None]:
    """Show the progress to a person; only then is it worth while to find out how much there is."""
    total = size() if session.interactive else None
    with progress_bar(Settings(json=not session.interactive), total, name) as progress:
        yield progress


def _remote_size(session: Session, path: str) -> int | None:
    attributes, listing = session.cluster.gateway.query(
        [{"op": "stat", "path": path, "follow": True}, {"op": "list", "path": path, "recursive": True}]
    )
    if isinstance(attributes, GatewayError):
        return None  # Fetching it will say what is wrong.
    if not is_folder(attributes):
        return int(attributes["size"])
    return None if isinstance(listing, GatewayError) else sum(map(_content, listing["entries"]))


def _content(entry: Json) -> int:
    return int(entry["size"]) if entry["type"] == "file" else 0


def _local_size(path: Path) -> int | None:
    if not path.is_dir():
        return path.stat().st_size
    return sum(source.entry.size for source in walk(path, dereference=False))
