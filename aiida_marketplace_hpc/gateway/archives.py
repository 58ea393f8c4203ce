"""Tar archives: made of files on the cluster, and unpacked there, without a shell and without leaving the roots.

What they look like is what ``tar -C root_dir -c[zjJ]f`` writes; what comes out of one is what ``tar -x`` makes of it, with
these differences. An archive appears when it is whole, and what is in it when all of it was read and nothing in it is damaged:
until then it lies in a folder out of sight. No member is written through a link, whoever made that; a member that would lie
elsewhere (``..``) makes the whole archive be refused, as does a device. Owners, and the bits that lend somebody's rights
(setuid, setgid, sticky), are not restored.
"""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import stat
import sys
import tarfile
import zlib
from bz2 import BZ2Decompressor, BZ2File
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import PurePosixPath
from typing import IO, Any, BinaryIO, Protocol, cast

from aiida_marketplace_hpc.errors import FileError, InvalidRequest, TooLarge
from aiida_marketplace_hpc.gateway.descriptors import (
    LIST,
    MAX_DEPTH,
    SYNC_EVERY,
    Advance,
    open_regular,
    told,
    too_deep,
)
from aiida_marketplace_hpc.gateway.draft import Draft, opened
from aiida_marketplace_hpc.gateway.files import Files
from aiida_marketplace_hpc.gateway.roots import PRIVATE, Place
from aiida_marketplace_hpc.gateway.staging import merge, staged
from aiida_marketplace_hpc.gateway.storage import AnyFiles
from aiida_marketplace_hpc.protocol import ARCHIVE_FORMATS

_CHUNK = 256 * 1024
_RECORD = 20 * tarfile.BLOCKSIZE
_MAX_HEADER = 1024 * 1024
"""Bytes of one header with its long names; more is an attack on the memory."""
_XZ_PRESET = 3
"""With 6, the default, each archive under way takes 94 MiB of memory instead of 32."""
_XZ_MEMORY = 128 * 1024 * 1024
"""Bytes of memory that unpacking may take: enough for all that ``xz -9`` makes."""
_LATEST = 2**40
"""Seconds; file systems cannot keep all the times that a header can say."""


# Making one


def compress(
    files: Files,
    sources: list[str],
    target: str,
    root_dir: str,
    *,
    format: str,
    overwrite: bool = True,
    dereference: bool = False,
) -> dict[str, Any]:
    """Write files and folders into an archive, which appears when it is whole.

    :param sources: absolute paths or patterns, all below ``root_dir``; the archive has their paths relative to that.
    :param format: one of :data:`~aiida_marketplace_hpc.protocol.ARCHIVE_FORMATS`.
    :param overwrite: whether a file at ``target`` is replaced or refused.
    :param dereference: follow links, and put in what they point to.
    :raises InvalidRequest: for an unknown format, or a source that is not below ``root_dir``.
    :raises FileError: for what is not there, a ``target`` that is, and a file that changes while it is read.
    """
    members = members_to_pack(files, sources, target, root_dir, format=format, overwrite=overwrite)
    with files.roots.place(target) as place, told(target), files.draft(place, overwrite) as draft:
        with _compressor(format, draft) as sink:
            packer = _Packer(files, sink, dereference)
            packer.leave_out(place)
            for member in members:
                packer.add(f"{root_dir}/{member}", member)
            packer.end()
        draft.commit()
        return {"path": place.path, "size": draft.size, "digest": draft.digest}


def members_to_pack(
    files: AnyFiles, sources: list[str], target: str, root_dir: str, *, format: str, overwrite: bool
) -> list[str]:
    """Check what can be checked before an archive is made, make the folder for it, and say what is to be put in.

    :return: paths relative to ``root_dir``, in order, patterns resolved.
    :raises: what :func:`compress` raises.
    """
    if files.stat(root_dir, follow=True)["type"] != "directory":
        raise _error(errno.ENOTDIR, root_dir)
    there = _type(files, target)
    if there == "directory":
        raise _error(errno.EISDIR, target)
    if there is not None and not overwrite:
        raise _error(errno.EEXIST, target)
    if format not in ARCHIVE_FORMATS:
        raise InvalidRequest(f"there is no archive format {format!r}; there are {', '.join(ARCHIVE_FORMATS)}")
    files.mkdir(str(PurePosixPath(target).parent), parents=True, exist_ok=True)
    return [_relative(path, root_dir) for source in sources for path in _matching(files, source)]


def _type(files: AnyFiles, path: str) -> str | None:
    try:
        return str(files.stat(path, follow=True)["type"])
    except FileError as exc:
        if exc.errno != "ENOENT":
            raise
        return None


def _matching(files: AnyFiles, source: str) -> list[str]:
    if not set("*?[").intersection(source):
        files.stat(source, follow=True)
        return [source]
    found = files.glob(source)
    if not found:
        raise FileError(f"nothing matches {source}", errno="ENOENT", path=source)
    return found


def _relative(path: str, root_dir: str) -> str:
    try:
        return str(PurePosixPath(path).relative_to(root_dir))
    except ValueError:
        raise InvalidRequest(f"{path} does not lie below {root_dir}") from None


class _Sink:
    """The draft as something that compressors write to."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._unsynced = 0

    def write(self, data: bytes | memoryview) -> int:
        self._draft.write(bytes(data))
        self._unsynced += len(data)
        if self._unsynced >= SYNC_EVERY:
            self._draft.sync()
            self._unsynced = 0
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _compressor(format: str, draft: Draft) -> Any:
    sink: Any = _Sink(draft)
    if format == "tar.gz":
        return gzip.GzipFile("", "wb", compresslevel=6, fileobj=sink, mtime=0)
    if format == "tar.bz2":
        return BZ2File(sink, "wb")
    if format == "tar.xz":
        return lzma.LZMAFile(sink, "wb", preset=_XZ_PRESET)
    return sink


class _Packer:
    """Writes the members of one archive.

    Headers are written one by one, not through :class:`tarfile.TarFile`, which remembers every member.
    """

    def __init__(self, files: Files, sink: IO[bytes], dereference: bool) -> None:
        self._files = files
        self._sink = sink
        self._dereference = dereference
        self._advance = files.advance
        self._written = 0
        self._left_out: set[tuple[int, int]] = set()
        self._linked: dict[tuple[int, int], str] = {}

    def leave_out(self, place: Place) -> None:
        """Leave out the file that the archive will replace, should it be among what is put in."""
        with suppress(FileNotFoundError):
            found = place.lstat()
            self._left_out.add((found.st_dev, found.st_ino))

    def add(self, path: str, name: str) -> None:
        """Put in a file, or a folder with all that is in it.

        :param name: its path in the archive.
        """
        parts = name.split("/")
        if ".." in parts:  # Like tar: such a path is read, but not written down.
            name = "/".join(parts[len(parts) - parts[::-1].index("..") :]) or "."
        with self._files.roots.place(path, follow=self._dereference) as place, told(path):
            self._add(place, name, ())

    def end(self) -> None:
        """Write the end mark."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._written % _RECORD))

    def _add(self, place: Place, name: str, above: tuple[tuple[int, int], ...]) -> None:
        found = place.lstat()
        identity = (found.st_dev, found.st_ino)
        if identity in self._left_out or stat.S_ISSOCK(found.st_mode):
            return
        self._advance(1)
        header = _header(name, found)
        if stat.S_ISDIR(found.st_mode):
            if identity in above or len(above) > MAX_DEPTH:
                raise too_deep()
            header.type = tarfile.DIRTYPE
            self._put(header)
            self._add_content(place, name, (*above, identity))
        elif stat.S_ISLNK(found.st_mode):
            header.type, header.linkname = tarfile.SYMTYPE, os.readlink(place.name, dir_fd=place.folder)
            self._put(header)
        elif stat.S_ISFIFO(found.st_mode):
            header.type = tarfile.FIFOTYPE
            self._put(header)
        elif found.st_nlink > 1 and identity in self._linked:
            header.type, header.linkname = tarfile.LNKTYPE, self._linked[identity]
            self._put(header)
        else:
            if found.st_nlink > 1:
                self._linked[identity] = name
            self._add_file(place, header)

    def _add_content(self, place: Place, name: str, above: tuple[tuple[int, int], ...]) -> None:
        with opened(place.name, LIST, place.folder) as folder:
            for entry in sorted(os.listdir(folder)):
                if entry == PRIVATE or entry.startswith(f"{PRIVATE}-"):
                    continue
                below = Place(place.root, folder, entry, f"{place.path}/{entry}")
                with told(below.path):
                    if self._dereference and stat.S_ISLNK(below.lstat().st_mode):
                        with self._files.roots.place(below.path) as real:
                            self._add(real, f"{name}/{entry}", above)
                    else:
                        self._add(below, f"{name}/{entry}", above)

    def _add_file(self, place: Place, header: tarfile.TarInfo) -> None:
        with open_regular(place) as content:
            before = os.fstat(content.fileno())
            header.size = before.st_size
            self._put(header)
            left = before.st_size
            while left:
                chunk = content.read(min(_CHUNK, left))
                if not chunk:
                    break
                self._write(chunk)
                self._advance(len(chunk))
                left -= len(chunk)
            after = os.fstat(content.fileno())
            if left or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise FileError(f"{place.path} changed while it was read", errno="EBUSY", path=place.path)
            self._write(bytes(-header.size % tarfile.BLOCKSIZE))

    def _put(self, header: tarfile.TarInfo) -> None:
        # The format that GNU tar writes: it keeps names that are not UTF-8, and sizes above 8 GiB.
        self._write(header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))

    def _write(self, data: bytes) -> None:
        self._sink.write(data)
        self._written += len(data)


def _header(name: str, found: os.stat_result) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.mode = stat.S_IMODE(found.st_mode)
    header.uid, header.gid = found.st_uid, found.st_gid
    header.mtime = int(found.st_mtime)
    return header


# Unpacking one


def extract(
    files: Files, path: str, target: str, *, strip_components: int = 0, most: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Unpack an archive into a folder, which is made where it is missing.

    Folders that are there are merged with those of the archive; other members replace what is there. Nothing appears before
    the whole archive was read.

    :param strip_components: how many leading parts of each member's path are left away; members with no more are left out.
    :param most: members, and bytes in all of them, that an archive may have.
    :raises TooLarge: it has more; what it would unpack to is known only while that happens.
    :raises FileError: for what is not there; EBADMSG for what is no archive, or a damaged one; EINVAL for a member that
        would lie elsewhere; EEXIST for a file in place of a folder that is not empty.
    """
    files.stat(path, follow=True)
    files.mkdir(target, parents=True, exist_ok=True)
    with (
        files.roots.place(path) as source,
        told(path),
        open_regular(source) as content,
        files.roots.place(target) as place,
        told(target),
        opened(place.name, LIST, place.folder) as goal,
        staged(place.root, goal) as folder,
        closing(_Unpacker(folder, path, strip_components, files.advance, most)) as unpacker,
    ):
        with _intact(path):
            for member, data in _members(_Stream(_decompressed(content), files.advance)):
                unpacker.add(member, data)
        merge(folder, goal, files.advance, files.protection, replaces=unpacker.has_folder)
        unpacker.restore_folders(goal, is_root=place.name == ".")
        return {"path": place.path, "entries": unpacker.count}


class _Damaged(Exception):
    """What is read is no archive, or not a whole one. (No error of tarfile's, of which it hides some.)"""


class _Decompressor(Protocol):
    """What the decompressors of bz2 and lzma have in common."""

    @property
    def needs_input(self) -> bool: ...
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Decompressed:
    """The content of a compressed file, all of whose streams end properly; unlike ``LZMAFile`` with a limit on memory."""

    def __init__(self, content: BinaryIO, make: Callable[[], _Decompressor]) -> None:
        self._content = content
        self._make = make
        self._decompressor = make()
        self._started = False

    def read(self, size: int) -> bytes:
        while True:
            data = b""
            if self._decompressor.eof:
                data = self._decompressor.unused_data.lstrip(b"\0") or self._next().lstrip(b"\0")
                if not data:
                    return b""
                self._decompressor = self._make()
            elif self._decompressor.needs_input:
                data = self._next()
                if not data:
                    raise EOFError("it breaks off")
            if found := self._decompressor.decompress(data, size):
                return found

    def _next(self) -> bytes:
        return self._content.read(_CHUNK)


def _decompressed(content: BinaryIO) -> Callable[[int], bytes]:
    magic = content.read(6)
    content.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=content, mode="rb").read
    if magic.startswith(b"BZh"):
        return _Decompressed(content, BZ2Decompressor).read
    if magic.startswith(b"\xfd7zXZ\0"):
        return _Decompressed(content, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)).read
    return content.read


class _Stream:
    """What tarfile reads from: forwards only, and never more at once than a header or chunk can have."""

    def __init__(self, read: Callable[[int], bytes], advance: Advance) -> None:
        self._read = read
        self._advance = advance
        self._at = 0

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> int:
        if position < self._at:
            raise _Damaged("a member begins before the end of the one before it")
        while self._at < position and self.read(min(_CHUNK, position - self._at)):
            pass
        return self._at

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise _Damaged("a header is too large")
        pieces = []
        while size > 0:
            try:
                piece = self._read(size)
            except OSError as exc:
                if exc.errno:
                    raise
                raise _Damaged(str(exc)) from exc
            except (EOFError, zlib.error, lzma.LZMAError) as exc:
                raise _Damaged(str(exc)) from exc
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece)
            self._at += len(piece)
            self._advance(len(piece))
        return b"".join(pieces)


class _Member(tarfile.TarInfo):
    """A member whose header is damaged is an error everywhere; tarfile itself takes it for the end, but at the beginning."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as exc:
            raise _Damaged(str(exc)) from exc


@contextmanager
def _intact(path: str) -> Iterator[None]:
    try:
        yield
    except (_Damaged, tarfile.TarError, UnicodeError) as exc:
        raise FileError(f"{path} is no archive, or a damaged one: {exc}", errno="EBADMSG", path=path) from exc


def _members(stream: _Stream) -> Iterator[tuple[_Member, IO[bytes] | None]]:
    """The members of an archive in order, each with its content if it is a file, to be read before the next is asked for."""
    source: Any = stream
    with tarfile.TarFile(fileobj=source, tarinfo=_Member, encoding="utf-8", errors="surrogateescape") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # They would all be kept.
            if member.size < 0:
                raise _Damaged("a member has a negative size")
            yield cast(_Member, member), archive.extractfile(member) if member.isreg() else None
    while stream.read(_CHUNK):  # Behind the end mark is the checksum.
        pass


class _Unpacker:
    """Puts members into an empty folder that nobody else knows; no link is followed in it.

    :param folder: its descriptor.
    :param path: the archive's, for errors.
    """

    def __init__(
        self, folder: int, path: str, strip_components: int, advance: Advance, most: tuple[int, int] | None
    ) -> None:
        self._members, self._bytes = most or (sys.maxsize, sys.maxsize)
        self._most = most
        self._folder = folder
        self._path = path
        self._strip = strip_components
        self._advance = advance
        self._folders: dict[tuple[str, ...], _Member] = {}
        self._parent: tuple[str, ...] = ()
        self._descriptor = os.dup(folder)
        self.count = 0

    def close(self) -> None:
        os.close(self._descriptor)

    def add(self, member: _Member, data: IO[bytes] | None) -> None:
        """Put in one member.

        :raises FileError: EINVAL for one that would lie elsewhere, EPERM for a device.
        :raises TooLarge: it is one too many, or too large.
        """
        self._advance(1)
        self._members -= 1
        self._require_room()
        parts = self._parts(member.name)
        if parts is None:
            return
        self.count += 1
        if member.isdir():
            os.close(self._walk(parts))
            self._folders[parts] = member
            return
        if not parts:
            raise self._refused(member, "EINVAL", "is no folder")
        folder, name = self._enter(parts[:-1]), parts[-1]
        try:
            self._put(member, data, folder, name)
        except FileExistsError:  # Of two members with one path the later one counts.
            if self._folders.pop(parts, None) is None:
                os.unlink(name, dir_fd=folder)
            else:
                os.rmdir(name, dir_fd=folder)
            self._put(member, data, folder, name)

    def _require_room(self) -> None:
        if self._most is not None and (self._members < 0 or self._bytes < 0):
            members, size = self._most
            raise TooLarge(
                f"{self._path} has more than {members} members, or {size} bytes in all of them, which is the limit of this "
                "gateway: nothing was unpacked"
            )

    def has_folder(self, parts: tuple[str, ...]) -> bool:
        """Whether a folder is a member itself, not only on the way to one."""
        return parts in self._folders

    def restore_folders(self, goal: int, *, is_root: bool) -> None:
        """Give the folders the permission bits and times that the archive has, now that nothing comes into them any more.

        :param goal: descriptor of the folder in which they are by now.
        :param is_root: that is a root itself, which is not changed.
        """
        self._folder = goal
        for parts, member in sorted(self._folders.items(), key=lambda item: -len(item[0])):
            if parts or not is_root:
                descriptor = self._walk(parts)
                try:
                    os.fchmod(descriptor, member.mode & 0o777)
                    os.utime(descriptor, _times(member))
                finally:
                    os.close(descriptor)

    def _put(self, member: _Member, data: IO[bytes] | None, folder: int, name: str) -> None:
        if data is not None:
            self._put_file(member, data, folder, name)
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=folder)
        elif member.islnk():
            self._put_hard_link(member, folder, name)
        elif member.isfifo():
            os.mkfifo(name, member.mode & 0o777, dir_fd=folder)
        else:
            raise self._refused(member, "EPERM", "is a device")
        if member.issym() or member.isfifo():
            os.utime(name, _times(member), dir_fd=folder, follow_symlinks=False)

    def _put_file(self, member: _Member, data: IO[bytes], folder: int, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, 0o600, dir_fd=folder), "wb") as file:
            unsynced = 0
            while chunk := data.read(_CHUNK):
                self._bytes -= len(chunk)
                self._require_room()
                file.write(chunk)
                self._advance(len(chunk))
                unsynced += len(chunk)
                if unsynced >= SYNC_EVERY:
                    file.flush()
                    os.fdatasync(file.fileno())
                    unsynced = 0
            file.flush()
            os.fchmod(file.fileno(), member.mode & 0o777)
            os.utime(file.fileno(), _times(member))
            os.fsync(file.fileno())

    def _put_hard_link(self, member: _Member, folder: int, name: str) -> None:
        parts = self._parts(member.linkname)
        if not parts:
            raise self._refused(member, "EINVAL", "is a hard link to nothing in the archive")
        if member.linkname == member.name:  # GNU tar makes such a member of a file that it was given twice.
            return
        descriptor = self._walk(parts[:-1])
        try:
            if not stat.S_ISREG(os.stat(parts[-1], dir_fd=descriptor, follow_symlinks=False).st_mode):
                raise self._refused(member, "EINVAL", "is a hard link to something else than a file")
            os.link(parts[-1], name, src_dir_fd=descriptor, dst_dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            raise self._refused(member, "EINVAL", "is a hard link to nothing in the archive") from None
        finally:
            os.close(descriptor)

    def _parts(self, name: str) -> tuple[str, ...] | None:
        """Where a member goes, or ``None`` if it is left out."""
        parts = [part for part in name.split("/") if part]
        if ".." in parts or PRIVATE in parts or "\0" in name:
            raise FileError(
                f"{self._path} has the member {name!r}, which would lie elsewhere: nothing was unpacked",
                errno="EINVAL",
                path=self._path,
            )
        if len(parts) <= self._strip:
            return None
        return tuple(part for part in parts[self._strip :] if part != ".")

    def _enter(self, parts: tuple[str, ...]) -> int:
        """A folder's descriptor, valid until the next call: members of one folder come one after the other."""
        if parts != self._parent:
            descriptor = self._walk(parts)
            os.close(self._descriptor)
            self._parent, self._descriptor = parts, descriptor
        return self._descriptor

    def _walk(self, parts: tuple[str, ...]) -> int:
        """Open a folder, making what is missing on the way."""
        descriptor = os.dup(self._folder)
        try:
            for part in parts:
                try:
                    below = os.open(part, LIST, dir_fd=descriptor)
                except FileNotFoundError:
                    os.mkdir(part, dir_fd=descriptor)
                    below = os.open(part, LIST, dir_fd=descriptor)
                except NotADirectoryError:
                    # Of a link, too: what an archive puts below a link may lie anywhere.
                    raise FileError(
                        f"{self._path} has members below {'/'.join(parts)}, which is no folder: nothing was unpacked",
                        errno="ENOTDIR",
                        path=self._path,
                    ) from None
                os.close(descriptor)
                descriptor = below
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _refused(self, member: _Member, number: str, reason: str) -> FileError:
        text = f"{self._path} has the member {member.name!r}, which {reason}: nothing was unpacked"
        return FileError(text, errno=number, path=self._path)


def _times(member: _Member) -> tuple[float, float]:
    seconds = min(max(float(member.mtime), 0.0), _LATEST)
    return seconds, seconds


def _error(number: int, path: str) -> FileError:
    return FileError.from_os_error(OSError(number, ""), path)
