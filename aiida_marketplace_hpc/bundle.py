"""The format in which files and folders travel: a stream of entries, each verified, with an end that cannot be missed.

A bundle is one line of magic, then for each entry a line of JSON, for a file followed by exactly ``size`` bytes and a line
of JSON with their digest, and at last a line that counts the entries::

    marketplace-hpc-bundle/1
    {"path": "", "type": "directory", "mode": 493}
    {"path": "in/a.txt", "type": "file", "mode": 420, "size": 2}
    hi
    {"digest": "sha-256:8f434346…"}
    {"path": "in/b", "type": "symlink", "target": "a.txt"}
    {"end": 3}

(the line break after ``hi`` is part of the digest's line, not of the file). Both sides hold one chunk at a time, whatever
a file's size. The digest comes *after* the bytes, so that the sender reads a file once; a receiver must therefore put a
file under its final name only when :meth:`Reader.__iter__` has gone past it. Paths are relative, ``/``-separated, ``""``
for the root; bytes that are not UTF-8 travel as surrogate escapes (PEP 383).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import BinaryIO, Literal

from aiida_marketplace_hpc.errors import IntegrityError

MAGIC = b"marketplace-hpc-bundle/1\n"
MEDIA_TYPE = "application/x-marketplace-hpc-bundle"
CHUNK = 256 * 1024
"""Bytes read and hashed at a time."""
_MAX_LINE = 64 * 1024

EntryType = Literal["file", "directory", "symlink"]


@dataclass(frozen=True)
class Entry:
    """One file, folder or symbolic link.

    :param path: relative to the bundle's root, ``""`` for the root itself.
    :param mode: permission bits, such as ``0o644``; meaningless for links.
    :param size: bytes; only for files.
    :param target: where a symbolic link points, verbatim.
    """

    path: str
    type: EntryType
    mode: int = 0
    size: int = 0
    target: str = ""

    def to_line(self) -> bytes:
        fields: dict[str, object] = {"path": self.path, "type": self.type}
        if self.type == "symlink":
            fields["target"] = self.target
        else:
            fields["mode"] = self.mode
        if self.type == "file":
            fields["size"] = self.size
        return json.dumps(fields).encode("ascii") + b"\n"


def header_digest_of(content: bytes) -> str:
    """The digest of ``content`` as the header ``Repr-Digest`` has it."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


def digest_of(data: bytes) -> str:
    """The digest of ``data`` in the form used everywhere on the wire: ``sha-256:`` and 64 hexadecimal digits."""
    return f"sha-256:{hashlib.sha256(data).hexdigest()}"


def write(entries: Iterable[tuple[Entry, BinaryIO | None]]) -> Generator[bytes, None, None]:
    """Yield a bundle chunk by chunk.

    :param entries: each entry with the open file of its content (``None`` for folders and links). The file is closed.
    :raises IntegrityError: when a file has fewer bytes than announced; the bundle then has no end, which the receiver sees.
    """
    yield MAGIC
    count = 0
    for entry, content in entries:
        count += 1
        # Around the first line, too: whoever takes the chunks may stop there, and the file must not stay open.
        with content or nullcontext():
            yield entry.to_line()
            if content is not None:
                yield from _content(entry, content)
    yield _end_line(count)


def _content(entry: Entry, content: BinaryIO) -> Iterator[bytes]:
    digest = hashlib.sha256()
    left = entry.size
    while left:
        chunk = content.read(min(CHUNK, left))
        if not chunk:
            raise IntegrityError(f"{entry.path or 'the file'} shrank while it was being sent: {left} bytes missing")
        digest.update(chunk)
        left -= len(chunk)
        yield chunk
    yield _digest_line(digest)


def length_of(entries: Iterable[Entry]) -> int:
    """The number of bytes of the bundle that :func:`write` makes of these entries, so that it can be announced."""
    count = 0
    length = len(MAGIC)
    for entry in entries:
        count += 1
        length += len(entry.to_line())
        if entry.type == "file":
            length += entry.size + len(_digest_line(hashlib.sha256()))
    return length + len(_end_line(count))


def _digest_line(digest: hashlib._Hash) -> bytes:
    return b'\n{"digest": "sha-256:%s"}\n' % digest.hexdigest().encode("ascii")


def _end_line(count: int) -> bytes:
    return b'{"end": %d}\n' % count


class Reader:
    """Read a bundle: iterate over ``(entry, chunks)``, and consume ``chunks`` before going on.

    :param read: called with a number of bytes, returns at most so many, ``b""`` at the end of the stream.
    :raises IntegrityError: (while iterating) for a wrong digest, a wrong count, anything malformed, or a missing end.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._buffer = bytearray()

    def __iter__(self) -> Iterator[tuple[Entry, Iterator[bytes]]]:
        if self._line() != MAGIC:
            raise IntegrityError("this is not a bundle; a proxy on the way may have replaced the body")
        count = 0
        while True:
            fields = self._json()
            if "end" in fields:
                if fields["end"] != count:
                    raise IntegrityError(f"the bundle ends after {count} entries but announces {fields['end']}")
                return
            entry = _entry(fields)
            count += 1
            if entry.type != "file":
                yield entry, iter(())
                continue
            chunks = self._content(entry)
            yield entry, chunks
            for _ in chunks:  # What a caller left unread is read all the same: the digest counts.
                pass

    def _content(self, entry: Entry) -> Iterator[bytes]:
        digest = hashlib.sha256()
        left = entry.size
        while left:
            chunk = self._take(min(CHUNK, left))
            if not chunk:
                raise IntegrityError(f"the transfer broke off inside {entry.path or 'the file'}, {left} bytes missing")
            digest.update(chunk)
            left -= len(chunk)
            yield chunk
        if self._line() != b"\n" or self._json().get("digest") != f"sha-256:{digest.hexdigest()}":
            raise IntegrityError(f"{entry.path or 'the file'} arrived with a wrong digest")

    def _take(self, size: int) -> bytes:
        if self._buffer:
            chunk = bytes(self._buffer[:size])
            del self._buffer[:size]
            return chunk
        return self._read(size)

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _MAX_LINE:
                raise IntegrityError("the bundle has an over-long line")
            chunk = self._read(CHUNK)
            if not chunk:
                raise IntegrityError("the transfer broke off before the end of the bundle")
            self._buffer += chunk
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    def _json(self) -> dict[str, object]:
        try:
            fields = json.loads(self._line())
        except ValueError as exc:
            raise IntegrityError("the bundle has a malformed line") from exc
        if not isinstance(fields, dict):
            raise IntegrityError("the bundle has a malformed line")
        return fields


def _entry(fields: dict[str, object]) -> Entry:
    path, kind = fields.get("path"), fields.get("type")
    mode, size, target = fields.get("mode", 0), fields.get("size", 0), fields.get("target", "")
    if (
        not isinstance(path, str)
        or not isinstance(target, str)
        or not isinstance(mode, int)
        or not isinstance(size, int)
        or size < 0
    ):
        raise IntegrityError("the bundle has a malformed entry")
    if kind == "file":
        return Entry(path, "file", mode & 0o7777, size)
    if kind == "directory":
        return Entry(path, "directory", mode & 0o7777)
    if kind == "symlink":
        return Entry(path, "symlink", target=target)
    raise IntegrityError(f"the bundle has an entry of unknown type {kind!r}")
