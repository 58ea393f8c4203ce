"""The clients of the comparison, each as its users run it: AiiDA transports in worker processes, and curl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiida_marketplace_hpc.testing.machine import RigError


class Worker:
    """A transport of AiiDA in a process of its own, opened; a context manager.

    :param kind: ``marketplace_hpc`` or ``core.ssh_async``.
    :param parameters: of the transport.
    :param home: its home, which has the SSH configuration.
    :param env: added to its environment, such as a token.
    """

    def __init__(self, kind: str, parameters: Mapping[str, Any], home: Path, env: Mapping[str, str]) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.worker", kind, json.dumps(dict(parameters))]
        environment = {"HOME": str(home), "PATH": os.environ["PATH"], "AIIDA_PATH": str(home), "LANG": "C.UTF-8", **env}
        self._process = subprocess.Popen(
            command,
            env=environment,
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    @property
    def pid(self) -> int:
        return self._process.pid

    def do(self, what: str, **parameters: Any) -> float:
        """Do one of :func:`benchmarks.worker.actions`, and return the seconds that it took there.

        :raises RigError: it failed.
        """
        assert self._process.stdin is not None  # noqa: S101 - for the type.
        self._process.stdin.write(json.dumps({"do": what, **parameters}) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - for the type.
        line = self._process.stdout.readline()
        if not line:
            raise RigError(f"the client ended with {self._process.wait(10)}; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RigError(f"the client failed: {answer['error']}")
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End it. May be repeated."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


def curl(*arguments: str) -> float:
    """Run curl, and return the seconds."""
    return _timed(["curl", "--silent", "--show-error", "--fail", *arguments])


def sha256sum(path: Path) -> float:
    """Take the digest of a file as a person would, and return the seconds."""
    return _timed(["sha256sum", str(path)])


def _timed(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RigError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return seconds
