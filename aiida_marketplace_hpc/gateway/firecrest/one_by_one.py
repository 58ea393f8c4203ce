"""Folders between gateway and cluster where FirecREST has no archives: one file after the other, several at a time."""

from __future__ import annotations

import hashlib
import posixpath
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiida_marketplace_hpc.bundle import CHUNK, Entry, Reader
from aiida_marketplace_hpc.errors import InvalidRequest
from aiida_marketplace_hpc.gateway.files import path_below
from aiida_marketplace_hpc.gateway.firecrest.archive import Packer
from aiida_marketplace_hpc.gateway.firecrest.client_v1 import ClusterV1
from aiida_marketplace_hpc.gateway.firecrest.failures import explained
from aiida_marketplace_hpc.gateway.firecrest.files import RemoteFiles
from aiida_marketplace_hpc.gateway.firecrest.transfers import RemoteTransfers
from aiida_marketplace_hpc.gateway.storage import Read

AT_ONCE = 8
"""Files of one request that are under way at a time."""
_PLAIN = (0o644, 0o664, 0o666)
"""Modes that a file is taken to have when it was just written: those that leave it to the cluster's umask."""
_MAX_LINKS = 40


class TransfersOneByOne(RemoteTransfers):
    """What one caller can send and fetch, without archives.

    Each file has its name when it is whole and was compared; a folder's files appear one after the other.
    """

    def forced(self) -> TransfersOneByOne:
        return TransfersOneByOne(self._files.forced(), self._keep, self._moving, self._limit)

    def write_folder(
        self, path: str, read: Read, *, overwrite: bool = True, into: str | None = None, parents: bool = False
    ) -> dict[str, Any]:
        """Write a folder from a bundle.

        :raises IntegrityError: for a wrong digest or a bundle that broke off; files that came before are there.
        """
        files = self._files
        _, target = files.roots.locate(files.inside(path, into) if into else path)
        count = 0
        with _Sending(files, target, overwrite, parents) as sending:
            for entry, chunks in Reader(read):
                if entry.length is not None:
                    raise InvalidRequest("parts of a file are uploaded by themselves, with the file's total and digest")
                sending.add(entry, chunks)
                count += 1
            sending.finish()
        return {"path": target, "entries": count}

    def _pack(self, path: str, local: Path, dereference: bool) -> None:
        """Fetch a folder, file by file, into an archive of the gateway's."""
        files, packer = self._files, Packer(local)
        try:
            top = files.stat(f"{path}/")
            packer.add(Entry("", "directory", top["mode"] & 0o7777), mtime=int(top["mtime"]))
            with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="firecrest-fetch") as pool:
                # So many at a time are in memory, or, if they are large, on the gateway's disk.
                waiting: list[tuple[str, dict[str, Any], Future[tuple[Any, int]] | None]] = []
                for name, found in self._walk(path, "", dereference, 0):
                    is_file = found["type"] == "file"
                    content = pool.submit(self._fetch, path_below(path, name)) if is_file else None
                    waiting.append((name, found, content))
                    if len(waiting) >= AT_ONCE:
                        _add(packer, *waiting.pop(0))
                for one in waiting:
                    _add(packer, *one)
        except BaseException:
            packer.discard()
            raise
        packer.close()

    def _walk(self, path: str, below: str, dereference: bool, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
        files = self._files
        for entry in files.listing(path_below(path, below)):
            name = f"{below}/{entry['name']}" if below else str(entry["name"])
            found = entry
            if entry["type"] == "symlink" and dereference:
                found = files.stat(path_below(path, name), follow=True)
                depth += 1
            if found["type"] in ("file", "directory", "symlink"):
                yield name, found
            if found["type"] == "directory":
                if depth > _MAX_LINKS:
                    raise InvalidRequest(f"the links in {path} lead in a circle")
                yield from self._walk(path, name, dereference, depth)

    def _fetch(self, path: str) -> tuple[Any, int]:
        content, attributes = self._files.read(path)
        return content, attributes.st_size


def _add(packer: Packer, name: str, found: dict[str, Any], content: Future[tuple[Any, int]] | None) -> None:
    mode, mtime = found["mode"] & 0o7777, int(found["mtime"])
    if content is None:
        kind = "symlink" if found["type"] == "symlink" else "directory"
        target = str(found.get("target", ""))
        packer.add(Entry(name, kind, mode, target=target), mtime=mtime)  # type: ignore[arg-type]
        return
    file, size = content.result()
    with file:
        packer.add(Entry(name, "file", mode, size), iter(lambda: file.read(CHUNK), b""), mtime=mtime)


class _Sending:
    """The entries of a folder on their way in; those of a bundle come in order, parents first."""

    def __init__(self, files: RemoteFiles, target: str, overwrite: bool, parents: bool) -> None:
        self._files = files
        self._target = target
        self._overwrite = overwrite
        self._parents = parents
        self._folder = Path(tempfile.mkdtemp(dir=files.spool))
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="firecrest-send")
        self._room = threading.Semaphore(2 * AT_ONCE)
        self._sent: list[Future[None]] = []
        self._there: dict[str, set[str]] = {}
        self._closed: list[tuple[str, int]] = []

    def __enter__(self) -> _Sending:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, entry: Entry, chunks: Any) -> None:
        """Send an entry on; a file, when its bytes have arrived and were compared."""
        path = path_below(self._target, entry.path)
        self._top()
        if entry.type == "directory":
            self._directory(path, entry)
        elif entry.type == "symlink":
            self._link(path, entry)
        else:
            self._file(path, entry, chunks)

    def _top(self) -> None:
        """Make the folder itself, unless that was done: later segments of a folder begin somewhere in it."""
        if self._target not in self._there:
            self._files.mkdir(self._target, parents=self._parents, exist_ok=self._overwrite)
            self._names_in(self._target)

    def _directory(self, path: str, entry: Entry) -> None:
        if entry.path:
            self._files.mkdir(path, exist_ok=True)
        is_root = any(root.path == path for root in self._files.roots)
        if entry.mode & 0o700 != 0o700 and not is_root:
            self._closed.append((path, entry.mode & 0o7777))

    def _link(self, path: str, entry: Entry) -> None:
        if posixpath.basename(path) in self._names_in(posixpath.dirname(path)):
            self._files.remove(path, missing_ok=True)
        self._files.symlink(path, entry.target)

    def _file(self, path: str, entry: Entry, chunks: Any) -> None:
        local, digest = self._folder / f"{len(self._sent)}", hashlib.sha256()
        with local.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        folder, name = posixpath.split(self._files.target(path, None, overwrite=True, parents=False))
        is_new = name not in self._names_in(folder)
        self._room.acquire()
        self._sent.append(self._pool.submit(self._send, path, local, entry, digest.hexdigest(), is_new))

    def _send(self, path: str, local: Path, entry: Entry, digest: str, is_new: bool) -> None:
        files, cluster = self._files, self._files.cluster
        mode = entry.mode & 0o7777
        try:
            assert isinstance(cluster, ClusterV1)  # noqa: S101 - there are no others here.
            if entry.size > files.largest_up:
                files.put_file(path, local, entry.size, digest, mode=mode)
            else:
                with explained(path):
                    cluster.store(path, local.read_bytes(), new=is_new)
                    if mode not in _PLAIN:
                        cluster.chmod(path, mode)
                files.advance(entry.size)
            local.unlink()
        finally:
            self._room.release()

    def _names_in(self, folder: str) -> set[str]:
        """What lies in a folder before anything is sent there."""
        if folder not in self._there:
            self._there[folder] = {str(line["name"]) for line in self._files.listing(folder)}
        return self._there[folder]

    def finish(self) -> None:
        """Wait until all is there; at the end, close the folders that are to be closed."""
        self._top()
        for one in self._sent:
            one.result()
        while self._closed:
            path, mode = self._closed.pop()
            with explained(path):
                self._files.cluster.chmod(path, mode)
