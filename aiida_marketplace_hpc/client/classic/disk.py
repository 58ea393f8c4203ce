"""The cluster's disk for AiiDA, on a classic gateway: most of what is done to it is deferred into the job script.

Results and exception types are those of :class:`~aiida_marketplace_hpc.client.files.RemoteDisk`, as far as there can be any.
What cannot be done raises :class:`~aiida_marketplace_hpc.errors.NotSupported` and says why.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import posixpath
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiida_marketplace_hpc.client.classic.gateway import ClassicGateway
from aiida_marketplace_hpc.client.classic.journal import Folder, FolderState, Node
from aiida_marketplace_hpc.client.classic.names import (
    JOB_SCRIPT,
    RESERVED,
    can_be_asked_for,
    is_ours,
    is_plain,
    working_directory,
)
from aiida_marketplace_hpc.client.classic.tree import MAGIC, Entry, InJob, Inline, Pieces, Tree
from aiida_marketplace_hpc.client.classic.view import Place, VirtualDisk
from aiida_marketplace_hpc.client.files import AnyPath, RemoteDisk, file_attribute, given, local_goal, no_magic, posix
from aiida_marketplace_hpc.client.folder import walk
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import IntegrityError, NotSupported, ServerFault

SMALL = 256 * 1024
"""Bytes up to which a file of a working directory waits in the journal, to go with others in one request."""
SMALL_TOTAL = 16 * 1024 * 1024
"""Bytes of such files of one working directory, which are in memory together when it is submitted."""


class ClassicDisk(RemoteDisk):
    """What AiiDA does with a remote disk, where there are only nine capabilities.

    :param gateway: may be shared between threads.
    :param classic: the same gateway as a classic one.
    """

    def __init__(self, gateway: HpcGateway, classic: ClassicGateway) -> None:
        super().__init__(gateway)
        self._classic = classic
        self._view = VirtualDisk(classic)

    # Looking

    @posix
    def whoami(self) -> str:
        """The name of the caller's home on the cluster: what ``{username}`` in a computer's work directory stands for."""
        return self._classic.account().name

    @posix
    def _type(self, path: AnyPath) -> str | None:
        if not str(path):
            return None
        entry = self._view.find(self._absolute(path))
        return None if entry is None or entry.kind == "symlink" else entry.kind

    @posix
    def get_attribute(self, path: AnyPath) -> Any:
        """The attributes of a path, of a link itself, as AiiDA's ``FileAttribute``."""
        return _attribute(self._entry(self._absolute(path)))

    @posix
    def get_mode(self, path: AnyPath) -> int:
        """The permission bits of a path."""
        return self._entry(self._absolute(path)).permissions

    def _entry(self, path: str) -> Entry:
        entry = self._view.find(path, follow=False)
        if entry is None:
            raise _missing(path)
        return entry

    def _folder_entries(self, path: str) -> dict[str, Entry]:
        entry = self._view.find(path)
        if entry is None:
            raise _missing(path)
        if entry.kind != "directory":
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        place = self._view.place(path)
        return place.tree.children(place.path)

    @posix
    def listdir(self, path: AnyPath = ".", pattern: str | None = None) -> list[str]:
        """The names in a folder; with ``pattern``, those that match, relative to the folder."""
        base = self._absolute(path)
        if pattern:
            return [found[len(base) + 1 :] for found in self.glob(f"{glob.escape(base)}/{pattern}")]
        return list(self._folder_entries(base))

    @posix
    def listdir_withattributes(self, path: AnyPath = ".", pattern: str | None = None) -> list[dict[str, Any]]:
        """The entries of a folder, each with ``name``, ``attributes`` and ``isdir`` (links to folders are folders)."""
        base = self._absolute(path)
        if pattern:
            named = {name: self._entry(f"{base}/{name}") for name in self.listdir(base, pattern)}
        else:
            named = self._folder_entries(base)
        return [
            {"name": name, "attributes": _attribute(entry), "isdir": "directory" in (entry.kind, entry.leads_to)}
            for name, entry in named.items()
        ]

    @posix
    def glob(self, pathname: AnyPath) -> list[str]:
        """The paths that match a shell pattern; none is no error."""
        pattern = self._absolute(pathname)
        try:
            place = self._view.place(pattern)
        except FileNotFoundError:
            return []
        return [posixpath.join(place.base, found) for found in place.tree.glob(place.path)]

    @posix
    def normalize(self, path: AnyPath = ".") -> str:
        """The path with ``.`` and ``..`` resolved."""
        return self._absolute(path)

    # Changing

    @posix
    def mkdir(self, path: AnyPath, ignore_existing: bool = False) -> None:
        """Make one folder."""
        self._make(self._absolute(path), ignore_existing, parents=False)

    @posix
    def makedirs(self, path: AnyPath, ignore_existing: bool = False) -> None:
        """Make a folder and those on the way."""
        self._make(self._absolute(path), ignore_existing, parents=True)

    def _make(self, path: str, exist_ok: bool, *, parents: bool) -> None:
        entry = self._view.find(path)
        if entry is not None:
            if exist_ok and entry.kind == "directory":
                return
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        above = posixpath.dirname(path)
        if parents:
            self._make(above, True, parents=True)
        else:
            self._require_folder(above)
        split = working_directory(path)
        if split is not None and not split[1]:
            # Two that make it at once: one of them has.
            if not self._classic.journal.add_folder(path) and not exist_ok:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            return
        self._changeable(path)
        self._classic.journal.put(Node(path, "directory", mtime=time.time()))

    @posix
    def rmdir(self, path: AnyPath) -> None:
        """Remove an empty folder."""
        place = self._absolute(path)
        if self._folder_entries(place):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), place)
        self._remove(place)

    @posix
    def rmtree(self, path: AnyPath) -> None:
        """Remove a folder with all that is in it, or a file; nothing there is no error."""
        place = self._absolute(path)
        if working_directory(place) is None:
            self._view.check(place)
            for folder in self._classic.journal.folders(place):
                self._remove(folder.path)
            if self._view.find(place, follow=False) is None:
                return
        elif self._view.find(place, follow=False) is None:
            return
        self._remove(place)

    @posix
    def remove(self, path: AnyPath) -> None:
        """Remove a file or link."""
        place = self._absolute(path)
        if self._entry(place).kind == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), place)
        self._remove(place)

    def _remove(self, path: str) -> None:
        journal = self._classic.journal
        folder = self._view.folder(path)
        if folder is None or not folder.is_launched:
            self._require_own(path)
            spent = {
                piece
                for node in journal.nodes(path)
                if isinstance(node.content, Pieces)
                for piece in node.content.pieces
            }
            if folder is not None and folder.path == path:
                journal.remove_folder(path)
            else:
                journal.remove(path)
            for piece in spent:
                if folder is None and not journal.is_used(piece):
                    journal.forget_piece(piece)
                    self._classic.delete(piece.jobid, f"{RESERVED}piece-{piece.digest}")
            return
        place = self._view.place(path)
        current = place.folder
        if current is None or current.state is not FolderState.ENDED:
            raise OSError(errno.EBUSY, "its job was launched and has not ended", path)
        if not place.path:
            self._empty(current, place.tree)
            journal.remove_folder(path)
            return
        if not can_be_asked_for(place.path):
            raise NotSupported(f"{path} has a name that the gateway refuses: remove the folder that it lies in")
        self._classic.delete(current.jobid, place.path)
        journal.change_folder(current.path, removed=(*current.removed, place.path))

    def _require_own(self, path: str) -> None:
        """Make sure that something was made here, and does not just come with a folder that the job copies.

        :raises NotSupported: it does.
        """
        journal = self._classic.journal
        split = working_directory(path)
        if split and split[1] and journal.node(path) is None and not journal.is_above_something(path):
            raise NotSupported(f"{path} comes with a folder that the job copies, and cannot be changed before")

    def _empty(self, folder: Folder, tree: Tree) -> None:
        """Delete what is in the real folder of a job that has ended. May be repeated."""
        # First what the job has left: with a file of an odd name in it, some servers do not even list a folder.
        names = {path for path in tree if "/" not in path}
        left = set()
        for _ in range(2):
            for name in sorted(filter(can_be_asked_for, names)):
                # What is gone is refused like what cannot be removed; of hidden ones nothing is ever listed.
                with suppress(ServerFault):
                    self._classic.delete(folder.jobid, name)
            names = left = self._listed(folder.jobid)
        if left:
            raise NotSupported(
                f"{', '.join(sorted(map(repr, left)))} of {folder.path} could not be removed: the gateway refuses the names, "
                f"or the cluster does not answer. They are in the folder of the gateway's job {folder.jobid}"
            )

    def _listed(self, jobid: str) -> set[str]:
        try:
            return {str(file["name"]) for file in self._classic.look(jobid).files}
        except ServerFault:
            return set()  # Some servers cannot list a folder with a file of an odd name.

    @posix
    def rename(self, oldpath: AnyPath, newpath: AnyPath) -> None:
        """Rename a file or folder before its job is launched; something at ``newpath`` is an :class:`OSError`."""
        given("oldpath", oldpath)
        given("newpath", newpath)
        old, new = self._absolute(oldpath), self._absolute(newpath)
        self._entry(old)
        if self._view.find(new, follow=False) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        self._require_folder(posixpath.dirname(new))
        for path in (old, new):
            split = working_directory(path)
            if split is not None and not split[1]:
                raise NotSupported("a working directory cannot be renamed: the gateway's job belongs to its path")
            self._changeable(path)
        self._require_own(old)
        self._carried(old, new)
        self._classic.journal.move(old, new)

    @posix
    def symlink(self, remotesource: AnyPath, remotedestination: AnyPath) -> None:
        """Make links: to ``remotesource``, or inside ``remotedestination`` to each path that matches it."""
        source = os.path.normpath(str(remotesource))
        goal = self._absolute(remotedestination)
        if not MAGIC.search(source):
            self._link(source, goal)
            return
        no_magic(goal)
        if working_directory(source) is None:
            self._changeable(goal)
            self._put_pattern("links", source, goal)
            return
        for found in self.glob(source):
            self._link(found, posixpath.join(goal, posixpath.basename(found)))

    def _link(self, source: str, goal: str) -> None:
        if self._view.find(goal, follow=False) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), goal)
        self._require_folder(posixpath.dirname(goal))
        self._changeable(goal)
        origin, real = "", source
        split = working_directory(source)
        if split is not None:
            origin = source
            folder = self._view.folder(source)
            target = working_directory(goal)
            if folder is not None and not (target is not None and target[0] == folder.path):
                if not folder.is_launched:
                    raise NotSupported(
                        f"{source} is not on the cluster before its job has started, and a link cannot lead there: copy it"
                    )
                real = posixpath.join(self._view.real(folder), split[1]).rstrip("/")
        self._classic.journal.put(Node(goal, "symlink", mtime=time.time(), source=real, origin=origin))

    @posix
    def chmod(self, path: AnyPath, mode: int) -> None:
        """Set the permission bits, before the job is launched."""
        if not str(path):
            raise OSError(errno.ENOENT, "no path was given")
        place = self._absolute(path)
        self._entry(place)
        self._changeable(place)
        if self._classic.journal.node(place) is None:
            split = working_directory(place)
            if split is None or not split[1]:
                return  # A folder that is there only here.
            raise NotSupported(f"{place} is copied by the job itself, and its mode cannot be set before")
        self._classic.journal.set_mode(place, mode)

    @posix
    def copy(
        self, remotesource: AnyPath, remotedestination: AnyPath, dereference: bool = False, recursive: bool = True
    ) -> None:
        """Have the job copy a file or folder, or everything that matches a pattern, when it starts.

        :param recursive: has no effect, as with aiida-core's local transport.
        """
        given("remotesource", remotesource)
        given("remotedestination", remotedestination)
        source, goal = self._absolute(remotesource), self._absolute(remotedestination)
        if not MAGIC.search(source):
            self._copy(source, self._inside(source, goal), dereference)
            return
        no_magic(goal)
        if working_directory(source) is None:
            self._deferred(goal)
            self._require_folder(goal)
            self._put_pattern("copies", source, goal, dereference)
            return
        found = self.glob(source)
        if len(found) > 1 and not self.isdir(goal):
            raise OSError(errno.ENOTDIR, "several paths cannot be copied to the name of one", goal)
        for path in found:
            self._copy(path, self._inside(path, goal), dereference)

    @posix
    def copyfile(self, remotesource: AnyPath, remotedestination: AnyPath, dereference: bool = False) -> None:
        """Have the job copy a file to exactly this name when it starts."""
        given("remotesource", remotesource)
        given("remotedestination", remotedestination)
        self._copy(self._absolute(remotesource), self._absolute(remotedestination), dereference)

    @posix
    def copytree(self, remotesource: AnyPath, remotedestination: AnyPath, dereference: bool = False) -> None:
        """Have the job copy a folder when it starts: to this name, or inside it where it is a folder already."""
        given("remotesource", remotesource)
        given("remotedestination", remotedestination)
        source, goal = self._absolute(remotesource), self._absolute(remotedestination)
        if self._is_known(source) and not self.isdir(source):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), source)
        self._copy(source, self._inside(source, goal), dereference)

    def _inside(self, source: str, goal: str) -> str:
        entry = self._view.find(goal)
        return posixpath.join(goal, posixpath.basename(source)) if entry and entry.kind == "directory" else goal

    def _is_known(self, path: str) -> bool:
        """Whether what is at a path is known here; other paths may be on the cluster, where only jobs see them."""
        home = self._classic.account().home
        if working_directory(path) is not None:
            return True
        return (path == home or path.startswith(f"{home}/")) and self._view.find(path) is not None

    def _put_pattern(self, kind: str, source: str, folder: str, follow: bool = False) -> None:
        """Have the job find what matches a pattern on the cluster."""
        name = f"\0{hashlib.sha256(source.encode('utf-8', 'surrogateescape')).hexdigest()}"
        self._classic.journal.put(Node(f"{folder}/{name}", kind, mtime=time.time(), source=source, follow=follow))

    def _copy(self, source: str, goal: str, dereference: bool) -> None:
        self._require_folder(posixpath.dirname(goal))
        journal = self._classic.journal
        if not self._is_known(source):
            # Something on the cluster that nobody can see from here.
            self._deferred(goal)
            journal.put(Node(goal, "copy", mtime=time.time(), source=source, follow=dereference))
            return
        entry = self._view.find(source, follow=dereference)
        if entry is None:
            raise _missing(source)
        folder = self._view.folder(source)
        if folder is not None and folder.is_launched:
            self._deferred(goal)
            split = working_directory(source)
            real = posixpath.join(self._view.real(folder), split[1] if split else "").rstrip("/")
            journal.put(
                Node(goal, "copy", mtime=time.time(), source=real, origin=source, follow=dereference),
            )
            return
        self._changeable(goal)
        self._carried(source, goal)
        if folder is not None and folder.path == source:
            journal.put(Node(goal, "directory", mtime=time.time()))
        journal.copy(source, goal, time.time())

    def _deferred(self, goal: str) -> None:
        """Make sure that a job script will come to do what is asked for."""
        if working_directory(goal) is None:
            raise NotSupported(
                f"only a job can copy files on this gateway, and {goal} belongs to none: keep the files in the folder of "
                "their calculation, or retrieve them"
            )
        self._changeable(goal)

    def _carried(self, source: str, goal: str) -> None:
        """Make sure that pieces which a job script is to use lie in its own folder."""
        split = working_directory(goal)
        if split is None:
            return
        for node in self._classic.journal.nodes(source):
            if not isinstance(node.content, Pieces):
                continue
            jobid = self._classic.job_of(split[0])
            if all(piece.jobid == jobid for piece in node.content.pieces):
                continue
            with tempfile.NamedTemporaryFile() as file:
                self._classic.get_pieces(node.content, file.write)
                file.flush()
                moved = self._classic.put(jobid, Path(file.name))
            self._classic.journal.put(Node(**{**vars(node), "content": moved}))

    @posix
    def compress(self, *args: Any, **kwargs: Any) -> None:
        """There is nobody to do that.

        :raises NotSupported: always.
        """
        raise NotSupported("a gateway with only the published capabilities makes no archives: let the job make them")

    @posix
    def extract(self, *args: Any, **kwargs: Any) -> None:
        """There is nobody to do that.

        :raises NotSupported: always.
        """
        raise NotSupported("a gateway with only the published capabilities unpacks no archives: let the job do it")

    # What may be changed

    def _require_folder(self, path: str) -> None:
        entry = self._view.find(path)
        if entry is None:
            raise _missing(path)
        if entry.kind not in ("directory", "other"):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)

    def _changeable(self, path: str) -> None:
        """Make sure that something can be made at a path.

        :raises NotSupported: its job was launched.
        :raises OSError: it is the name of one of our own files.
        """
        split = working_directory(path)
        if split is None:
            self._view.check(path)
            return
        if split[1] and is_ours(split[1]):
            raise OSError(
                errno.EINVAL,
                f"files in a working directory cannot be called {JOB_SCRIPT} or {RESERVED}* on this gateway",
                path,
            )
        folder = self._classic.journal.folder(split[0])
        if folder is not None and folder.is_launched:
            raise NotSupported(
                f"{path} cannot be changed any more: its job was launched, and only jobs change folders on this gateway"
            )

    # Up

    @posix
    def _put_file(self, local: str, remote: str, overwrite: bool, into: str | None) -> None:
        goal = self._absolute(remote)
        entry = self._view.find(goal)
        if entry is not None and entry.kind == "directory":
            if into is None:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), goal)
            goal = posixpath.join(goal, into)
            entry = self._view.find(goal)
        elif str(remote).endswith("/"):
            raise _missing(str(remote))
        if entry is not None and not overwrite:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), goal)
        self._require_folder(posixpath.dirname(goal))
        folder = self._view.folder(goal)
        if folder is not None and folder.is_launched:
            self._put_live(Path(local), goal, folder)
            return
        self._changeable(goal)
        self._store(Path(local), goal, None, folder)

    def _put_live(self, local: Path, goal: str, folder: Folder) -> None:
        """Upload a file for a job that runs, as a person who wants to tell it something."""
        name = goal[len(folder.path) + 1 :]
        if folder.state is FolderState.ENDED or not is_plain(name) or is_ours(name):
            self._changeable(goal)
        if local.stat().st_size > self._classic.piece:
            raise NotSupported(f"{goal} is too large to be uploaded while the job runs")
        content = local.read_bytes()
        self._classic.upload(folder.jobid, name, content)
        # It has this very name, as it is a plain one; if it is gone, the job has taken it.
        if self._classic.look(folder.jobid).size_of(name) not in (None, len(content)):
            raise IntegrityError(f"{goal} did not arrive: upload it again")

    def _store(self, local: Path, goal: str, mode: int | None, folder: Folder | None) -> None:
        journal = self._classic.journal
        size = local.stat().st_size
        if (
            folder is not None
            and size <= SMALL
            and size + self._classic.journal.size_of_data(folder.path) <= SMALL_TOTAL
        ):
            data = local.read_bytes()
            journal.put(Node(goal, "file", mode, time.time(), len(data), Inline(goal), data))
            return
        jobid = self._classic.job_of(folder.path) if folder is not None else self._spare_job()
        content = self._classic.put(jobid, local)
        size = sum(piece.size for piece in content.pieces)
        if folder is None:
            # No launch looks whether it is there.
            self._classic.check_pieces(jobid, set(content.pieces))
        journal.put(Node(goal, "file", mode, time.time(), size, content))

    def _spare_job(self) -> str:
        """The gateway's job for files that belong to no working directory; it is never launched."""
        path = f"\0{self._classic.account().home}"
        self._classic.journal.add_folder(path)
        return self._classic.job_of(path)

    @posix
    def puttree(
        self,
        localpath: AnyPath,
        remotepath: AnyPath,
        dereference: bool = True,
        overwrite: bool = True,
        *_: Any,
        **__: Any,
    ) -> None:
        """Upload a folder: to this name, or inside it where it is a folder already (``localpath/``: its content)."""
        local, remote = str(localpath), str(remotepath)
        if not os.path.isabs(local):
            raise ValueError(f"the local path must be an absolute path, not {local!r}")
        if not remote:
            raise OSError(errno.ENOENT, "no remote path was given")
        if not os.path.exists(local):
            raise FileNotFoundError(errno.ENOENT, "the local path does not exist", local)
        if not os.path.isdir(local):
            raise NotADirectoryError(errno.ENOTDIR, "the local path is not a folder", local)
        goal = self._absolute(remote)
        name = os.path.split(local)[1]
        entry = self._view.find(goal)
        if entry is not None:
            if not overwrite:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), goal)
            if entry.kind != "directory":
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), goal)
            goal = posixpath.join(goal, name) if name else goal
        self._make(goal, True, parents=True)
        folder = self._view.folder(goal)
        self._changeable(goal)
        for source in walk(Path(local), dereference=dereference):
            below = source.entry.path
            if not below:
                continue
            path = posixpath.join(goal, below)
            self._changeable(path)
            if source.entry.type == "symlink":
                self._classic.journal.put(
                    Node(path, "symlink", mtime=time.time(), source=str(source.entry.target), origin="")
                )
            elif source.entry.type == "directory":
                if self._classic.journal.node(path) is None:
                    self._classic.journal.put(Node(path, "directory", source.entry.mode, time.time()))
            else:
                self._store(source.path, path, source.entry.mode, folder)

    # Down

    @posix
    def _get(
        self,
        remote: str,
        local: str,
        dereference: bool,
        overwrite: bool,
        *,
        wanted: str | None = None,
        ignore_missing: bool = False,
    ) -> None:
        if not remote:
            raise OSError(errno.ENOENT, "no remote path was given")
        path = self._absolute(remote)
        try:
            place = self._view.place(path)
        except FileNotFoundError:
            if ignore_missing:
                return
            raise
        # A path is followed, whatever is said of the links inside.
        entry = place.tree.find(place.path) if place.folder is not None else self._view.find(path)
        if entry is None or entry.kind == "symlink":
            if ignore_missing:
                return
            raise _missing(path)
        goal = local_goal(remote, local, entry.kind, overwrite=overwrite, wanted=wanted)
        if entry.kind == "directory":
            self._get_folder(place, place.path, goal, dereference)
            return
        if goal.exists() and not overwrite:
            raise FileExistsError(errno.EEXIST, "not overwriting what exists", str(goal))
        self._get_file(path, entry, goal, None)

    def _get_folder(self, place: Place, path: str, goal: Path, dereference: bool) -> None:
        goal.mkdir(parents=True, exist_ok=True)
        modes: list[tuple[Path, int]] = []
        for name, entry in place.tree.children(path).items():
            below = posixpath.join(path, name)
            local = goal / name
            if entry.kind == "symlink" and not dereference:
                local.unlink(missing_ok=True)
                local.symlink_to(entry.target or "")
                continue
            found = place.tree.find(below)
            if found is None or found.kind == "symlink":
                raise _missing(posixpath.join(place.base, below))
            if found.kind == "directory":
                self._get_folder(place, below, local, dereference)
                modes.append((local, found.permissions))
            elif found.kind == "file":
                self._get_file(posixpath.join(place.base, below), found, local, found.permissions)
            else:
                raise shutil.SpecialFileError(errno.EINVAL, "neither a file, a folder nor a symbolic link", below)
        for local, mode in modes:
            local.chmod(stat.S_IMODE(mode))

    def _get_file(self, path: str, entry: Entry, goal: Path, mode: int | None) -> None:
        """Download a file: it gets its name when it is whole."""
        if mode is None and goal.is_file():
            mode = stat.S_IMODE(goal.stat().st_mode)
        part = goal.parent / f".marketplace-hpc-{os.getpid()}-{os.urandom(8).hex()}.part"
        try:
            with open(part, "wb") as file:
                self._fetch(path, entry, file.write)
                if mode is not None:
                    os.fchmod(file.fileno(), stat.S_IMODE(mode))
            os.replace(part, goal)
        finally:
            part.unlink(missing_ok=True)

    def _fetch(self, path: str, entry: Entry, write: Callable[[bytes], object]) -> None:
        content = entry.content
        if isinstance(content, Inline):
            node = self._classic.journal.node(content.path)
            if node is None or node.data is None:
                raise _missing(path)
            write(node.data)
            return
        if isinstance(content, Pieces):
            self._classic.get_pieces(content, write)
            return
        if not isinstance(content, InJob):
            raise NotSupported(f"{path} is made by the job, and cannot be read before it has started")
        digest, size = hashlib.sha256(), 0
        for data in self._parts(path, content):
            digest.update(data)
            size += len(data)
            write(data)
        if content.digest is not None and digest.hexdigest() != content.digest:
            raise IntegrityError(
                f"{path} is not what it was when its job ended: was it changed since, or is it being changed?"
            )
        if content.digest is None and content.exact and size != entry.size:
            raise IntegrityError(f"{path} has {size} bytes and not {entry.size}, as it had when its job ended")

    def _parts(self, path: str, content: InJob) -> Iterable[bytes]:
        if content.handed_out:
            return (self._classic.download(content.jobid, name) for name in content.pieces)
        if not can_be_asked_for(content.path):
            raise NotSupported(
                f"{path} has a name that the gateway refuses; list it among what the calculation retrieves, and its job hands "
                "it out under another one"
            )
        try:
            return [self._classic.download(content.jobid, content.path)]
        except ServerFault as exc:
            raise ServerFault(
                f"the gateway does not hand out {path}: it is larger than the gateway allows (5 MiB, mostly), it was removed, "
                "or the cluster does not answer. A larger file must be among what the calculation retrieves: its job hands it "
                "out in pieces",
                request_id=exc.request_id,
            ) from exc

    def read(self, path: str) -> bytes:
        """Download a file into memory."""
        data = bytearray()
        self._fetch(path, self._entry(path), data.extend)
        return bytes(data)

    def _absolute(self, path: AnyPath) -> str:
        text = str(path)
        if not text.startswith("/"):
            home = self._classic.account().home
            text = home if text in ("", ".") else f"{home}/{text}"
        # Nothing of it is resolved on the cluster: links in it are looked at in the tree.
        return os.path.normpath(text)


def _missing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _attribute(entry: Entry) -> Any:
    types = {"directory": stat.S_IFDIR, "symlink": stat.S_IFLNK, "file": stat.S_IFREG}
    fields = {
        "size": entry.size,
        "uid": os.getuid(),
        "gid": os.getgid(),
        "mode": types.get(entry.kind, 0) | entry.permissions,
        "atime": entry.mtime,
        "mtime": entry.mtime,
    }
    return file_attribute(fields)
