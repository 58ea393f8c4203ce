"""Confinement: from a path that a caller names to a place below one of the caller's roots, and nowhere else.

A path is walked component by component, each opened relative to the descriptor of the folder before it and without
following links. A symbolic link is followed by this module, not by the kernel, so that a link that leads from one root into
another works and one that leads out of the roots does not; nothing that another process renames or replaces during the walk
can lead it elsewhere. What comes out is a :class:`Place`: an open folder and a name in it.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath

from aiida_marketplace_hpc.errors import FileError, Forbidden, InvalidRequest

PRIVATE = ".marketplace-hpc"
"""A folder of the gateway's own at the top of every writable root; callers neither see nor reach it."""
_MAX_LINKS = 40
_MAX_PATH = 4096
_MAX_NAME = 255
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True)
class Root:
    """A folder below which a caller may work.

    :param path: absolute and normalised; it is the path that callers see.
    """

    name: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class Place:
    """A name in an open folder below a root. The last component is never followed by whoever uses it.

    :param folder: descriptor of the folder, valid inside the ``with`` block that gave it.
    :param name: the last component, ``.`` for the root itself; nothing need be there.
    :param path: the absolute path as a caller would write it, links resolved.
    :param only_folder: the caller wrote a slash at the end: what is here, or comes here, is a folder and nothing else.
    :param links: the symbolic links that the last component led through, each by the real path of its folder and its name.
    """

    root: Root
    folder: int
    name: str
    path: str
    only_folder: bool = False
    links: tuple[tuple[str, str], ...] = ()

    def writable(self) -> Place:
        """Return itself.

        :raises Forbidden: below a read-only root, or for the root itself.
        """
        if self.root.read_only:
            raise Forbidden(f"{self.path} is below the read-only root {self.root.name} ({self.root.path})")
        if self.name == ".":
            raise Forbidden(f"{self.path} is a root itself and cannot be changed")
        return self

    def lstat(self) -> os.stat_result:
        """Attributes of what is there, of a link itself if it is one; raises :class:`OSError`."""
        return os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)


class Roots:
    """All roots of one caller."""

    def __init__(self, roots: Sequence[Root]) -> None:
        self._roots = tuple(roots)
        # A link may name a root by its real path, too.
        self._bases = [
            (root, _components(base)) for root in self._roots for base in {root.path, os.path.realpath(root.path)}
        ]

    def __iter__(self) -> Iterator[Root]:
        return iter(self._roots)

    def by_name(self, name: str) -> Root | None:
        """The root of that name."""
        return next((root for root in self._roots if root.name == name), None)

    def prepare(self) -> None:
        """Make the folders of writable roots that are missing; may be repeated.

        :raises FileError: if one cannot be made.
        """
        for root in self._roots:
            if not root.read_only:
                try:
                    os.makedirs(root.path, mode=0o700, exist_ok=True)
                except OSError as exc:
                    raise FileError.from_os_error(exc, root.path) from exc

    def free(self, root: Root) -> int | None:
        """Bytes that are free on a root's file system; ``None`` if that is not known."""
        try:
            found = os.statvfs(root.path)
        except OSError:
            return None
        return found.f_bavail * found.f_frsize

    @contextmanager
    def place(self, path: str, *, follow: bool = True, make_parents: bool = False) -> Iterator[Place]:
        """Find the place that an absolute path names.

        :param follow: whether a link in the last component is followed, too; it is if the path ends with a slash.
        :param make_parents: make missing folders on the way, but not those that only a link names.
        :raises Forbidden: if it is, or a link on the way leads, outside the roots.
        :raises FileError: for a missing folder on the way, a file in place of one, too many links, an over-long name.
        :raises InvalidRequest: for something that is no absolute path at all.
        """
        walk = _Walk(self, path, make_parents)
        try:
            yield walk.run(follow or path.endswith("/"))
        finally:
            walk.close()

    def resolve(self, path: str) -> str:
        """Resolve every link in an absolute path; what follows something that does not exist is left as it is written.

        :raises Forbidden: if it is, or a link on the way leads, outside the roots.
        :raises FileError: for too many links, an over-long name, a folder that must not be looked into.
        """
        walk = _Walk(self, path.rstrip("/"), False)
        try:
            resolved = walk.resolve()
        finally:
            walk.close()
        self.locate(resolved)
        return resolved

    def names_of(self, real: str, *, below: bool = False) -> set[str]:
        """The paths under which callers may know what has this real path on the gateway's machine; nothing is opened.

        They are more than one where a root is, or lies below, a link, or where roots overlap.

        :param below: with the paths of the roots that lie below it.
        """
        parts = _components(real)
        found = {real}
        for root, base in self._bases:
            if parts[: len(base)] == base:
                found.add(posixpath.join(root.path, *parts[len(base) :]))
            elif below and base[: len(parts)] == parts:
                found.add(root.path)
        return found

    def locate(self, path: str) -> tuple[Root, list[str]]:
        """The root that an absolute path lies below (the deepest), and the components under it; nothing is opened.

        :raises Forbidden: if it lies below none.
        """
        parts = _components(path)
        best: tuple[Root, list[str]] | None = None
        for root, base in self._bases:
            if parts[: len(base)] == base and (best is None or len(parts) - len(base) < len(best[1])):
                best = root, parts[len(base) :]
        if best is None:
            known = ", ".join(f"{root.name} ({root.path})" for root in self._roots)
            raise Forbidden(f"{path} lies outside the roots of this gateway: {known}")
        return best


def _components(path: str) -> list[str]:
    if not path.startswith("/") or "\0" in path:
        raise InvalidRequest(f"{path!r} is no absolute path")
    return [part for part in path.split("/") if part not in ("", ".")]


class _Walk:
    """One walk along a path; owns the descriptors that it opens."""

    def __init__(self, roots: Roots, path: str, make_parents: bool) -> None:
        self._roots = roots
        self._asked = path
        self._make_parents = make_parents
        self._links = 0
        self._only_folder = path.endswith("/")
        self._name = ""
        self._stack: list[tuple[int, str]] = []
        self._followed: list[tuple[str, str]] = []
        if len(os.fsencode(path)) > _MAX_PATH:
            raise FileError(f"the path is longer than {_MAX_PATH} bytes", errno="ENAMETOOLONG", path=path)
        self._root, self._todo = roots.locate(path)
        self._own = len(self._todo)
        """How many of the components at the end are the caller's words, not a link's."""

    def close(self) -> None:
        for descriptor, _ in self._stack:
            os.close(descriptor)
        self._stack.clear()

    def run(self, follow: bool) -> Place:
        self._enter(self._root)
        while self._todo:
            name = self._name = self._todo.pop(0)
            last = not self._todo
            if name == "..":
                if len(self._stack) == 1:
                    raise Forbidden(f"{self._asked} leads out of the root {self._root.name} ({self._root.path})")
                os.close(self._stack.pop()[0])
                continue
            if name == PRIVATE and len(self._stack) == 1:
                raise Forbidden(f"{self._asked} is the gateway's own")
            if len(os.fsencode(name)) > _MAX_NAME:
                raise FileError(
                    f"a name in {self._asked} is longer than 255 bytes", errno="ENAMETOOLONG", path=self._asked
                )
            if last and not follow:
                return self._place(self._stack[-1][0], name)
            kind, target = self._look(name, last)
            if kind is None:
                return self._place(self._stack[-1][0], name)
            if kind == "link":
                self._redirect(target)
            elif kind != "folder":
                if not last or self._only_folder:
                    raise self._error(errno.ENOTDIR)
                return self._place(self._stack[-1][0], name)
        if len(self._stack) == 1:
            return Place(self._root, self._stack[0][0], ".", self._root.path)
        name = self._stack[-1][1]
        return self._place(self._stack[-2][0], name, up=1)

    def resolve(self) -> str:
        try:
            return self.run(True).path
        except FileError as exc:
            if exc.errno not in ("ENOENT", "ENOTDIR") or not self._stack:
                raise
        names = [entry[1] for entry in self._stack[1:]]
        return posixpath.normpath(posixpath.join(self._root.path, *names, self._name, *self._todo))

    def _look(self, name: str, last: bool) -> tuple[str | None, str]:
        """What ``name`` in the current folder is; a folder is entered."""
        try:
            descriptor = self._open(name, last)
        except FileNotFoundError:
            if last:
                return None, ""
            raise self._error(errno.ENOENT) from None
        except OSError as exc:
            raise self._error(exc.errno or errno.EIO) from exc
        try:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISDIR(mode):
                self._stack.append((descriptor, name))
                descriptor = -1
                return "folder", ""
            if stat.S_ISLNK(mode):
                return "link", os.readlink("", dir_fd=descriptor)
            return "file", ""
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _open(self, name: str, last: bool) -> int:
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        folder = self._stack[-1][0]
        try:
            return os.open(name, flags, dir_fd=folder)
        except FileNotFoundError:
            if last or not self._make_parents:
                raise
        if len(self._todo) >= self._own:
            raise FileExistsError(errno.EEXIST, "a link that leads nowhere is in the way")
        if self._root.read_only:
            raise Forbidden(f"{self._asked} is below the read-only root {self._root.name} ({self._root.path})")
        if name.startswith(f"{PRIVATE}-"):  # It may be the name of a job's guard.
            raise Forbidden(f"{name} in {self._asked} is a name for the gateway's own files: no such folder is made")
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=folder)
        return os.open(name, flags, dir_fd=folder)

    def _redirect(self, target: str) -> None:
        self._links += 1
        self._own = min(self._own, len(self._todo))
        if not self._todo:
            self._followed.append((os.readlink(f"/proc/self/fd/{self._stack[-1][0]}"), self._name))
        if not self._todo and target.endswith("/"):  # The words of a link count as the caller's do.
            self._only_folder = True
        if self._links > _MAX_LINKS:
            raise self._error(errno.ELOOP)
        if target.startswith("/"):
            try:
                self._root, parts = self._roots.locate(target)
            except Forbidden:
                raise Forbidden(f"a symbolic link on the way to {self._asked} leads out of the roots") from None
            self._todo = parts + self._todo
            self._enter(self._root)
        else:
            self._todo = [part for part in target.split("/") if part not in ("", ".")] + self._todo

    def _enter(self, root: Root) -> None:
        self.close()
        try:
            self._stack = [(os.open(root.path, _FOLDER), "")]
        except OSError as exc:
            raise self._error(exc.errno or errno.EIO) from exc

    def _place(self, folder: int, name: str, up: int = 0) -> Place:
        names = [entry[1] for entry in self._stack[1 : len(self._stack) - up]]
        path = str(PurePosixPath(self._root.path, *names, name))
        return Place(self._root, folder, name, path, self._only_folder, tuple(self._followed))

    def _error(self, number: int) -> FileError:
        return FileError.from_os_error(OSError(number, ""), self._asked)
