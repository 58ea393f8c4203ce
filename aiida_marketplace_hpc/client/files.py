"""The cluster's disk with the semantics that AiiDA expects of a transport.

Every operation is written once, synchronously, over :class:`~aiida_marketplace_hpc.client.gateway.HpcGateway`; results and
exception types are those of aiida-core's own transports. What the file system refuses is an :class:`OSError`, a path outside
the roots a :class:`PermissionError`, nonsense a :class:`ValueError`. When the gateway does not answer, the package's own
:class:`~aiida_marketplace_hpc.errors.ConnectionFailed` comes through, which AiiDA's retry handles.

Paths are absolute paths on the cluster; a relative one is taken from the user's home.
"""

from __future__ import annotations

import errno
import functools
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any, ParamSpec, TypeVar

from aiida_marketplace_hpc.bundle import Entry
from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import FileError, Forbidden, GatewayError, InvalidRequest, NotFound

P = ParamSpec("P")
R = TypeVar("R")
AnyPath = str | PurePath

_MAGIC = re.compile(r"[*?\[]")


def posix(method: Callable[P, R]) -> Callable[P, R]:
    """Let a method raise what Python's own file functions raise."""

    @functools.wraps(method)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except GatewayError as exc:
            raise _translated(exc) from exc

    return told


def _translated(error: GatewayError) -> Exception:
    if isinstance(error, FileError):
        return error.to_os_error()
    if isinstance(error, Forbidden):
        return PermissionError(errno.EACCES, error.message)
    if isinstance(error, NotFound):
        return FileNotFoundError(errno.ENOENT, error.message)
    if isinstance(error, InvalidRequest):
        return ValueError(error.message)
    return error


def _is_missing(error: GatewayError) -> bool:
    """Whether Python's ``os.path.exists`` would answer no."""
    return isinstance(error, FileError) and error.errno in ("ENOENT", "ENOTDIR", "ELOOP", "ENAMETOOLONG", "EACCES")


def local_goal(remote: str, local: str, kind: str, *, overwrite: bool, wanted: str | None) -> Path:
    """The name here of what is fetched, as aiida-core's own transports choose it.

    :param kind: what there is at ``remote``: ``file``, ``directory`` or something else.
    :param wanted: the only kind that is fetched.
    :raises OSError: it cannot be brought there.
    """
    if wanted is not None and kind != wanted:
        number = errno.EISDIR if kind == "directory" else errno.ENOTDIR
        raise OSError(number, os.strerror(number), remote)
    goal = local
    if kind == "directory":
        if os.path.exists(local) and not overwrite:
            raise FileExistsError(errno.EEXIST, "not overwriting what exists", local)
        if os.path.isfile(local):
            raise NotADirectoryError(errno.ENOTDIR, "a folder cannot be written into a file", local)
    if os.path.isdir(local) and wanted != "file":
        goal = os.path.join(local, os.path.split(remote)[1])
    elif local.endswith("/") and kind == "file":
        raise FileNotFoundError(errno.ENOENT, "there is no such local folder", local)
    if kind == "file":
        goal = os.path.realpath(goal)
        if os.path.islink(goal):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), local)
    return Path(goal)


class RemoteDisk:
    """What AiiDA does with a remote disk.

    :param gateway: may be shared between threads.
    """

    def __init__(self, gateway: HpcGateway) -> None:
        self._gateway = gateway

    # Looking

    @posix
    def whoami(self) -> str:
        """The user's name on the cluster: what ``{username}`` in a computer's work directory stands for."""
        return str(self._gateway.info()["username"])

    def isdir(self, path: AnyPath) -> bool:
        """Whether there is a folder, or a link to one."""
        return self._type(path) == "directory"

    def isfile(self, path: AnyPath) -> bool:
        """Whether there is a regular file, or a link to one."""
        return self._type(path) == "file"

    def path_exists(self, path: AnyPath) -> bool:
        """Whether there is anything; a dangling link is nothing."""
        return self._type(path) is not None

    @posix
    def _type(self, path: AnyPath) -> str | None:
        if not str(path):
            return None
        try:
            return str(self._gateway.ask("stat", path=self._absolute(path), follow=True)["type"])
        except FileError as exc:
            if _is_missing(exc):
                return None
            raise

    @posix
    def get_attribute(self, path: AnyPath) -> Any:
        """The attributes of a path, of a link itself, as AiiDA's ``FileAttribute``."""
        return file_attribute(self._gateway.ask("stat", path=self._absolute(path)))

    @posix
    def get_mode(self, path: AnyPath) -> int:
        """The permission bits of a path."""
        return stat.S_IMODE(int(self._gateway.ask("stat", path=self._absolute(path))["mode"]))

    @posix
    def listdir(self, path: AnyPath = ".", pattern: str | None = None) -> list[str]:
        """The names in a folder; with ``pattern``, those that match, relative to the folder."""
        base = self._absolute(path)
        if pattern:
            prefix, full = _in_folder(base, pattern)
            return [name.removeprefix(prefix) for name in self._gateway.ask("glob", pattern=full)["paths"]]
        return [str(entry["name"]) for entry in self._gateway.ask("list", path=base)["entries"]]

    @posix
    def listdir_withattributes(self, path: AnyPath = ".", pattern: str | None = None) -> list[dict[str, Any]]:
        """The entries of a folder, each with ``name``, ``attributes`` and ``isdir`` (links to folders are folders).

        With ``pattern``, those that match, their names relative to the folder.
        """
        base = self._absolute(path)
        if pattern:
            prefix, full = _in_folder(base, pattern)
            entries = self._gateway.ask("glob", pattern=full, attributes=True)["entries"]
            named = [(str(entry["path"]).removeprefix(prefix), entry) for entry in entries]
        else:
            entries = self._gateway.ask("list", path=base, follow=True)["entries"]
            named = [(str(entry["name"]), entry) for entry in entries]
        return [
            {
                "name": name,
                "attributes": file_attribute(entry),
                "isdir": (entry.get("leads_to") if entry["type"] == "symlink" else entry["type"]) == "directory",
            }
            for name, entry in named
        ]

    @posix
    def glob(self, pathname: AnyPath) -> list[str]:
        """The paths that match a shell pattern; none is no error."""
        return list(self._gateway.ask("glob", pattern=self._absolute(pathname))["paths"])

    def iglob(self, pathname: AnyPath) -> Iterator[str]:
        """The same as an iterator."""
        return iter(self.glob(pathname))

    @posix
    def normalize(self, path: AnyPath = ".") -> str:
        """The path with links, ``.`` and ``..`` resolved."""
        return str(self._gateway.ask("realpath", path=self._absolute(path))["path"])

    # Changing

    @posix
    def mkdir(self, path: AnyPath, ignore_existing: bool = False) -> None:
        """Make one folder."""
        self._gateway.ask("mkdir", path=self._absolute(path), exist_ok=ignore_existing)

    @posix
    def makedirs(self, path: AnyPath, ignore_existing: bool = False) -> None:
        """Make a folder and those on the way."""
        wanted = os.path.normpath(self._absolute(path))
        self._gateway.ask("mkdir", path=wanted, parents=True, exist_ok=ignore_existing)

    @posix
    def rmdir(self, path: AnyPath) -> None:
        """Remove an empty folder."""
        self._gateway.ask("remove", path=self._absolute(path), directory=True)

    @posix
    def rmtree(self, path: AnyPath) -> None:
        """Remove a folder with all that is in it, or a file; nothing there is no error."""
        self._gateway.ask("remove", path=self._absolute(path), recursive=True, missing_ok=True)

    @posix
    def remove(self, path: AnyPath) -> None:
        """Remove a file or link."""
        self._gateway.ask("remove", path=self._absolute(path))

    @posix
    def rename(self, oldpath: AnyPath, newpath: AnyPath) -> None:
        """Rename a file or folder; something at ``newpath`` is an :class:`OSError`."""
        given("oldpath", oldpath)
        given("newpath", newpath)
        self._gateway.ask("rename", path=self._absolute(oldpath), target=self._absolute(newpath))

    @posix
    def symlink(self, remotesource: AnyPath, remotedestination: AnyPath) -> None:
        """Make links: to ``remotesource``, or inside ``remotedestination`` to each path that matches it."""
        source = os.path.normpath(str(remotesource))
        goal = os.path.normpath(self._absolute(remotedestination))
        if not _MAGIC.search(source):
            self._gateway.ask("symlink", path=goal, target=source)
            return
        no_magic(goal)
        self._all(
            {"op": "symlink", "path": os.path.join(goal, os.path.basename(found)), "target": found}
            for found in self.glob(source)
        )

    @posix
    def chmod(self, path: AnyPath, mode: int) -> None:
        """Set the permission bits."""
        if not str(path):
            raise OSError(errno.ENOENT, "no path was given")
        self._gateway.ask("chmod", path=self._absolute(path), mode=mode)

    @posix
    def copy(
        self, remotesource: AnyPath, remotedestination: AnyPath, dereference: bool = False, recursive: bool = True
    ) -> None:
        """Copy a file or folder, or everything that matches a pattern, on the cluster, without it coming here.

        :param recursive: has no effect, as with aiida-core's local transport.
        """
        given("remotesource", remotesource)
        given("remotedestination", remotedestination)
        source, goal = self._absolute(remotesource), self._absolute(remotedestination)
        sources = [source]
        if _MAGIC.search(source):
            no_magic(goal)
            sources = self.glob(source)
            if len(sources) > 1 and not self.isdir(goal):
                raise OSError(errno.ENOTDIR, "several paths cannot be copied to the name of one", goal)
        try:
            self._all({"op": "copy", "path": found, "target": goal, "dereference": dereference} for found in sources)
        except InvalidRequest as exc:
            if sources == [source]:
                raise
            raise OSError(
                errno.EINVAL, exc.message, goal
            ) from exc  # What a pattern matches is not the caller's nonsense.

    @posix
    def copyfile(self, remotesource: AnyPath, remotedestination: AnyPath, dereference: bool = False) -> None:
        """Copy the content of a file on the cluster to exactly this name; a link stays a link unless ``dereference``."""
        given("remotesource", remotesource)
        given("remotedestination", remotedestination)
        source, goal = self._absolute(remotesource), self._absolute(remotedestination)
        self._gateway.ask("copy", path=source, target=goal, dereference=dereference, exact=True)

    @posix
    def copytree(self, remotesource: AnyPath, remotedestination: AnyPath, dereference: bool = False) -> None:
        """Copy a folder on the cluster: to this name, or inside it where it is a folder already."""
        given("remotesource", remotesource)
        given("remotedestination", remotedestination)
        source, goal = self._absolute(remotesource), self._absolute(remotedestination)
        self._gateway.ask("copy", path=source, target=goal, dereference=dereference, directory=True)

    # Archives

    @posix
    def compress(
        self,
        format: str,
        remotesources: AnyPath | list[AnyPath],
        remotedestination: AnyPath,
        root_dir: AnyPath,
        overwrite: bool = True,
        dereference: bool = False,
    ) -> None:
        """Write files, folders and what matches patterns into an archive on the cluster, which appears when it is whole.

        :param format: ``tar``, ``tar.gz``, ``tar.bz2`` or ``tar.xz``.
        :param root_dir: the folder that the paths in the archive are relative to; all sources lie below it.
        :raises ValueError: for another format, or a source that lies elsewhere.
        :raises OSError: if a source is missing, or ``remotedestination`` is there and not to be replaced, or is a folder.
        """
        sources = remotesources if isinstance(remotesources, list) else [remotesources]
        self._gateway.ask(
            "compress",
            sources=[self._absolute(source) for source in sources],
            target=self._absolute(remotedestination),
            root_dir=self._absolute(root_dir),
            format=format,
            overwrite=overwrite,
            dereference=dereference,
        )

    @posix
    def extract(
        self,
        remotesource: AnyPath,
        remotedestination: AnyPath,
        overwrite: bool = True,
        strip_components: int = 0,
        *_: Any,
        **__: Any,
    ) -> None:
        """Unpack an archive on the cluster into a folder; what is in it appears when all of it was read.

        :param strip_components: how many leading parts of the paths in the archive are left away.
        :raises OSError: if there is no such archive, if it is damaged, or has a member that would lie elsewhere.
        :raises NotImplementedError: for ``overwrite=False``, as in aiida-core.
        """
        if not overwrite:
            raise NotImplementedError("unpacking without replacing what is there is not possible")
        self._gateway.ask(
            "extract",
            path=self._absolute(remotesource),
            target=self._absolute(remotedestination),
            strip_components=strip_components,
        )

    # Transfers

    def put(
        self,
        localpath: AnyPath,
        remotepath: AnyPath,
        dereference: bool = True,
        overwrite: bool = True,
        ignore_nonexisting: bool = False,
        *_: Any,
        **__: Any,
    ) -> None:
        """Upload a file, a folder, or everything that matches a local pattern.

        A file goes into ``remotepath`` where that is a folder; a folder goes inside an existing one.
        """
        local, remote = _local(localpath), str(remotepath)
        if not remote:
            raise OSError(errno.ENOENT, "no remote path was given")
        if not _MAGIC.search(local):
            self._put(local, remote, dereference, overwrite, ignore_missing=ignore_nonexisting)
            return
        no_magic(remote)
        # Files first: what the gateway says about a file settles whether several things can go there.
        sources = sorted(glob.glob(local), key=os.path.isdir)
        if len(sources) > 1:
            if os.path.isdir(sources[0]) and not self.isdir(remote):
                raise NotADirectoryError(errno.ENOTDIR, "several folders cannot be uploaded to the name of one", remote)
            remote = f"{remote}/"
        for source in sources:
            self._put(source, remote, dereference, overwrite)

    def _put(
        self, local: str, remote: str, dereference: bool, overwrite: bool, *, ignore_missing: bool = False
    ) -> None:
        if os.path.isdir(local):
            self.puttree(local, remote, dereference, overwrite)
        elif os.path.isfile(local):
            self._put_file(local, remote, overwrite, into=os.path.basename(local))
        elif not ignore_missing:
            raise FileNotFoundError(errno.ENOENT, "the local path does not exist", local)

    def putfile(
        self,
        localpath: AnyPath,
        remotepath: AnyPath,
        dereference: bool = True,
        overwrite: bool = True,
        *_: Any,
        **__: Any,
    ) -> None:
        """Upload a file to exactly this name."""
        local = _local(localpath)
        if not str(remotepath):
            raise OSError(errno.ENOENT, "no remote path was given")
        if not os.path.exists(local):
            raise FileNotFoundError(errno.ENOENT, "the local path does not exist", local)
        self._put_file(local, str(remotepath), overwrite, into=None)

    @posix
    def _put_file(self, local: str, remote: str, overwrite: bool, into: str | None) -> None:
        transfer.put_file(self._gateway, Path(local), self._absolute(remote), overwrite=overwrite, into=into)

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
        local, remote = _local(localpath), str(remotepath)
        if not remote:
            raise OSError(errno.ENOENT, "no remote path was given")
        if not os.path.exists(local):
            raise FileNotFoundError(errno.ENOENT, "the local path does not exist", local)
        if not os.path.isdir(local):
            raise NotADirectoryError(errno.ENOTDIR, "the local path is not a folder", local)
        transfer.put_tree(
            self._gateway,
            Path(local),
            self._absolute(remote),
            dereference=dereference,
            overwrite=overwrite,
            # Without it, the gateway itself refuses a folder that is there.
            into=(os.path.split(local)[1] or None) if overwrite else None,
            parents=True,
        )

    def get(
        self,
        remotepath: AnyPath,
        localpath: AnyPath,
        dereference: bool = True,
        overwrite: bool = True,
        ignore_nonexisting: bool = False,
        *_: Any,
        **__: Any,
    ) -> None:
        """Download a file, a folder, or everything that matches a remote pattern.

        A file goes into ``localpath`` where that is a folder; a folder goes inside an existing one.
        """
        local, remote = _local(localpath), str(remotepath)
        if not remote:
            raise OSError(errno.ENOENT, "no remote path was given")
        if not _MAGIC.search(remote):
            self._get(remote, local, dereference, overwrite, ignore_missing=ignore_nonexisting)
            return
        no_magic(local)
        sources = self.glob(remote)
        if len(sources) > 1 and not os.path.isdir(local):
            raise OSError(errno.ENOTDIR, "several files cannot be downloaded to the name of one", local)
        for source in sources:
            self._get(source, local, dereference, overwrite)

    def getfile(
        self,
        remotepath: AnyPath,
        localpath: AnyPath,
        dereference: bool = True,
        overwrite: bool = True,
        *_: Any,
        **__: Any,
    ) -> None:
        """Download a file to exactly this name."""
        self._get(str(remotepath), _local(localpath), dereference, overwrite, wanted="file")

    def gettree(
        self,
        remotepath: AnyPath,
        localpath: AnyPath,
        dereference: bool = True,
        overwrite: bool = True,
        *_: Any,
        **__: Any,
    ) -> None:
        """Download a folder: to this name, or inside it where it is a folder already."""
        self._get(str(remotepath), _local(localpath), dereference, overwrite, wanted="directory")

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

        def destination(root: Entry) -> Path:
            # Only now is it known whether it is a file or a folder, which decides about its name here.
            return local_goal(remote, local, root.type, overwrite=overwrite, wanted=wanted)

        place = self._gateway.place(self._absolute(remote))
        try:
            transfer.get(self._gateway, place, destination, dereference=dereference, overwrite=overwrite)
        except FileError as exc:
            # A link to nothing inside a folder is another matter than a folder that is not there.
            itself = self._gateway.locate(exc.path) == place if exc.path else True
            if not (ignore_missing and _is_missing(exc) and itself):
                raise

    # Shared

    def _absolute(self, path: AnyPath) -> str:
        text = str(path)
        if text.startswith("/"):
            return text
        home = self._gateway.home()
        return home if text in ("", ".") else f"{home}/{text}"

    def _all(self, operations: Iterator[dict[str, Any]]) -> None:
        """Carry out operations in one request, up to the first that fails."""
        listed = list(operations)
        for result in self._gateway.query(listed, stop_on_error=True) if listed else []:
            if isinstance(result, GatewayError):
                raise result


def _local(path: AnyPath) -> str:
    text = str(path)
    if not os.path.isabs(text):
        raise ValueError(f"the local path must be an absolute path, not {text!r}")
    return text


def given(name: str, path: AnyPath) -> None:
    if not str(path):
        raise ValueError(f"{name} must not be empty")


def no_magic(path: str) -> None:
    if _MAGIC.search(path):
        raise ValueError(f"a destination cannot have a pattern: {path}")


def _in_folder(base: str, pattern: str) -> tuple[str, str]:
    """What the paths that match ``pattern`` in a folder begin with, and the pattern for the whole of them."""
    prefix = f"{base.rstrip('/')}/"
    return prefix, f"{glob.escape(prefix)}{pattern}"


def file_attribute(fields: dict[str, Any]) -> Any:
    from aiida.transports.util import FileAttribute

    return FileAttribute(
        {
            "st_size": fields["size"],
            "st_uid": fields["uid"],
            "st_gid": fields["gid"],
            "st_mode": fields["mode"],
            "st_atime": fields["atime"],
            "st_mtime": fields["mtime"],
        }
    )
