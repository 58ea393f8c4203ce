"""Uploads that go on where they broke off: large files in parts, folders in segments.

How much of a large file has arrived is the gateway's to say, so after anything that went wrong it is asked, and the rest is
sent. The same holds for a new process that knows nothing of the first attempt: the gateway tells a file by its size and
digest, not by its name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.client.body import MARGIN, BundleBody, LargeFile
from aiida_marketplace_hpc.client.folder import Progress, Source
from aiida_marketplace_hpc.errors import IntegrityError, MarketplaceHpcError, ServerFault, TooLarge, Unavailable

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.gateway import HpcGateway, Place
    from aiida_marketplace_hpc.client.routes import Value

Json = dict[str, Any]

_MAX_WAITS = 3  # The gateway lets nobody wait longer than 5 seconds at a time.


class LargeUpload:
    """One large file on its way.

    :param parameters: of the upload, but for those that say what is sent of it.
    :param limit: bytes of one body, if fewer than the gateway is known to take.
    :raises OSError: the file cannot be read.
    """

    def __init__(
        self,
        gateway: HpcGateway,
        file: Path,
        place: Place,
        parameters: Mapping[str, Value],
        progress: Progress | None = None,
        limit: int | None = None,
    ) -> None:
        self._gateway = gateway
        self._file = LargeFile(file)
        self._place = place
        self._parameters = {**parameters, "total": self._file.size, "digest": self._file.digest}
        self._progress = progress
        self._limit = limit or gateway.body_limit.size
        self._held: int | None = None  # Unknown: to be asked for.
        self._restart = False
        self._furthest = 0
        self._waited = 0
        self._answer: Json | None = None

    def run(self) -> Json:
        """Send what is missing until the file is there. May be repeated if it may be replaced.

        :return: the gateway's answer: ``path``, ``size`` in bytes, ``digest``.
        :raises IntegrityError: the local file changed meanwhile, or arrived wrong again and again.
        :raises MarketplaceHpcError: for 20 seconds there was no progress.
        """
        return self._gateway.persist(self._attempt, lambda: self._furthest)

    def _attempt(self) -> Json:
        while self._answer is None:
            if self._held is None:
                self._ask()
            else:
                self._send(self._held)
        return self._answer

    def _ask(self) -> None:
        restart, self._restart = self._restart, False
        parameters = {**self._parameters, "restart": True} if restart else self._parameters
        self._take(self._gateway.upload(self._place, lambda: b"", parameters=parameters, once=True))

    def _send(self, offset: int) -> None:
        body = self._file.body(offset, self._limit, self._progress)
        self._held = None
        try:
            answer = self._gateway.upload(
                self._place,
                lambda: body,
                content_type=bundle.MEDIA_TYPE,
                parameters={**self._parameters, "offset": offset},
                once=True,
            )
        except TooLarge:
            if not self._gateway.body_limit.refused(len(body)):
                raise
            self._limit = self._gateway.body_limit.size
            self._held = offset
            return
        except MarketplaceHpcError:
            self._file.check()
            # A proxy that cannot pass so much on does not always say so. For this file only: it may have been chance.
            limit = self._gateway.body_limit
            self._limit = limit.segment if self._limit > limit.segment else limit.smallest
            raise
        self._take(answer)
        if answer.get("held") == offset and answer.get("wait") is not True:
            self._held = None
            raise IntegrityError(f"nothing of {self._file.path} arrives on the cluster, though the gateway answers")

    def _take(self, answer: Json) -> None:
        if answer.get("complete") is True:
            self._answer = answer
            return
        held, wait = answer.get("held"), answer.get("wait")
        if not isinstance(held, int) or not 0 <= held <= self._file.size:
            raise ServerFault("the gateway did not say how much of the file it holds")
        if wait is not True:
            if answer.get("digest") != self._file.digest_up_to(held):
                # Left by a machine that crashed, or somebody else's: not the beginning of this file.
                self._restart = True
                return
            self._held = held
        elif answer.get("under_way") is True:
            self._waited = 0  # All of it is there, and the gateway sends it on: it will say what comes of that.
        elif held <= self._furthest:
            self._waited += 1
            if self._waited > _MAX_WAITS:
                self._waited = 0
                raise Unavailable(
                    "somebody else has begun to upload the same file and does not get on: try again later"
                )
        if held > self._furthest:
            self._furthest, self._waited = held, 0


class FolderUpload:
    """A folder on its way: small files in segments, one request each, then the large ones.

    :param sources: parents before children, the folder itself first.
    :param parameters: ``overwrite``, ``into``, ``parents`` and ``force`` as for the folder itself.
    """

    def __init__(
        self,
        gateway: HpcGateway,
        sources: Sequence[Source],
        place: Place,
        parameters: Mapping[str, Value],
        progress: Progress | None = None,
    ) -> None:
        self._gateway = gateway
        self._place = place
        self._parameters = parameters
        self._force = parameters.get("force")
        self._progress = progress
        self._sources = sources
        self._rest = deque(sources)
        self._large: list[Source] = []
        self._limit = min(gateway.body_limit.segment, gateway.body_limit.size)
        self._whole = bundle.length_of(source.entry for source in sources) <= self._limit
        self._answer: Json | None = None
        self._sent = 0

    def run(self) -> Json:
        """Send everything.

        May be repeated if ``overwrite`` is set and ``into`` is not (the second time, the folder would go inside the first).

        :return: the gateway's answer: ``path`` (where the folder is), ``entries`` (how many).
        :raises MarketplaceHpcError: for 20 seconds there was no progress.
        """
        if self._parameters.get("overwrite") is not True or self._parameters.get("into") is not None:
            self._send_segment(repeatable=False)
        self._gateway.persist(self._send_rest, lambda: self._sent)
        for source in self._large:
            place = self._gateway.place(f"{self._path}/{source.entry.path}")
            parameters: dict[str, Value] = {"overwrite": True, "mode": source.entry.mode, "force": self._force}
            LargeUpload(self._gateway, source.path, place, parameters, self._progress).run()
        if not self._whole:
            # Into a folder that is read-only nothing more could have been put.
            self._whole = True
            self._rest.extend(source for source in self._sources if _writable(source) != source)
            self._gateway.persist(self._send_rest, lambda: self._sent)
        return {**(self._answer or {}), "path": self._path, "entries": len(self._sources)}

    @property
    def _path(self) -> str:
        return str((self._answer or {}).get("path"))

    def _send_rest(self) -> None:
        while self._rest:
            self._send_segment(repeatable=True)

    def _send_segment(self, *, repeatable: bool) -> None:
        segment = self._next_segment()
        if not segment:
            return
        body = BundleBody(segment if self._whole else [_writable(source) for source in segment], self._progress)
        try:
            answer = self._gateway.upload(
                self._place,
                lambda: body,
                content_type=bundle.MEDIA_TYPE,
                parameters={"bundle": True, **self._parameters},
                repeatable=repeatable,
                once=repeatable,
            )
        except TooLarge:
            if not self._gateway.body_limit.refused(len(body)):
                raise
            self._again(segment, self._gateway.body_limit.size)
            if not repeatable:
                self._send_segment(repeatable=False)
        except MarketplaceHpcError:
            # A proxy that cannot pass so much on does not always say so. For this folder only: it may have been chance.
            self._again(segment, self._gateway.body_limit.smallest)
            raise
        else:
            self._sent += len(segment)
            if self._answer is None:
                self._answer = answer
                self._place = self._gateway.place(self._path)
                self._parameters = {"overwrite": True, "force": self._force}

    def _next_segment(self) -> list[Source]:
        """Take sources that together fit into a body; what fits into none is set aside."""
        segment: list[Source] = []
        length = bundle.length_of([])
        while self._rest:
            source = self._rest[0]
            more = bundle.length_of([source.entry]) - bundle.length_of([])
            if more > self._limit - MARGIN:
                self._large.append(self._rest.popleft())
                self._whole = False
                continue
            if segment and length + more > self._limit - MARGIN:
                break
            segment.append(self._rest.popleft())
            length += more
        return segment

    def _again(self, segment: list[Source], limit: int) -> None:
        self._rest.extendleft(reversed(segment))
        if limit < self._limit:
            self._limit, self._whole = limit, False


def _writable(source: Source) -> Source:
    entry = source.entry
    if entry.type != "directory" or entry.mode & 0o700 == 0o700:
        return source
    return replace(source, entry=replace(entry, mode=entry.mode | 0o700))
