"""Calls to one system of a FirecREST v2, and what an answer means that is not the wished one.

The calls are those of pyfirecrest; added are those that it has no method for. Every call has an end, is made once, and says
when it fails whether it may have been carried out all the same: FirecREST runs a command over SSH for each, for 5 s at most,
and answers 408 when it has stopped waiting, not when nothing has happened.
"""

from __future__ import annotations

import posixpath
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
from firecrest.FirecrestException import FirecrestException, MultipartUploadException
from firecrest.v2 import Firecrest

from aiida_marketplace_hpc.gateway.firecrest.tokens import NoToken, Tokens

T = TypeVar("T")
Json = dict[str, Any]

TIMEOUT = 20.0
"""Seconds without a byte after which a call is given up; FirecREST itself gives a command 5 and a login 5."""
_CONNECT = 5.0
_LOST = (None, 424, 502, 503, 504)
_LARGEST = 5 * 1024 * 1024
"""Bytes that FirecREST takes or gives at once (``max_ops_file_size``), where it does not say."""
_PIECE = 1024 * 1024
_PATIENCE = 3.0
"""Seconds that a call waits itself for its turn, after a 429; what takes longer is told to whoever asked."""
_QUIET = 10.0
"""Seconds to leave FirecREST alone after a 429 that names no time."""
_MADE_AGE = 600.0
_ZONE_AGE = 3600.0
_MOST_MADE = 10_000
_DIGEST = re.compile(r"Invalid output: \\?([0-9a-f]{64}) ")


class CallFailed(Exception):
    """A call that did not bring what was asked for; the message is for a person.

    :param status: of the answer; ``None``: there was none.
    :param carried_out: whether it may have been carried out all the same.
    :param retry_after: seconds to wait, where it was too many calls.
    :param own: whether it is FirecREST that says it, not something on the way.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        carried_out: bool = False,
        retry_after: float | None = None,
        own: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.carried_out = carried_out
        self.retry_after = retry_after
        self.own = own


class TokenRefused(CallFailed):
    """There is no token, or it was refused: nothing was carried out."""


class JobFailed(CallFailed):
    """A job of FirecREST's own, that moves files, has ended otherwise than well."""


class UnusableName(Exception):
    """FirecREST would not take this name for what it is."""


class Made:
    """Folders that were made, or found, some minutes ago at most."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def has(self, path: str) -> bool:
        return self._clock() < self._until.get(path, 0.0)

    def add(self, path: str) -> None:
        if len(self._until) > _MOST_MADE:
            self._until.clear()
        self._until[path] = self._clock() + _MADE_AGE


class _Calls(Firecrest):
    """pyfirecrest's client, with what it has no method for."""

    def fetch(self, system: str, path: str) -> bytes:
        """Download a small file into memory.

        :calls: GET `/filesystem/{system}/ops/download`
        """
        answer = self._get_request(endpoint=f"/filesystem/{system}/ops/download", params={"path": path})
        self._check_response(answer, 200, return_json=False)
        return bytes(answer.content)

    def store(self, system: str, folder: str, name: str, content: bytes) -> None:
        """Upload a small file.

        :calls: POST `/filesystem/{system}/ops/upload`
        """
        answer = self._post_request(
            endpoint=f"/filesystem/{system}/ops/upload", params={"path": folder}, files={"file": (name, content)}
        )
        self._check_response(answer, 204)

    def pack(self, system: str, path: str, target: str, *, dereference: bool) -> None:
        """Make an archive, at once.

        :calls: POST `/filesystem/{system}/ops/compress`
        """
        self._at_once("compress", system, path, target, dereference=dereference)

    def unpack(self, system: str, path: str, target: str) -> None:
        """Unpack an archive, at once.

        :calls: POST `/filesystem/{system}/ops/extract`
        """
        self._at_once("extract", system, path, target)

    def job(self, what: str, system: str, path: str, target: str, **options: object) -> Json:
        """Have a job do what takes long: ``compress``, ``extract``, ``cp`` or ``mv``.

        :calls: POST `/filesystem/{system}/transfer/{what}`
        """
        data = {"sourcePath": path, "targetPath": target, **options}
        answer = self._post_request(endpoint=f"/filesystem/{system}/transfer/{what}", json_data=data)
        return dict(self._check_response(answer, 201))

    def _at_once(self, what: str, system: str, path: str, target: str, **options: object) -> None:
        data = {"sourcePath": path, "targetPath": target, "compression": "gzip", **options}
        answer = self._post_request(endpoint=f"/filesystem/{system}/ops/{what}", json_data=data)
        self._check_response(answer, 204)


class Cluster:
    """One system of a FirecREST, as one account. May be used by many threads at once.

    Methods raise :class:`CallFailed`, those that name paths :class:`UnusableName`.

    :param url: of FirecREST.
    :param system: its name there.
    :param timeout: seconds without a byte after which a call is given up.
    """

    compares = False
    """Whether what was written has been compared with what was sent when the call comes back."""

    def __init__(
        self,
        url: str,
        system: str,
        tokens: Tokens,
        *,
        timeout: float = TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url
        self.system = system
        self._tokens = tokens
        self._clock = clock
        self._sleep = sleep
        self.made = Made(clock)
        self._zone: tuple[int, float] | None = None
        self._quiet_until = 0.0
        self._lock = threading.Lock()
        self._about: Json | None = None
        self._calls: Any = self._make_calls(timeout)

    def _make_calls(self, timeout: float) -> Any:
        calls = _Calls(self.url, self._tokens)
        calls.timeout = httpx.Timeout(timeout, connect=min(timeout, _CONNECT))
        calls.num_retries_rate_limit = 0
        calls.disable_client_logging = True
        calls.MAX_DIRECT_UPLOAD_SIZE = 0  # What is small enough is decided here.
        return calls

    def usable(self, path: str) -> str:
        """Return a path that this FirecREST takes for what it is.

        :raises UnusableName: for any other.
        """
        return usable(path)

    def close(self) -> None:
        """Close its connections."""
        self._calls.close_session()

    # What it is

    def about(self) -> Json:
        """What FirecREST says about the system; asked once.

        :raises CallFailed: if it is not known, or there is no such system.
        """
        with self._lock:
            if self._about is None:
                systems = self._ask(self._calls.systems)
                found = [one for one in systems if isinstance(one, dict) and one.get("name") == self.system]
                if not found:
                    names = ", ".join(str(one.get("name")) for one in systems) or "none"
                    raise CallFailed(f"{self.url} has no system {self.system}; it has {names}")
                self._about = found[0]
            return self._about

    @property
    def largest_up(self) -> int:
        """Bytes of a file that can be sent at once."""
        operations = self.about().get("dataOperation") or {}
        return int(operations.get("max_ops_file_size") or operations.get("maxOpsFileSize") or _LARGEST)

    @property
    def largest_down(self) -> int:
        """Bytes of a file that can be fetched at once: FirecREST counts them as base64."""
        return (self.largest_up - 1) // 4 * 3

    @property
    def transfer_method(self) -> str | None:
        """How larger files are moved, in FirecREST's words; ``None``: they are not."""
        transfer = (self.about().get("dataOperation") or {}).get("data_transfer") or {}
        return transfer.get("serviceType") or transfer.get("service_type")

    def partitions(self) -> list[str]:
        """The names of its partitions."""
        return sorted(str(one["name"]) for one in self._do(self._calls.partitions, self.system))

    def zone(self) -> int | None:
        """Seconds that its wall clock is ahead of UTC, where that was found out within the hour."""
        return self._zone[0] if self._zone is not None and self._clock() < self._zone[1] else None

    def note_zone(self, ahead: int) -> None:
        """Note how many seconds its wall clock is ahead of UTC."""
        self._zone = ahead, self._clock() + _ZONE_AGE

    # Jobs

    def submit(self, folder: str, script: str, name: str) -> str:
        """Submit a script; its id. May not be repeated.

        :param name: under which it is kept in the folder, where it has to be in a file.
        """
        answer = self._do(self._calls.submit, self.system, usable(folder), script_str=script)
        if not isinstance(answer.get("jobId"), str | int):
            raise CallFailed("FirecREST took a job but gave no id for it", carried_out=True, own=True)
        return str(answer["jobId"])

    def jobs(self) -> list[Json]:
        """All jobs of the account that live, or have ended within 24 hours."""
        return self._records(self._do(self._calls.job_info, self.system))

    def job(self, id: str) -> list[Json]:
        """What is on record about a job, however old; nothing where there is none (yet)."""
        try:
            return self._records(self._do(self._calls.job_info, self.system, id))
        except CallFailed as exc:
            if exc.status == 404 and exc.own and "Job not found" in exc.message:
                return []
            raise

    def script(self, id: str) -> str | None:
        """The script of a living job; ``None`` if the job is gone or has none."""
        try:
            found = self._do(self._calls.job_metadata, self.system, id)
        except CallFailed as exc:
            if exc.status == 404 and exc.own:
                return None
            raise
        scripts = [str(one["script"]) for one in found or [] if one.get("script") is not None]
        return scripts[0] if scripts else None

    def cancel(self, id: str) -> None:
        """Ask for the end of a job."""
        self._do(self._calls.cancel_job, self.system, id)

    @staticmethod
    def _records(found: object) -> list[Json]:
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise CallFailed("FirecREST answered what is no list of jobs", own=True)
        return found

    # Files

    def stat(self, path: str, *, follow: bool = False) -> Json:
        """The numbers of a path, by the names of ``os.stat_result`` without ``st_``."""
        return dict(self._ask(self._calls.stat, self.system, usable(path), dereference=follow))

    def listing(self, path: str, *, recursive: bool = False) -> list[Json]:
        """The lines of ``ls -lA`` with numeric owners."""
        found = self._ask(
            self._calls.list_files, self.system, usable(path), show_hidden=True, recursive=recursive, numeric_uid=True
        )
        return list(found or [])

    def checksum(self, path: str) -> str:
        """The SHA-256 of a file, in hexadecimal."""
        try:
            return str(self._ask(self._calls.checksum, self.system, usable(path))["checksum"]).lstrip("\\")
        except CallFailed as exc:
            # Of a name with a blank in it FirecREST takes its own answer for a wrong one, and repeats it.
            found = _DIGEST.search(exc.message)
            if found is None:
                raise
            return found[1]

    def mkdir(self, path: str, *, parents: bool = False) -> None:
        """Make a folder; with ``parents`` it may be there already."""
        self._do(self._calls.mkdir, self.system, usable(path), create_parents=parents)

    def symlink(self, target: str, path: str) -> None:
        """Make ``path`` a link; where ``path`` is a folder, the link comes into it."""
        self._do(self._calls.symlink, self.system, usable(target), usable(path))

    def chmod(self, path: str, mode: int) -> None:
        """Set the permission bits."""
        self._do(self._calls.chmod, self.system, usable(path), f"{mode:o}")

    def remove(self, path: str) -> Json | None:
        """Remove whatever is there with all that is in it; what takes long is done by a job, which is returned."""
        started = self._do(self._calls.rm, self.system, usable(path), blocking=False)
        return None if started is None else dict(started)

    def fetch(self, path: str) -> bytes:
        """The content of a file of at most :attr:`largest_down` bytes, links followed."""
        return bytes(self._ask(self._calls.fetch, self.system, usable(path)))

    def store(self, path: str, content: bytes) -> None:
        """Write a file of at most :attr:`largest_up` bytes in place, links followed."""
        folder, name = posixpath.split(usable(path))
        if '"' in name:  # The form's own quoting would become part of the name.
            raise UnusableName(f"FirecREST cannot be sent a file named {name!r}: it has a quotation mark")
        self._do(self._calls.store, self.system, folder, name, content)

    def pack(self, path: str, target: str, *, dereference: bool = False) -> None:
        """Make a gzipped tar of a path, at once."""
        self._do(self._calls.pack, self.system, usable(path), usable(target), dereference=dereference)

    def unpack(self, path: str, target: str) -> None:
        """Unpack a gzipped tar into a folder, at once."""
        self._do(self._calls.unpack, self.system, usable(path), usable(target))

    def start(self, what: str, path: str, target: str, **options: object) -> Json:
        """Have a job do ``compress``, ``extract``, ``cp`` or ``mv``; what :meth:`finished` asks for."""
        return self._do(self._calls.job, what, self.system, usable(path), usable(target), **options)

    def finished(self, job: Json) -> bool:
        """Whether such a job has ended well.

        :raises CallFailed: it has ended otherwise, or that cannot be found out.
        """
        transfer = job["transferJob"]
        states = {str(one["status"]["state"]).split(" ")[0] for one in self.job(str(transfer["jobId"]))}
        if not states or states & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"}:
            return False
        if states == {"COMPLETED"}:
            return True
        said = ""
        try:
            said = self.fetch(transfer["logs"]["errorLog"]).decode("utf-8", "replace").strip()[-500:]
        except CallFailed:
            pass
        words = f"FirecREST's job {transfer['jobId']} ended as {', '.join(sorted(states))}: {said}"
        raise JobFailed(words, status=500, own=True)

    def ended(self, id: str, folder: str) -> bool:
        """Whether a job of the gateway's own, which writes its errors to ``errors`` in its folder, has ended well.

        :raises CallFailed: as :meth:`finished`.
        """
        return self.finished({"transferJob": {"jobId": id, "logs": {"errorLog": f"{folder}/errors"}}})

    def forget(self, job: Json) -> None:
        """Remove what such a job has written about itself."""
        for log in job["transferJob"]["logs"].values():
            try:
                self.remove(log)
            except (CallFailed, UnusableName):
                pass

    def stage_up(self, local: str, size: int, path: str) -> Json:
        """Send a large file to where FirecREST stages files; a job brings it to ``path``, see :meth:`finished`."""
        folder, name = posixpath.split(usable(path))
        method = self._staging()
        sent = self._do(
            self._calls.upload,
            self.system,
            local,
            folder,
            name,
            blocking=False,
            transfer_method=method,
            file_size=size,
        )
        if sent is None:
            raise CallFailed("FirecREST took a large file for a small one")
        sent.chunk_size = _PIECE
        self._do(sent.upload_file_to_stage)
        return dict(sent.transfer_data)

    def stage_down(self, path: str) -> Json:
        """Have a job bring a large file to where FirecREST stages files; see :meth:`finished`, then :meth:`collect`."""
        method = self._staging()
        data = {"source_path": usable(path), "transfer_directives": {"transferMethod": method}}

        def ask() -> Json:
            answer = self._calls._post_request(endpoint=f"/filesystem/{self.system}/transfer/download", json_data=data)
            return dict(self._calls._check_response(answer, 201))

        return self._do(ask)

    def collect(self, job: Json, write: Callable[[bytes], object]) -> None:
        """Fetch what :meth:`stage_down` has brought, piece by piece."""
        directives = job.get("transferDirectives") or {}
        url = directives.get("download_url") or directives.get("downloadUrl")
        if not isinstance(url, str):
            raise CallFailed("FirecREST does not say where it has put the file", own=True)
        try:
            with self._calls._session.stream("GET", url, timeout=self._calls.timeout) as answer:
                if answer.status_code != 200:
                    raise CallFailed(f"the store of FirecREST answered {answer.status_code}", status=answer.status_code)
                for piece in answer.iter_bytes(_PIECE):
                    write(piece)
        except httpx.HTTPError as exc:
            raise CallFailed(f"the store of FirecREST broke off: {type(exc).__name__}") from exc

    def _staging(self) -> str:
        if self.transfer_method != "s3":
            raise CallFailed(
                f"this FirecREST moves no larger files in a way that the gateway knows ({self.transfer_method or 'none'})",
                status=413,
            )
        return "s3"

    # What all of them share

    def _ask(self, call: Callable[..., T], *arguments: object, **options: object) -> T:
        """Make a call that changes nothing: once more if it was lost on the way."""
        try:
            return self._do(call, *arguments, **options)
        except CallFailed as exc:
            if exc.status not in _LOST or not exc.carried_out:
                raise
            return self._do(call, *arguments, **options)

    def _do(self, call: Callable[..., T], *arguments: object, **options: object) -> T:
        """Make a call; once more if the token was refused, and again if FirecREST asks for a moment."""
        until, renewed = self._clock() + _PATIENCE, False
        while True:
            wait = self._quiet_until - self._clock()
            if self._clock() + wait > until:
                raise CallFailed("FirecREST has asked for fewer calls", status=429, retry_after=wait, own=True)
            if wait > 0:
                self._sleep(wait)
            try:
                return self._told(call, *arguments, **options)
            except TokenRefused as exc:
                if renewed or exc.status != 401 or not self._tokens.refused():
                    raise
                renewed = True
            except CallFailed as exc:
                if exc.status != 429:
                    raise
                self._quiet_until = self._clock() + (exc.retry_after or 0.0)

    def _told(self, call: Callable[..., T], *arguments: object, **options: object) -> T:
        try:
            return call(*arguments, **options)
        except FirecrestException as exc:
            raise _meaning(exc.responses[-1]) from None
        except MultipartUploadException as exc:
            raise CallFailed("the store of FirecREST does not take the file", carried_out=True) from exc
        except NoToken as exc:
            raise TokenRefused(str(exc)) from exc
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
            raise CallFailed(f"FirecREST cannot be reached: {exc or type(exc).__name__}") from exc
        except httpx.HTTPError as exc:
            raise CallFailed(f"FirecREST gave no answer: {type(exc).__name__}", carried_out=True) from exc
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise CallFailed(
                f"FirecREST answered what cannot be read ({type(exc).__name__})", carried_out=True
            ) from exc


def usable(path: str) -> str:
    """Return a path that FirecREST takes for what it is.

    It puts paths between single quotes into a command, and nothing else: a quote in a path would end it, and what follows
    would be run. Line breaks and the like get lost in what it prints.

    :raises UnusableName: for any other.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UnusableName(f"FirecREST cannot be sent {path!r}: it is not UTF-8") from None
    if "'" in path:
        raise UnusableName(f"FirecREST cannot be sent {path!r}: it has an apostrophe")
    if not path.isprintable():
        raise UnusableName(f"FirecREST cannot be sent {path!r}: it has characters that are not printable")
    return path


def _meaning(answer: Any) -> CallFailed:
    """What an answer means that is not the wished one."""
    status = int(answer.status_code)
    own, message = True, ""
    try:
        said = answer.json()
        message = str(said["message"])
    except (ValueError, KeyError, TypeError):
        own = False
        message = f"something on the way to FirecREST answered {status}"
    if status == 429:
        return CallFailed("FirecREST has asked for fewer calls", status=429, retry_after=retry_after(answer), own=own)
    if status == 401:
        return TokenRefused(f"FirecREST refuses the token: {message}", status=401, own=own)
    # 424: the SSH connection; it may have been lost when the command was under way.
    carried_out = status in (408, 413, 424) or status >= 500
    return CallFailed(message, status=status, carried_out=carried_out, own=own)


def retry_after(answer: Any) -> float:
    """Seconds to wait that an answer names, or that are taken where it names none."""
    text = answer.headers.get("Retry-After") or answer.headers.get("RateLimit-Reset") or ""
    try:
        return min(max(float(text), 0.1), 600.0)
    except ValueError:
        return _QUIET
