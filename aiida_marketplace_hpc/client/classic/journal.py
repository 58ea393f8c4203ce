"""What was done to folders of a classic gateway, on this machine's disk: it outlives the daemon, and all its workers share it.

A *folder* is a working directory of AiiDA; the gateway has one job for it, made when the first file has to go there or when it
is submitted. *Nodes* are what was made on the virtual disk: in working directories whose job was not launched yet, and outside
of them. Their order counts: it is that in which the job script makes them.

SQLite, as it is safe against kills and shared by processes; paths are kept as bytes, since names may be anything.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from aiida_marketplace_hpc.client.classic.tree import Inline, Piece, Pieces
from aiida_marketplace_hpc.errors import ConnectionFailed, Phase

_PATIENCE = 60.0
"""Seconds to wait for another process that changes the same folder or the database."""
_BETWEEN_TRIES = 0.02
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS folders (
    path BLOB PRIMARY KEY, state TEXT NOT NULL, jobid TEXT, launched REAL, real BLOB, digest TEXT, end TEXT, manifest BLOB,
    piece INTEGER, withdrawn INTEGER NOT NULL DEFAULT 0, removed TEXT NOT NULL DEFAULT '[]');
CREATE INDEX IF NOT EXISTS folders_by_job ON folders (jobid);
CREATE TABLE IF NOT EXISTS nodes (
    number INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB NOT NULL UNIQUE, kind TEXT NOT NULL, mode INTEGER,
    mtime REAL NOT NULL, size INTEGER NOT NULL, digest TEXT, data BLOB, pieces TEXT, source BLOB, origin BLOB, follow INTEGER);
CREATE TABLE IF NOT EXISTS pieces (
    jobid TEXT NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL, seen INTEGER NOT NULL, PRIMARY KEY (jobid, digest));
"""


class FolderState(str, Enum):
    """How far a working directory has got. In this order; only a refused launch goes back."""

    NEW = "new"
    """The gateway has no job for it."""
    CREATING = "creating"
    """One was asked for. Found by a later process, the answer was lost: the folder on the cluster that may be there is no
    one's."""
    CREATED = "created"
    LAUNCHING = "launching"
    """A launch was sent. Without an answer it is in doubt, and is not sent again: the start record decides."""
    LAUNCHED = "launched"
    ENDED = "ended"


@dataclass(frozen=True)
class Folder:
    """A working directory.

    :param real: its absolute path on the cluster, known once its job has started.
    :param launched: when it was launched, by this machine's clock.
    :param digest: hexadecimal SHA-256 of AiiDA's script.
    :param end: how the job ended, as the poll answers it.
    :param manifest: as it was downloaded.
    :param piece: bytes of a piece in which its job hands out large files.
    :param withdrawn: it is not to be launched any more.
    :param removed: paths that were removed after the end.
    """

    path: str
    state: FolderState = FolderState.NEW
    jobid: str = ""
    launched: float | None = None
    real: str = ""
    digest: str = ""
    end: dict[str, Any] | None = None
    manifest: bytes | None = None
    piece: int = 0
    withdrawn: bool = False
    removed: tuple[str, ...] = ()

    @property
    def is_launched(self) -> bool:
        """Whether the job script makes the folder, or has made it: nothing of it can be changed from here as before."""
        return self.state in (FolderState.LAUNCHING, FolderState.LAUNCHED, FolderState.ENDED)


@dataclass(frozen=True)
class Node:
    """Something that was made on the virtual disk.

    :param kind: ``directory``, ``file``, ``symlink``, ``copy``; or ``copies`` and ``links`` of all that will match a pattern
        in the folder that ``path`` lies in, whose own last segment then begins with a NUL.
    :param content: of a file.
    :param data: the bytes of a small file; left away in lists.
    :param source: of a link, where it points; of a copy, where on the cluster it comes from.
    :param origin: the virtual path of the source, if that is known here.
    :param follow: of a copy, whether links become what they lead to.
    """

    path: str
    kind: str
    mode: int | None = None
    mtime: float = 0.0
    size: int = 0
    content: Inline | Pieces | None = None
    data: bytes | None = None
    source: str = ""
    origin: str = ""
    follow: bool = False


def default_folder() -> Path:
    """Where journals are kept."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "marketplace-hpc" / "classic"


class Journal:
    """What one user has on one classic gateway.

    :param who: what tells it apart: the gateway, the way to it, the user.
    :param folder: by default :func:`default_folder`.
    """

    def __init__(self, *who: str, folder: Path | None = None) -> None:
        place = folder or default_folder()
        name = hashlib.sha256("\n".join(who).encode()).hexdigest()[:32]
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = place / f"{name}.sqlite"
        self._locks = place / f"{name}.locks"
        self._locks.mkdir(mode=0o700, exist_ok=True)
        with self._open() as db:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)

    @contextmanager
    def _open(self, *, reading: bool = False) -> Iterator[sqlite3.Connection]:
        """One transaction, on disk when it is over. A connection of its own for each: threads and forks share nothing."""
        db = sqlite3.connect(self._path, timeout=_PATIENCE, isolation_level=None)
        try:
            db.execute("BEGIN" if reading else "BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.rollback()
                raise
            db.commit()
        finally:
            db.close()

    @contextmanager
    def locked(
        self, path: str, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> Iterator[None]:
        """Be the only one, of all threads and processes on this machine, that makes or launches a folder's job.

        The end of a process ends its locks. Not to be nested.

        :raises ConnectionFailed: another one has been at it for a minute.
        """
        name = hashlib.sha256(_bytes(path)).hexdigest()[:2]
        until = clock() + _PATIENCE
        with open(self._locks / name, "ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if clock() > until:
                        raise ConnectionFailed(
                            f"another process has been busy with {path} for {_PATIENCE:.0f} s", phase=Phase.NOT_SENT
                        ) from None
                sleep(_BETWEEN_TRIES)
            yield

    # Facts

    def fact(self, name: str) -> str | None:
        """Something that was learnt about the gateway."""
        with self._open(reading=True) as db:
            row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def learn(self, name: str, value: str) -> None:
        """Keep something that was learnt about the gateway."""
        with self._open() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    # Folders

    def folder(self, path: str) -> Folder | None:
        """A working directory by its path."""
        return self._folder("path = ?", _bytes(path))

    def folder_of_job(self, jobid: str) -> Folder | None:
        """A working directory by the gateway's id of its job."""
        return self._folder("jobid = ?", jobid)

    def folders(self, below: str = "") -> list[Folder]:
        """All working directories, or those below a path."""
        with self._open(reading=True) as db:
            if below:
                rows = db.execute(f"SELECT {_FOLDER} FROM folders WHERE path >= ? AND path < ?", _range(below))  # noqa: S608
            else:
                rows = db.execute(f"SELECT {_FOLDER} FROM folders")  # noqa: S608
            return [_read_folder(row) for row in rows]

    def _folder(self, condition: str, value: Any) -> Folder | None:
        with self._open(reading=True) as db:
            row = db.execute(f"SELECT {_FOLDER} FROM folders WHERE {condition}", (value,)).fetchone()  # noqa: S608
        return None if row is None else _read_folder(row)

    def add_folder(self, path: str) -> bool:
        """Make a working directory, with the job that one of this name has left; ``False`` if there is one."""
        with self._open() as db:
            if db.execute("SELECT 1 FROM folders WHERE path = ?", (_bytes(path),)).fetchone() is not None:
                return False
            if db.execute("UPDATE folders SET path = ? WHERE path = ?", (_bytes(path), _hidden(path))).rowcount:
                return True
            cursor = db.execute(
                "INSERT OR IGNORE INTO folders (path, state) VALUES (?, ?)", (_bytes(path), FolderState.NEW.value)
            )
            return cursor.rowcount == 1

    def change_folder(self, path: str, **fields: Any) -> None:
        """Write down facts about a working directory, by the names of :class:`Folder`'s fields."""
        kept = {name: _KEPT.get(name, lambda value: value)(value) for name, value in fields.items()}
        names = ", ".join(f"{name} = ?" for name in kept)
        with self._open() as db:
            db.execute(f"UPDATE folders SET {names} WHERE path = ?", (*kept.values(), _bytes(path)))  # noqa: S608

    def remove_folder(self, path: str) -> None:
        """Forget a working directory with all that was made in it.

        The job of one that was not launched is kept for the next of its name: there is never a second one for it.
        """
        with self._open() as db:
            _remove_nodes(db, path)
            states = (FolderState.CREATING.value, FolderState.CREATED.value)
            kept = "UPDATE folders SET path = ?, withdrawn = 0 WHERE path = ? AND state IN (?, ?)"
            if db.execute(kept, (_hidden(path), _bytes(path), *states)).rowcount:
                return
            db.execute("DELETE FROM folders WHERE path = ?", (_bytes(path),))

    # Nodes

    def nodes(self, below: str, *, data: bool = False) -> list[Node]:
        """What was made at a path and below it, in order.

        :param data: with the bytes of small files.
        """
        columns = _NODE if data else _NODE_ALONE
        query = f"SELECT {columns} FROM nodes WHERE path = ? OR (path >= ? AND path < ?) ORDER BY number"  # noqa: S608
        with self._open(reading=True) as db:
            rows = db.execute(query, (_bytes(below), *_range(below)))
            return [_read_node(row) for row in rows]

    def node(self, path: str) -> Node | None:
        """What was made at a path itself."""
        with self._open(reading=True) as db:
            row = db.execute(f"SELECT {_NODE} FROM nodes WHERE path = ?", (_bytes(path),)).fetchone()  # noqa: S608
        return None if row is None else _read_node(row)

    def is_above_something(self, path: str) -> bool:
        """Whether anything was made below a path."""
        with self._open(reading=True) as db:
            for table in ("nodes", "folders"):
                query = f"SELECT 1 FROM {table} WHERE path >= ? AND path < ? LIMIT 1"  # noqa: S608
                if db.execute(query, _range(path)).fetchone() is not None:
                    return True
        return False

    def size_of_data(self, below: str) -> int:
        """Bytes of the small files below a path."""
        with self._open(reading=True) as db:
            query = "SELECT SUM(size) FROM nodes WHERE data IS NOT NULL AND path >= ? AND path < ?"
            return int(db.execute(query, _range(below)).fetchone()[0] or 0)

    def put(self, *nodes: Node) -> None:
        """Make nodes, in this order; they replace what is at their paths."""
        with self._open() as db:
            for node in nodes:
                _insert(db, node)

    def set_mode(self, path: str, mode: int) -> None:
        """Change the permission bits of a node."""
        with self._open() as db:
            db.execute("UPDATE nodes SET mode = ? WHERE path = ?", (mode, _bytes(path)))

    def remove(self, path: str) -> None:
        """Remove the node at a path and all below it."""
        with self._open() as db:
            _remove_nodes(db, path)

    def move(self, old: str, new: str) -> None:
        """Give the node at a path, and all below it, another place."""
        with self._open() as db:
            rows = db.execute(
                "SELECT number, path FROM nodes WHERE path = ? OR (path >= ? AND path < ?)", (_bytes(old), *_range(old))
            ).fetchall()
            for number, path in rows:
                moved = _bytes(new) + bytes(path)[len(_bytes(old)) :]
                db.execute("UPDATE nodes SET path = ? WHERE number = ?", (moved, number))

    def copy(self, old: str, new: str, now: float) -> None:
        """Make the same nodes at another place, where what a file holds is the same bytes and not sent again."""
        with self._open() as db:
            rows = db.execute(
                f"SELECT {_NODE} FROM nodes WHERE path = ? OR (path >= ? AND path < ?) ORDER BY number",  # noqa: S608
                (_bytes(old), *_range(old)),
            ).fetchall()
            for row in rows:
                node = _read_node(row)
                _insert(db, Node(**{**vars(node), "path": new + node.path[len(old) :], "mtime": now}))

    # Pieces

    def has_piece(self, piece: Piece) -> bool:
        """Whether a piece was uploaded."""
        with self._open(reading=True) as db:
            row = db.execute("SELECT 1 FROM pieces WHERE jobid = ? AND digest = ?", (piece.jobid, piece.digest))
            return row.fetchone() is not None

    def add_piece(self, piece: Piece, *, seen: bool) -> None:
        """Note that a piece was uploaded.

        :param seen: it was seen in the job's folder with its size, as an answer alone says nothing.
        """
        with self._open() as db:
            db.execute(
                "INSERT OR REPLACE INTO pieces VALUES (?, ?, ?, ?)", (piece.jobid, piece.digest, piece.size, int(seen))
            )

    def forget_piece(self, piece: Piece) -> None:
        """Note that a piece is not there."""
        with self._open() as db:
            db.execute("DELETE FROM pieces WHERE jobid = ? AND digest = ?", (piece.jobid, piece.digest))

    def is_used(self, piece: Piece, *, outside: str = "") -> bool:
        """Whether a file consists of a piece.

        :param outside: files below this path do not count.
        """
        with self._open(reading=True) as db:
            rows = db.execute(
                "SELECT path FROM nodes WHERE pieces LIKE ?", (f'%"{piece.jobid}", {piece.size}, "{piece.digest}"%',)
            )
            prefix = _bytes(f"{outside}/")
            return any(not (outside and bytes(path).startswith(prefix)) for (path,) in rows)


_FOLDER = "path, state, jobid, launched, real, digest, end, manifest, piece, withdrawn, removed"
_NODE = "path, kind, mode, mtime, size, digest, data, pieces, source, origin, follow"
_NODE_ALONE = _NODE.replace("data", "CASE WHEN data IS NULL THEN NULL ELSE x'' END")


def _bytes(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _text(path: bytes | None) -> str:
    return "" if path is None else bytes(path).decode("utf-8", "surrogateescape")


_KEPT: dict[str, Callable[[Any], Any]] = {
    "state": lambda state: state.value,
    "real": _bytes,
    "end": json.dumps,
    "removed": lambda removed: json.dumps(list(removed)),
    "withdrawn": int,
}


def _hidden(path: str) -> bytes:
    """What no path is: where the row of a folder stays that was removed."""
    return b"\0" + _bytes(path)


def _range(below: str) -> tuple[bytes, bytes]:
    """Between which paths, in the order of bytes, those below a path lie: ``0`` comes next to ``/``."""
    base = below.rstrip("/")
    return _bytes(f"{base}/"), _bytes(f"{base}0")


def _read_folder(row: tuple[Any, ...]) -> Folder:
    path, state, jobid, launched, real, digest, end, manifest, piece, withdrawn, removed = row
    return Folder(
        _text(path),
        FolderState(state),
        jobid or "",
        launched,
        _text(real),
        digest or "",
        None if end is None else json.loads(end),
        manifest,
        piece or 0,
        bool(withdrawn),
        tuple(json.loads(removed)),
    )


def _read_node(row: tuple[Any, ...]) -> Node:
    path, kind, mode, mtime, size, digest, data, pieces, source, origin, follow = row
    content: Inline | Pieces | None = None
    if pieces is not None:
        content = Pieces(tuple(Piece(*piece) for piece in json.loads(pieces)), digest)
    elif data is not None:
        content = Inline(_text(path))
    return Node(_text(path), kind, mode, mtime, size, content, data, _text(source), _text(origin), bool(follow))


def _insert(db: sqlite3.Connection, node: Node) -> None:
    pieces: str | None = None
    data: bytes | None = None
    digest: str | None = None
    if isinstance(node.content, Pieces):
        pieces = json.dumps([[piece.jobid, piece.size, piece.digest] for piece in node.content.pieces])
        digest = node.content.digest
    elif node.data is not None:
        data = node.data
    db.execute(
        f"INSERT OR REPLACE INTO nodes ({_NODE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
        (
            _bytes(node.path),
            node.kind,
            node.mode,
            node.mtime,
            node.size,
            digest,
            data,
            pieces,
            _bytes(node.source),
            _bytes(node.origin),
            int(node.follow),
        ),
    )


def _remove_nodes(db: sqlite3.Connection, path: str) -> None:
    db.execute("DELETE FROM nodes WHERE path = ? OR (path >= ? AND path < ?)", (_bytes(path), *_range(path)))
