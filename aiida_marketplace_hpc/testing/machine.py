"""The machine on which the cluster's side of a test runs, and the processes on it.

:class:`Machine` is this machine as it is; :class:`~aiida_marketplace_hpc.testing.cluster.IsolatedCluster` is a part of it
that is set apart. Slurm and gateways are started on either of them without knowing on which. Linux only: processes are
found in ``/proc``.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CLUSTER_USER = "mphpc-cluster"
"""The account under which the cluster's side runs where tests run as root."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_MARK = "MPHPC_RIG"


class RigError(Exception):
    """A part of the rig could not be brought up or ended; the message has the end of the log that says why."""


class NotPossibleHere(RigError):
    """This machine lacks something that the rig needs.

    :param reason: what is lacking.
    :param remedy: the command that would provide it.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; to enable it: {remedy}")
        self.reason = reason
        self.remedy = remedy


def is_root_on_debian() -> bool:
    """Say whether packages may be installed and accounts created here."""
    return os.geteuid() == 0 and Path("/etc/debian_version").exists()


def wait_until(condition: Callable[[], bool], *, within: float, failure: Callable[[], str], poll: float = 0.02) -> None:
    """Wait for a condition of the world outside.

    :param within: seconds.
    :param failure: called for the message if the time is over.
    :raises RigError: if the time is over.
    """
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise RigError(failure())
        time.sleep(poll)


def tail(path: Path, lines: int = 30) -> str:
    """The last lines of a log, headed by its path; never raises for a log that is missing."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as exc:
        text = str(exc)
    return "\n".join([f"--- end of {path}:", *text.splitlines()[-lines:]])


def free_ports(count: int) -> list[int]:
    """Find different TCP ports of 127.0.0.1 on which nobody listens.

    They lie below the ephemeral range: a client that keeps calling a dead server on an ephemeral port can be given that very
    port as its own and then talks to itself, and any outgoing connection can take the port of a server that restarts.
    """
    ports: set[int] = set()
    while len(ports) < count:
        port = 15000 + secrets.randbelow(17000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.add(port)
    return list(ports)


def ensure_user(name: str = CLUSTER_USER) -> str:
    """Create a system account without a login if there is none of that name, and return the name.

    May be repeated, also by several processes at once.

    :raises NotPossibleHere: if that takes root.
    """
    command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
    command += ["--shell", "/usr/sbin/nologin", name]
    for attempt in range(20):
        try:
            pwd.getpwnam(name)
        except KeyError:
            pass
        else:
            return name
        if os.geteuid() != 0:
            raise NotPossibleHere(f"there is no account {name}", f"sudo {' '.join(command)}")
        made = subprocess.run(command, capture_output=True, text=True, env={"PATH": SYSTEM_PATH})
        if made.returncode not in (
            0,
            1,
            9,
        ):  # 1: another process holds the lock on the password file, 9: has just made it
            raise RigError(f"useradd {name}: {made.stderr.strip()}")
        if made.returncode:
            time.sleep(0.05 * (attempt + 1))
    raise RigError(f"useradd {name}: the password file stays locked")


@dataclass(frozen=True)
class ProcessEntry:
    """A living process (no zombie)."""

    pid: int
    parent: int
    name: str

    def environment(self) -> dict[str, str]:
        """The environment it was started with; empty if it has ended or belongs to somebody else."""
        try:
            raw = Path(f"/proc/{self.pid}/environ").read_bytes()
        except OSError:
            return {}
        pairs = (item.partition("=") for item in raw.decode(errors="surrogateescape").split("\0") if "=" in item)
        return {key: value for key, _, value in pairs}

    def memory(self, name: str) -> int:
        """What it has in memory: a field of its status such as ``VmRSS`` or ``VmHWM``, in bytes.

        :raises RigError: if it has ended.
        """
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) * 1024
        raise RigError(f"process {self.pid} has no {name}: it has ended")

    def forget_peak(self) -> None:
        """Let its ``VmHWM`` begin anew; only root may, where the process is not of the same account."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def command(self) -> list[str]:
        """Its arguments; empty if it has ended."""
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
        except OSError:
            return []


def process_table() -> Iterator[ProcessEntry]:
    """All processes that live now."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
        except OSError:
            continue
        name, _, rest = stat.partition("(")[2].rpartition(")")
        state, parent = rest.split()[:2]
        if state not in "ZX":
            yield ProcessEntry(int(entry), int(parent), name)


def with_descendants(roots: Iterable[int], table: Sequence[ProcessEntry]) -> set[int]:
    """The given processes and all that descend from them, as far as the parents still live."""
    found = set(roots)
    while True:
        more = {entry.pid for entry in table if entry.parent in found} - found
        if not more:
            return found
        found |= more


def marked_with(variable: str, value: str) -> set[int]:
    """The processes that carry a variable in their environment, and their descendants."""
    table = list(process_table())
    return with_descendants((e.pid for e in table if e.environment().get(variable) == value), table)


def end_all(find: Callable[[], set[int]], *, within: float = 10.0) -> None:
    """Kill processes until none is found any more, also those that appear meanwhile.

    :param find: returns the ids of the processes that must not live.
    :raises RigError: if some live after ``within`` seconds.
    """
    deadline = time.monotonic() + within
    while pids := find() - {os.getpid()}:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if time.monotonic() > deadline:
            raise RigError(f"processes that do not end: {sorted(pids)}")
        time.sleep(0.01)


@dataclass(frozen=True)
class TreeEntry:
    """One path below a directory: ``type`` as ``find`` words it (f, d, l, …), ``mode`` the permission bits, ``size`` in
    bytes, ``target`` of a symbolic link."""

    type: str
    mode: int
    size: int
    target: str = ""


class Machine:
    """This machine as it is, with a directory that stands for the cluster's file systems.

    Below :attr:`path` lie ``home`` and ``scratch``, which belong to :attr:`user`, and ``software``, which belongs to whoever
    runs the tests. Every process started here runs in an environment of its own and is ended by :meth:`close`, also if it
    has gone to the background, unless it has cleared its environment *and* lost its parents.

    :param user: the account of the cluster's processes; as root it defaults to :data:`CLUSTER_USER`, otherwise it is the
        account that runs the tests.
    """

    def __init__(self, user: str | None = None) -> None:
        own = pwd.getpwuid(os.geteuid()).pw_name
        self.user = user or (CLUSTER_USER if os.geteuid() == 0 else own)
        self.path = ""
        self.rig = ""
        self._children: list[subprocess.Popen[bytes]] = []
        self._own_user = own
        self._mark = secrets.token_hex(8)

    def __enter__(self) -> Machine:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self) -> None:
        """Make the directories.

        :raises NotPossibleHere: if this machine does not allow it.
        """
        if self._own_user == "root":
            ensure_user(self.user)
        base = Path(tempfile.mkdtemp(prefix="mphpc-cluster-"))
        base.chmod(0o755)
        try:
            self._lay_out(str(base / "cluster"), str(base / "rig"))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process that was started here, and remove the directories. May be repeated."""
        end_all(lambda: marked_with(_MARK, self._mark))
        self._reap()
        if self.path:
            shutil.rmtree(Path(self.path).parent, ignore_errors=True)

    @property
    def home(self) -> str:
        """Where users have their homes: for ``--home``, ``{home}/{username}``."""
        return f"{self.path}/home"

    @property
    def scratch(self) -> str:
        """Where users have their scratch directories."""
        return f"{self.path}/scratch"

    @property
    def software(self) -> str:
        """What the cluster offers to all, read-only for :attr:`user` where tests run as root."""
        return f"{self.path}/software"

    def environment(self, user: str | None = None) -> dict[str, str]:
        """The environment of the machine's processes; nothing of the tests' own gets into it."""
        name = user or self._own_user
        home = f"{self.rig}/home" if name == self.user else "/"
        names = {"USER": name, "LOGNAME": name, "HOME": home, "LANG": "C.UTF-8", "PATH": SYSTEM_PATH}
        return {**names, "TMPDIR": f"{self.rig}/temporary", _MARK: self._mark}

    def popen(
        self,
        argv: Sequence[str],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own; the id is that of the command itself.

        :param user: the account; by default the one that runs the tests.
        :param env: added to :meth:`environment`.
        :param cwd: a directory of this machine.
        """
        child = subprocess.Popen(
            self._wrap(argv, user, cwd),
            env={**self.environment(user), **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        self._children = [*(c for c in self._children if c.poll() is None), child]
        return child

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        input: str | bytes | None = None,
        timeout: float = 60.0,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and return what it said.

        :param user: the account; by default the one that runs the tests.
        :param timeout: seconds after which the command is killed and :class:`subprocess.TimeoutExpired` raised.
        :param check: raise for an exit code other than 0.
        :raises RigError: with the command's own words, if ``check`` is set.
        """
        done = subprocess.run(
            self._wrap(argv, user, cwd),
            env={**self.environment(user), **(env or {})},
            input=input.encode() if isinstance(input, str) else input or b"",
            capture_output=True,
            timeout=timeout,
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if check and done.returncode:
            raise RigError(f"{' '.join(argv)} ended with {done.returncode}:\n{out}{err}")
        return subprocess.CompletedProcess(list(argv), done.returncode, out, err)

    def exists(self, path: str) -> bool:
        """Say whether a path exists on this machine; a dangling link does not."""
        return self.run(["test", "-e", path]).returncode == 0

    def read_text(self, path: str) -> str:
        """The content of a file on this machine.

        :raises RigError: if it cannot be read.
        """
        return self.run(["cat", "--", path], check=True).stdout

    def write(self, path: str, content: str | bytes, *, user: str | None = None, mode: int = 0o644) -> None:
        """Write a file on this machine, with the directories above it."""
        script = 'mkdir -p -- "${1%/*}" && (umask 077 && cat >"$1") && chmod -- "$2" "$1"'
        self.run(["sh", "-c", script, "write", path, f"{mode:o}"], user=user, input=content, check=True)

    def tree(self, path: str) -> dict[str, TreeEntry]:
        """Everything below a directory of this machine, by relative path; links are not followed.

        :raises RigError: if there is no such directory.
        """
        found = self.run(["find", path, "-mindepth", "1", "-printf", r"%P\0%y\0%m\0%s\0%l\0"], check=True)
        fields = found.stdout.split("\0")[:-1]
        rows = zip(*(fields[i::5] for i in range(5)), strict=True)
        return {name: TreeEntry(kind, int(mode, 8), int(size), link) for name, kind, mode, size, link in rows}

    def make_directory(self, name: str, *, user: str | None = None, mode: int = 0o755) -> str:
        """Make a directory for the rig's own files (state, sockets, logs) with a name that nobody else has."""
        path = f"{self.rig}/{name}-{secrets.token_hex(4)}"
        self._install_directory(path, user, mode)
        return path

    def outside(self, path: str) -> Path:
        """Where the test itself finds a path of this machine, past every isolation: to open a database, to read a log.

        Absolute symbolic links do not resolve on that way.
        """
        return Path(path)

    def processes(self) -> list[ProcessEntry]:
        """The processes that were started on this machine, directly or by others of them."""
        ours = marked_with(_MARK, self._mark)
        return [entry for entry in process_table() if entry.pid in ours]

    def _lay_out(self, path: str, rig: str) -> None:
        self.path, self.rig = path, rig
        for directory in (path, rig, self.software):
            self._install_directory(directory, None, 0o755)
        for directory in (self.home, self.scratch, f"{rig}/home"):
            self._install_directory(directory, self.user, 0o755)
        self._install_directory(f"{rig}/temporary", None, 0o1777)

    def _install_directory(self, path: str, user: str | None, mode: int) -> None:
        owner: list[str] = []
        if self._own_user == "root":
            account = pwd.getpwnam(user or "root")
            owner = ["-o", account.pw_name, "-g", str(account.pw_gid)]
        self.run(["install", "-d", "-m", f"{mode:o}", *owner, path], check=True)

    def _wrap(self, argv: Sequence[str], user: str | None, cwd: str) -> list[str]:
        """The command as it must be started from outside; every layer replaces itself by the next, so the id stays."""
        wrapped = ["env", f"--chdir={cwd}", *argv]
        if user is not None and user != self._own_user:
            if self._own_user != "root":
                raise NotPossibleHere(f"only root can run commands as {user}", "run the tests as root")
            account = pwd.getpwnam(user)
            switch = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--init-groups", "--"]
            wrapped = [*switch, *wrapped]
        return wrapped

    def _reap(self) -> None:
        for child in self._children:
            child.wait(timeout=10)
        self._children = []
