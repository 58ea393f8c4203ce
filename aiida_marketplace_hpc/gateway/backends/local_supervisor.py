"""The process that stands by one local job: starts it, watches it, ends it, and writes down how it ended.

The gateway starts it as a program of its own, by its path and with nothing but the standard library, so that it is up in
a few milliseconds and goes on when the gateway is restarted, upgraded or killed. It knows only the job's folder in the spool::

    spec.json         what to run, and how; written by the gateway, never changed
    wrapper           what is run
    cancel            exists when somebody asked for the end of the job
    alive             locked by the supervisor *and* by every process of the job: it is free when all of them are gone
    supervisor.lock   locked by the supervisor alone
    member            open in every process of the job, and in no other
    started.json      written before the first instruction of the job
    ended.json        written when no process of the job is left
    log               what the supervisor has to complain about

It works on Linux: it finds the processes of a job in ``/proc``, and has orphaned ones handed to itself by the kernel.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SPEC = "spec.json"
WRAPPER = "wrapper"
CANCEL = "cancel"
ALIVE = "alive"
SUPERVISOR_LOCK = "supervisor.lock"
MEMBER = "member"
STARTED = "started.json"
ENDED = "ended.json"
LOG = "log"

_POLL = 0.2
_HIGH_DESCRIPTOR = 100
_PR_SET_CHILD_SUBREAPER = 36
_GO = b"g"
_DEFAULT_SIGNALS = (
    signal.SIGCHLD,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGPIPE,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXFSZ,
)


def main(arguments: list[str]) -> int:
    """Supervise one job in the background.

    :param arguments: the job's folder in the spool, and the inherited descriptors that hold its slot and its lock ``alive``.
    """
    if os.fork():
        # The gateway waits for this process only, so that it has no children to look after.
        return 0
    job = Path(arguments[0])
    member = os.open(job / MEMBER, os.O_RDONLY | os.O_CREAT, 0o600)
    for descriptor in (*map(int, arguments[1:]), member):
        # Out of the way of scripts, which use the low numbers for themselves. The processes of the job inherit them.
        fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH_DESCRIPTOR)
        os.close(descriptor)
    lock = os.open(job / SUPERVISOR_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    Supervisor(job, read_json(job / SPEC)).run()
    return 0


class Supervisor:
    """Runs one job to its end.

    :param job: its folder in the spool.
    :param spec: its ``spec.json``: ``folder``, ``environment``, ``stdin``, ``stdout``, ``stderr`` (``null``: joined),
        ``append``, ``time_limit`` (seconds or ``null``), ``kill_wait`` (seconds between SIGTERM and SIGKILL).
    """

    def __init__(self, job: Path, spec: dict[str, Any]) -> None:
        self._job = job
        self._spec = spec
        self._child = 0
        self._status: int | None = None
        self._max_rss_kib = 0
        self._cpu_seconds = 0.0

    def run(self) -> None:
        """Start the job, wait for its end, and write it down."""
        if (self._job / CANCEL).exists():
            self._write_end({"state": "CANCELLED", "exit_code": None, "signal": None, "reason": ""})
            return
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        wakeup, wakeup_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        complaint = self._start()
        asked = self._watch(wakeup)
        code = os.waitstatus_to_exitcode(self._status or 0)
        self._write_end(
            {
                "state": asked or ("COMPLETED" if code == 0 else "FAILED"),
                "exit_code": code if code >= 0 else None,
                "signal": -code if code < 0 else None,
                "reason": _read_to_end(complaint),
                "max_rss_kib": self._max_rss_kib,
                "cpu_seconds": round(self._cpu_seconds, 3),
            }
        )

    def _start(self) -> int:
        """Start the job.

        :returns: a descriptor from which the reason can be read, should the job not come to run.
        """
        gate, gate_end = os.pipe()
        complaint, complaint_end = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            try:
                os.close(gate_end)
                os.setsid()
                # It must not run unless it is on record that it was started.
                if os.read(gate, 1) == _GO:
                    _become_job(self._job, self._spec)
            except OSError as error:
                os.write(complaint_end, str(error).encode("utf-8", "replace")[:500])
            finally:
                os._exit(1)
        os.close(gate)
        os.close(complaint_end)
        record = {"started_at": time.time(), "supervisor": os.getpid(), "session": self._child, "boot": boot_id()}
        record["start"] = next((process.start for process in processes([self._child])), 0)
        write_json(self._job / STARTED, record)
        os.write(gate_end, _GO)
        os.close(gate_end)
        return complaint

    def _watch(self, wakeup: int) -> str | None:
        """Wait until no process of the job is left.

        :returns: the state of a job whose end was brought about from here, else ``None``.
        """
        limit = self._spec["time_limit"]
        deadline = None if limit is None else time.monotonic() + limit
        asked: str | None = None
        kill_from = 0.0
        while True:
            alone = self._reap()
            if alone:
                return asked
            now = time.monotonic()
            ended = self._status is not None
            if not ended and asked is None:
                if (self._job / CANCEL).exists():
                    asked = "CANCELLED"
                elif deadline is not None and now >= deadline:
                    asked = "TIMEOUT"
                if asked is not None:
                    kill_from = now + self._spec["kill_wait"]
                    signal_all(descendants(os.getpid()), signal.SIGTERM)
            killing = (ended or asked is not None) and now >= kill_from
            if killing:
                # What a script leaves behind ends with it; after a request to end, everybody has the same time to comply.
                signal_all(descendants(os.getpid()), signal.SIGKILL)
            pause = 0.02 if killing else _POLL
            if deadline is not None and asked is None:
                pause = max(0.0, min(pause, deadline - now))
            if select.select([wakeup], [], [], pause)[0]:
                os.read(wakeup, 4096)

    def _reap(self) -> bool:
        """Collect what has ended.

        :returns: whether no process is left: orphans are handed to this one, so that it has children as long as anything
            of the job lives.
        """
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            self._max_rss_kib = max(self._max_rss_kib, usage.ru_maxrss)
            self._cpu_seconds += usage.ru_utime + usage.ru_stime
            if pid == self._child:
                self._status = status

    def _write_end(self, record: dict[str, Any]) -> None:
        record = {"ended_at": time.time(), **record}
        while self._job.is_dir():
            try:
                write_json(self._job / ENDED, record)
            except OSError as error:
                # Until it is written the job counts as running; a full disk may be cleared.
                sys.stderr.write(f"cannot write {ENDED}: {error}\n")
                sys.stderr.flush()
                time.sleep(1)
            else:
                return


def _become_job(job: Path, spec: dict[str, Any]) -> None:
    """Become the wrapper of the job's script.

    :raises OSError: if that is not possible.
    """
    signal.set_wakeup_fd(-1)
    # What Python, or whoever started the gateway, ignores is inherited.
    for number in _DEFAULT_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    os.chdir(spec["folder"])
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if spec["append"] else os.O_TRUNC)
    stdin = os.open(spec["stdin"], os.O_RDONLY)
    stdout = os.open(spec["stdout"], flags, 0o666)
    stderr = stdout if spec["stderr"] is None else os.open(spec["stderr"], flags, 0o666)
    for target, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, target)
    os.execve("/bin/sh", ["sh", str(job / WRAPPER)], spec["environment"])  # noqa: S606 (an argument list is the point)


class Process(NamedTuple):
    """A living process as ``/proc`` shows it.

    :param start: when it started, in clock ticks since the machine did.
    """

    pid: int
    parent: int
    session: int
    start: int


def descendants(root: int) -> Iterator[int]:
    """Find the living processes that descend from one."""
    children: dict[int, list[int]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process.pid)
    stack = list(children.get(root, ()))
    while stack:
        pid = stack.pop()
        stack.extend(children.get(pid, ()))
        yield pid


def members(job: Path, started: dict[str, Any]) -> set[int]:
    """Find the living processes of a job whose supervisor is gone: those of its session, and those marked as its members.

    Who holds the lock ``alive`` is no proof: a gateway may have taken it to write down the job's end.

    :param job: its folder in the spool.
    :param started: its ``started.json``.
    """
    mark = str(job.resolve() / MEMBER)
    found = {process.pid for process in processes() if mark in _open_files(process.pid)}
    if started["boot"] == boot_id():
        session = [process for process in processes() if process.session == started["session"]]
        # An id is free for another process as soon as nobody of the session is left.
        if all(process.start == started["start"] for process in session if process.pid == process.session):
            found.update(process.pid for process in session)
    return found


def processes(pids: Iterable[int] | None = None) -> Iterator[Process]:
    """List living processes.

    :param pids: of these; default: of all.
    """
    for pid in pids if pids is not None else [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
        try:
            with open(f"/proc/{pid}/stat", "rb") as stat:
                # The name in parentheses may hold anything, also blanks and parentheses.
                fields = stat.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if len(fields) > 19 and fields[0] not in (b"Z", b"X"):
            yield Process(pid, int(fields[1]), int(fields[3]), int(fields[19]))


def _open_files(pid: int) -> Iterator[str]:
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for descriptor in descriptors:
        try:
            yield os.readlink(f"/proc/{pid}/fd/{descriptor}")
        except OSError:
            continue


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes that may be gone by now."""
    for pid in pids:
        try:
            os.kill(pid, number)
            # A stopped process takes nothing but SIGKILL before it goes on.
            os.kill(pid, signal.SIGCONT)
        except (ProcessLookupError, PermissionError):
            continue


def boot_id() -> str:
    """Identify this run of the machine: process ids of another run mean nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the job's files.

    :raises OSError: if it cannot be read.
    """
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file so that it is either there as a whole, also after a power failure, or not at all.

    Each of these files has one writer at a time, who holds the lock for it.

    :raises OSError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(json.dumps(content).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_to_end(descriptor: int) -> str:
    with open(descriptor, "rb") as pipe:
        return pipe.read().decode("utf-8", "replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
