"""Commands that change files on the cluster: ``mkdir``, ``rm``, ``mv``, ``cp``."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

import click

from aiida_marketplace_hpc.cli.shell.cluster import CommandError, Json, is_folder, is_missing
from aiida_marketplace_hpc.cli.shell.line import Word
from aiida_marketplace_hpc.cli.shell.session import Session, command, operands
from aiida_marketplace_hpc.errors import FileError, GatewayError

_MANY = 5
# Not -f, which is written by habit.
live_option = click.option("--live", is_flag=True, help="Also what a live job of yours needs: its script, its folder.")


@command("mkdir")
@click.option("-p", "parents", is_flag=True, help="Missing folders on the way, too; one that is there is no error.")
@operands("paths")
def mkdir(session: Session, paths: Sequence[str], parents: bool) -> int:
    """Make folders."""
    cluster = session.cluster
    operations = [
        {"op": "mkdir", "path": cluster.path(name), "parents": parents, "exist_ok": parents} for name in paths
    ]
    return _carry_out(session, "mkdir", operations)


@command("rm")
@click.option("-r", "-R", "recursive", is_flag=True, help="Folders, with all that is in them.")
@click.option("-f", "force", is_flag=True, help="Ask nothing; what is not there is no error.")
@live_option
@operands("paths")
def rm(session: Session, paths: Sequence[str], recursive: bool, force: bool, live: bool) -> int:
    """Remove files, and with -r folders.

    A symbolic link is removed itself, never what it points to. What was not named itself is asked about: what is in a
    folder, and what matches a pattern. Where nobody can be asked, a pattern needs -f.
    """
    for name in paths:
        if posixpath.basename(name.rstrip("/")) in ("", ".", ".."):
            raise CommandError(f"{name} is not removed as a whole: go above it and name it, or remove what is in it")
    cluster = session.cluster
    targets = {name: cluster.path(name).rstrip("/") for name in paths}
    status = 0
    files: list[str] = []
    folders: list[str] = []
    for name, found in zip(targets, cluster.stats([*targets.values()], follow=False), strict=True):
        if isinstance(found, GatewayError):
            if not (force and is_missing(found)):
                status = session.report("rm", found)
        elif not is_folder(found):
            files.append(name)
        elif recursive:
            folders.append(name)
        else:
            session.complain(f"rm: {name} is a folder: rm -r removes it with all that is in it")
            status = 1
    if not force:
        files, folders = _agreed(session, files, folders)
    fields = {"op": "remove", "missing_ok": force, **_forced(live)}
    operations = [{**fields, "path": targets[name]} for name in files]
    operations += [{**fields, "path": targets[name], "recursive": True} for name in folders]
    return _carry_out(session, "rm", operations) or status


def _agreed(session: Session, files: Sequence[str], folders: Sequence[str]) -> tuple[list[str], list[str]]:
    """Leave out what its owner does not want removed."""
    refused: set[str] = set()
    patterns: dict[str, list[str]] = {}
    for name in (*files, *folders):
        if isinstance(name, Word) and name.pattern is not None:
            patterns.setdefault(name.pattern, []).append(name)
    for pattern, names in patterns.items():
        if not session.interactive:
            raise CommandError(f"{pattern} matches {len(names)} names: rm -f removes them without a question")
        shown = [session.name(name) + ("/ and all that is in it" if name in folders else "") for name in names[:_MANY]]
        rest = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
        if not session.confirm(f"remove {', '.join(shown)}{rest}?"):
            refused.update(names)
    if session.interactive:
        named = [name for name in folders if not (isinstance(name, Word) and name.pattern is not None)]
        refused.update(
            name for name in named if not session.confirm(f"remove {session.name(name)} and all that is in it?")
        )
    return [name for name in files if name not in refused], [name for name in folders if name not in refused]


@command("mv")
@live_option
@operands("paths", metavar="SOURCE... TARGET")
def mv(session: Session, paths: Sequence[str], live: bool) -> int:
    """Rename a file or folder, or move several into a folder. Nothing is ever replaced."""
    cluster = session.cluster
    sources, target = _sources_and_target(paths)
    inside = is_folder(cluster.stats([cluster.path(target)])[0])
    _only_into_a_folder(sources, target, inside)
    operations: list[Json] = []
    for name in sources:
        goal = posixpath.join(target, posixpath.basename(name.rstrip("/"))) if inside else target
        fields = {"path": cluster.path(name).rstrip("/"), "target": cluster.path(goal).rstrip("/")}
        operations.append({"op": "rename", **fields, **_forced(live)})
    return _carry_out(session, "mv", operations)


@command("cp")
@click.option("-r", "-R", "recursive", is_flag=True, help="Folders, with all that is in them.")
@live_option
@operands("paths", metavar="SOURCE... TARGET")
def cp(session: Session, paths: Sequence[str], recursive: bool, live: bool) -> int:
    """Copy files on the cluster: to a name, or into a folder. Links inside a folder stay links."""
    cluster = session.cluster
    sources, target = _sources_and_target(paths)
    *found, goal = cluster.stats([cluster.path(name) for name in paths])
    _only_into_a_folder(sources, target, is_folder(goal))
    status = 0
    operations: list[Json] = []
    for name, attributes in zip(sources, found, strict=True):
        if isinstance(attributes, GatewayError):
            status = session.report("cp", attributes)
        elif is_folder(attributes) and not recursive:
            session.complain(f"cp: {name} is a folder: cp -r copies it with all that is in it")
            status = 1
        else:
            fields = {"path": cluster.path(name), "target": cluster.path(target)}
            operations.append({"op": "copy", **fields, **_forced(live)})
    return _carry_out(session, "cp", operations) or status


def _sources_and_target(paths: Sequence[str]) -> tuple[Sequence[str], str]:
    if len(paths) < 2:
        raise click.UsageError("name what and where to")
    return paths[:-1], paths[-1]


def _only_into_a_folder(sources: Sequence[str], target: str, is_one: bool) -> None:
    if not is_one and (len(sources) > 1 or target.endswith("/")):
        raise CommandError(f"{target} is no folder: make it with mkdir first")


def _forced(live: bool) -> Json:
    # Left out where it is not needed: an older gateway, which protects nothing, does not know the field.
    return {"force": True} if live else {}


def _carry_out(session: Session, name: str, operations: Sequence[Json]) -> int:
    """Do all operations in one request, and say which of them failed."""
    status = 0
    for result in session.cluster.gateway.query(operations) if operations else []:
        if isinstance(result, GatewayError):
            status = session.report(name, _advised(result))
    return status


_ADVICE = {
    "EXDEV": "it lies on another file system: cp -r and then rm -r move it",
    "EEXIST": "remove that first, or choose another name",
    "EBUSY": "--live forces it for jobs of yours",
}


def _advised(error: GatewayError) -> GatewayError:
    if isinstance(error, FileError) and error.errno in _ADVICE:
        return FileError(f"{error.message}: {_ADVICE[error.errno]}", errno=error.errno, path=error.path)
    return error
