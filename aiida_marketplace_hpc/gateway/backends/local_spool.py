"""The spool of the local backend: one folder per job, which is queue, lock and accounting record at once.

::

    SPOOL/lock            held while an id is drawn and its folder appears
    SPOOL/last-id         the last id that was drawn; ids only grow, and the queue is served in their order
    SPOOL/slots/N         locked while a job runs in slot N
    SPOOL/jobs/ID/        see :mod:`~aiida_marketplace_hpc.gateway.backends.local_supervisor`

Nothing is kept in memory that is not also here, so that several gateways may use one spool, and any of them may be killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiida_marketplace_hpc.gateway.backends.base import Unknown
from aiida_marketplace_hpc.gateway.backends.local_supervisor import (
    ALIVE,
    CANCEL,
    ENDED,
    SPEC,
    STARTED,
    SUPERVISOR_LOCK,
    WRAPPER,
    members,
    read_json,
    sync_folder,
    write_json,
)

_OVERDUE = "overdue"


class SpooledJob:
    """One job's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name

    @property
    def spec(self) -> Mapping[str, Any]:
        """What the job is.

        :raises FileNotFoundError: if there is no such job.
        """
        return read_json(self.folder / SPEC)

    @property
    def wrapper(self) -> bytes:
        """The script that was submitted.

        :raises FileNotFoundError: if there is no such job.
        """
        return (self.folder / WRAPPER).read_bytes()

    @property
    def started(self) -> Mapping[str, Any] | None:
        return self._read(STARTED)

    @property
    def ended(self) -> Mapping[str, Any] | None:
        return self._read(ENDED)

    @property
    def cancel_requested(self) -> bool:
        return (self.folder / CANCEL).exists()

    @property
    def overdue(self) -> bool:
        """Whether a job without a supervisor was ended for its time limit."""
        return (self.folder / _OVERDUE).exists()

    @property
    def has_ended(self) -> bool:
        return (self.folder / ENDED).exists()

    @property
    def supervised(self) -> bool:
        """Whether a supervisor stands by the job."""
        with _locked(self.folder / SUPERVISOR_LOCK, fcntl.LOCK_SH) as free:
            return free is None

    def request_cancel(self) -> None:
        """Leave word that the job is to end; its supervisor, or whoever takes it up, acts on it."""
        (self.folder / CANCEL).touch(mode=0o600)

    def mark_overdue(self) -> None:
        """Leave word that the job is being ended for its time limit."""
        (self.folder / _OVERDUE).touch(mode=0o600)

    def members(self, started: Mapping[str, Any]) -> set[int]:
        """Find the processes that are left of a job without a supervisor."""
        return members(self.folder, dict(started))

    @contextmanager
    def claim(self) -> Iterator[int | None]:
        """Take the lock that a living job holds.

        :returns: the locked descriptor; ``None`` if the job lives, or if another process has taken it up.
        """
        with _locked(self.folder / ALIVE, fcntl.LOCK_EX) as descriptor:
            yield descriptor

    def settle(self) -> Mapping[str, Any] | None:
        """Write down the end of a job that has ended without a supervisor to do it.

        That is a job that was cancelled before it started, or one whose supervisor was killed. As long as a process of it
        lives, it has not ended.

        :returns: the record of its end; ``None`` while it waits or lives.
        """
        if (ended := self.ended) is not None:
            return ended
        started = self.started
        if started is None and not self.cancel_requested:
            return None
        with self.claim() as claimed:
            if claimed is None:
                return None
            # It may have started or ended before the lock was taken.
            started = self.started
            if (ended := self.ended) is not None:
                return ended
            if started is None:
                return self.end("CANCELLED")
            if self.members(started):
                return None
            if self.cancel_requested:
                return self.end("CANCELLED")
            if self.overdue:
                return self.end("TIMEOUT")
            return self.end("NODE_FAIL", "its supervisor died")

    def end(self, state: str, reason: str = "") -> Mapping[str, Any]:
        """Write down an end; only for whoever holds :meth:`claim`."""
        record = {"ended_at": time.time(), "state": state, "reason": reason, "exit_code": None, "signal": None}
        write_json(self.folder / ENDED, record)
        return record

    def _read(self, name: str) -> Mapping[str, Any] | None:
        try:
            return read_json(self.folder / name)
        except FileNotFoundError:
            return None


class Spool:
    """All jobs of a spool.

    :param path: where it is; made if missing, for the gateway's account only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._jobs = path / "jobs"
        self._lock = threading.Lock()
        self._listed: int | None = None
        self._ids: list[int] = []
        self._newest = 0

    def create(self) -> None:
        """Make the spool's folders.

        :raises OSError: if that is not possible.
        """
        for folder in (self._path, self._jobs, self._path / "slots"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(self, describe: Callable[[str], Mapping[str, Any]], wrapper: bytes) -> str:
        """Put a job into the queue, durably.

        :param describe: makes the job's ``spec.json`` when its id is known.
        :returns: the job's id.
        :raises OSError: if that is not possible; then there is no such job.
        :raises Unknown: if the job is there, but may be lost with the next power failure.
        """
        with _locked(self._path / "lock", fcntl.LOCK_EX, wait=True):
            id = str(self._draw_id())
            new = self._path / "new"
            # What a gateway left here that was killed in this place.
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(mode=0o700)
            (new / WRAPPER).write_bytes(wrapper)
            write_json(new / SPEC, dict(describe(id)))
            os.rename(new, self._jobs / id)
            try:
                sync_folder(self._jobs)
            except OSError as error:
                raise Unknown(f"the spool {self._path} may not keep the job: {error}") from error
        return id

    def get(self, id: str) -> SpooledJob | None:
        """Look up a job."""
        folder = self._jobs / id
        return SpooledJob(folder) if id.isdecimal() and folder.is_dir() else None

    def living(self) -> list[SpooledJob]:
        """List the jobs whose end is not on record, in the order in which they came.

        :raises OSError: if the spool cannot be read.
        """
        with self._lock:
            changed = os.stat(self._jobs).st_mtime_ns
            # The clock of a file system is coarse: a folder that has changed just now may change again unnoticed.
            if changed != self._listed or time.time_ns() - changed < 2_000_000_000:
                known, ids = set(self._ids), self._all_ids()
                self._ids = [id for id in ids if id in known or id > self._newest]
                self._newest = max(ids, default=self._newest)
                self._listed = changed
            jobs = [SpooledJob(self._jobs / str(id)) for id in self._ids]
            living = [job for job in jobs if not job.has_ended]
            self._ids = [int(job.id) for job in living]
        return living

    def since(self, moment: float) -> Iterator[SpooledJob]:
        """List the jobs that were submitted since then (seconds since the epoch), newest first.

        :raises OSError: if the spool cannot be read.
        """
        for id in reversed(self._all_ids()):
            job = SpooledJob(self._jobs / str(id))
            try:
                submitted_at = job.spec["submitted_at"]
            except FileNotFoundError:
                continue
            # Ids grow with time, but a clock may have been set back.
            if submitted_at < moment - 3600:
                return
            if submitted_at >= moment:
                yield job

    @contextmanager
    def slot(self, slots: int) -> Iterator[int | None]:
        """Take a free slot.

        :returns: its locked descriptor, to be handed on; ``None`` if all are taken.
        """
        for number in range(slots):
            with _locked(self._path / "slots" / str(number), fcntl.LOCK_EX) as descriptor:
                if descriptor is not None:
                    yield descriptor
                    return
        yield None

    def prune(self, age: float) -> None:
        """Forget the jobs that ended more than ``age`` seconds ago.

        :raises OSError: if the spool cannot be read.
        """
        for id in self._all_ids():
            job = SpooledJob(self._jobs / str(id))
            ended = job.ended
            if ended is not None and ended["ended_at"] < time.time() - age:
                # Moved away first: an interrupted removal must not leave what looks like a waiting job.
                doomed = self._path / f"old-{id}"
                try:
                    os.rename(job.folder, doomed)
                except FileNotFoundError:
                    continue
                shutil.rmtree(doomed, ignore_errors=True)
        for doomed in self._path.glob("old-*"):
            shutil.rmtree(doomed, ignore_errors=True)

    def _draw_id(self) -> int:
        counter = self._path / "last-id"
        try:
            last = int(read_json(counter)["id"])
        except FileNotFoundError:
            last = 0
        # The jobs count too, should the counter be lost: an id must never come twice.
        id = max(last, *self._all_ids(), 0) + 1
        write_json(counter, {"id": id})
        return id

    def _all_ids(self) -> list[int]:
        return sorted(int(name) for name in os.listdir(self._jobs) if name.isdecimal())


@contextmanager
def _locked(path: Path, kind: int, *, wait: bool = False) -> Iterator[int | None]:
    """Hold a lock file; ``None`` if it is held by another."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)
