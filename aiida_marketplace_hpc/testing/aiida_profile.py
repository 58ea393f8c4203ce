"""An AiiDA installation of its own, used as its users do: through ``verdi``, scripts and the daemon."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from aiida_marketplace_hpc.testing.machine import (
    SYSTEM_PATH,
    ProcessEntry,
    RigError,
    end_all,
    marked_with,
    process_table,
    tail,
    wait_until,
)
from aiida_marketplace_hpc.testing.rig import Rig

FAST: Mapping[str, int] = {"runner.poll.interval": 1, "transport.task_retry_initial_interval": 1, "daemon.timeout": 10}
"""Options of AiiDA with which little is waited for: how often a process is looked after, and after which time a failed
transport task is tried again (AiiDA's own: 60 and 20 s). The time to wait for the daemon's answer is longer than AiiDA's own
2 s, within which a busy machine may not answer."""
PATIENT: Mapping[str, int] = {
    "runner.poll.interval": 60,
    "transport.task_retry_initial_interval": 20,
    "daemon.timeout": 10,
}
"""AiiDA's own intervals."""

_MARK = "MPHPC_AIIDA"
_WORKER_START = 30.0
"""Seconds in which the daemon's workers connect to its broker, or do not."""


@dataclass(frozen=True)
class ProcessOutcome:
    """How an AiiDA process stands: its state, and once it has ended its exit code and message."""

    pk: int
    state: str
    exit_status: int | None
    exit_message: str | None
    paused: bool

    @property
    def terminated(self) -> bool:
        return self.state in ("finished", "excepted", "killed")


class AiidaProfile(Rig):
    """An AiiDA configuration directory with one profile, apart from any other on this machine.

    Everything runs in processes of its own with an environment of its own: nothing of the tests' environment gets in, no
    token above all, and the tests' own process never loads a profile. SQLite holds the data. :meth:`close` ends every process,
    also the daemon's, and removes the directory.

    :param path: the directory, which is created; its ``.aiida`` is the configuration directory.
    :param broker: ``zeromq``, with which there is a daemon, or ``None``.
    :param options: AiiDA's options, :data:`FAST` or :data:`PATIENT` with what you change.
    :param import_path: directories from which the daemon's workers import test code (workflows, calculation plugins).
    :param env: added to the environment of every process.
    """

    NAME = "test"

    def __init__(
        self,
        path: Path,
        broker: Literal["zeromq"] | None = "zeromq",
        *,
        options: Mapping[str, int | str | bool] = FAST,
        import_path: Sequence[Path] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.broker = broker
        self._options = dict(options)
        self._import_path = list(import_path)
        self._env = dict(env or {})
        self._mark = secrets.token_hex(8)
        self._scripts = 0
        self._temporary = Path()

    def start(self) -> None:
        """Create the profile, as ``verdi presto`` does: with a user, and with this machine as the computer ``localhost``.

        :raises RigError: with what AiiDA said, if it does not.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        # Sockets lie in it, whose paths must be short.
        self._temporary = Path(tempfile.mkdtemp(prefix="mphpc-aiida-"))
        broker = "--use-zeromq" if self.broker else "--no-broker"
        self.run([sys.executable, "-W", "ignore", "-c", _CREATE, self.NAME, broker, json.dumps(self._options)])

    def close(self) -> None:
        """End every process that was started here, the daemon's included, and remove the directory. May be repeated."""
        self.kill_daemon()
        shutil.rmtree(self._temporary, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process of this installation."""
        programs = str(Path(sys.executable).parent)
        imports = os.pathsep.join(str(path) for path in self._import_path)
        return {
            "PATH": f"{programs}{os.pathsep}{SYSTEM_PATH}",
            "HOME": str(self.path),
            "USER": "aiida",
            "LANG": "C.UTF-8",
            "TMPDIR": str(self._temporary),
            "AIIDA_PATH": str(self.path),
            **({"PYTHONPATH": imports} if imports else {}),
            _MARK: self._mark,
            **self._env,
        }

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str | None = None,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the environment of this installation.

        :param input: what is typed.
        :param check: raise for an exit code other than 0.
        :param env: added to the environment, such as a token.
        :param timeout: seconds.
        :raises RigError: with what it said, if ``check`` is set.
        """
        done = subprocess.run(
            argv,
            env={**self.environment, **(env or {})},
            cwd=self.path,
            input=input or "",
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise RigError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def verdi(
        self,
        *args: str,
        input: str | None = None,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``verdi`` with this profile.

        :param input: what is typed.
        :param check: raise for an exit code other than 0.
        :param env: added to the environment, such as a token.
        :param timeout: seconds.
        :raises RigError: with what it said, if ``check`` is set.
        """
        return self.run([self._verdi, "-p", self.NAME, *args], input=input, check=check, env=env, timeout=timeout)

    def python(
        self,
        code: str | Path,
        *args: str,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a script with the profile loaded, as ``verdi run`` does.

        :param code: the file, or the text of the script.
        :raises RigError: with what it said, if ``check`` is set and it ends with another exit code than 0.
        """
        return self.verdi("run", "--", str(self._script(code)), *args, check=check, env=env, timeout=timeout)

    def start_python(
        self,
        code: str | Path,
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a script as :meth:`python` does, and return at once; :meth:`close` ends it at the latest."""
        return subprocess.Popen(
            [self._verdi, "-p", self.NAME, "run", "--", str(self._script(code))],
            env={**self.environment, **(env or {})},
            cwd=self.path,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )

    def start_daemon(self, workers: int = 1, *, env: Mapping[str, str] | None = None) -> None:
        """Start the daemon and wait until its workers are connected to its broker.

        Broker and workers start at once. A worker that reads the broker's address in the moment in which that is written
        connects to nothing, and waits there for ever (aiida-core 2.9.4); such a one is started anew.

        :param env: added to the environment of the workers, such as a token.
        :raises RigError: with the end of the daemon's log, if they are not.
        """
        self.verdi("daemon", "start", str(workers), env=env)
        try:
            self._wait_for_workers(workers, _WORKER_START)
        except RigError:
            for pid in self.workers():
                os.kill(pid, signal.SIGKILL)
            self._wait_for_workers(workers, 60)

    def _wait_for_workers(self, number: int, within: float) -> None:
        wait_until(
            lambda: len(self.workers()) >= number and self._connections() >= number,
            within=within,
            failure=lambda: (
                f"{len(self.workers())} of {number} daemon workers run, "
                f"{self._connections()} connections to the broker are open\n{self.daemon_log()}"
            ),
            poll=0.1,
        )

    def _connections(self) -> int:
        """How many have reached the broker."""
        addresses = [path.read_text() for path in (self.path / ".aiida").glob("broker/*/broker.sockets")]
        sockets = Path("/proc/net/unix").read_text().splitlines()
        listening_too = sum(
            line.endswith(f"{address}/router.sock") for address in addresses if address for line in sockets
        )
        return listening_too - len(addresses)

    def stop_daemon(self) -> None:
        """Stop the daemon as its user does; AiiDA kills it if that takes more than 30 s.

        :raises RigError: if something of it still runs after a minute.
        """
        self.verdi("daemon", "stop", "--timeout", "45", check=False)
        wait_until(
            lambda: not self._daemon_processes(),
            within=60,
            failure=lambda: f"the daemon does not stop: {[entry.command() for entry in self._daemon_processes()]}",
        )

    def kill_daemon(self) -> None:
        """Kill the daemon with all that belongs to it, at once, and everything else that was started here."""
        end_all(lambda: marked_with(_MARK, self._mark))

    def workers(self) -> list[int]:
        """The process ids of the daemon's workers, oldest first."""
        return sorted(entry.pid for entry in self._daemon_processes() if entry.command()[-2:] == ["daemon", "worker"])

    def kill_worker(self) -> None:
        """Kill the oldest worker as ``kill -9`` does; the daemon starts another one in its place."""
        os.kill(self.workers()[0], signal.SIGKILL)

    def daemon_log(self, lines: int = 60) -> str:
        """The end of the daemon's log, and what its broker says: who submitted into the void sees no worker there."""
        configuration = self.path / ".aiida"
        patterns = ("daemon/log/aiida-*.log", "broker/*/broker.log", "broker/*/broker.status")
        return "\n".join(tail(path, lines) for pattern in patterns for path in sorted(configuration.glob(pattern)))

    def outcomes(self, pks: Iterable[int]) -> dict[int, ProcessOutcome]:
        """How processes stand now, by primary key; those that do not exist are missing."""
        return self._watch(pks, 0.0)

    def wait_for(self, pks: Iterable[int], timeout: float = 120.0) -> dict[int, ProcessOutcome]:
        """Wait until all processes have ended, however they end.

        :param timeout: seconds.
        :raises RigError: with the states, the reports and the end of the daemon's log, if the time is over.
        """
        wanted = set(pks)
        found = self._watch(wanted, timeout)
        if late := wanted - {pk for pk, outcome in found.items() if outcome.terminated}:
            reports = [self.verdi("process", "report", str(pk), check=False).stdout for pk in sorted(late)]
            raise RigError("\n".join([f"not ended after {timeout:g} s: {found}", *reports, self.daemon_log()]))
        return found

    def _watch(self, pks: Iterable[int], timeout: float) -> dict[int, ProcessOutcome]:
        wanted = ",".join(map(str, pks))
        done = self.python(_WATCH, wanted, str(timeout), timeout=timeout + 60)
        return {row[0]: ProcessOutcome(*row) for row in json.loads(done.stdout.splitlines()[-1])}

    def _daemon_processes(self) -> list[ProcessEntry]:
        entries = (entry for entry in process_table() if entry.environment().get(_MARK) == self._mark)
        return [entry for entry in entries if "daemon" in entry.command()]

    @property
    def _verdi(self) -> str:
        return str(Path(sys.executable).with_name("verdi"))

    def _script(self, code: str | Path) -> Path:
        if isinstance(code, Path):
            return code
        self._scripts += 1
        script = self._temporary / f"script_{self._scripts}.py"
        script.write_text(code, encoding="utf-8")
        return script


# One start of AiiDA instead of one for each option.
_CREATE = """\
import json, sys
from aiida.cmdline.commands.cmd_verdi import verdi
from aiida.manage.configuration import get_config

name, broker, options = sys.argv[1:]
verdi.main(["presto", "--profile-name", name, broker, "--non-interactive"], standalone_mode=False)
config = get_config()
for option, value in json.loads(options).items():
    config.set_option(option, value, scope=name)
config.store()
"""

_WATCH = """\
import json, sys, time
from aiida import orm

pks, deadline = [int(pk) for pk in sys.argv[1].split(",") if pk], time.monotonic() + float(sys.argv[2])
fields = ["id", "attributes.process_state", "attributes.exit_status", "attributes.exit_message", "attributes.paused"]
while True:
    query = orm.QueryBuilder().append(orm.ProcessNode, filters={"id": {"in": pks}}, project=fields)
    rows = [[pk, state, status, message, bool(paused)] for pk, state, status, message, paused in query.all()]
    ended = sum(row[1] in ("finished", "excepted", "killed") for row in rows)
    if ended == len(set(pks)) or time.monotonic() > deadline:
        break
    time.sleep(0.2)
print(json.dumps(rows))
"""
