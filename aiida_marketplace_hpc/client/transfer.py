"""Files and folders, to the cluster and back: verified, resumed, with one chunk in memory at a time.

Up to a segment (:class:`~aiida_marketplace_hpc.client.body.BodyLimit`) a file goes up in one request as a raw body whose
digest was announced before, a folder in one request as a bundle; what is larger in parts or segments
(:mod:`~aiida_marketplace_hpc.client.upload`). Whatever comes down comes as a bundle, which says itself whether it is a file or
a folder, so that nobody has to ask first; one that breaks off goes on after the last byte that was verified.
"""

from __future__ import annotations

import os
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.client.answer import Answer
from aiida_marketplace_hpc.client.body import FileBody
from aiida_marketplace_hpc.client.folder import Destination, Progress, Received, Receiver, Skip, walk
from aiida_marketplace_hpc.client.retry import may_repeat
from aiida_marketplace_hpc.client.upload import FolderUpload, LargeUpload
from aiida_marketplace_hpc.errors import ConnectionFailed, DeadlineExceeded, IntegrityError, TooLarge

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.gateway import HpcGateway, Place
    from aiida_marketplace_hpc.client.routes import Value

Local = str | os.PathLike[str]

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
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Upload one file. May be repeated if ``overwrite`` is set.

    The file is read twice, first for its digest, with which the gateway verifies what arrives before the file gets its name.

    :param remote: absolute path on the cluster, or a place in a job's folder.
    :param mode: permission bits; ``None``: the gateway's default.
    :param overwrite: replace a file of that name; else it is refused.
    :param into: the name to use inside ``remote``, should that be a folder.
    :param parents: make missing folders on the way.
    :param force: replace the script or guard of a live job of one's own, too.
    :param progress: called with the number of bytes that were just sent.
    :return: the gateway's answer: ``path`` (where the file is), ``size`` in bytes, ``digest``.
    :raises OSError: the local file cannot be read, or is not a file.
    :raises IntegrityError: the local file changed meanwhile, or arrived wrong; it did not get its name.
    :raises FileError: the cluster's file system refuses, or it would change what belongs to a live job (``EBUSY``).
    :raises MarketplaceHpcError: the call failed otherwise.
    """
    gateway.require("resume")
    place = gateway.place(remote)
    path = Path(local)
    parameters: dict[str, Value] = {
        "mode": mode,
        "overwrite": overwrite,
        "into": into,
        "parents": parents,
        "force": force or None,
    }
    limit = gateway.body_limit
    if path.stat().st_size > min(limit.segment, limit.size):
        return LargeUpload(gateway, path, place, parameters, progress).run()
    body = FileBody(path, progress)
    try:
        answer = gateway.upload(
            place,
            lambda: body,
            content_type=_OCTETS,
            parameters={"digest": body.digest, **parameters},
            repeatable=overwrite,
            once=len(body) > limit.smallest,
        )
    except (TooLarge, ConnectionFailed, IntegrityError) as exc:
        refused = isinstance(exc, TooLarge) and limit.refused(len(body))
        # What a proxy that cannot pass so much on does: it refuses, hangs up, or passes a part on. After a long silence there
        # is no time for another way.
        late = isinstance(exc, DeadlineExceeded)
        if len(body) <= limit.smallest or not (refused or (may_repeat(exc, overwrite) and not late)):
            raise
        return LargeUpload(gateway, path, place, parameters, progress, limit=limit.smallest).run()
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
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Upload a folder with everything in it: hidden and empty things, modes, odd names.

    May be repeated if ``overwrite`` is set and ``into`` is not (the second time, the folder would go inside the first).

    :param remote: absolute path on the cluster, or a place in a job's folder; it becomes the folder.
    :param dereference: send what symbolic links point to; else the links.
    :param overwrite: add to a folder that is there; else it is refused.
    :param into: the name to use inside ``remote``, should that be a folder already.
    :param parents: make missing folders on the way.
    :param force: replace the script or guard of a live job of one's own, too.
    :param progress: called with the number of bytes that were just sent.
    :return: the gateway's answer: ``path`` (where the folder is), ``entries`` (how many).
    :raises OSError: something local cannot be read, is no file, folder or link, or a link leads nowhere or in a circle.
    :raises IntegrityError: a local file shrank meanwhile, or something arrived wrong.
    :raises FileError: the cluster's file system refuses, or it would change what belongs to a live job (``EBUSY``).
    :raises MarketplaceHpcError: the call failed otherwise.
    """
    gateway.require("resume")
    sources = list(walk(Path(local), dereference=dereference))
    parameters: dict[str, Value] = {"overwrite": overwrite, "into": into, "parents": parents, "force": force or None}
    return FolderUpload(gateway, sources, gateway.place(remote), parameters, progress).run()


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
    gateway.require("resume")
    place = gateway.place(remote)
    receiver = Receiver(
        local if callable(local) else _always(Path(local)),
        overwrite=overwrite,
        progress=progress,
        source=f"{gateway.url} {gateway.app_id} {gateway.info().get('username')} {place.jobid}/{place.path}",
    )
    parameters: dict[str, Value] = {"bundle": True, "dereference": dereference, "length": gateway.body_limit.answer}

    def attempt() -> Received:
        while receiver.received is None:
            with suppress(Skip):
                gateway.download(
                    place,
                    lambda answer: receiver.receive(answer.read),
                    parameters={**parameters, **receiver.position},
                    once=True,
                )
        return receiver.received

    with closing(receiver):
        return gateway.persist(attempt, lambda: receiver.size)


def _always(path: Path) -> Destination:
    return lambda entry: path


def read(gateway: HpcGateway, remote: str | Place) -> bytes:
    """Download one file into memory, verified. May be repeated.

    :raises IsADirectoryError: it is a folder.
    :raises FileError: there is no such file, or it cannot be read.
    :raises IntegrityError: it arrived with a wrong digest.
    """

    gateway.require("resume")
    place = gateway.place(remote)
    pieces: list[bytes] = []
    version, size, ended = "", 0, False

    def receive(answer: Answer) -> None:
        nonlocal version, size, ended
        reader = bundle.Reader(answer.read)
        for entry, chunks in reader:
            if entry.type != "file" or entry.path:
                raise IsADirectoryError(f"{place.path} is a folder: use get")
            if entry.offset != size or entry.version != version:
                pieces.clear()
                version, size = entry.version, 0
                if entry.offset:
                    raise IntegrityError(f"{place.path} changed on the cluster while it was being sent")
            pieces.append(b"".join(chunks))
            size += len(pieces[-1])
        ended = not reader.more

    def attempt() -> bytes:
        while not ended:
            position: dict[str, Value] = {"offset": size} if size else {}
            limits: dict[str, Value] = {"bundle": True, "length": gateway.body_limit.answer}
            gateway.download(place, receive, parameters={**limits, **position}, once=True)
        return b"".join(pieces)

    return gateway.persist(attempt, lambda: size)


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

    gateway.require("ranges")
    place = gateway.place(remote)
    most = gateway.body_limit.piece or length
    pieces, left = [], length
    while True:
        pieces.append(_range(gateway, place, offset + length - left, min(left, most)))
        left -= len(pieces[-1])
        if left == 0 or len(pieces[-1]) < most:
            return b"".join(pieces)


def _range(gateway: HpcGateway, place: Place, offset: int, length: int) -> bytes:
    def content(answer: Answer) -> bytes:
        piece = bytearray()
        while chunk := answer.read(bundle.CHUNK):
            piece += chunk
            if len(piece) > length:
                raise IntegrityError(f"more than the {length} bytes that were asked for arrived", retryable=False)
        if answer.digest is not None and answer.digest != bundle.header_digest_of(bytes(piece)):
            raise IntegrityError(f"a piece of {place.path} arrived with a wrong digest")
        return bytes(piece)

    return gateway.download(place, content, parameters={"offset": offset, "length": length})
