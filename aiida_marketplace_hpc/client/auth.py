"""Where the access token comes from: a source that is asked for every request, so that a renewed token is used at once.

A source is written ``env:NAME``, ``file:PATH``, ``command:CMD`` or ``login:NAME``
(:mod:`~aiida_marketplace_hpc.client.login`). Only this text is ever stored; no message, ``repr`` or
log line contains a token, nor the arguments of a command, which may hold one.
"""

from __future__ import annotations

import abc
import os
import re
import shlex
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from aiida_marketplace_hpc.claims import claims_of, moment
from aiida_marketplace_hpc.errors import ConfigurationError, TokenUnavailable

DEFAULT_SOURCE = "env:MP_ACCESS_TOKEN"
"""The source that the command line and :class:`~aiida_marketplace_hpc.client.gateway.HpcGateway` use unless told."""

COMMAND_TIMEOUT = 10.0
"""Seconds that a token command may take."""
COMMAND_CACHE = 60.0
"""Seconds for which the output of a token command is used again that does not say when it expires."""
_SHORTEST_CACHE = 10.0  # A token that has expired by our clock may be good by the gateway's.
_FAILURE_CACHE = 5.0  # Threads that queued up behind a failing command must not each wait for it in turn.
_MAX_FILE = 64 * 1024
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_TOKEN = re.compile(r"[!-~]+")
_FORMS = (
    "env:NAME (an environment variable), file:PATH (a file that only you can read), command:CMD (its output) or login:NAME "
    "(what `marketplace-hpc login NAME` has kept)"
)


class TokenSource(abc.ABC):
    """Where a token comes from. Sources may be used by several threads at once."""

    reloadable: ClassVar[bool] = False
    """Whether asking again after :meth:`forget` can give another token."""
    margin: float = 60.0
    """Seconds before its end from which a token is replaced, where the source can; a gateway may state others."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The source as a person may see it."""

    @abc.abstractmethod
    def token(self, within: float = COMMAND_TIMEOUT) -> str:
        """Return the token that is valid now. May be repeated.

        :param within: seconds that it may take at most.
        :raises TokenUnavailable: there is none; the message names the source and says what to do.
        """

    def forget(self, token: str) -> None:  # noqa: B027
        """Say that ``token`` was refused: it is not given again from a cache."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    @staticmethod
    def parse(text: str) -> TokenSource:
        """Make the source that ``text`` describes. Does not look for a token yet.

        :param text: ``env:NAME``, ``file:PATH``, ``command:CMD`` or ``login:NAME``.
        :raises ConfigurationError: it is none of these. The message does not repeat ``text``, which may be a token.
        """
        scheme, colon, rest = text.strip().partition(":")
        rest = rest.strip()
        if not colon or not rest:
            raise ConfigurationError(f"the token source must be written {_FORMS}; a token itself does not belong there")
        if scheme == "env":
            return EnvironmentToken(rest)
        if scheme == "file":
            return FileToken(rest)
        if scheme == "command":
            return CommandToken(rest)
        if scheme == "login":
            from aiida_marketplace_hpc.client.login import LoginToken

            return LoginToken(rest)
        raise ConfigurationError(f"the token source is of an unknown kind; use {_FORMS}")


class EnvironmentToken(TokenSource):
    """The value of an environment variable, read for every request.

    :raises ConfigurationError: ``variable`` is no name of a variable.
    """

    def __init__(self, variable: str) -> None:
        if not _NAME.fullmatch(variable):
            raise ConfigurationError("env: needs the name of an environment variable, such as env:MP_ACCESS_TOKEN")
        self._variable = variable

    @property
    def name(self) -> str:
        return f"env:{self._variable}"

    def token(self, within: float = COMMAND_TIMEOUT) -> str:
        value = os.environ.get(self._variable, "")
        if not value.strip():
            raise TokenUnavailable(
                f"the environment variable {self._variable} holds no token: set it, or choose another token source: {_FORMS}"
            )
        return _checked(value, self.name)


class FileToken(TokenSource):
    """The content of a file, read again when the file has changed.

    :raises ConfigurationError: ``path`` is not absolute; a relative one would mean another file in a daemon.
    """

    reloadable = True

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        if not self._path.is_absolute():
            raise ConfigurationError("file: needs an absolute path, such as file:~/.marketplace/token")
        self._lock = threading.Lock()
        self._cached: tuple[tuple[int, int, int], str] | None = None

    @property
    def name(self) -> str:
        return f"file:{self._path}"

    def token(self, within: float = COMMAND_TIMEOUT) -> str:
        with self._lock:
            try:
                signature = self._signature(self._path.stat())
                if self._cached is None or self._cached[0] != signature:
                    self._cached = self._read()
            except OSError as exc:
                raise TokenUnavailable(f"the token file {self._path} cannot be read: {exc.strerror}") from exc
            return self._cached[1]

    def forget(self, token: str) -> None:
        with self._lock:
            if self._cached is not None and self._cached[1] == token:
                self._cached = None

    def _read(self) -> tuple[tuple[int, int, int], str]:
        with self._path.open("rb") as file:
            # Of the open file, not of the path: the token belongs to the attributes that were checked.
            signature = self._signature(os.fstat(file.fileno()))
            content = file.read(_MAX_FILE + 1)
        if not content.strip():
            raise TokenUnavailable(f"the token file {self._path} is empty: write a token to it")
        if len(content) > _MAX_FILE:
            raise TokenUnavailable(f"the token file {self._path} is too large to hold a token and nothing else")
        return signature, _checked(content.decode("utf-8", "replace"), self.name)

    def _signature(self, status: os.stat_result) -> tuple[int, int, int]:
        if not stat.S_ISREG(status.st_mode):
            raise TokenUnavailable(f"the token file {self._path} is not a file")
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise TokenUnavailable(
                f"others can read the token file {self._path}: run `chmod 600 {shlex.quote(str(self._path))}`"
            )
        return status.st_mtime_ns, status.st_size, status.st_ino


class CommandToken(TokenSource):
    """The output of a command, run without a shell and used again until its end if it is a JWT with an expiry, else for
    :data:`COMMAND_CACHE` seconds.

    :param clock: the seconds of a monotonic clock.
    :param wall_clock: seconds since the epoch.
    :raises ConfigurationError: ``command`` cannot be split into arguments.
    """

    reloadable = True

    def __init__(
        self,
        command: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        try:
            self._arguments = shlex.split(command)
        except ValueError as exc:
            raise ConfigurationError("command: has unbalanced quotes") from exc
        if not self._arguments:
            raise ConfigurationError("command: needs a command that prints a token")
        self._clock, self._wall_clock = clock, wall_clock
        self._lock = threading.Lock()
        self._cached: tuple[float, str] | None = None  # and until when it is used
        self._failed: tuple[float, str] | None = None

    @property
    def name(self) -> str:
        return f"command:{self._arguments[0]}" + (" …" if len(self._arguments) > 1 else "")

    def token(self, within: float = COMMAND_TIMEOUT) -> str:
        within = max(0.0, min(within, COMMAND_TIMEOUT))
        if not self._lock.acquire(timeout=within):
            raise TokenUnavailable(f"{self.name} gave no token within {within:.0f} s")
        try:
            now = self._clock()
            if self._cached is not None and now < self._cached[0]:
                return self._cached[1]
            if self._failed is not None and now - self._failed[0] < _FAILURE_CACHE:
                raise TokenUnavailable(self._failed[1])
            try:
                token = self._run(within)
            except TokenUnavailable as exc:
                self._failed = (self._clock(), exc.message)
                raise
            self._cached, self._failed = (self._clock() + self._good_for(token), token), None
            return token
        finally:
            self._lock.release()

    def forget(self, token: str) -> None:
        with self._lock:
            if self._cached is not None and self._cached[1] == token:
                self._cached = None

    def _good_for(self, token: str) -> float:
        end = moment(claims_of(token), "exp")
        if end is None:
            return COMMAND_CACHE
        return max(end - self._wall_clock() - self.margin, _SHORTEST_CACHE)

    def _run(self, within: float) -> str:
        try:
            done = subprocess.run(
                self._arguments,
                stdin=subprocess.DEVNULL,  # A command that asks for a password must fail, not wait.
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=within,
                check=False,
            )
        except subprocess.TimeoutExpired:
            # Without its cause, which would carry the arguments and the output so far.
            raise TokenUnavailable(
                f"{self.name} gave no token within {within:.0f} s: run it by hand to see why"
            ) from None
        except OSError as exc:
            raise TokenUnavailable(f"{self.name} cannot be run: {exc.strerror}") from None
        if done.returncode != 0:
            raise TokenUnavailable(f"{self.name} ended with exit code {done.returncode}: run it by hand to see why")
        if not done.stdout.strip():
            raise TokenUnavailable(f"{self.name} printed nothing: it must print a token")
        return _checked(done.stdout.decode("utf-8", "replace"), self.name)


class StaticToken(TokenSource):
    """A token that a program already holds. It is never shown."""

    def __init__(self, token: str) -> None:
        self._token = _checked(token, self.name)

    @property
    def name(self) -> str:
        return "a token given by the program"

    def token(self, within: float = COMMAND_TIMEOUT) -> str:
        return self._token


def _checked(text: str, name: str) -> str:
    token = text.strip()
    if not _TOKEN.fullmatch(token):
        raise TokenUnavailable(
            f"{name} gives something that is not a token: it must be one word of printable characters"
        )
    return token
