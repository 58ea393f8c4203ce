"""The format in which files and folders travel: a stream of entries, each verified, with an end that cannot be missed.

A bundle is one line of magic, then for each entry a line of JSON, for a file followed by its bytes and a line of JSON with
their digest, and at last a line that counts the entries::

    marketplace-hpc-bundle/1
    {"path": "", "type": "directory", "mode": 493}
    {"path": "in/a.txt", "type": "file", "mode": 420, "size": 2}
    hi
    {"digest": "sha-256:8f434346…"}
    {"path": "in/b", "type": "symlink", "target": "a.txt"}
    {"path": "in/large", "type": "file", "mode": 420, "size": 300000, "offset": 262144, "length": 37856, "version": "5f…"}
    … 37856 bytes …
    {"digest": "sha-256:0d1b…"}
    {"end": 4}

(the line break after ``hi`` is part of the digest's line, not of the file). Both sides hold one chunk at a time, whatever
a file's size. The digest comes *after* the bytes, so that the sender reads a file once; a receiver must therefore use the
bytes only when :meth:`Reader.__iter__` has gone past it. Paths are relative, ``/``-separated, ``""`` for the root; bytes
that are not UTF-8 travel as surrogate escapes (PEP 383).

A file may come as *parts*, entries with ``offset`` and ``length``, in order and without gaps: what was verified before a
bundle broke off is kept, and the next bundle goes on from there. ``version`` changes when the file does, so that parts of
two states of a file are never put together. A bundle that ends before everything was said has ``"more": true`` in its last
line. Parts begin at multiples of :data:`PART`. What goes wrong when a bundle is under way already, such as a file in a folder
that may not be read, is its last line instead: ``{"error": {…}}``, as an answer would have it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import BinaryIO, Literal

from aiida_marketplace_hpc.errors import GatewayError, IntegrityError, from_wire

MAGIC = b"marketplace-hpc-bundle/1\n"
MEDIA_TYPE = "application/x-marketplace-hpc-bundle"
CHUNK = 256 * 1024
"""Bytes read and hashed at a time."""
PART = CHUNK
"""Bytes of one part of a large file, but for its last: what is verified, kept and, if need be, sent again at a time."""
_MAX_LINE = 64 * 1024

EntryType = Literal["file", "directory", "symlink"]


@dataclass(frozen=True)
class Entry:
    """One file, folder or symbolic link.

    :param path: relative to the bundle's root, ``""`` for the root itself.
    :param mode: permission bits, such as ``0o644``; meaningless for links.
    :param size: bytes; only for files.
    :param target: where a symbolic link points, verbatim.
    :param offset: where in the file this part begins, in bytes.
    :param length: bytes of this part; ``None``: the entry is the whole file.
    :param version: changes when the file does; only for parts.
    """

    path: str
    type: EntryType
    mode: int = 0
    size: int = 0
    target: str = ""
    offset: int = 0
    length: int | None = None
    version: str = ""

    @property
    def end(self) -> int:
        """Where in the file the bytes of this entry end."""
        return self.size if self.length is None else self.offset + self.length

    def parts(self, offset: int = 0) -> Iterator[Entry]:
        """The parts of this file from ``offset`` on; of a small one from its beginning on, the file itself.

        :param offset: a multiple of :data:`PART`, at most the size.
        """
        if self.size <= PART and not offset:
            yield self
            return
        while offset < self.size:
            length = min(PART, self.size - offset)
            yield replace(self, offset=offset, length=length)
            offset += length

    def to_line(self) -> bytes:
        fields: dict[str, object] = {"path": self.path, "type": self.type}
        if self.type == "symlink":
            fields["target"] = self.target
        else:
            fields["mode"] = self.mode
        if self.type == "file":
            fields["size"] = self.size
        if self.length is not None:
            fields |= {"offset": self.offset, "length": self.length, "version": self.version}
        return json.dumps(fields).encode("ascii") + b"\n"


def header_digest_of(content: bytes) -> str:
    """The digest of ``content`` as the header ``Repr-Digest`` has it."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


def digest_of(data: bytes) -> str:
    """The digest of ``data`` in the form used everywhere on the wire: ``sha-256:`` and 64 hexadecimal digits."""
    return f"sha-256:{hashlib.sha256(data).hexdigest()}"


def write(
    entries: Iterable[tuple[Entry, BinaryIO | None]], *, limit: int | None = None
) -> Generator[bytes, None, None]:
    """Yield a bundle chunk by chunk.

    :param entries: each entry with the open file of its content (``None`` for folders and links), read from where it
        stands and not closed: a generator that opens them is closed itself, wherever the bundle ends.
    :param limit: bytes after which no further entry is begun; the bundle then says that there is more.
    :raises IntegrityError: when a file has fewer bytes than announced; the bundle then has no end, which the receiver sees.
    """
    yield MAGIC
    count = written = 0
    more = False
    with closing(entries) if isinstance(entries, Generator) else nullcontext():
        listed = iter(entries)
        while True:
            try:
                entry, content = next(listed)
            except StopIteration:
                break
            except GatewayError as exc:
                yield json.dumps({"error": exc.to_wire()}).encode("ascii") + b"\n"
                return
            if limit is not None and written >= limit:
                more = True
                break
            count += 1
            line = entry.to_line()
            written += len(line)
            yield line
            if content is not None:
                for chunk in _content(entry, content):
                    written += len(chunk)
                    yield chunk
    yield end_line(count, more)


def _content(entry: Entry, content: BinaryIO) -> Iterator[bytes]:
    digest = hashlib.sha256()
    left = entry.end - entry.offset
    while left:
        chunk = content.read(min(CHUNK, left))
        if not chunk:
            raise IntegrityError(f"{entry.path or 'the file'} shrank while it was being sent: {left} bytes missing")
        digest.update(chunk)
        left -= len(chunk)
        yield chunk
    yield digest_line(f"sha-256:{digest.hexdigest()}")


def length_of(entries: Iterable[Entry]) -> int:
    """The number of bytes of the bundle that :func:`write` makes of these entries, so that it can be announced."""
    count = 0
    length = len(MAGIC)
    for entry in entries:
        count += 1
        length += len(entry.to_line())
        if entry.type == "file":
            length += entry.end - entry.offset + len(digest_line(digest_of(b"")))
    return length + len(end_line(count))


def digest_line(digest: str) -> bytes:
    """The line that follows the bytes of a file or part."""
    return b'\n{"digest": "%s"}\n' % digest.encode("ascii")


def end_line(count: int, more: bool = False) -> bytes:
    """The last line."""
    return b'{"end": %d%s}\n' % (count, b', "more": true' if more else b"")


class Reader:
    """Read a bundle: iterate over ``(entry, chunks)``, and consume ``chunks`` before going on.

    :param read: called with a number of bytes, returns at most so many, ``b""`` at the end of the stream.
    :param running: the digest of what came before; the lines then have the digest of everything up to them.
    :raises IntegrityError: (while iterating) for a wrong digest, a wrong count, anything malformed, or a missing end.
    :raises GatewayError: (while iterating) what went wrong on the other side.
    """

    def __init__(self, read: Callable[[int], bytes], *, running: hashlib._Hash | None = None) -> None:
        self._read = read
        self._buffer = bytearray()
        self._running = running
        self.more = False
        """Whether the bundle, when it has ended, said that there is more."""

    def __iter__(self) -> Iterator[tuple[Entry, Iterator[bytes]]]:
        if self._line() != MAGIC:
            raise IntegrityError("this is not a bundle; a proxy on the way may have replaced the body")
        count = 0
        while True:
            fields = self._json()
            if "error" in fields:
                raise from_wire(0, fields["error"])
            if "end" in fields:
                if fields["end"] != count:
                    raise IntegrityError(f"the bundle ends after {count} entries but announces {fields['end']}")
                self.more = fields.get("more") is True
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
        digest = hashlib.sha256() if self._running is None else self._running
        left = entry.end - entry.offset
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
        return _part(Entry(path, "file", mode & 0o7777, size), fields)
    if kind == "directory":
        return Entry(path, "directory", mode & 0o7777)
    if kind == "symlink":
        return Entry(path, "symlink", target=target)
    raise IntegrityError(f"the bundle has an entry of unknown type {kind!r}")


def _part(whole: Entry, fields: dict[str, object]) -> Entry:
    if "length" not in fields:
        return whole
    offset, length, version = fields.get("offset"), fields["length"], fields.get("version", "")
    if (
        not isinstance(offset, int)
        or not isinstance(length, int)
        or not isinstance(version, str)
        or not 0 <= length <= PART
        or offset < 0
        or offset % PART
        or offset + length > whole.size
    ):
        raise IntegrityError("the bundle has a malformed part of a file")
    return replace(whole, offset=offset, length=length, version=version)
