"""The file operations of a gateway that shares a file system with its cluster.

Everything works on a :class:`~aiida_marketplace_hpc.gateway.roots.Place`, relative to open folders, without a shell.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, BinaryIO

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.errors import FileError, Forbidden, IntegrityError, InvalidRequest
from aiida_marketplace_hpc.gateway.descriptors import (
    LIST,
    MAX_DEPTH,
    Advance,
    Identity,
    identity_of,
    ignore_progress,
    open_regular,
    told,
)
from aiida_marketplace_hpc.gateway.draft import Draft, opened
from aiida_marketplace_hpc.gateway.globbing import Globbing
from aiida_marketplace_hpc.gateway.moving import move, rename_new
from aiida_marketplace_hpc.gateway.protection import Protection
from aiida_marketplace_hpc.gateway.roots import PRIVATE, Place, Roots
from aiida_marketplace_hpc.gateway.storage import Read
from aiida_marketplace_hpc.gateway.trees import Usage, copy_content, measure, remove_tree

_PIECE = 1024 * 1024
UNPROTECTED = Protection()


class Files(Globbing):
    """What one caller can do with files.

    Paths are absolute. Methods raise :class:`FileError` with the POSIX error for what the file system refuses and EBUSY for
    what belongs to a live job, :class:`Forbidden` for what lies outside the roots or below a read-only one.

    :param advance: is told about the progress of what takes long.
    :param protection: refuses to take away or replace what belongs to a live job.
    """

    def __init__(self, roots: Roots, advance: Advance = ignore_progress, protection: Protection = UNPROTECTED) -> None:
        self.roots = roots
        self.advance = advance
        self.protection = protection

    @property
    def largest_whole(self) -> None:
        """Bytes of a file up to which it should come in one piece: there is no such limit here."""
        return None

    def watched(self, advance: Advance) -> Files:
        """The same, telling its progress."""
        return Files(self.roots, advance, self.protection)

    def forced(self) -> Files:
        """The same for somebody who means it, also where a live job of theirs is concerned."""
        return Files(self.roots, self.advance, self.protection.forced())

    # Looking

    def stat(self, path: str, *, follow: bool = False) -> dict[str, Any]:
        """Attributes of a path; of a link itself unless ``follow``."""
        with self.roots.place(path, follow=follow) as place, told(path):
            return {"path": place.path, **_attributes(place.folder, place.name)}

    def realpath(self, path: str) -> str:
        """The path with every link resolved; what does not exist, or cannot, is left as it is written."""
        rest: list[str] = []
        while True:
            try:
                return posixpath.normpath(posixpath.join(self.roots.resolve(path), *reversed(rest)))
            except FileError as exc:
                if exc.errno not in ("ELOOP", "EACCES") or not self.roots.locate(path)[1]:
                    raise
            path, name = posixpath.split(path.rstrip("/"))
            rest.append(name)

    def listing(
        self, path: str, *, recursive: bool = False, pattern: str | None = None, follow: bool = False
    ) -> list[dict[str, Any]]:
        """The entries of a folder, hidden ones too, sorted by name; ``recursive``: of all folders below, links not followed.

        :param pattern: a shell pattern for the name.
        :param follow: say of each link as ``leads_to`` the type of what it leads to, or ``None``.
        """
        entries: list[dict[str, Any]] = []
        with self._folder(path) as (place, folder), told(path):
            self._walk(folder, "", recursive, entries, place.name == ".", 0)
        if pattern is not None:
            entries = [entry for entry in entries if fnmatch.fnmatchcase(entry["name"].rpartition("/")[2], pattern)]
        if follow:
            self._look_through(entries, lambda entry: path_below(path, entry["name"]))
        return entries

    def _walk(
        self, folder: int, prefix: str, recursive: bool, entries: list[dict[str, Any]], top: bool, depth: int
    ) -> None:
        if depth > MAX_DEPTH:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        for name in sorted(os.listdir(folder)):
            if top and name == PRIVATE:
                continue
            try:
                attributes = _attributes(folder, name)
            except FileNotFoundError:  # Removed while we look.
                continue
            entries.append({"name": prefix + name, **attributes})
            self.advance(1)
            if recursive and attributes["type"] == "directory":
                with opened(name, LIST, folder) as below:
                    self._walk(below, f"{prefix}{name}/", recursive, entries, False, depth + 1)

    def names(self, path: str, prefix: str) -> list[str]:
        """The names in a folder that begin with ``prefix``, sorted."""
        with self._folder(path) as (_, folder), told(path):
            return sorted(name for name in os.listdir(folder) if name.startswith(prefix))

    def _allowed(self, path: str) -> None:
        self.roots.locate(path)

    def _matching(self, base: str, pattern: str) -> list[str]:
        try:
            with self._folder(base) as (place, folder):
                names = os.listdir(folder)
                private = place.name == "."
        except (FileError, Forbidden):  # As with a shell: what cannot be looked at does not match.
            return []
        self.advance(1)
        if not pattern.startswith("."):
            names = [name for name in names if not name.startswith(".")]
        return [name for name in names if fnmatch.fnmatchcase(name, pattern) and not (private and name == PRIVATE)]

    def _type(self, path: str) -> str | None:
        try:
            return str(self.stat(path, follow=True)["type"])
        except (FileError, Forbidden):
            return None

    def checksum(self, path: str) -> dict[str, Any]:
        """The digest and size of a file, links followed."""
        with self.roots.place(path) as place, told(path), open_regular(place) as content:
            digest, size = hashlib.sha256(), 0
            while chunk := content.read(_PIECE):
                digest.update(chunk)
                size += len(chunk)
                self.advance(len(chunk))
            return {"digest": f"sha-256:{digest.hexdigest()}", "size": size}

    def usage(self, path: str) -> Usage:
        """What a file or a folder with all that is in it takes, as ``du`` counts; a link that is itself named is followed."""
        with self.roots.place(path) as place, told(path):
            return measure(place.folder, place.name, self.advance)

    # Changing

    def mkdir(self, path: str, *, parents: bool = False, exist_ok: bool = False, mode: int = 0o777) -> None:
        """Make a folder.

        :param parents: make the folders on the way, too.
        :param exist_ok: accept a folder that is there already.
        """
        with self.roots.place(path.rstrip("/"), follow=False, make_parents=parents) as place, told(path):
            try:
                place.lstat()
            except FileNotFoundError:
                self.protection.check_target(place, exists=False)
                with suppress(FileExistsError):  # Somebody was faster.
                    os.mkdir(place.writable().name, mode, dir_fd=place.folder)
                    return
            if not (exist_ok and self._type(path) == "directory"):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def rename(self, path: str, target: str) -> None:
        """Rename a file, link or folder, or move it to another file system; something at ``target`` is never replaced."""
        with self._named(path) as old, self.roots.place(target.rstrip("/"), follow=False) as new, told(path):
            if not stat.S_ISDIR(old.writable().lstat().st_mode) and target.endswith("/"):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            new.writable()
            self._check_leaving(old)
            self.protection.check_target(new, exists=False)
            try:
                rename_new(old, new)
            except FileExistsError as exc:
                raise FileError.from_os_error(exc, target) from exc
            except OSError as exc:
                if exc.errno != errno.EXDEV:
                    raise
                with suppress(FileNotFoundError):
                    new.lstat()
                    raise FileError.from_os_error(OSError(errno.EEXIST, ""), target) from exc
                move(old, new, self.advance, lambda: self._check_leaving(old))

    def symlink(self, path: str, target: str) -> None:
        """Make ``path`` a symbolic link to ``target``, which need not exist and is not followed out of the roots."""
        with self.roots.place(path, follow=False) as place, told(path):
            self.protection.check_target(place.writable(), exists=False)
            os.symlink(target, place.name, dir_fd=place.folder)

    def chmod(self, path: str, mode: int) -> None:
        """Set the permission bits of a file or folder, links followed."""
        with self.roots.place(path) as place, told(path):
            descriptor = os.open(place.writable().name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place.folder)
            try:
                if stat.S_ISLNK(os.fstat(descriptor).st_mode):
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                os.chmod(f"/proc/self/fd/{descriptor}", mode & 0o7777)
            finally:
                os.close(descriptor)

    def remove(self, path: str, *, directory: bool = False, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file or link; ``directory``: an empty folder; ``recursive``: whatever is there with all that is in it."""
        try:
            with self._named(path) as place, told(path):
                mode = place.writable().lstat().st_mode
                self._check_leaving(place)
                if directory:
                    os.rmdir(place.name, dir_fd=place.folder)
                elif recursive and stat.S_ISDIR(mode):
                    remove_tree(place.folder, place.name, self.advance)
                else:
                    os.unlink(place.name, dir_fd=place.folder)
        except FileError as exc:
            if not (missing_ok and exc.errno == "ENOENT"):
                raise

    def copy(
        self, path: str, target: str, *, dereference: bool = False, exact: bool = False, directory: bool = False
    ) -> None:
        """Copy a file, or a folder with all that is in it, keeping permission bits.

        Into ``target`` where that is a folder, else to that name. A link *inside* a copied folder stays a link unless
        ``dereference``; a link that is itself named is looked through.

        :param exact: copy the content of a file to exactly this name, without its permission bits; a link stays a link
            unless ``dereference``.
        :param directory: refuse to copy anything but a folder.
        """
        if exact:
            self._copy_exactly(path, target, dereference)
            return
        with self._existing(path) as source, told(path):
            mode = source.lstat().st_mode
            if directory and not stat.S_ISDIR(mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not directory and self.realpath(target) == source.path:
                raise InvalidRequest(f"{path} cannot be copied to itself")
            is_folder = stat.S_ISDIR(mode)
            inside = self.inside(target, posixpath.basename(path))
            # A file goes where a link leads, a folder does not take a link's place.
            with (
                self.roots.place(inside.rstrip("/") if is_folder else inside, follow=not is_folder) as goal,
                told(target),
            ):
                goal.writable()
                if goal.path == source.path:
                    raise FileError(f"File exists: {goal.path} is what is copied", errno="EEXIST", path=goal.path)
                if is_folder:
                    if f"{goal.path}/".startswith(f"{source.path}/"):
                        raise FileError(f"{path} cannot be copied into itself", errno="EINVAL", path=goal.path)
                    self.protection.check_target(goal, exists=False)
                    self._copy_tree(source, goal, dereference, ())
                else:
                    self._copy_file(source, goal)

    def _copy_exactly(self, path: str, target: str, dereference: bool) -> None:
        with self._existing(path) as real, told(path):
            with self.roots.place(path, follow=False) as named:
                if not dereference and stat.S_ISLNK(named.lstat().st_mode):
                    link = os.readlink(named.name, dir_fd=named.folder)
                    self.symlink(target, link)
                    return
            if stat.S_ISDIR(real.lstat().st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            with self.roots.place(target) as goal, told(target):
                if goal.path == real.path:
                    raise FileError(f"File exists: {goal.path} is what is copied", errno="EEXIST", path=goal.path)
                self._copy_file(real, goal, keep_mode=False)

    def _copy_tree(self, source: Place, goal: Place, dereference: bool, above: tuple[Identity, ...]) -> None:
        """Copy a folder.

        :param above: the folders, on both sides, that this one is inside of; a link back to one would never end.
        """
        if len(above) > 2 * MAX_DEPTH or identity_of(source.lstat()) in above:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        os.mkdir(goal.name, 0o700, dir_fd=goal.folder)
        with opened(source.name, LIST, source.folder) as folder, opened(goal.name, LIST, goal.folder) as made:
            above = (*above, identity_of(os.fstat(folder)), identity_of(os.fstat(made)))
            for name in sorted(os.listdir(folder)):
                if source.name == "." and name == PRIVATE:
                    continue
                below = Place(source.root, folder, name, f"{source.path}/{name}")
                there = Place(goal.root, made, name, f"{goal.path}/{name}")
                kind = below.lstat().st_mode
                self.advance(1)
                if stat.S_ISLNK(kind) and dereference:
                    with self.roots.place(below.path) as real, told(below.path):
                        if stat.S_ISDIR(real.lstat().st_mode):
                            self._copy_tree(real, there, dereference, above)
                        else:
                            self._copy_file(real, there)
                elif stat.S_ISLNK(kind):
                    os.symlink(os.readlink(name, dir_fd=folder), name, dir_fd=made)
                elif stat.S_ISDIR(kind):
                    self._copy_tree(below, there, dereference, above)
                else:
                    self._copy_file(below, there)
            os.fchmod(made, stat.S_IMODE(os.fstat(folder).st_mode))

    def _copy_file(self, source: Place, goal: Place, *, keep_mode: bool = True) -> None:
        with _reading(source) as content, self.draft(goal) as draft:
            copy_content(content.fileno(), draft.fileno(), self.advance)
            draft.commit(stat.S_IMODE(os.fstat(content.fileno()).st_mode) if keep_mode else None)

    # Transfers

    def read(self, path: str) -> tuple[BinaryIO, os.stat_result]:
        """Open a file for reading, links followed; the caller closes it."""
        with self.roots.place(path) as place, told(path):
            content = open_regular(place)
            return content, os.fstat(content.fileno())

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

        :param digest: what the body must have; a body that differs leaves everything as it was.
        :param mode: permission bits; without it a replaced file keeps its own and a new one gets the default.
        :param into: the name to use should ``path`` be a folder.
        :param parents: make missing folders on the way.
        :raises IntegrityError: if the body does not have ``digest``, or broke off.
        """
        target = self.inside(path, into) if into else path
        with (
            self.roots.place(target, make_parents=parents) as place,
            told(target),
            self.draft(place, overwrite) as draft,
        ):
            while chunk := read(bundle.CHUNK):
                draft.write(chunk)
            if digest is not None and digest != draft.digest:
                raise IntegrityError(f"{target} arrived with a wrong digest: nothing was written; send it again")
            draft.commit(mode)
            return {"path": place.path, "size": draft.size, "digest": draft.digest}

    # Shared

    def draft(self, place: Place, overwrite: bool = True) -> Draft:
        """A file that is to get the name of a place; see :class:`Draft`.

        :raises Forbidden: if nothing may be written there.
        """
        return Draft(place.writable(), self.protection, overwrite)

    def _check_leaving(self, place: Place) -> None:
        """Make sure that what is there may be taken away or get another name."""
        if stat.S_ISDIR(place.lstat().st_mode):
            self.protection.check_folder(place.folder, place.name)
        else:
            self.protection.check_target(place, exists=True)

    @contextmanager
    def _named(self, path: str) -> Iterator[Place]:
        """The place of a name, a link not followed; with a slash at the end there is a folder."""
        with self.roots.place(path.rstrip("/"), follow=False) as place, told(path):
            if path.endswith("/") and not stat.S_ISDIR(place.lstat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            yield place

    @contextmanager
    def _existing(self, path: str) -> Iterator[Place]:
        """The place of something that is there, links followed; whatever keeps it from being found, it is not there."""
        with ExitStack() as stack:
            try:
                place = stack.enter_context(self.roots.place(path))
                place.lstat()
            except (FileError, OSError) as exc:
                raise FileError(f"{os.strerror(errno.ENOENT)}: {path}", errno="ENOENT", path=path) from exc
            yield place

    def inside(self, path: str, name: str) -> str:
        """``path/name`` where ``path`` is a folder, else ``path``."""
        try:
            with self.roots.place(path) as place:
                is_folder = stat.S_ISDIR(place.lstat().st_mode)
        except (OSError, FileError):  # Whoever uses the path says what is wrong with it.
            is_folder = False
        return path_below(path, name) if is_folder else path

    @contextmanager
    def _folder(self, path: str) -> Iterator[tuple[Place, int]]:
        with self.roots.place(path) as place, told(path), opened(place.name, LIST, place.folder) as folder:
            yield place, folder


def path_below(path: str, relative: str) -> str:
    """``path/relative``; whoever sends names must not leave ``path`` with them."""
    if relative == "":
        return path
    parts = relative.split("/")
    if relative.startswith("/") or ".." in parts or "\0" in relative:
        raise InvalidRequest(f"{relative!r} is not a path below a folder")
    return f"{path.rstrip('/')}/{relative}"


def _attributes(folder: int, name: str) -> dict[str, Any]:
    """A path's attributes as they go over the wire."""
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
    attributes: dict[str, Any] = {
        "type": kinds.get(stat.S_IFMT(found.st_mode), "other"),
        "mode": found.st_mode,
        "size": found.st_size,
        "mtime": found.st_mtime,
        "atime": found.st_atime,
        "uid": found.st_uid,
        "gid": found.st_gid,
    }
    if attributes["type"] == "symlink":
        attributes["target"] = os.readlink(name, dir_fd=folder)
    return attributes


@contextmanager
def _reading(place: Place) -> Iterator[BinaryIO]:
    with open_regular(place) as content:
        yield content
