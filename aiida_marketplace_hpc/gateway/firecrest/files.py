"""The file operations of a gateway that reaches its cluster's file systems through FirecREST alone.

Each method costs one call or a few, each of which runs one command on the cluster; renaming and copying cost a job of the
batch system, because FirecREST has nothing else for them. ``docs/howto/firecrest.md`` says what that means for the guarantees.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import posixpath
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.errors import FileError, Forbidden, IntegrityError, Unavailable
from aiida_marketplace_hpc.gateway.backends.wrapper import GUARD_PREFIX
from aiida_marketplace_hpc.gateway.descriptors import Advance, ignore_progress
from aiida_marketplace_hpc.gateway.files import path_below
from aiida_marketplace_hpc.gateway.firecrest.client import CallFailed, Cluster, JobFailed, Json
from aiida_marketplace_hpc.gateway.firecrest.failures import explained
from aiida_marketplace_hpc.gateway.firecrest.roots import RemoteRoots
from aiida_marketplace_hpc.gateway.globbing import Globbing
from aiida_marketplace_hpc.gateway.protection import LiveJobs
from aiida_marketplace_hpc.gateway.roots import PRIVATE
from aiida_marketplace_hpc.gateway.storage import Read
from aiida_marketplace_hpc.gateway.trees import Usage

_LETTERS = {"-": stat.S_IFREG, "d": stat.S_IFDIR, "l": stat.S_IFLNK, "p": stat.S_IFIFO, "s": stat.S_IFSOCK}
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
_PIECE = 1024 * 1024
_POLL = 1.0
_JOB_TIME = 3600.0
"""Seconds after which a job of FirecREST's that moves files is not waited for any longer."""
_MAX_LINKS = 40


class RemoteFiles(Globbing):
    """What one caller can do with files, as :class:`~aiida_marketplace_hpc.gateway.files.Files` says.

    A link is followed by the cluster. Nothing is renamed into place: while a file is written it is seen under its name, and
    only the answer says that it is whole.

    :param spool: a folder of the gateway's own, for what is on its way.
    """

    def __init__(
        self,
        roots: RemoteRoots,
        cluster: Cluster,
        protection: LiveJobs,
        spool: Path,
        advance: Advance = ignore_progress,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.roots = roots
        self.cluster = cluster
        self.protection = protection
        self.spool = spool
        self.advance = advance
        self._sleep = sleep

    def watched(self, advance: Advance) -> RemoteFiles:
        """The same, telling its progress."""
        return RemoteFiles(self.roots, self.cluster, self.protection, self.spool, advance, self._sleep)

    def forced(self) -> RemoteFiles:
        """The same for somebody who means it, also where a live job of theirs is concerned."""
        return RemoteFiles(self.roots, self.cluster, self.protection.forced(), self.spool, self.advance, self._sleep)

    @property
    def largest_whole(self) -> int | None:
        """Bytes of a file up to which it goes on without a job of the batch system, whose time no request would wait for."""
        try:
            return self.cluster.largest_up * 9 // 10 - 4096
        except CallFailed:
            return None  # Whoever is told nothing sends what is usual.

    @property
    def largest_up(self) -> int:
        """Bytes of a file that can be sent at once."""
        with explained(self.cluster.url):
            return self.cluster.largest_up

    @property
    def largest_down(self) -> int:
        """Bytes of a file that can be fetched at once."""
        with explained(self.cluster.url):
            return self.cluster.largest_down

    # Looking

    def stat(self, path: str, *, follow: bool = False) -> dict[str, Any]:
        """Attributes of a path; of a link itself unless ``follow``."""
        _, clean = self.roots.locate(path)
        follow = follow or path.endswith("/")
        with explained(path):
            found = self.cluster.stat(f"{clean}/" if path.endswith("/") else clean, follow=follow)
            names = ("mode", "size", "mtime", "atime", "uid", "gid")
            attributes: dict[str, Any] = {
                "path": clean,
                "type": _kind(found["mode"]),
                **{name: found[name] for name in names},
            }
            if attributes["type"] == "symlink":
                attributes["target"] = self._link(clean)
        return attributes

    def identified(self, path: str) -> dict[str, Any]:
        """What is there, links followed, with all numbers by which a change is noticed."""
        _, clean = self.roots.locate(path)
        with explained(path):
            found = self.cluster.stat(f"{clean}/" if path.endswith("/") else clean, follow=True)
        return {**found, "path": clean, "type": _kind(found["mode"])}

    def _link(self, path: str) -> str:
        found = self.cluster.listing(path)
        return str(found[0].get("linkTarget") or "") if found else ""

    def realpath(self, path: str) -> str:
        """The path with every link resolved; what does not exist, or cannot, is left as it is written."""
        root, clean = self.roots.locate(path)
        done, todo, links = root.path, clean[len(root.path) :].strip("/").split("/"), 0
        while todo:
            name = todo.pop(0)
            if not name:
                continue
            done = posixpath.join(done, name)
            try:
                found = self.stat(done)
            except FileError:
                return posixpath.normpath(posixpath.join(done, *todo))
            if found["type"] != "symlink":
                continue
            links += 1
            if links > _MAX_LINKS:
                raise FileError(f"{os.strerror(errno.ELOOP)}: {path}", errno="ELOOP", path=path)
            led = posixpath.normpath(posixpath.join(posixpath.dirname(done), found["target"], *todo))
            root, led = self.roots.locate(led)
            done, todo = root.path, led[len(root.path) :].strip("/").split("/")
        return done

    def listing(
        self, path: str, *, recursive: bool = False, pattern: str | None = None, follow: bool = False
    ) -> list[dict[str, Any]]:
        """The entries of a folder, hidden ones too, sorted by name; ``recursive``: of all folders below, links not followed.

        Times are those of ``ls``, to the second.
        """
        _, clean = self.roots.locate(path)
        with explained(path):
            # With the slash a link to a folder is looked through, and what is no folder is refused.
            lines = self.cluster.listing(f"{clean.rstrip('/')}/", recursive=recursive)
            offset = self._zone(clean, lines)
        top = any(root.path == clean for root in self.roots)
        entries = [_entry(line, offset) for line in lines]
        if top:
            entries = [entry for entry in entries if entry["name"].partition("/")[0] != PRIVATE]
        if pattern is not None:
            entries = [entry for entry in entries if fnmatch.fnmatchcase(entry["name"].rpartition("/")[2], pattern)]
        entries.sort(key=lambda entry: entry["name"].split("/"))
        if follow:
            self._look_through(entries, lambda entry: path_below(clean, entry["name"]))
        self.advance(len(entries) + 1)
        return entries

    def _zone(self, folder: str, lines: list[Json]) -> int:
        """Seconds that the clock of the cluster's walls is ahead of UTC: ``ls`` prints no zone. Asked for now and then."""
        known = self.cluster.zone()
        if known is not None or not lines:
            return known or 0
        first = lines[0]
        with suppress(CallFailed):
            exact = int(self.cluster.stat(posixpath.join(folder, str(first["name"])))["mtime"])
            # It may have been changed in between: zones are whole quarters of an hour.
            ahead = round((_wall(first) - exact) / 900.0) * 900
            self.cluster.note_zone(ahead)
            return ahead
        return 0

    def names(self, path: str, prefix: str) -> list[str]:
        """The names in a folder that begin with ``prefix``, sorted."""
        return [entry["name"] for entry in self.listing(path) if entry["name"].startswith(prefix)]

    def _allowed(self, path: str) -> None:
        self.roots.locate(path)

    def _matching(self, base: str, pattern: str) -> list[str]:
        try:
            names = [entry["name"] for entry in self.listing(base)]
        except (FileError, Forbidden):  # As with a shell: what cannot be looked at does not match.
            return []
        if not pattern.startswith("."):
            names = [name for name in names if not name.startswith(".")]
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]

    def _type(self, path: str) -> str | None:
        try:
            return str(self.stat(path, follow=True)["type"])
        except (FileError, Forbidden):
            return None

    def checksum(self, path: str) -> dict[str, Any]:
        """The digest and size of a file, links followed."""
        _, clean = self.roots.locate(path)
        with explained(path):
            size = self.cluster.stat(clean, follow=True)["size"]
            return {"digest": f"sha-256:{self.cluster.checksum(clean)}", "size": size}

    def usage(self, path: str) -> Usage:
        """What a file or a folder with all that is in it takes; what is on the disk is taken for what ``stat`` says."""
        found = self.stat(path, follow=True)
        size, count = found["size"], 1
        if found["type"] == "directory":
            for entry in self.listing(path, recursive=True):
                size, count = size + entry["size"], count + 1
        return Usage(size, size, count)

    # Changing

    def mkdir(self, path: str, *, parents: bool = False, exist_ok: bool = False, mode: int = 0o777) -> None:
        """Make a folder."""
        clean = self._new(path, exist_ok=exist_ok)
        if clean is None:
            return
        self.protection.check_path(clean, exists=False)
        with explained(path, repeatable=exist_ok):
            if parents and not exist_ok:
                self.cluster.mkdir(posixpath.dirname(clean), parents=True)
            try:
                self.cluster.mkdir(clean, parents=parents and exist_ok)
            except CallFailed as exc:
                if not (exist_ok and "File exists" in exc.message and self._type(clean) == "directory"):
                    raise
            else:
                if mode != 0o777:
                    self.cluster.chmod(clean, mode & 0o7777)

    def _new(self, path: str, *, exist_ok: bool) -> str | None:
        root, clean = self.roots.locate(path.rstrip("/"))
        if clean == root.path and exist_ok:
            self.roots.prepare()
            return None
        return self.roots.writable(clean)

    def rename(self, path: str, target: str) -> None:
        """Rename a file, link or folder, by a job of FirecREST's; something that is at ``target`` is not replaced.

        Somebody who puts something there at the same moment is not seen.
        """
        old, new = self.roots.writable(path), self.roots.writable(target)
        kind = self._named(path)["type"]
        if kind != "directory" and target.endswith("/"):
            raise FileError(f"{os.strerror(errno.ENOTDIR)}: {target}", errno="ENOTDIR", path=target)
        self._check_leaving(old, kind)
        self.protection.check_path(new, exists=False)
        self._require_nothing(new)
        self._by_job("mv", old, new, path)

    def symlink(self, path: str, target: str) -> None:
        """Make ``path`` a symbolic link to ``target``, which need not exist."""
        clean = self.roots.writable(path)
        self.protection.check_path(clean, exists=False)
        self._require_nothing(clean)
        with explained(path, repeatable=False):
            self.cluster.symlink(target, clean)

    def chmod(self, path: str, mode: int) -> None:
        """Set the permission bits of a file or folder, links followed."""
        clean = self.roots.writable(path)
        with explained(path):
            self.cluster.chmod(clean, mode & 0o7777)

    def remove(self, path: str, *, directory: bool = False, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file or link; ``directory``: an empty folder; ``recursive``: whatever is there with all that is in it.

        FirecREST only knows the last of these: the others are looked at before.
        """
        clean = self.roots.writable(path)
        try:
            kind = self._named(path)["type"]
            self._check_leaving(clean, kind)
            if kind == "directory":
                if not (directory or recursive):
                    raise FileError(f"{os.strerror(errno.EISDIR)}: {path}", errno="EISDIR", path=path)
                if directory and self.listing(clean):
                    raise FileError(f"{os.strerror(errno.ENOTEMPTY)}: {path}", errno="ENOTEMPTY", path=path)
            elif directory:
                raise FileError(f"{os.strerror(errno.ENOTDIR)}: {path}", errno="ENOTDIR", path=path)
            with explained(path):
                started = self.cluster.remove(clean)
                if started is not None:
                    self._wait(started)
        except FileError as exc:
            if not (missing_ok and exc.errno == "ENOENT"):
                raise

    def copy(
        self, path: str, target: str, *, dereference: bool = False, exact: bool = False, directory: bool = False
    ) -> None:
        """Copy a file, or a folder with all that is in it, by a job of FirecREST's; modes and times are kept."""
        _, source = self.roots.locate(path)
        found = self.stat(source, follow=True)
        is_link = exact and not dereference and self.stat(source)["type"] == "symlink"
        if is_link:
            self.symlink(target, str(self.stat(source)["target"]))
            return
        if exact and found["type"] == "directory":
            raise FileError(f"{os.strerror(errno.EISDIR)}: {path}", errno="EISDIR", path=path)
        if directory and found["type"] != "directory":
            raise FileError(f"{os.strerror(errno.ENOTDIR)}: {path}", errno="ENOTDIR", path=path)
        goal = self.roots.writable(target if exact else self.inside(target, posixpath.basename(source)))
        if goal == source or f"{goal}/".startswith(f"{source}/"):
            raise FileError(f"{path} cannot be copied to, or into, itself", errno="EINVAL", path=goal)
        there = self._type(goal)
        if found["type"] == "directory" and there is not None:
            raise FileError(f"{os.strerror(errno.EEXIST)}: {goal}", errno="EEXIST", path=goal)
        self.protection.check_path(goal, exists=there is not None)
        if found["type"] == "file" and found["size"] <= min(self.largest_down, self.largest_up):
            # Without a job: it takes a moment, and needs nobody's allocation.
            with explained(path):
                content = self.cluster.fetch(source)
            self.put(goal, content, mode=None if exact else stat.S_IMODE(found["mode"]))
            return
        # What is named is looked through if it is a link, as with `cp -H`.
        self._by_job(
            "cp", f"{source}/." if found["type"] == "directory" else source, goal, path, dereference=dereference
        )

    # Transfers

    def read(self, path: str) -> tuple[BinaryIO, os.stat_result]:
        """Fetch a file, links followed, and open it for reading; the caller closes it."""
        file = tempfile.TemporaryFile(dir=self.spool)  # noqa: SIM115 - the caller closes it.
        try:
            self.fetch(path, file)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file, os.fstat(file.fileno())

    def fetch(self, path: str, file: Any, *, large: bool = False) -> None:
        """Write the content of a file, links followed, to an open file.

        :param large: it is known to be larger than what FirecREST gives at once.
        """
        _, clean = self.roots.locate(path)
        with explained(path):
            self.fetch_staged(clean, file, large=large)

    def fetch_staged(self, path: str, file: Any, *, large: bool = False) -> None:
        """The same for any path on the cluster; raises what the calls raise."""
        try:
            if not large:
                file.write(self.cluster.fetch(path))
                file.flush()
                return
        except CallFailed as exc:
            # Of a file that is much too large FirecREST never reads the end, and takes that for a command that hangs.
            if (
                exc.status not in (408, 413)
                or self.cluster.stat(path, follow=True)["size"] <= self.cluster.largest_down
            ):
                raise
        started = self.cluster.stage_down(path)
        self._wait(started)
        digest = hashlib.sha256()

        def take(piece: bytes) -> None:
            digest.update(piece)
            file.write(piece)
            self.advance(len(piece))

        self.cluster.collect(started, take)
        file.flush()
        self._verify(path, digest.hexdigest())

    def write(
        self,
        path: str,
        read: Read,
        *,
        digest: str | None = None,
        mode: int | None = None,
        overwrite: bool = True,
        into: str | None = None,
        parents: bool = False,
    ) -> dict[str, Any]:
        """Write a whole file from a request's body.

        A body that differs from ``digest`` is not sent on. What is on the cluster is compared with what was sent.
        """
        clean = self.target(path, into, overwrite=overwrite, parents=parents)
        with tempfile.NamedTemporaryFile(dir=self.spool) as file:
            found, size = hashlib.sha256(), 0
            while chunk := read(bundle.CHUNK):
                found.update(chunk)
                file.write(chunk)
                size += len(chunk)
            if digest not in (None, f"sha-256:{found.hexdigest()}"):
                raise IntegrityError(f"{clean} arrived with a wrong digest: nothing was written; send it again")
            file.flush()
            if posixpath.basename(clean).startswith(GUARD_PREFIX) and not overwrite:
                self._take(clean, Path(file.name).read_bytes())
            else:
                self.put_file(clean, Path(file.name), size, found.hexdigest(), mode=mode)
        return {"path": clean, "size": size, "digest": f"sha-256:{found.hexdigest()}"}

    def target(self, path: str, into: str | None, *, overwrite: bool, parents: bool) -> str:
        """Where a file that is sent to ``path`` is to go, when everything that can be known beforehand allows it."""
        clean = self.roots.writable(self.inside(path, into) if into else path)
        guard = posixpath.basename(clean).startswith(GUARD_PREFIX)
        # Where a file may be replaced it need not be looked for: if there is none, none is protected.
        there = (overwrite and not guard) or self._type(clean) is not None
        if there and not overwrite and not guard:
            raise FileError(f"{os.strerror(errno.EEXIST)}: {clean}", errno="EEXIST", path=clean)
        self.protection.check_path(clean, exists=there)
        if parents:
            with explained(path):
                self.cluster.mkdir(posixpath.dirname(clean), parents=True)
        return clean

    def put_file(self, path: str, local: Path, size: int, digest: str, *, mode: int | None) -> None:
        """Send a file of the gateway's to the cluster, and compare what arrived."""
        if size <= self.largest_up:
            self.put(path, local.read_bytes(), mode=mode, digest=digest)
            return
        with explained(path):
            started = self.cluster.stage_up(str(local), size, path)
            self._wait(started)
            if not self.cluster.compares:
                self._verify(path, digest)
            if mode is not None:
                self.cluster.chmod(path, mode & 0o7777)

    def put(self, path: str, content: bytes, *, mode: int | None, digest: str | None = None) -> None:
        """Write a small file, and compare what arrived."""
        with explained(path):
            self.cluster.store(path, content)
            self.advance(len(content))
            if not self.cluster.compares:
                self._verify(path, digest or hashlib.sha256(content).hexdigest())
            if mode is not None:
                self.cluster.chmod(path, mode & 0o7777)

    def _verify(self, path: str, digest: str) -> None:
        if self.cluster.checksum(path) != digest:
            raise IntegrityError(f"{path} is not on the cluster as it was sent: send it again")

    def _take(self, path: str, content: bytes) -> None:
        """Make a guard that is not there: a link, because making one is what FirecREST can do at one blow.

        A shell that is to create the file finds its name taken, reads through the link who has it, and ends.
        """
        folder, name = posixpath.split(path)
        held = f"{GUARD_PREFIX}taken-{name.removeprefix(GUARD_PREFIX)}"
        with explained(path, repeatable=False):
            self.cluster.store(f"{folder}/{held}", content)
            self.cluster.symlink(held, path)

    # Shared

    @contextmanager
    def dropped(self, path: str) -> Iterator[None]:
        """Remove what is at ``path`` at the end, if that can be done."""
        try:
            yield
        finally:
            with suppress(CallFailed):
                self.cluster.remove(path)

    def inside(self, path: str, name: str) -> str:
        """``path/name`` where ``path`` is a folder, else ``path``."""
        return path_below(path, name) if self._type(path) == "directory" else path

    def _named(self, path: str) -> dict[str, Any]:
        """The attributes of a name, a link not followed; with a slash at the end there is a folder."""
        found = self.stat(path.rstrip("/"))
        if path.endswith("/") and found["type"] != "directory":
            raise FileError(f"{os.strerror(errno.ENOTDIR)}: {path}", errno="ENOTDIR", path=path)
        return found

    def _check_leaving(self, path: str, kind: str) -> None:
        if kind == "directory":
            self.protection.check_tree(path)
        else:
            self.protection.check_path(path, exists=True)

    def _require_nothing(self, path: str) -> None:
        try:
            self.stat(path)
        except FileError as exc:
            if exc.errno != "ENOENT":
                raise
        else:
            raise FileError(f"{os.strerror(errno.EEXIST)}: {path}", errno="EEXIST", path=path)

    def by_job(self, what: str, path: str, target: str, **options: object) -> None:
        """Have a job of FirecREST's do something, and wait for its end."""
        self._wait(self.cluster.start(what, path, target, **options))

    def pause(self, seconds: float) -> None:
        """Wait, and tell that something is going on."""
        self.advance(1)
        self._sleep(seconds)

    def follow(self, id: str, folder: str) -> None:
        """Wait for the end of a job that the gateway has submitted itself.

        :param folder: the job's, with what it writes to standard error in ``errors``.
        :raises JobFailed: with the end of that.
        :raises Unavailable: if it takes too long; it goes on.
        """
        self._until(lambda: self.cluster.ended(id, folder))

    def _by_job(self, what: str, path: str, target: str, named: str, **options: object) -> None:
        with explained(named, repeatable=False):
            self.by_job(what, path, target, **options)

    def _wait(self, job: Json) -> None:
        """Wait for a job of FirecREST's, and remove its logs.

        :raises Unavailable: if it takes too long; it goes on.
        """
        try:
            self._until(lambda: self.cluster.finished(job))
        except JobFailed:
            self.cluster.forget(job)
            raise
        self.cluster.forget(job)

    def _until(self, ended: Callable[[], bool]) -> None:
        until = time.monotonic() + _JOB_TIME
        pause = _POLL / 4
        while True:
            try:
                if ended():
                    return
            except JobFailed:
                raise
            except CallFailed:
                pass  # A question that was not answered says nothing about the job.
            self.advance(1)
            if time.monotonic() > until:
                raise Unavailable("a job of FirecREST's that moves files takes too long", retryable=False)
            self._sleep(pause)
            pause = min(pause * 2, _POLL)


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "other")


def _entry(line: Json, ahead: int) -> dict[str, Any]:
    """A line of ``ls`` as it goes over the wire."""
    mode = _LETTERS.get(str(line["type"]), 0) | _bits(str(line["permissions"]))
    moment = _wall(line) - ahead
    entry: dict[str, Any] = {
        "name": str(line["name"]),
        "type": _kind(mode),
        "mode": mode,
        "size": int(line["size"]),
        "mtime": float(moment),
        "atime": float(moment),
        "uid": _number(line["user"]),
        "gid": _number(line["group"]),
    }
    if entry["type"] == "symlink":
        entry["target"] = str(line.get("linkTarget") or "")
    return entry


def _wall(line: Json) -> int:
    moment = datetime.strptime(str(line["lastModified"]), "%Y-%m-%dT%H:%M:%S")
    return int(moment.replace(tzinfo=timezone.utc).timestamp())


def _bits(letters: str) -> int:
    """The permission bits of ``rwxr-sr-t``."""
    bits = 0
    for position, letter in enumerate(letters[:9]):
        bit = 1 << (8 - position)
        if letter in "rwxst":
            bits |= bit
        if letter in "sStT":
            bits |= (0o4000, 0o2000, 0o1000)[position // 3]
    return bits


def _number(text: object) -> int:
    return int(str(text)) if str(text).isdecimal() else -1
