"""Local files and folders as the entries of a bundle, and the entries of a bundle as local files and folders.

What is received is not trusted: whatever a gateway sends, nothing is written outside the place that was asked for, neither
by a path with ``..`` nor through a symbolic link, and no file is seen under its name before its digest was verified.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from aiida_marketplace_hpc.bundle import Entry, EntryType, Reader
from aiida_marketplace_hpc.client.kept import KEEP_FROM, Kept, kept
from aiida_marketplace_hpc.errors import IntegrityError

Progress = Callable[[int], None]
"""Called with the number of bytes that have just been moved."""
Destination = Callable[[Entry], Path]
"""Says where the root of a bundle goes, once its type is known; may raise :class:`OSError` to refuse it."""

_PERMISSIONS = 0o777  # A gateway does not get to make a setuid file here.


@dataclass(frozen=True)
class Source:
    """One entry to send and the local path of its content."""

    entry: Entry
    path: Path

    def open(self) -> BinaryIO | None:
        """Open the content, where there is one."""
        return self.path.open("rb") if self.entry.type == "file" else None


def walk(folder: Path, *, dereference: bool) -> Iterator[Source]:
    """Yield a local folder and everything in it, parents before children, in the order of names.

    :param dereference: follow symbolic links inside; else they are entries themselves. ``folder`` itself is followed.
    :raises OSError: something cannot be read; a link points nowhere or, with ``dereference``, to a folder that it lies in;
        :class:`shutil.SpecialFileError` for pipes, sockets and devices.
    """
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    yield Source(Entry("", "directory", stat.S_IMODE(status.st_mode)), folder)
    yield from _children(folder, "", dereference, ((status.st_dev, status.st_ino),))


def _children(folder: Path, path: str, dereference: bool, above: tuple[tuple[int, int], ...]) -> Iterator[Source]:
    for name in sorted(os.listdir(folder)):
        local = folder / name
        below = f"{path}/{name}" if path else name
        status = local.stat() if dereference else local.lstat()
        mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISLNK(status.st_mode):
            yield Source(Entry(below, "symlink", target=os.readlink(local)), local)
        elif stat.S_ISDIR(status.st_mode):
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(local))
            yield Source(Entry(below, "directory", mode), local)
            yield from _children(local, below, dereference, (*above, identity))
        elif stat.S_ISREG(status.st_mode):
            yield Source(Entry(below, "file", mode, status.st_size), local)
        else:
            raise shutil.SpecialFileError(errno.EINVAL, "neither a file, a folder nor a symbolic link", str(local))


def inside_if_folder(local: Path, name: str) -> Destination:
    """Name things as ``cp -r`` and AiiDA's transports do: inside ``local`` if that is a folder, else at ``local``.

    :param name: the name to use inside ``local``.
    """
    return lambda entry: local / name if local.is_dir() else local


@dataclass(frozen=True)
class Received:
    """What was received, and where it is now."""

    type: EntryType
    path: Path


class Skip(Exception):
    """What comes next is here already: ask again, from :attr:`Receiver.position` on."""


class Receiver:
    """Writes what a gateway sends to the local disk, in as many bundles as it takes.

    Modes are those that :func:`shutil.copyfile` and :func:`shutil.copytree` leave: a single file has the user's default
    mode (or keeps the one of the file that it replaces), a folder's content has the modes of the original.

    :param destination: is asked once.
    :param overwrite: replace what is there: files one by one, folders by adding to them.
    :param source: where it comes from, the gateway included; with it, what arrived of a large file outlasts this object.
    """

    def __init__(
        self, destination: Destination, *, overwrite: bool, progress: Progress | None = None, source: str | None = None
    ) -> None:
        self._destination = destination
        self._overwrite = overwrite
        self._progress = progress
        self._source = source
        self._root: _Root | None = None
        self._file: _Incoming | None = None
        self._last: str | None = None
        self._changed: str | None = None
        self.received: Received | None = None
        """What was received, when all of it was."""
        self.size = 0
        """How much was received: bytes, and one for each entry."""

    @property
    def position(self) -> dict[str, str | int]:
        """From where on to ask, as parameters of ``getDataset``."""
        if self._file is not None:
            return {"after": self._file.entry.path, "offset": self._file.held}
        if self._changed is not None:
            return {"after": self._changed, "offset": 0}
        return {} if self._last is None else {"after": self._last}

    def receive(self, read: Callable[[int], bytes]) -> None:
        """Read a bundle to its end. After an error, call it again with one that begins at :attr:`position`.

        :param read: as for :class:`~aiida_marketplace_hpc.bundle.Reader`.
        :raises IntegrityError: something arrived wrong; what was verified before it is kept.
        :raises FileExistsError: something is there and ``overwrite`` is not set.
        :raises Skip: the next file was received before.
        :raises OSError: the local disk refuses.
        """
        reader = Reader(read)
        for number, (entry, chunks) in enumerate(reader):
            if number and not entry.path and not entry.offset:
                raise _untrusted("begins twice")
            root = self._rooted(entry)
            if entry.type == "directory":
                root.make(entry)
            elif entry.type == "symlink":
                root.link(entry)
            elif entry.length is None:
                self._drop()
                root.write(entry, chunks, self._progress)
            else:
                self._part(root, entry, chunks)
                continue
            self._finished(entry)
        if not reader.more:
            if self._root is None:
                raise _untrusted("is empty")
            if self._file is not None:
                self._drop()
                raise IntegrityError("a file vanished on the cluster while it was being sent")
            self._root.finish()
            self.received = Received(self._root.type, self._root.path)

    def close(self) -> None:
        """Let go of a file that is not complete; may be repeated."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rooted(self, entry: Entry) -> _Root:
        if self._root is None:
            if entry.path:
                raise _untrusted("does not begin with its root")
            # Only once: a first attempt may have made a folder that a second must not go inside of.
            path = self._destination(entry)
            if not self._overwrite and os.path.lexists(path):
                raise _exists(path)
            self._root = _Root(path, entry.type)
        elif entry.path and self._root.type != "directory":
            raise _untrusted("holds more than one thing, but no folder")
        if not entry.path and not entry.offset:
            self.size = 0  # From the beginning, and the same again is no progress.
        return self._root

    def _part(self, root: _Root, entry: Entry, chunks: Iterator[bytes]) -> None:
        file = self._file
        if file is not None and not (file.is_of(entry) and entry.offset == file.held):
            self._drop()
            file = None
            if entry.offset:
                # Another state of the file: what was received of the first is of no use.
                self._changed = entry.path
                raise IntegrityError(f"{entry.path or 'the file'} changed on the cluster while it was being sent")
        if file is None:
            if entry.offset:
                raise _untrusted(f"begins in the middle of {entry.path!r}")
            file = self._file = root.begin(entry, self._source)
            self._changed = None
            if file.held:
                if self._progress is not None:
                    self._progress(file.held)
                self.size += file.held
                self._complete(file)
                raise Skip
        part = b"".join(chunks)  # Verified when it has ended.
        file.write(part)
        self.size += len(part)
        if self._progress is not None:
            self._progress(len(part))
        self._complete(file)

    def _complete(self, file: _Incoming) -> None:
        if file.held == file.entry.size:
            self._file = None
            try:
                file.commit()
            finally:
                file.close()
            self._finished(file.entry)

    def _finished(self, entry: Entry) -> None:
        self._last, self._changed = entry.path, None
        self.size += 1

    def _drop(self) -> None:
        if self._file is not None:
            self._file.discard()
            self.close()


def write_file(path: Path, content: bytes, *, overwrite: bool) -> Received:
    """Write one file that is in memory, whole or not at all. May be repeated if ``overwrite`` is set.

    :raises FileExistsError: something is there and ``overwrite`` is not set.
    :raises OSError: the local disk refuses.
    """
    if not overwrite and os.path.lexists(path):
        raise _exists(path)
    _Root(path, "file").write(Entry("", "file", size=len(content)), iter([content]), None)
    return Received("file", path)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "it is there already and is not overwritten", str(path))


class _Root:
    """The place below which a bundle is written."""

    def __init__(self, path: Path, kind: EntryType) -> None:
        self.path = path
        self.type = kind
        self._folders: set[str] = set()
        self._modes: list[tuple[Path, int]] = []

    def make(self, entry: Entry) -> None:
        self._folder(entry.path)
        self._modes.append((self._at(entry.path), entry.mode & _PERMISSIONS))

    def write(self, entry: Entry, chunks: Iterator[bytes], progress: Progress | None) -> None:
        # A single file goes where its name leads, as with any program; below a folder no link is followed.
        path = self._goal(entry)
        temporary = _temporary(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    if progress is not None:
                        progress(len(chunk))
                # All chunks were read, so the digest was right.
                mode = entry.mode & _PERMISSIONS if self.type == "directory" else _mode_of(path)
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _goal(self, entry: Entry) -> Path:
        """Where a file goes; the root itself, which is the caller's choice, where a link leads."""
        if entry.path:
            return self._place(entry.path)
        goal = Path(os.path.realpath(self.path))
        if goal.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(self.path))
        return goal

    def begin(self, entry: Entry, source: str | None) -> _Incoming:
        """Open a file that comes in parts."""
        path = self._goal(entry)
        mode = entry.mode & _PERMISSIONS if self.type == "directory" else _mode_of(path)
        found = None
        if source is not None and entry.size >= KEEP_FROM:
            found = kept(f"{source}/{entry.path}", entry.version, entry.size, path.parent)
        return _Incoming(entry, path, mode, found)

    def link(self, entry: Entry) -> None:
        if not _nameable(entry.target):
            raise _untrusted(f"has a symbolic link {entry.path!r} that cannot be made")
        path = self._place(entry.path)
        temporary = _temporary(path)
        temporary.symlink_to(entry.target)
        try:
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def finish(self) -> None:
        # Last, and from the inside: a folder may be read-only.
        for path, mode in reversed(self._modes):
            path.chmod(mode)

    def _at(self, path: str) -> Path:
        return self.path / path if path else self.path

    def _place(self, path: str) -> Path:
        """Where a file or link goes; its folder is there when this returns."""
        if not path:
            return self.path
        parts = _parts(path)
        self._folder("/".join(parts[:-1]))
        return self._at(path)

    def _folder(self, path: str) -> None:
        if path in self._folders:
            return
        if not path:
            # The root is the caller's choice, a link to a folder included.
            self.path.mkdir(parents=True, exist_ok=True)
        else:
            parts = _parts(path)
            self._folder("/".join(parts[:-1]))
            local = self._at(path)
            try:
                local.mkdir()
            except FileExistsError:
                if local.is_symlink():
                    raise _untrusted(f"has something behind the symbolic link {path}") from None
                if not local.is_dir():
                    raise
        self._folders.add(path)


class _Incoming:
    """A file of which parts have been received: beside its final name, or, if it is large, where the next process finds it."""

    def __init__(self, entry: Entry, path: Path, mode: int | None, found: Kept | None) -> None:
        self.entry = entry
        self._path = path
        self._mode = mode
        self._kept = found
        self.held = found.held if found is not None else 0
        if found is None:
            self._temporary = _temporary(path)
            descriptor = os.open(
                self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
            )
            self._file = os.fdopen(descriptor, "wb", buffering=0)

    def is_of(self, entry: Entry) -> bool:
        """Whether an entry is a part of the same state of the same file."""
        mine = self.entry
        return (mine.path, mine.size, mine.version) == (entry.path, entry.size, entry.version)

    def write(self, part: bytes) -> None:
        """Append a part that was verified."""
        if self._kept is not None:
            self._kept.write(part)
        else:
            self._file.write(part)
        self.held += len(part)

    def commit(self) -> None:
        """Give the whole file its name."""
        if self._kept is not None:
            self._kept.move_to(self._path, self._mode)
            return
        if self._mode is not None:
            os.fchmod(self._file.fileno(), self._mode)
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Forget what was received."""
        if self._kept is not None:
            self._kept.discard()
        self.held = 0

    def close(self) -> None:
        """Let go of it; nothing stays beside the final name."""
        if self._kept is not None:
            self._kept.close()
        else:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def _parts(path: str) -> list[str]:
    parts = path.split("/")
    if not _nameable(path) or any(part in ("", ".", "..") for part in parts):
        raise _untrusted(f"has an entry with the path {path!r}")
    return parts


def _nameable(path: str) -> bool:
    try:
        return bool(path) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _untrusted(what: str) -> IntegrityError:
    return IntegrityError(f"the bundle {what}: nothing more of it is written", retryable=False)


def _temporary(path: Path) -> Path:
    return path.parent / f".marketplace-hpc-{secrets.token_hex(8)}.part"


def _mode_of(path: Path) -> int | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None
