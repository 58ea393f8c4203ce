"""What servers of other projects have in common as rigs of a test."""

from __future__ import annotations

import abc
import secrets
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from aiida_marketplace_hpc.testing.machine import Machine, RigError, tail, wait_until
from aiida_marketplace_hpc.testing.rig import Rig


class Server(Rig):
    """A server on a machine, on 127.0.0.1 only, with data, port and password of its own.

    What it keeps lasts from one start to the next, and is removed with the machine's own directories.
    """

    title: ClassVar[str]
    """What it is called in messages."""
    _deadly: ClassVar[signal.Signals] = signal.SIGKILL
    """What ends it at once."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.password = secrets.token_urlsafe(12)
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = ""

    def start(self, within: float = 60.0) -> None:
        """Start it and wait until it lets in.

        :param within: seconds.
        :raises NotPossibleHere: where it is not installed.
        :raises RigError: with the end of its log, if it ends or does not come up in time.
        """
        self.check_possible()
        if not self._directory:
            self._set_up()
        with open(self._log, "ab") as log:
            self._process = self.machine.popen(
                self._command(),
                user=self.machine.user,
                env=self._environment(),
                cwd=self._directory,
                stdout=log,
                stderr=log,
            )
        process = self._process
        wait_until(
            lambda: process.poll() is not None or self._lets_in(),
            within=within,
            failure=lambda: f"{self.title} does not come up\n{tail(self._log)}",
            poll=0.1,
        )
        if process.poll() is not None:
            raise RigError(f"{self.title} ended while it started\n{tail(self._log)}")

    def kill(self) -> None:
        """End it at once, as ``kill -9`` does: all connections break."""
        if self._process is not None:
            self._process.send_signal(self._deadly)
            self._process.wait(timeout=20)
        self._process = None

    def close(self) -> None:
        """End it. May be repeated."""
        self.kill()

    @property
    def _log(self) -> Path:
        return self.machine.outside(f"{self._directory}/log")

    @staticmethod
    @abc.abstractmethod
    def check_possible() -> None:
        """Raise :class:`NotPossibleHere` where it is not installed."""

    @abc.abstractmethod
    def _set_up(self) -> None:
        """Make its directory with what it needs."""

    @abc.abstractmethod
    def _command(self) -> Sequence[str]:
        """What starts it; the directory is there."""

    def _environment(self) -> Mapping[str, str]:
        return {}

    @abc.abstractmethod
    def _lets_in(self) -> bool:
        """Whether it answers."""
