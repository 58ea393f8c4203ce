"""What the demo puts up and takes down: a directory for everything, a gateway, an AiiDA profile with its daemon.

Everything is a child process with a real command. All of them, and what they start in turn, are found again by a mark in
their environment, so that nothing is left running whatever happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]
import yaml  # type: ignore[import-untyped]

from aiida_marketplace_hpc.errors import ConfigurationError, MarketplaceHpcError

HOST = "127.0.0.1"
USER = "demo@localhost"
COMPUTER = "cluster"
CODE = "python3"

_MARK = "MARKETPLACE_HPC_STAGE"
_CLAIM = ".marketplace-hpc-demo"
_OLDEST_PYTHON = (3, 10)
_FOREIGN = ("AIIDA_", "MARKETPLACE_HPC_", "MP_")
"""Variables of these families would turn the demo's commands to somebody's own profile or gateway."""
_GATEWAY_START = 30.0
_COMMAND = 120.0
_GRACE = 10.0
_WORKER_START = 30.0
_PATIENCE = "30"
"""Seconds that AiiDA waits for its daemon; the default is too short for a machine that is busy with other things."""


@dataclass(frozen=True)
class Layout:
    """Where everything of a demo lies."""

    directory: Path

    @property
    def aiida(self) -> Path:
        """AiiDA's own folder below ``AIIDA_PATH``, which is the directory itself."""
        return self.directory / ".aiida"

    @property
    def cluster(self) -> Path:
        """The users' homes on the cluster."""
        return self.directory / "cluster"

    @property
    def gateway(self) -> Path:
        """The gateway's state: its database, its spool, its log."""
        return self.directory / "gateway"

    @property
    def gateway_log(self) -> Path:
        return self.gateway / "gateway.log"

    @property
    def spool(self) -> Path:
        """Where the backend ``local`` keeps its jobs."""
        return self.gateway / "local"

    @property
    def token(self) -> Path:
        return self.directory / "token"

    @property
    def log(self) -> Path:
        """All commands with what they said."""
        return self.directory / "demo.log"

    @property
    def result(self) -> Path:
        """What the study has found out."""
        return self.directory / "result"

    def settings(self, name: str) -> Path:
        """The file with the options of one of AiiDA's commands."""
        return self.directory / f"{name}.yaml"


def check_python(version: tuple[int, int]) -> None:
    """Refuse an interpreter that this package does not support.

    :raises ConfigurationError: saying which one is needed.
    """
    if version < _OLDEST_PYTHON:
        found, needed = (".".join(map(str, numbers)) for numbers in (version, _OLDEST_PYTHON))
        raise ConfigurationError(
            f"this is Python {found}, the demo needs {needed} or newer: make the virtual environment with a newer one, "
            "for example `python3.12 -m venv .venv`"
        )


def check_packages() -> None:
    """Refuse to begin without the packages that the demo needs beyond the plugin's own.

    :raises ConfigurationError: naming the first that is missing and how to install it.
    """
    for name in ("matplotlib", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise ConfigurationError(
                f"the package {name} is missing, which the demo needs: pip install 'aiida-marketplace-hpc[demo]'"
            )
    for name in ("verdi", "marketplace-hpc"):
        if not program(name).exists():
            raise ConfigurationError(
                f"there is no command {program(name)}: install this package into a virtual environment of its own and start "
                "the demo from there"
            )


def check_port(port: int) -> None:
    """Refuse a port on which somebody listens.

    :param port: 0 stands for any free one, which is always there.
    :raises ConfigurationError: naming the way out.
    """
    with socket.socket() as probe:
        # As the gateway itself does: connections that were closed a moment ago do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as exc:
            raise ConfigurationError(
                f"port {port} on {HOST} cannot be used ({exc.strerror}): another gateway may be running; "
                "choose a free port with --port 0"
            ) from exc


def program(name: str) -> Path:
    """The command that was installed beside the running interpreter."""
    return Path(sys.executable).with_name(name)


class Stage:
    """A directory, a gateway and an AiiDA profile. Use as a context manager: leaving it takes everything down.

    :param directory: where everything goes. What an earlier demo left there is replaced, other files are not touched.
    :param port: the gateway's; 0: any free one.
    """

    def __init__(self, directory: Path, port: int) -> None:
        self.layout = Layout(directory.absolute())
        self.port = port
        self.url = ""
        self.slots = os.cpu_count() or 1
        self._token = secrets.token_urlsafe(24)
        self._gateway: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None
        self._daemon = False
        self._unfinished = False

    def __enter__(self) -> Stage:
        """Make the directory.

        :raises ConfigurationError: if it cannot be used; the message says why and what to do.
        """
        try:
            self._lock = self._claim()
            self._end(self._leftovers)  # Of a demo that was killed.
            self._clear()
            self._write_token()
        except BaseException:
            if self._lock is not None:
                self._lock.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop everything that was started; the directory stays."""
        try:
            if self._daemon:
                self._quietly(program("verdi"), "daemon", "stop", "--timeout", _PATIENCE)
            # First whoever might submit another job, then the jobs, which would outlive the gateway.
            self._end(self._marked)
            if self._unfinished:
                self._cancel_jobs()
        finally:
            try:
                self._stop_gateway()
                self._end(self._leftovers)
            finally:
                if self._lock is not None:
                    self._lock.close()

    @property
    def interpreter(self) -> Path:
        """The Python that jobs on the cluster use: the real one, not that of the virtual environment."""
        return Path(os.path.realpath(sys.executable))

    @property
    def software(self) -> Path:
        """Where that Python is installed: a read-only root of the gateway."""
        return self.interpreter.parents[1]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of all commands."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        return {
            **inherited,
            "AIIDA_PATH": str(self.layout.directory),
            # AiiDA's daemon looks for verdi on the path.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]),
            # A proxy that the environment names does not know the way to this machine.
            "NO_PROXY": HOST,
            "no_proxy": HOST,
            _MARK: str(self.layout.directory),
        }

    def start_gateway(self) -> list[str]:
        """Start a gateway and wait until it answers.

        :returns: the command, to be shown.
        :raises MarketplaceHpcError: with its own last words, if it does not.
        """
        layout = self.layout
        command = ["marketplace-hpc", "gateway", "serve", "--backend", "local"]
        command += ["--host", HOST, "--port", str(self.port)]
        command += ["--slots", str(self.slots), "--state", str(layout.gateway)]
        command += ["--home", f"{layout.cluster}/{{username}}", "--root", f"software={self.software}:ro"]
        # The token does not go into the arguments, which everybody on the machine can read.
        environment = {**self.environment, "MARKETPLACE_HPC_DEV_TOKEN": json.dumps({USER: self._token})}
        layout.gateway.mkdir(mode=0o700)
        with open(layout.gateway_log, "wb") as log:
            self._gateway = subprocess.Popen(
                [program(command[0]), *command[1:]],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which stops things in their order.
            )
        self.url = self._wait_for_address(self._gateway)
        return command

    def _wait_for_address(self, gateway: subprocess.Popen[bytes]) -> str:
        assert gateway.stdout is not None  # noqa: S101 - made with a pipe.
        deadline = time.monotonic() + _GATEWAY_START
        said = b""
        while b"\n" not in said:
            ready, _, _ = select.select([gateway.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(gateway.stdout.fileno(), 4096) if ready else b""
            if not piece:
                raise MarketplaceHpcError(f"the gateway did not start:\n{last_lines(self.layout.gateway_log)}")
            said += piece
        return said.decode().strip().removeprefix("listening on ")

    def _stop_gateway(self) -> None:
        if self._gateway is None:
            return
        with self._gateway:
            self._gateway.terminate()
            try:
                self._gateway.wait(_GRACE)
            except subprocess.TimeoutExpired:
                self._gateway.kill()

    def write_settings(self, name: str, settings: dict[str, object]) -> Path:
        """Write the options of one of AiiDA's commands to a file, for ``--config``."""
        path = self.layout.settings(name)
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return path

    def verdi(self, *arguments: str) -> str:
        """Run one of AiiDA's commands.

        :returns: what it said.
        :raises MarketplaceHpcError: with its own words, if it failed.
        """
        return self.run([program("verdi"), *arguments])

    def start_daemon(self) -> None:
        """Start AiiDA's daemon with one worker.

        :raises MarketplaceHpcError: with its own words, if that failed.
        """
        self._daemon = True  # Before, so that one that is interrupted while it starts is stopped, too.
        self.verdi("daemon", "start", "1", "--timeout", _PATIENCE)
        if not self._has_worker():
            # A worker that reads its broker's address while that is written waits elsewhere for ever (aiida-core 2.9.4).
            self.verdi("daemon", "restart", "--timeout", _PATIENCE)

    def _has_worker(self) -> bool:
        """Whether a worker has come to the daemon's broker, which says so every five seconds."""
        deadline = time.monotonic() + _WORKER_START
        while time.monotonic() < deadline:
            for status in self.layout.aiida.glob("broker/*/broker.status"):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    if json.loads(status.read_text()).get("task_subscribers"):
                        return True
            time.sleep(0.1)
        return False

    def run_study(self, command: Sequence[str | Path], timeout: float) -> None:
        """Run the command that submits the study and follows it, on the user's terminal.

        :raises MarketplaceHpcError: if it failed or took longer than ``timeout`` seconds.
        """
        self._unfinished = True
        self.run(command, timeout=timeout, on_terminal=True)
        self._unfinished = False

    def run(self, command: Sequence[str | Path], *, timeout: float = _COMMAND, on_terminal: bool = False) -> str:
        """Run a command to its end.

        :param on_terminal: let it use the user's terminal instead of the log.
        :returns: what it said, if not on the terminal.
        :raises MarketplaceHpcError: with its own words, if it failed or took longer than ``timeout`` seconds.
        """
        words = " ".join([Path(command[0]).name, *map(str, command[1:])])
        with open(self.layout.log, "a+b") as log:
            log.write(f"$ {words}\n".encode())
            log.flush()
            begin = log.tell()
            # To a file, not a pipe: what AiiDA starts in the background may hold on to a pipe and keep us waiting.
            output = None if on_terminal else log
            child = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                status = child.wait(timeout)
            except BaseException as exc:
                _end([psutil.Process(child.pid)] if child.poll() is None else [])
                child.wait()
                if isinstance(exc, subprocess.TimeoutExpired):
                    raise MarketplaceHpcError(f"`{words}` did not end within {timeout:.0f} s") from exc
                raise
            log.seek(begin)
            said = log.read().decode("utf-8", "replace")
        if status != 0:
            raise MarketplaceHpcError(f"`{words}` failed with exit code {status}\n{said}".rstrip())
        return said

    def _claim(self) -> IO[str]:
        """Make the directory ours."""
        directory = self.layout.directory
        if {":", "{", "}"} & set(str(directory)):
            raise ConfigurationError(
                f"the directory {directory} has a character in its path that AiiDA or path templates give a meaning to "
                "(one of : { }): choose another with --directory"
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            claim = directory / _CLAIM
            if not claim.exists() and any(directory.iterdir()):
                raise ConfigurationError(
                    f"{directory} is not empty and not an earlier demo's: choose another one with --directory"
                )
            lock = open(claim, "a", encoding="utf-8")  # noqa: SIM115 - held as long as the demo runs.
        except OSError as exc:
            raise ConfigurationError(
                f"the directory {directory} cannot be written ({exc.strerror}): choose another one with --directory"
            ) from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            lock.close()
            raise ConfigurationError(
                f"another demo is running in {directory}: wait for its end, or choose another one with --directory"
            ) from exc
        return lock

    def _clear(self) -> None:
        layout = self.layout
        for pid_file in list(layout.aiida.glob("daemon/circus-*.pid")):
            if pid_file.read_text().strip().isdecimal() and psutil.pid_exists(int(pid_file.read_text())):
                raise ConfigurationError(
                    f"an AiiDA daemon works on the earlier result in {layout.directory}: stop it with "
                    f"`AIIDA_PATH={layout.directory} verdi daemon stop`, or choose another one with --directory"
                )
        try:
            for folder in (layout.aiida, layout.cluster, layout.gateway, layout.result):
                if folder.exists():
                    shutil.rmtree(folder)
            layout.cluster.mkdir()
            layout.result.mkdir()
            layout.log.write_bytes(b"")
        except OSError as exc:
            raise ConfigurationError(
                f"the earlier result in {layout.directory} cannot be replaced ({exc.strerror}): "
                "choose another one with --directory"
            ) from exc

    def _write_token(self) -> None:
        self.layout.token.unlink(missing_ok=True)
        with open(os.open(self.layout.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self._token)

    def _cancel_jobs(self) -> None:
        """Cancel what an interrupted study has on the cluster, and wait until it is gone."""
        client = program("marketplace-hpc")
        options = ["--json", "--url", self.url, "--token-source", f"file:{self.layout.token}"]
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            try:
                jobs = json.loads(self._quietly(client, *options, "job", "list", "--active"))["jobs"]
            except (ValueError, KeyError):
                return  # The gateway does not answer; its processes are ended by their mark.
            if not jobs:
                return
            for job in jobs:
                self._quietly(client, *options, "job", "cancel", job["jobid"])

    def _quietly(self, *command: str | Path) -> str:
        """Run a command whose failure changes nothing, since what it should stop is ended by its mark afterwards."""
        try:
            return self.run(command)
        except MarketplaceHpcError:
            return ""

    def _leftovers(self) -> list[psutil.Process]:
        """Everything of this demo, or of an earlier one in the directory, that still runs."""
        jobs = f"{self.layout.spool}{os.sep}"
        # Jobs start from a clean environment, but each has a supervisor that is given its folder in the spool.
        return [*self._marked(), *_with_descendants(lambda process: any(w.startswith(jobs) for w in process.cmdline()))]

    def _marked(self) -> list[psutil.Process]:
        """The processes that carry our mark, except for the gateway."""
        mark = str(self.layout.directory)
        gateway = self._gateway.pid if self._gateway is not None and self._gateway.poll() is None else None
        return [
            process
            for process in _with_descendants(lambda process: process.environ().get(_MARK) == mark)
            if process.pid != gateway
        ]

    def _end(self, find: Callable[[], list[psutil.Process]]) -> None:
        """End processes until none is found any more.

        :raises MarketplaceHpcError: if some do not end.
        """
        deadline = time.monotonic() + 2 * _GRACE
        while found := find():
            if time.monotonic() > deadline:
                pids = ", ".join(str(process.pid) for process in found)
                raise MarketplaceHpcError(f"these processes of the demo do not end: {pids}")
            _end(found)


def _with_descendants(belongs: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if belongs(process):
                found.update({one.pid: one for one in (process, *process.children(recursive=True))})
        except psutil.Error:
            continue
    found.pop(os.getpid(), None)
    return list(found.values())


def _end(processes: Sequence[psutil.Process]) -> None:
    """End processes: first by asking, then by force."""
    for stop in ("terminate", "kill"):
        for process in processes:
            try:
                getattr(process, stop)()
            except psutil.Error:
                continue
        _, processes = psutil.wait_procs(processes, timeout=_GRACE / 2)


def last_lines(path: Path, count: int = 15) -> str:
    """The end of a log."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
    except OSError as exc:
        return str(exc)
