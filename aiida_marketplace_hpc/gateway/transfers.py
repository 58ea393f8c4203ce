"""Folders and large files on their way in and out, as bundles.

A folder comes in as bundles of whole files, each of which appears when it is verified. A large file comes in parts, in as many
requests as it takes; what arrived is kept (:mod:`~aiida_marketplace_hpc.gateway.unfinished`) and the file appears when it is
whole. What goes out goes in one order, so that a receiver that lost the connection can name the place to go on from.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from aiida_marketplace_hpc.bundle import Entry, Reader
from aiida_marketplace_hpc.bundle import write as bundled
from aiida_marketplace_hpc.errors import FileError, IntegrityError, InvalidRequest
from aiida_marketplace_hpc.gateway.descriptors import LIST, MAX_DEPTH, Identity, identity_of, open_regular, told
from aiida_marketplace_hpc.gateway.draft import existing_target, opened
from aiida_marketplace_hpc.gateway.files import Files, path_below
from aiida_marketplace_hpc.gateway.roots import PRIVATE
from aiida_marketplace_hpc.gateway.storage import Read
from aiida_marketplace_hpc.gateway.unfinished import Content, InUse, Keep, unfinished

_DIGEST = re.compile(r"sha-256:[0-9a-f]{64}")
Item = tuple[Entry, BinaryIO | None]


@dataclass(frozen=True)
class Position:
    """How far a bundle on its way out got.

    :param path: the last entry that was received.
    :param offset: how much of it, if it is a file that was not received to its end; ``None``: all.
    """

    path: str
    offset: int | None = None


class Transfers:
    """What one caller can send and fetch. Errors are those of :class:`~aiida_marketplace_hpc.gateway.files.Files`."""

    def __init__(self, files: Files, keep: Keep) -> None:
        self._files = files
        self._keep = keep

    def forced(self) -> Transfers:
        """The same for somebody who means it, also where a live job of theirs is concerned."""
        return Transfers(self._files.forced(), self._keep)

    # In

    def write_folder(
        self, path: str, read: Read, *, overwrite: bool = True, into: str | None = None, parents: bool = False
    ) -> dict[str, Any]:
        """Write a folder from a bundle; each file appears when it is whole and verified.

        :param overwrite: whether a folder that exists may be written into, and its files replaced.
        :param into: the name to use should ``path`` be a folder.
        :param parents: make missing folders on the way.
        :raises IntegrityError: for a wrong digest or a bundle that broke off; files that came before it are there.
        """
        files = self._files
        target = files.inside(path, into) if into else path
        tops = {root.path for root in files.roots}
        count = 0
        modes: list[tuple[str, int]] = []
        for entry, chunks in Reader(read):
            if entry.length is not None:
                raise InvalidRequest("parts of a file are uploaded by themselves, with the file's total and digest")
            count += 1
            where = path_below(target, entry.path)
            if entry.type == "directory":
                files.mkdir(where, parents=parents, exist_ok=overwrite, mode=0o700 | entry.mode)
                if where.rstrip("/") not in tops:  # What is put right into a root does not change the root itself.
                    modes.append((where, entry.mode))
            elif entry.type == "symlink":
                there = None
                with suppress(FileError):
                    there = files.stat(where)["type"]
                if overwrite and there not in (None, "directory"):
                    files.remove(where, missing_ok=True)
                files.symlink(where, entry.target)
            else:
                with files.roots.place(where) as place, told(where), files.draft(place, overwrite) as draft:
                    for chunk in chunks:
                        draft.write(chunk)
                    # Only now, past the digest, is the file known to be whole; the reader raises if it is not.
                    draft.commit(entry.mode)
        for where, mode in reversed(modes):
            files.chmod(where, mode)
        return {"path": target, "entries": count}

    def write_parts(
        self,
        path: str,
        read: Read,
        *,
        total: int,
        digest: str,
        offset: int | None = None,
        restart: bool = False,
        mode: int | None = None,
        overwrite: bool = True,
        into: str | None = None,
        parents: bool = False,
    ) -> dict[str, Any]:
        """Take the next parts of a large file, or only say how much is held; put the file there when it is whole.

        May be repeated, with any outcome: what counts is what is held.

        :param read: a bundle of parts, each of whose digests covers the file up to that part's end.
        :param total: the file's size in bytes.
        :param digest: the file's digest.
        :param offset: where the bundle begins; ``None``: there is none, the caller asks.
        :param restart: drop what is held before: the caller found it to be wrong.
        :param mode: permission bits; without it a replaced file keeps its own and a new one gets the default.
        :param into: the name to use should ``path`` be a folder.
        :param parents: make missing folders on the way.
        :return: ``complete``; if so, ``path``, ``size`` and ``digest`` of the file. Else ``held`` (bytes), their ``digest``,
            and ``wait``, if nothing should be sent before asking again.
        :raises IntegrityError: a part arrived wrong, or not at all; those before it are held.
        """
        if not _DIGEST.fullmatch(digest):
            raise InvalidRequest("the digest of a file in parts is sha-256: and 64 hexadecimal digits")
        target = self._files.inside(path, into) if into else path
        with self._files.roots.place(target, make_parents=parents) as place, told(target):
            existing_target(place.writable(), self._files.protection, overwrite)
            asking = offset is None and not restart
            try:
                with unfinished(place, total, digest, self._keep, asking=asking) as content:
                    if restart:
                        content.discard()
                    content.check()
                    if not content.checking:
                        if offset is None or not content.held:
                            content.adopt()
                        if offset == content.held and not content.copying:
                            _receive(content, read)
                    if content.held == total:
                        if not content.right:
                            content.discard()
                            raise IntegrityError(
                                f"{target} arrived with a wrong digest: nothing was written; send it again"
                            )
                        content.move_to(place, self._files.protection, mode, overwrite)
                        return {"complete": True, "path": place.path, "size": total, "digest": digest}
                    wait = content.checking or content.copying
                    return {"complete": False, "held": content.held, "digest": content.digest, "wait": wait}
            except InUse as exc:
                return {"complete": False, "held": exc.held, "digest": None, "wait": True}

    # Out

    def send(
        self, path: str, *, dereference: bool = True, position: Position | None = None, limit: int | None = None
    ) -> Generator[bytes, None, None]:
        """Open a file or folder for reading as a bundle.

        Errors of the path itself are raised here, not when the first chunk is taken.

        :param position: go on from there.
        :param limit: bytes after which the bundle ends and says that there is more.
        """
        with self._files.roots.place(path) as place, told(path):
            attributes = place.lstat()
            if not stat.S_ISDIR(attributes.st_mode):
                content = open_regular(place)
                chunks = _holding(content, bundled(_parts("", content, position), limit=limit))
                next(chunks)
                return chunks
            top = place.path
        return bundled(self._walk(top, dereference, position), limit=limit)

    def _walk(self, top: str, dereference: bool, position: Position | None) -> Generator[Item, None, None]:
        """The entries of a folder, parents before children and in the order of names, opened one by one as they are sent."""
        seek = None if position is None else [part for part in position.path.split("/") if part]
        pending: list[tuple[str, str, list[str] | None, tuple[Identity, ...]]] = [("", top, seek, ())]
        while pending:
            relative, path, seek, above = pending.pop()
            with self._files.roots.place(path, follow=dereference or not relative) as place, told(path):
                attributes = place.lstat()
                mode = stat.S_IMODE(attributes.st_mode)
                content = None
                if stat.S_ISLNK(attributes.st_mode):
                    target = os.readlink(place.name, dir_fd=place.folder)
                    entry = Entry(relative, "symlink", target=target)
                elif stat.S_ISDIR(attributes.st_mode):
                    identity = identity_of(attributes)
                    if len(above) > MAX_DEPTH or identity in above:  # A link back would never end.
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    with opened(place.name, LIST, place.folder) as folder:
                        names = sorted(os.listdir(folder), reverse=True)
                    above = (*above, identity)
                    for name in names:
                        if place.name == "." and name == PRIVATE:
                            continue
                        if seek and name < seek[0]:
                            break
                        further = seek[1:] if seek and name == seek[0] else None
                        pending.append((f"{relative}/{name}" if relative else name, f"{path}/{name}", further, above))
                    entry = Entry(relative, "directory", mode)
                else:
                    content = open_regular(place)
            if content is not None:
                if seek is None:
                    yield from _parts(relative, content, None)
                elif not seek:
                    yield from _parts(relative, content, position)
                else:
                    content.close()
            elif seek is None:
                yield entry, None


def _holding(content: BinaryIO, chunks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
    # A generator that nobody has begun closes nothing when it is closed: this one is begun at once.
    with content, closing(chunks):
        yield b""
        yield from chunks


def _receive(content: Content, read: Read) -> None:
    reader = Reader(read, running=(digest := content.running()))
    for entry, chunks in reader:
        if entry.type != "file" or entry.size != content.size or entry.offset != content.held:
            raise InvalidRequest("the body of an upload in parts has something else in it than the file's next part")
        part = b"".join(chunks)
        content.append(part, digest)


def _parts(relative: str, content: BinaryIO, position: Position | None) -> Generator[Item, None, None]:
    """The parts of an open file from a position on; closes it."""
    with content:
        status = os.fstat(content.fileno())
        # The inode, too: of a file that was replaced, times and size may be the same.
        version = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"
        whole = Entry(relative, "file", stat.S_IMODE(status.st_mode), status.st_size, version=version)
        offset = 0
        if position is not None:
            if position.offset is None:
                return
            # A file that has become shorter is another one: from its beginning.
            offset = position.offset if position.offset < status.st_size else 0
        content.seek(offset)
        for part in whole.parts(offset):
            yield part, content
