"""What ``marketplace-hpc login`` has left: one login per name, in a folder that only its owner can read, or in the keyring.

Of a login in the keyring the folder has a note, whose change says that the login has changed. Every change is made under the
login's lock, which holds across threads, processes and machines that share the folder, and is on disk when it returns.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import queue
import re
import shlex
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from aiida_marketplace_hpc.errors import ConfigurationError, ProviderUnavailable, TokenUnavailable

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SERVICE = "aiida-marketplace-hpc"
_KEYRING_PATIENCE = 10.0
"""Seconds: a keyring that is locked waits for a person, and in a daemon there is none."""
_BETWEEN_TRIES = 0.02
_MAX_FILE = 1024 * 1024


class LoginBusy(ProviderUnavailable):
    """Another process is changing a login."""


Grant = Literal["device", "client_credentials"]


@dataclass(frozen=True)
class Login:
    """A login and the tokens that came of it.

    :param received: when the access token was asked for, in seconds since the epoch by this machine's clock.
    :param lifetime: seconds from then for which it is good.
    :param forced: the token was asked for because the one before was refused.
    :param renewing: a renewal was begun whose answer has not arrived.
    :param ended: why there will be no further token; empty: there will.
    :param in_keyring: it is kept there.
    """

    name: str
    issuer: str
    client_id: str
    grant: Grant
    token_endpoint: str
    scope: str = ""
    revocation_endpoint: str = ""
    end_session_endpoint: str = ""
    basic: bool = True
    client_secret: str = field(default="", repr=False)
    access_token: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)
    received: float = 0.0
    lifetime: float = 0.0
    forced: bool = False
    renewing: bool = False
    ended: str = ""
    in_keyring: bool = False

    def lasts(self, now: float) -> float:
        """Seconds for which the access token is still good. A clock that was set back makes it bad, which does no harm."""
        age = now - self.received
        return self.lifetime - age if age >= -1.0 else 0.0


def checked_name(name: str) -> str:
    """Return the name of a login.

    :raises ConfigurationError: it is none. The message does not repeat it, as it may be a token.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            "the name of a login has letters, digits, - and _, at most 64: such as login:marketplace"
        )
    return name


def default_folder() -> Path:
    """Where logins are kept."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "marketplace-hpc" / "logins"


class LoginStore:
    """All logins of a person on this machine.

    :param folder: by default :func:`default_folder`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def names(self) -> list[str]:
        """The names of all logins."""
        return sorted(path.stem for path in self.folder.glob("*.json") if _NAME.fullmatch(path.stem))

    def where(self, login: Login) -> str:
        """Where a login is kept, for a person."""
        return "the system's keyring" if login.in_keyring else str(self._path(login.name))

    def signature(self, name: str) -> tuple[int, int, int]:
        """Something that differs when the login has changed.

        :raises TokenUnavailable: there is no such login.
        """
        try:
            status = self._path(name).stat()
        except OSError as exc:
            raise self._missing(name, exc) from None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def read(self, name: str) -> Login:
        """Return a login as it is now.

        :raises TokenUnavailable: there is none, it is damaged, or others could read it.
        """
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise self._missing(name, exc) from None
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MAX_FILE)
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            path = shlex.quote(str(self._path(name)))
            raise TokenUnavailable(f"others can read the login {name}: run `chmod 600 {path}`")
        document = _decoded(content)
        if document is not None and document.get("in_keyring"):
            document = _decoded(_from_keyring(name))
        try:
            return Login(**{**(document or {}), "name": name})
        except TypeError:
            raise TokenUnavailable(f"the login {name} is damaged: {_remedy(name)}") from None

    def write(self, login: Login) -> None:
        """Keep a login in the place of the one of its name; to be called under its lock. It is on disk when this returns.

        :raises TokenUnavailable: it could not be kept; the one before is as it was.
        """
        document = dataclasses.asdict(login)
        if login.in_keyring:
            _into_keyring(login.name, json.dumps(document))
            public = ("name", "issuer", "client_id", "in_keyring")
            document = {key: document[key] for key in public}
        try:
            self._make_folder()
            self._replace(login.name, json.dumps(document).encode())
        except OSError as exc:
            raise TokenUnavailable(f"the login {login.name} cannot be kept in {self.folder}: {exc.strerror}") from None

    def remove(self, name: str) -> None:
        """Forget a login; to be called under its lock."""
        with suppress(FileNotFoundError):
            if (_decoded(self._path(name).read_bytes()) or {}).get("in_keyring"):
                _out_of_keyring(name)
            self._path(name).unlink()

    @contextmanager
    def lock(self, name: str, within: float) -> Iterator[None]:
        """Hold a login's lock. It ends with the process that holds it, however that ends.

        :param within: seconds.
        :raises LoginBusy: another process held it all the time.
        :raises TokenUnavailable: the folder cannot be written, or has no locks.
        """
        descriptor = -1
        try:
            try:
                self._make_folder()
                # Never removed: whoever waits for it would hold another lock than whoever comes later.
                descriptor = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                until = time.monotonic() + within
                while not _locked(descriptor):
                    if time.monotonic() >= until:
                        raise LoginBusy(f"another process is renewing the login {name} and does not get on")
                    time.sleep(_BETWEEN_TRIES)
            except OSError as exc:
                raise TokenUnavailable(f"the login {name} cannot be locked in {self.folder}: {exc.strerror}") from None
            yield
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _path(self, name: str) -> Path:
        return self.folder / f"{checked_name(name)}.json"

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            self.folder.chmod(0o700)

    def _replace(self, name: str, content: bytes) -> None:
        new = self.folder / f".{name}.new"
        with suppress(FileNotFoundError):
            new.unlink()  # Of a process that was killed here; the lock is ours.
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._path(name))
        folder = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _missing(self, name: str, exc: OSError) -> TokenUnavailable:
        if isinstance(exc, FileNotFoundError):
            return TokenUnavailable(f"there is no login {name} in {self.folder}: {_remedy(name)}")
        return TokenUnavailable(f"the login {name} cannot be read: {exc.strerror}")


def keyring_is_usable() -> bool:
    """Whether the system has a keyring that keeps secrets, and opens without a person."""
    try:
        import keyring
    except ImportError:
        return False

    def tried() -> bool:
        backend = keyring.get_keyring()
        # Below that are those that keep nothing, or keep it in clear text.
        if backend.priority < 1:
            return False
        backend.set_password(_SERVICE, _PROBE, "kept")
        kept = backend.get_password(_SERVICE, _PROBE) == "kept"
        backend.delete_password(_SERVICE, _PROBE)
        return kept

    try:
        return _within_patience(tried)
    except TokenUnavailable:
        return False


_PROBE = ".probe"


def _into_keyring(name: str, text: str) -> None:
    import keyring

    _within_patience(lambda: keyring.set_password(_SERVICE, name, text))


def _from_keyring(name: str) -> bytes:
    try:
        import keyring
    except ImportError:
        raise TokenUnavailable(
            f"the login {name} is in the system's keyring, and the package keyring is missing: {_remedy(name)} --store file"
        ) from None
    text = _within_patience(lambda: keyring.get_password(_SERVICE, name))
    if text is None:
        raise TokenUnavailable(f"the system's keyring has lost the login {name}: {_remedy(name)}")
    return text.encode()


def _out_of_keyring(name: str) -> None:
    import keyring

    with suppress(TokenUnavailable):
        _within_patience(lambda: keyring.delete_password(_SERVICE, name))


def _within_patience(action: Callable[[], T]) -> T:
    """Do something with the keyring in a thread of its own, which is left behind if it does not come back."""
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((True, action()))
        except Exception as exc:  # noqa: BLE001 - backends raise what they like.
            answers.put((False, type(exc).__name__))

    threading.Thread(target=run, name="keyring", daemon=True).start()
    try:
        good, answer = answers.get(timeout=_KEYRING_PATIENCE)
    except queue.Empty:
        good, answer = False, "no answer"
    if not good:
        raise TokenUnavailable(
            f"the system's keyring cannot be used ({answer}): unlock it, or keep the login in a file with --store file"
        )
    result: T = answer
    return result


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _decoded(content: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(content)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _remedy(name: str) -> str:
    return f"run `marketplace-hpc login {name}`"
