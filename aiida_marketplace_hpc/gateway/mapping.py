"""Which folder name the operator gives an identity: by a claim, by a map in a file, or by a command."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from aiida_marketplace_hpc.errors import ConfigurationError, Forbidden, Unavailable
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.auth.answers import Answers, Asking
from aiida_marketplace_hpc.gateway.auth.claims import claim
from aiida_marketplace_hpc.gateway.backends.environment import job_environment
from aiida_marketplace_hpc.gateway.config import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,47}")
_TIMEOUT = 10.0
"""Seconds that a command gets."""
_KEPT = 10.0
"""Seconds for which a command's answer counts: until the ledger has it, or for whoever is refused and asks again."""


class HomeNames(Protocol):
    """Says which folder name somebody gets. Asked about people who are new; afterwards the ledger knows."""

    def name_of(self, identity: Identity) -> str:
        """The name; empty if there is none for them.

        :raises Unavailable: if that cannot be found out now.
        """
        ...


class ByClaim:
    """The name is what a claim says.

    :param name: the claim; ``a.b`` is ``b`` inside ``a``.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def name_of(self, identity: Identity) -> str:
        said = claim(identity.claims, self._name)
        return said if isinstance(said, str) else ""


class ByFile:
    """The name stands in a file: a table in TOML, or an object in JSON, from e-mail address or subject to name.

    It is read whenever somebody new comes.

    :raises ConfigurationError: if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._read()
        except (OSError, ValueError) as exc:
            raise ConfigurationError(f"the map of homes {path} cannot be read: {exc}") from exc

    def name_of(self, identity: Identity) -> str:
        try:
            names = self._read()
        except (OSError, ValueError) as exc:
            logger.error("the map of homes %s cannot be read: %s", self._path, exc)
            raise Unavailable(
                "which folder is yours cannot be found out now: ask the operator of this gateway"
            ) from None
        return next((name for who, name in names.items() if identity.is_called(who)), "")

    def _read(self) -> Mapping[str, str]:
        text = self._path.read_text(encoding="utf-8")
        names = json.loads(text) if self._path.suffix == ".json" else tomllib.loads(text)
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError('it has lines such as "alice@example.org" = "alice"')
        return names


class ByCommand:
    """A command prints the name; it gets the identity as a JSON object on its standard input.

    :param arguments: the command and its arguments; no shell.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._answers: Answers[str] = Answers(1000)
        self._asking: Asking[str | None] = Asking(4)

    def name_of(self, identity: Identity) -> str:
        key = f"{identity.issuer}\0{identity.subject}"
        name = self._asking.once(key, lambda: self._answer(key, identity))
        if name is None:
            raise Unavailable("which folder is yours cannot be found out now: ask the operator of this gateway")
        return name

    def _answer(self, key: str, identity: Identity) -> str | None:
        kept = self._answers.get(key)
        if kept is not None:
            return kept[0]
        told = {
            "issuer": identity.issuer,
            "subject": identity.subject,
            "email": identity.email,
            "email_verified": identity.email_verified,
            "name": identity.name,
            "claims": dict(identity.claims),
        }
        try:
            printed = _printed(self._arguments, json.dumps(told))
        except (OSError, subprocess.SubprocessError, ValueError) as exc:
            logger.error("the command that names homes, %s, failed for %s: %s", self._arguments[0], identity, exc)
            return None
        self._answers.put(key, printed, _KEPT)
        return printed


def _printed(arguments: Sequence[str], told: str) -> str:
    """What a command prints, without blanks around it.

    :raises OSError: if it cannot be started.
    :raises subprocess.SubprocessError: if it fails or takes too long; then all that it has started is ended, too.
    """
    with subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=job_environment(),
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, complaint = process.communicate(told, timeout=_TIMEOUT)
        except BaseException:
            # Its pipes are closed, not read to their end: whatever has left its session may hold them open.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.SubprocessError(f"exit code {process.returncode}: {complaint.strip()[-500:]}")
    return printed.strip()


def home_names(settings: Settings) -> HomeNames | None:
    """What the settings name, if they name something.

    :raises ConfigurationError: if they name several, or a file that cannot be read.
    """
    given = [name for name in ("home_claim", "home_map", "home_command") if getattr(settings, name)]
    if len(given) > 1:
        raise ConfigurationError(f"{' and '.join(given)} both say which folder somebody gets: leave one")
    if settings.home_claim:
        return ByClaim(settings.home_claim)
    if settings.home_map is not None:
        return ByFile(settings.home_map.expanduser())
    return ByCommand(settings.home_command) if settings.home_command else None


def checked_name(name: str, identity: Identity) -> str:
    """Return a name that may be that of a folder.

    :raises Forbidden: if there is none, or one that would lead elsewhere.
    """
    if not name:
        logger.warning("no home is named for %s", identity)
        raise Forbidden(
            f"there is no home on this cluster for {identity}: ask the operator of this gateway to name one"
        )
    if not _NAME.fullmatch(name):
        logger.error("the home that is named for %s is no safe name: %r", identity, name)
        raise Forbidden(
            f"the home that is named for {identity} has a name that this gateway does not accept (letters, digits and _ . - "
            "only, 48 at most): ask its operator"
        )
    return name
