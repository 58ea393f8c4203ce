"""Files and folders, to the cluster and back: one request each, verified, with one chunk in memory at a time.

A file goes up as a raw body whose digest was announced before; a folder as a bundle of announced length. Whatever comes
down comes as a bundle, which says itself whether it is a file or a folder, so that nobody has to ask first.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import shutil
import stat
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.client.answer import Answer
from aiida_marketplace_hpc.client.folder import Destination, Progress, Received, Receiver, Source, walk
from aiida_marketplace_hpc.errors import IntegrityError

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.gateway import HpcGateway, Place

Local = str | os.PathLike[str]

_CHUNK = bundle.CHUNK
_OCTETS = "application/octet-stream"


def put_file(
    gateway: HpcGateway,
    local: Local,
    remote: str | Place,
    *,
    mode: int | None = None,
    overwrite: bool = True,
    into: str | None = None,
    parents: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Upload one file. May be repeated if ``overwrite`` is set.

    The file is read twice, first for its digest, with which the gateway verifies what arrives before the file gets its name.

    :param remote: absolute path on the cluster, or a place in a job's folder.
    :param mode: permission bits; ``None``: the gateway's default.
    :param overwrite: replace a file of that name; else it is refused.
    :param into: the name to use inside ``remote``, should that be a folder.
    :param parents: make missing folders on the way.
    :param progress: called with the number of bytes that were just sent.
    :return: the gateway's answer: ``path`` (where the file is), ``size`` in bytes, ``digest``.
    :raises OSError: the local file cannot be read, or is not a file.
    :raises IntegrityError: the local file changed meanwhile, or arrived wrong; it did not get its name.
    :raises FileError: the cluster's file system refuses.
    :raises MarketplaceHpcError: the call failed otherwise.
    """
    gateway.require("digest")
    place = gateway.place(remote)
    body = FileBody(Path(local), progress)
    answer = gateway.upload(
        place,
        lambda: body,
        content_type=_OCTETS,
        parameters={"digest": body.digest, "mode": mode, "overwrite": overwrite, "into": into, "parents": parents},
        repeatable=overwrite,
    )
    if answer.get("digest", body.digest) != body.digest:
        raise IntegrityError(f"{local} arrived on the cluster with a wrong digest: upload it again")
    return answer


def put_tree(
    gateway: HpcGateway,
    local: Local,
    remote: str | Place,
    *,
    dereference: bool = True,
    overwrite: bool = True,
    into: str | None = None,
    parents: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Upload a folder with everything in it: hidden and empty things, modes, odd names.

    May be repeated if ``overwrite`` is set and ``into`` is not (the second time, the folder would go inside the first).

    :param remote: absolute path on the cluster, or a place in a job's folder; it becomes the folder.
    :param dereference: send what symbolic links point to; else the links.
    :param overwrite: add to a folder that is there; else it is refused.
    :param into: the name to use inside ``remote``, should that be a folder already.
    :param parents: make missing folders on the way.
    :param progress: called with the number of bytes that were just sent.
    :return: the gateway's answer: ``path`` (where the folder is), ``entries`` (how many).
    :raises OSError: something local cannot be read, is no file, folder or link, or a link leads nowhere or in a circle.
    :raises IntegrityError: a local file shrank meanwhile, or something arrived wrong.
    :raises FileError: the cluster's file system refuses.
    :raises MarketplaceHpcError: the call failed otherwise.
    """
    gateway.require("bundle")
    place = gateway.place(remote)
    sources = list(walk(Path(local), dereference=dereference))
    body = BundleBody(sources, progress)
    return gateway.upload(
        place,
        lambda: body,
        content_type=bundle.MEDIA_TYPE,
        parameters={"bundle": True, "overwrite": overwrite, "into": into, "parents": parents},
        repeatable=overwrite and into is None,
    )


def get(
    gateway: HpcGateway,
    remote: str | Place,
    local: Local | Destination,
    *,
    dereference: bool = True,
    overwrite: bool = True,
    progress: Progress | None = None,
) -> Received:
    """Download a file or a folder, whichever it is, in one request. May be repeated.

    Every file gets its name only when its digest was verified. When the transfer breaks off for good, the files of a folder
    that are whole stay; nothing else does.

    :param remote: absolute path on the cluster, or a place in a job's folder.
    :param local: the name that it gets; or a function that is called once with the first entry, whose type is that of the
        whole, and chooses a name by it (as :func:`~aiida_marketplace_hpc.client.folder.inside_if_folder` does) or refuses
        it with an :class:`OSError`.
    :param dereference: fetch what symbolic links inside a folder point to; else the links.
    :param overwrite: replace a local file, or add to a local folder; else :class:`FileExistsError`.
    :param progress: called with the number of bytes that have just arrived.
    :raises OSError: the local disk refuses.
    :raises IntegrityError: something arrived wrong, or tries to leave the place that it was sent to.
    :raises FileError: there is no such thing (``ENOENT``), or the cluster's file system refuses.
    :raises MarketplaceHpcError: the call failed otherwise.
    """
    gateway.require("bundle")
    receiver = Receiver(local if callable(local) else _always(Path(local)), overwrite=overwrite, progress=progress)
    return gateway.download(
        gateway.place(remote),
        lambda answer: receiver.receive(answer.read),
        parameters={"bundle": True, "dereference": dereference},
    )


def _always(path: Path) -> Destination:
    return lambda entry: path


def read(gateway: HpcGateway, remote: str | Place) -> bytes:
    """Download one file into memory, verified. May be repeated.

    :raises IsADirectoryError: it is a folder.
    :raises FileError: there is no such file, or it cannot be read.
    :raises IntegrityError: it arrived with a wrong digest.
    """

    def content(size_limited_read: Callable[[int], bytes]) -> bytes:
        pieces: list[bytes] = []
        for entry, chunks in bundle.Reader(size_limited_read):
            if entry.type != "file" or entry.path:
                raise IsADirectoryError(f"{gateway.place(remote).path} is a folder: use get")
            pieces.extend(chunks)
        return b"".join(pieces)

    gateway.require("bundle")
    return gateway.download(gateway.place(remote), lambda answer: content(answer.read), parameters={"bundle": True})


def read_range(gateway: HpcGateway, remote: str | Place, offset: int, length: int) -> bytes:
    """Download a piece of a file into memory, without the rest of it travelling. May be repeated.

    Verified where the gateway says the digest of the piece beforehand, which it does up to 1 MiB.

    :param remote: absolute path on the cluster, or a place in a job's folder.
    :param offset: the first byte, counted from 0.
    :param length: bytes.
    :return: the bytes that are there: fewer than ``length`` at the end of the file, none past it.
    :raises NotSupported: the gateway sends only whole files.
    :raises FileError: there is no such file, it is a folder (``EISDIR``), or it cannot be read.
    :raises IntegrityError: it arrived wrong.
    """

    def content(answer: Answer) -> bytes:
        piece = bytearray()
        while chunk := answer.read(_CHUNK):
            piece += chunk
            if len(piece) > length:
                raise IntegrityError(f"more than the {length} bytes that were asked for arrived", retryable=False)
        if answer.digest is not None and answer.digest != bundle.header_digest_of(bytes(piece)):
            raise IntegrityError(f"a piece of {place.path} arrived with a wrong digest")
        return bytes(piece)

    gateway.require("ranges")
    place = gateway.place(remote)
    return gateway.download(place, content, parameters={"offset": offset, "length": length})


class FileBody:
    """A local file as a body, with its digest.

    :raises OSError: it cannot be read, or is not a file.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        self._path = path
        self._progress = progress
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"{path} is a folder")
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for its other end.
            raise shutil.SpecialFileError(f"{path} is not a regular file")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            self._signature = _signature(file.fileno())
            self._size = 0
            while chunk := file.read(_CHUNK):
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
            if _signature(file.fileno()) != self._signature:
                raise self._changed()
            while left:
                chunk = file.read(min(_CHUNK, left))
                if not chunk:
                    raise self._changed()
                left -= len(chunk)
                digest.update(chunk)
                if not left and f"sha-256:{digest.hexdigest()}" != self.digest:
                    raise self._changed()
                yield chunk
                if self._progress is not None:
                    self._progress(len(chunk))

    def _changed(self) -> IntegrityError:
        return _local_change(f"{self._path} changed while it was being uploaded: upload it again when it is complete")


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
            for chunk in bundle.write((source.entry, source.open()) for source in self._sources):
                yield chunk
                if self._progress is not None:
                    self._progress(len(chunk))
        except IntegrityError as exc:
            raise _local_change(exc.message) from exc


class FormBody:
    """A file as the published form: all that a classic gateway understands."""

    def __init__(self, filename: str, file: FileBody) -> None:
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


def _local_change(message: str) -> IntegrityError:
    # Not repeated by itself: the next attempt would announce the same size and digest again.
    return IntegrityError(message, retryable=False)


def _signature(descriptor: int) -> tuple[int, int, int]:
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns
