"""A Python session in an AiiDA installation, as a notebook is one: started once, asked many times."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, cast

from aiida_marketplace_hpc.testing.aiida_profile import AiidaProfile
from aiida_marketplace_hpc.testing.machine import RigError, tail


class AiidaSession:
    """A process with the installation's profile loaded, which runs pieces of code; a context manager.

    Starting AiiDA takes seconds, and each piece of code is spared them. The pieces share what a process shares (loaded
    modules, AiiDA's runner, the connections to a gateway) but no names.

    :param profile: the installation; the process ends with it at the latest.
    :param env: added to the environment, such as a token.
    """

    def __init__(self, profile: AiidaProfile, *, env: Mapping[str, str] | None = None) -> None:
        self._log = profile.path / "session.log"
        self._unread = b""
        with self._log.open("ab") as log:
            self._process = profile.start_python(
                _LOOP, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self._questions = cast(IO[bytes], self._process.stdin)
        self._answers = cast(IO[bytes], self._process.stdout)

    def __enter__(self) -> AiidaSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def run(self, code: str, *, timeout: float = 300.0) -> str:
        """Run code in a namespace of its own, and return what it printed.

        :param timeout: seconds; the session is of no use any more once it is over.
        :raises RigError: with the traceback, if the code raises; with the end of the session's log, if it does not answer.
        """
        self._questions.write(json.dumps(code).encode() + b"\n")
        self._questions.flush()
        printed, error = json.loads(self._line(timeout))
        if error:
            raise RigError(f"{error}\nprinted before: {printed!r}\n{tail(self._log)}")
        return str(printed)

    def close(self) -> None:
        """End the process; may be repeated."""
        self._process.kill()
        self._questions.close()
        self._answers.close()
        self._process.wait(timeout=10)

    def _line(self, timeout: float) -> bytes:
        answers = self._answers.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            ready, _, _ = select.select([answers], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(answers, 1 << 16) if ready else b""
            if not more:
                why = "has ended" if ready else f"does not answer within {timeout:g} s"
                self._process.kill()
                raise RigError(f"the AiiDA session {why}\n{tail(self._log)}")
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line


# What is printed goes to the log, but for what a piece of code itself prints, and the answers.
_LOOP = """\
import contextlib, io, json, linecache, os, sys, traceback

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    code, printed, error = json.loads(line), io.StringIO(), None
    linecache.cache["<code>"] = (len(code), None, code.splitlines(keepends=True), "<code>")  # for tracebacks
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, "<code>", "exec"), {"__name__": "session"})
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), file=answers, flush=True)
"""
