"""What an upload sends: its length is known beforehand, its bytes come one chunk at a time."""

from __future__ import annotations

import hashlib
import os
import posixpath
import shutil
import stat
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import BinaryIO

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.bundle import PART, Entry
from aiida_marketplace_hpc.client.folder import Progress, Source
from aiida_marketplace_hpc.errors import IntegrityError

SEGMENT = 8 * 1024 * 1024
"""Bytes up to which a file travels in one piece, and small files of a folder travel together."""
SMALLEST = 960 * 1024
"""Bytes of the smallest body that is tried; many proxies refuse more than 1 MiB."""
MARGIN = 64
"""Bytes that a bundle may get longer than the sum of its entries: its last line counts them."""
_TEXT = 4 * 1024 * 1024
"""Bytes of a body that travels as text: in a broker's message, which is held in memory as a whole at each of its stations."""
_PIECE = 1024 * 1024
_LINES = 80 * 1024
"""Bytes of what stands around the content of an answer: in a bundle one line more, in a message the headers."""
_OPEN = 64 * 1024 * 1024  # What is lost, or held in a proxy's memory, is bounded; that many bytes hide a round trip.


class BodyLimit:
    """How large the bodies of one gateway's requests and answers may be, in bytes of content, as far as is known.

    What travels as base64 takes a third more on the way. ``size`` is the largest body, ``segment`` that up to which a file
    travels in one piece, ``smallest`` the smallest that is tried; ``answer`` the length that is asked for at once, ``None``
    for all; ``piece`` the same for a piece of a file.

    :param proxied: a platform's proxy is on the way, which may hold bodies in memory.
    """

    def __init__(self, *, proxied: bool) -> None:
        self._proxied = proxied
        self._suits: tuple[bool, int | None, int | None] = (False, None, None)
        self._begin()

    def suit(self, *, coded: bool, answer_limit: int | None = None, whole: int | None = None) -> None:
        """Fit what was found out about the way; what was learnt on the same way is kept.

        :param coded: content travels as base64.
        :param answer_limit: bytes of an answer, as it travels.
        :param whole: bytes of a file that the gateway passes on in one piece, where it has less patience for larger ones.
        """
        if self._suits != (coded, answer_limit, whole):
            self._suits = (coded, answer_limit, whole)
            self._begin()

    def _begin(self) -> None:
        coded, answer_limit, whole = self._suits
        self.smallest = SMALLEST // 4 * 3 if coded else SMALLEST
        self.segment = max(self.smallest, min(_TEXT if coded else SEGMENT, whole or SEGMENT))
        self.size = SEGMENT if self._proxied else _OPEN
        self.answer = SEGMENT if self._proxied else None
        self.piece: int | None = None
        if coded:
            self.size = _TEXT
            # A bundle ends with the entry that reaches the length.
            fits = _TEXT if answer_limit is None else answer_limit // 4 * 3 - PART - _LINES
            self.answer = max(1, min(_TEXT, fits))
            # Up to that, a piece comes with its digest.
            self.piece = max(1, min(_PIECE, fits))

    def refused(self, size: int) -> bool:
        """Note that a body of that size was refused as too large; whether a smaller one can be tried."""
        if size <= self.smallest:
            return False
        self.size = min(self.size, self.segment if size > self.segment else self.smallest)
        return True


class FileBody:
    """A local file as a body, with its digest.

    :raises OSError: it cannot be read, or is not a file.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        self._path = path
        self._progress = progress
        digest = hashlib.sha256()
        with open_regular(path) as file:
            self._signature = _signature(file)
            self._size = 0
            while chunk := file.read(bundle.CHUNK):
                digest.update(chunk)
                self._size += len(chunk)
        self.digest = f"sha-256:{digest.hexdigest()}"

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Generator[bytes, None, None]:
        """Yield the file chunk by chunk.

        :raises IntegrityError: it is not what it was when its digest was taken. The last chunk is kept back until that is
            known, so that a wrong body is never complete.
        """
        digest = hashlib.sha256()
        left = self._size
        with self._path.open("rb") as file:
            if _signature(file) != self._signature:
                raise changed(self._path)
            while left:
                chunk = file.read(min(bundle.CHUNK, left))
                if not chunk:
                    raise changed(self._path)
                left -= len(chunk)
                digest.update(chunk)
                if not left and f"sha-256:{digest.hexdigest()}" != self.digest:
                    raise changed(self._path)
                yield chunk
                if self._progress is not None:
                    self._progress(len(chunk))


class BytesBody:
    """Bytes in memory as a body, with their digest."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.digest = f"sha-256:{hashlib.sha256(content).hexdigest()}"

    def __len__(self) -> int:
        return len(self._content)

    def __iter__(self) -> Generator[bytes, None, None]:
        yield self._content


class LargeFile:
    """A local file that is uploaded in parts, with the digest up to the end of each.

    It is read once for that before anything is sent: only the digest of the whole tells whether the gateway holds a piece of
    it already.

    :raises OSError: it cannot be read, or is not a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        digest = hashlib.sha256()
        # Of a file of 4 GiB half a MiB.
        self._digests = bytearray(digest.digest())
        self.size = 0
        with open_regular(path) as file:
            self._signature = _signature(file)
            while chunk := file.read(PART):
                digest.update(chunk)
                self._digests += digest.digest()
                self.size += len(chunk)
        self.digest = f"sha-256:{digest.hexdigest()}"

    def digest_up_to(self, position: int) -> str | None:
        """The digest of the first ``position`` bytes; ``None`` if no part ends there."""
        if position != self.size and position % PART:
            return None
        number = -(-position // PART)
        return f"sha-256:{self._digests[32 * number : 32 * (number + 1)].hex()}"

    def check(self) -> None:
        """Make sure that it is what it was.

        :raises IntegrityError: it is not, for good.
        """
        with self.path.open("rb") as file:
            if _signature(file) != self._signature:
                raise changed(self.path)

    def body(self, offset: int, limit: int, progress: Progress | None = None) -> PartsBody:
        """The parts from ``offset`` on that fit into a body of ``limit`` bytes, but at least one."""
        parts: list[Entry] = []
        length = bundle.length_of([])
        for part in Entry("", "file", size=self.size).parts(offset):
            more = bundle.length_of([part]) - bundle.length_of([])
            if parts and length + more > limit - MARGIN:
                break
            parts.append(part)
            length += more
        return PartsBody(self, parts, progress)


class PartsBody:
    """Some parts of a large file as a body."""

    def __init__(self, file: LargeFile, parts: Sequence[Entry], progress: Progress | None) -> None:
        self._file = file
        self._parts = parts
        self._progress = progress
        self._length = bundle.length_of(parts)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Generator[bytes, None, None]:
        """Yield the bundle chunk by chunk.

        :raises IntegrityError: the file is not what it was when its digests were taken.
        """
        yield bundle.MAGIC
        with self._file.path.open("rb") as content:
            self._file.check()
            content.seek(self._parts[0].offset)
            for part in self._parts:
                yield part.to_line()
                chunk = content.read(part.end - part.offset)
                if len(chunk) != part.end - part.offset:
                    raise changed(self._file.path)
                yield chunk
                yield bundle.digest_line(str(self._file.digest_up_to(part.end)))
                if self._progress is not None:
                    self._progress(len(chunk))
        yield bundle.end_line(len(self._parts))


class BundleBody:
    """Local files and folders as the body of a bundle."""

    def __init__(self, sources: Sequence[Source], progress: Progress | None = None) -> None:
        self._sources = sources
        self._progress = progress
        self._length = bundle.length_of(source.entry for source in sources)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Generator[bytes, None, None]:
        """Yield the bundle chunk by chunk.

        :raises IntegrityError: a file is shorter than it was.
        :raises OSError: a file cannot be read.
        """
        try:
            for chunk in bundle.write(self._opened()):
                yield chunk
                if self._progress is not None:
                    self._progress(len(chunk))
        except IntegrityError as exc:
            raise local_change(exc.message) from exc

    def _opened(self) -> Generator[tuple[Entry, BinaryIO | None], None, None]:
        for source in self._sources:
            if source.entry.type == "file":
                with source.path.open("rb") as content:
                    yield source.entry, content
            else:
                yield source.entry, None


class FormBody:
    """A file as the published form: all that a classic gateway understands."""

    def __init__(self, filename: str, file: FileBody | BytesBody) -> None:
        boundary = f"marketplace-hpc-{file.digest.partition(':')[2][:32]}"
        name = posixpath.basename(filename).encode("utf-8", "surrogateescape")
        for character, escape in ((b'"', b"%22"), (b"\r", b"%0D"), (b"\n", b"%0A")):
            name = name.replace(character, escape)
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self._file = file
        self._head = (
            f"--{boundary}\r\n".encode()
            + b'Content-Disposition: form-data; name="file"; filename="'
            + name
            + b'"\r\nContent-Type: application/octet-stream\r\n\r\n'
        )
        self._tail = f"\r\n--{boundary}--\r\n".encode()

    def __len__(self) -> int:
        return len(self._head) + len(self._file) + len(self._tail)

    def __iter__(self) -> Generator[bytes, None, None]:
        yield self._head
        yield from self._file
        yield self._tail


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading.

    :raises OSError: it cannot be read, or is not a file.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path} is a folder")
    if not stat.S_ISREG(status.st_mode):
        # Opening a pipe would wait for its other end.
        raise shutil.SpecialFileError(f"{path} is not a regular file")
    return path.open("rb")


def changed(path: Path) -> IntegrityError:
    """The error for a local file that is not what it was when its upload began."""
    return local_change(f"{path} changed while it was being uploaded: upload it again when it is complete")


def local_change(message: str) -> IntegrityError:
    """An error that is not repeated by itself: the next attempt would announce the same size and digest again."""
    return IntegrityError(message, retryable=False)


def _signature(file: BinaryIO) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns
