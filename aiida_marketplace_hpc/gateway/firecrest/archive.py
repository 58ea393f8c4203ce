"""The archives in which folders travel between gateway and cluster, on the gateway's side: written, and read without trust.

FirecREST makes and unpacks them with GNU tar. One that comes from the cluster is never unpacked here: its content is read from
where it lies in the archive, so that nothing in it can reach any file of the gateway's.
"""

from __future__ import annotations

import gzip
import tarfile
import time
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from aiida_marketplace_hpc.bundle import CHUNK, Entry
from aiida_marketplace_hpc.errors import IntegrityError, TooLarge
from aiida_marketplace_hpc.gateway.transfers import Position


class Packer:
    """Writes one archive.

    Names and modes are those of the entries; tar takes the cluster's umask off the modes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gzip = gzip.open(path, "wb", compresslevel=1)  # noqa: SIM115 - close() closes it.
        self._tar = tarfile.open(  # noqa: SIM115 - close() closes it.
            fileobj=self._gzip, mode="w|", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
        )
        self.count = 0
        self.size = 0
        """Bytes of content, and what each entry takes beside it."""

    def add(self, entry: Entry, chunks: Iterable[bytes] = (), *, mtime: int | None = None) -> None:
        """Add an entry; a file's content must be as long as it says.

        :param mtime: when it was changed last, in seconds since the epoch; default: now.
        """
        member = tarfile.TarInfo(f"./{entry.path}" if entry.path else ".")
        member.mode = entry.mode & 0o7777
        member.mtime = int(time.time()) if mtime is None else mtime
        self.count += 1
        self.size += 1536 + entry.size
        if entry.type == "directory":
            member.type = tarfile.DIRTYPE
            member.mode |= 0o700  # Or nothing could be put into it.
        elif entry.type == "symlink":
            member.type, member.linkname = tarfile.SYMTYPE, entry.target
        else:
            member.size = entry.size
            content = _Chunks(chunks)
            self._tar.addfile(member, cast(BinaryIO, content))
            content.end()
            return
        self._tar.addfile(member)

    def close(self) -> int:
        """Finish it; its size in bytes."""
        self._tar.close()
        self._gzip.close()
        return self.path.stat().st_size

    def discard(self) -> None:
        """Close and remove it; may be repeated."""
        self._gzip.close()
        self.path.unlink(missing_ok=True)


class _Chunks:
    """A file's content as what has a ``read``."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._held = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._held) < size and (chunk := next(self._chunks, None)) is not None:
            self._held += chunk
        piece = bytes(self._held[:size])
        del self._held[:size]
        return piece

    def end(self) -> None:
        """Read on to where a wrong digest would be found."""
        for _ in self._chunks:
            pass


def inflate(path: Path, target: Path, limit: int) -> None:
    """Write the tar in a gzipped file to another one.

    :param limit: bytes.
    :raises IntegrityError: if it is broken or not whole.
    :raises TooLarge: if more than that would come out.
    """
    size = 0
    try:
        with gzip.open(path, "rb") as packed, target.open("wb") as plain:
            while chunk := packed.read(CHUNK):
                size += len(chunk)
                if size > limit:
                    raise TooLarge(f"more than {limit} bytes come out of the archive that was made on the cluster")
                plain.write(chunk)
    except (OSError, EOFError, zlib.error) as exc:
        raise IntegrityError(f"the archive that was made on the cluster is not whole: {exc}") from exc


class Unpacked:
    """The entries of an archive in the order of a bundle: parents before children, names sorted.

    What is neither file, folder nor link is left out, and what has no place below the top.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tar = tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
            self._members = dict(_members(self._tar))
        except tarfile.TarError as exc:
            raise IntegrityError(f"the archive that was made on the cluster cannot be read: {exc}") from exc

    def close(self) -> None:
        """Close it."""
        self._tar.close()

    def entries(self, position: Position | None) -> Generator[tuple[Entry, BinaryIO | None], None, None]:
        """The entries after a position, each with the open file of its content; closes the archive at the end."""
        with self._tar:
            for path in sorted(self._members, key=_parts):
                if position is not None and _parts(path) < _parts(position.path):
                    continue
                member = self._members[path]
                again = position is not None and path == position.path
                offset = position.offset if again and position is not None else 0
                if again and offset is None:
                    continue
                yield from self._entry(path, member, offset or 0)

    def _entry(self, path: str, member: tarfile.TarInfo, offset: int) -> Iterator[tuple[Entry, BinaryIO | None]]:
        mode = member.mode & 0o7777
        if member.isdir():
            yield Entry(path, "directory", mode), None
        elif member.issym():
            yield Entry(path, "symlink", target=member.linkname), None
        else:
            content = self._tar.extractfile(member)
            if content is None:  # A second name of something that is not in the archive.
                return
            with content:
                size = self._tar.getmember(member.linkname).size if member.islnk() else member.size
                whole = Entry(path, "file", mode, size, version=f"{member.mtime:x}-{size:x}-{member.chksum:x}")
                offset = offset if offset < size else 0
                content.seek(offset)
                for part in whole.parts(offset):
                    yield part, cast(BinaryIO, content)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    for member in tar:
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if ".." not in parts and (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            yield "/".join(parts), member


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]
