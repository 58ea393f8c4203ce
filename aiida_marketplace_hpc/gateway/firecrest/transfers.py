"""Folders and large files on their way to a cluster behind FirecREST and back.

A folder goes as one archive: a few calls each way, whatever the number of files. What a client sends in parts is gathered on
the gateway's disk, verified there, and then sent on; what is larger than FirecREST takes at once goes by way of its store,
which takes a job of the batch system. Nothing is ever whole in memory but what FirecREST takes at once (5 MiB by default).
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.bundle import Entry, Reader
from aiida_marketplace_hpc.errors import Busy, InvalidRequest
from aiida_marketplace_hpc.gateway.files import Files, path_below
from aiida_marketplace_hpc.gateway.firecrest.archive import Packer, Unpacked, inflate
from aiida_marketplace_hpc.gateway.firecrest.client import CallFailed
from aiida_marketplace_hpc.gateway.firecrest.failures import explained
from aiida_marketplace_hpc.gateway.firecrest.files import RemoteFiles
from aiida_marketplace_hpc.gateway.roots import Root, Roots
from aiida_marketplace_hpc.gateway.storage import Read
from aiida_marketplace_hpc.gateway.transfers import Position, Transfers
from aiida_marketplace_hpc.gateway.unfinished import Keep

_PATIENCE = 4.0
"""Seconds that a request waits for a large file that is on its way between gateway and cluster."""
_KEEP = 900.0
"""Seconds for which a large file that was fetched, and nobody has asked for again, is kept."""
_VERSION = ("ino", "mtime", "ctime", "size")
"""By what a file is known to be the same as before."""
_CHANGED = ("file changed as we read it", "File removed before we read it")
"""What tar says of a folder in which a job is writing; the archive is whole all the same."""


class OnTheWay:
    """What the gateway is moving between itself and the cluster in the background, by what it is.

    An end is told once, and forgotten some minutes later.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._moving: dict[tuple[object, ...], tuple[Future[Any], float]] = {}

    def join(self, key: tuple[object, ...], move: Callable[[], Any], patience: float) -> Any:
        """Start to move something, unless it is moving already, and wait for it a little.

        :return: what ``move`` returns.
        :raises StillRunning: it takes longer; to be asked again.
        """
        with self._lock:
            now = self._clock()
            for old, (future, since) in list(self._moving.items()):
                if future.done() and now - since > _KEEP:
                    del self._moving[old]
            known = self._moving.get(key)
            if known is None:
                future = Future()
                self._moving[key] = future, now
                threading.Thread(target=_run, args=(future, move), name="firecrest-transfer", daemon=True).start()
            else:
                future = known[0]
                self._moving[key] = future, now
        try:
            result = future.result(patience)
        except StillRunning:
            if future.done():  # It is the error of what was moved.
                self.forget(key)
            raise
        except BaseException:
            self.forget(key)
            raise
        return result

    def forget(self, key: tuple[object, ...]) -> None:
        """Move it again the next time."""
        with self._lock:
            self._moving.pop(key, None)


def _run(future: Future[Any], move: Callable[[], Any]) -> None:
    try:
        result = move()
    except BaseException as exc:  # noqa: BLE001 - whoever waits for it is to see it.
        future.set_exception(exc)
    else:
        future.set_result(result)


class RemoteTransfers:
    """What one caller can send and fetch, as :class:`~aiida_marketplace_hpc.gateway.transfers.Transfers` says.

    :param keep: how long what is not finished is kept on the gateway's disk.
    :param limit: bytes that may come out of one archive.
    """

    def __init__(self, files: RemoteFiles, keep: Keep, moving: OnTheWay, limit: int) -> None:
        self._files = files
        self._keep = keep
        self._moving = moving
        self._limit = limit

    def forced(self) -> RemoteTransfers:
        """The same for somebody who means it, also where a live job of theirs is concerned."""
        return RemoteTransfers(self._files.forced(), self._keep, self._moving, self._limit)

    # In

    def write_folder(
        self, path: str, read: Read, *, overwrite: bool = True, into: str | None = None, parents: bool = False
    ) -> dict[str, Any]:
        """Write a folder from a bundle.

        Nothing is sent on before a segment was verified; files appear when it is unpacked, one after the other.

        :raises IntegrityError: for a wrong digest or a bundle that broke off; segments that came before are there.
        """
        files = self._files
        _, target = files.roots.locate(files.inside(path, into) if into else path)
        loading = _Loading(files, target, overwrite, parents)
        with loading:
            for entry, chunks in Reader(read):
                if entry.length is not None:
                    raise InvalidRequest("parts of a file are uploaded by themselves, with the file's total and digest")
                path_below(target, entry.path)
                loading.add(entry, chunks)
            loading.send()
        return {"path": target, "entries": loading.count}

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
        """Take the next parts of a large file; when all are here, send it on, which goes on in the background."""
        files = self._files
        target = files.target(path, into, overwrite=overwrite, parents=parents)
        name = hashlib.sha256(f"{total} {digest}".encode()).hexdigest()
        here = files.spool / name
        if not here.exists() or here.stat().st_size != total:
            roots = Roots([Root("spool", str(files.spool))])
            taken = Transfers(Files(roots), self._keep).write_parts(
                str(here), read, total=total, digest=digest, offset=offset, restart=restart
            )
            if not taken["complete"]:
                return taken
        plain = digest.removeprefix("sha-256:")
        key = (str(files.spool), target, total, digest, mode)
        try:
            self._moving.join(key, lambda: files.put_file(target, here, total, plain, mode=mode), _PATIENCE)
        except StillRunning:
            return {"complete": False, "held": total, "digest": digest, "wait": True, "under_way": True}
        self._moving.forget(key)
        here.unlink(missing_ok=True)
        return {"complete": True, "path": target, "size": total, "digest": digest}

    # Out

    def send(
        self, path: str, *, dereference: bool = True, position: Position | None = None, limit: int | None = None
    ) -> Generator[bytes, None, None]:
        """Fetch a file or folder and open it for reading as a bundle.

        :raises Busy: it is large and still on its way to the gateway; to be asked again.
        """
        files = self._files
        found = files.identified(path)
        if found["type"] != "directory":
            content = self._fetched(found)
            version = "-".join(f"{found[name]:x}" for name in _VERSION)
            return _begun(bundle.write(_parts(content, found, version, position), limit=limit), content)
        folder = Path(tempfile.mkdtemp(dir=files.spool))
        try:
            packed, plain = folder / "packed", folder / "plain"
            self._take_packed(found["path"], dereference, packed)
            inflate(packed, plain, self._limit)
            packed.unlink()
            opened = Unpacked(plain)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return _begun(bundle.write(opened.entries(position), limit=limit), _Folder(folder, opened))

    def _take_packed(self, path: str, dereference: bool, local: Path) -> None:
        """Have an archive of a folder made on the cluster and fetched, and take it.

        :raises Busy: that takes longer; to be asked again.
        """
        key = (str(self._files.spool), path, dereference)

        def pack() -> Path:
            here = self._files.spool / f"packed-{secrets.token_hex(8)}"
            self._pack(path, here, dereference)
            return here

        while not local.exists():
            try:
                packed = self._moving.join(key, pack, _PATIENCE)
            except StillRunning:
                raise _on_its_way(path) from None
            self._moving.forget(key)
            with suppress(FileNotFoundError):  # Another request for the same has taken it.
                packed.rename(local)

    def _pack(self, path: str, local: Path, dereference: bool) -> None:
        """Make an archive of a folder on the cluster and fetch it."""
        files = self._files
        archive = files.roots.staged(suffix=".tar.gz")
        with explained(path), files.dropped(archive):
            # The dot: where the path itself is a link, it is looked through.
            try:
                files.cluster.pack(f"{path}/.", archive, dereference=dereference)
            except CallFailed as exc:
                if exc.status == 408:
                    options = {"compression": "gzip", "dereference": dereference}
                    files.by_job("compress", f"{path}/.", archive, **options)
                elif not any(words in exc.message for words in _CHANGED):
                    raise
            with local.open("wb") as file:
                files.fetch_staged(archive, file)

    def _fetched(self, found: dict[str, Any]) -> BinaryIO:
        """The content of a file; of a large one, when it is here."""
        files, path = self._files, found["path"]
        if found["size"] <= files.largest_down:
            return files.read(path)[0]
        key = (str(files.spool), path, *(found[name] for name in _VERSION))
        here = files.spool / f"fetched-{hashlib.sha256(repr(key).encode()).hexdigest()}"

        def fetch() -> None:
            draft = here.with_suffix(".draft")
            with draft.open("wb") as file:
                files.fetch(path, file, large=True)
            draft.rename(here)

        if not here.exists():
            try:
                self._moving.join(key, fetch, _PATIENCE)
            except StillRunning:
                raise _on_its_way(path) from None
            self._moving.forget(key)
        return here.open("rb")


def _on_its_way(path: str) -> Busy:
    return Busy(f"{path} is on its way to the gateway: ask again", retry_after=1.0, under_way=True)


class _Loading:
    """The segments of a folder on its way in: each an archive of at most what FirecREST takes at once."""

    def __init__(self, files: RemoteFiles, target: str, overwrite: bool, parents: bool) -> None:
        self._files = files
        self._target = target
        self._overwrite = overwrite
        self._parents = parents
        self._made = False
        self._folder = Path(tempfile.mkdtemp(dir=files.spool))
        self._packer: Packer | None = None
        self._names: dict[str, set[str]] = {}
        self._closed: list[tuple[str, int]] = []
        self.count = 0

    def __enter__(self) -> _Loading:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._packer is not None:
            self._packer.discard()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, entry: Entry, chunks: Any) -> None:
        self.count += 1
        most = self._files.largest_up * 9 // 10
        if entry.type == "file" and entry.size + 4096 > most:
            self._alone(entry, chunks)
            return
        if self._packer is not None and self._packer.size + entry.size + 4096 > most:
            self.send()
        if self._packer is None:
            self._packer = Packer(self._folder / "segment")
        if entry.type == "directory" and entry.mode & 0o700 != 0o700:
            self._closed.append((entry.path, entry.mode))
        if not entry.path and any(root.path == self._target for root in self._files.roots):
            return  # What is put right into a root does not change the root itself.
        self._note(entry)
        self._packer.add(entry, chunks)

    def send(self) -> None:
        """Send what there is; at the end, close the folders that are to be closed."""
        self._make()
        if self._packer is not None:
            self._send(self._packer)
            self._packer.discard()
            self._packer = None
        while self._closed:
            path, mode = self._closed.pop()
            with explained(self._target):
                self._files.cluster.chmod(path_below(self._target, path), mode)

    def _make(self) -> None:
        if not self._made:
            self._files.mkdir(self._target, parents=self._parents, exist_ok=self._overwrite)
            self._made = True

    def _note(self, entry: Entry) -> None:
        if entry.type != "directory":
            folder, _, name = path_below(self._target, entry.path).rpartition("/")
            self._names.setdefault(folder, set()).add(name)

    def _send(self, packer: Packer) -> None:
        files = self._files
        packer.close()
        if not packer.count:
            return
        for folder, names in self._names.items():
            files.protection.check_paths(folder, names)
        self._names = {}
        archive = files.roots.staged(suffix=".tar.gz")
        with explained(self._target), files.dropped(archive):
            files.roots.prepare()
            # What tar unpacks is compared with gzip's own checksum on the way.
            files.cluster.store(archive, packer.path.read_bytes())
            try:
                files.cluster.unpack(archive, self._target)
            except CallFailed as exc:
                if exc.status != 408:
                    raise
                files.by_job("extract", archive, self._target, compression="gzip")

    def _alone(self, entry: Entry, chunks: Any) -> None:
        """Send a file by itself that is too large to go with others."""
        self._make()
        if self._packer is not None:
            self.send()
        local, digest = self._folder / "alone", hashlib.sha256()
        with local.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        path = self._files.target(path_below(self._target, entry.path), None, overwrite=True, parents=False)
        self._files.put_file(path, local, entry.size, digest.hexdigest(), mode=entry.mode)
        local.unlink()


class _Folder:
    """What is removed when an archive was sent."""

    def __init__(self, folder: Path, opened: Unpacked) -> None:
        self._folder = folder
        self._opened = opened

    def close(self) -> None:
        self._opened.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _begun(chunks: Generator[bytes, None, None], held: BinaryIO | _Folder) -> Generator[bytes, None, None]:
    """The same chunks; what they are read from is closed at the end, also if nobody takes them."""

    def holding() -> Generator[bytes, None, None]:
        try:
            yield b""
            yield from chunks
        finally:
            chunks.close()
            held.close()

    begun = holding()
    next(begun)
    return begun


def _parts(
    content: BinaryIO, found: dict[str, Any], version: str, position: Position | None
) -> Generator[tuple[Entry, BinaryIO | None], None, None]:
    """The parts of a file from a position on."""
    content.seek(0, 2)
    size = content.tell()
    whole = Entry("", "file", found["mode"] & 0o7777, size, version=version)
    offset = 0
    if position is not None:
        if position.offset is None:
            return
        offset = position.offset if position.offset < size else 0
    content.seek(offset)
    for part in whole.parts(offset):
        yield part, content


def sweep_spool(folder: Path, age: float) -> None:
    """Remove what lies in a spool for longer than ``age`` seconds."""
    with suppress(OSError):
        for entry in folder.iterdir():
            with suppress(OSError):
                if entry.name.startswith(".") or time.time() - entry.stat().st_mtime < age:
                    continue
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()
