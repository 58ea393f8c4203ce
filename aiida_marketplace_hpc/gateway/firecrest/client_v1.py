"""Calls to one system of a FirecREST v1, by the same methods as to one of version 2.

The calls go through pyfirecrest. What the first version does otherwise, and what is made of it (source: FirecREST 1.13.0,
``src/utilities``, ``src/compute``, ``src/tasks`` and ``src/common``):

- Errors are headers under the status 400; :data:`_HEADERS` has the words of the commands for them.
- What is asked of the batch system becomes a *task*, which is asked for until it has an outcome. It is asked for by its id:
  the list of tasks that pyfirecrest asks for is not restricted in that version, and holds the answers of all earlier ones.
- Uploads are renamed (``secure_filename``) and written in place. So a file is sent under a name that stays what it is,
  compared, and then renamed, which is done at one blow: a file has its name when it is whole.
- A job is submitted from a file, and its folder is the file's.
- Listings cut names at blanks and lines at dollar signs: such names are neither written nor read.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import requests
from firecrest.v1 import Firecrest
from urllib3.exceptions import NewConnectionError

from aiida_marketplace_hpc.gateway.backends.slurm_states import read_state
from aiida_marketplace_hpc.gateway.backends.wrapper import GUARD_PREFIX
from aiida_marketplace_hpc.gateway.classic.firecrest import is_forbidden
from aiida_marketplace_hpc.gateway.firecrest.client import (
    CallFailed,
    Cluster,
    JobFailed,
    Json,
    TokenRefused,
    UnusableName,
    retry_after,
)
from aiida_marketplace_hpc.gateway.firecrest.records_v1 import queued
from aiida_marketplace_hpc.gateway.firecrest.tokens import NoToken, Tokens

T = TypeVar("T")

ANSWER_TIME = 60.0
"""Seconds in which a task that asks something of the batch system has to have an outcome."""
LIST_TIME = 180.0
"""The same for the whole queue, in which each job costs FirecREST three logins, one after the other."""
SUBMIT_TIME = 45.0
"""The same for a submission: sbatch has no time-out there, and its task goes on."""
AT_ONCE = 100
"""Jobs of one answer, at most: the largest page that FirecREST gives."""
_CONNECT = 5.0
_MIB = 1024 * 1024
_FORM = 4096
"""Bytes that a form has beside the file in it, at most: its size is what is limited."""
_PIECE = 1024 * 1024
_REMOVALS = 24
"""How often a removal that FirecREST has ended after its 5 seconds is continued."""
_HEADERS = {
    "X-Invalid-Path": "No such file or directory",
    "X-Not-Found": "No such file or directory",
    "X-Permission-Denied": "Permission denied",
    "X-Exists": "File exists",
    "X-A-Directory": "Is a directory",
    "X-Not-A-Directory": "Not a directory",
}
_NO_ACCOUNTING = "accounting storage is disabled"
_STAGED, _FETCHED = "114", "117"
_STAGING_FAILED = ("115", "118")


class TaskFailed(CallFailed):
    """A task ended with an error; the message is what the cluster said."""


class NotStored(CallFailed):
    """The file from which a job was to be submitted did not get to its place: nothing was submitted."""


class _Calls(Firecrest):
    """pyfirecrest's client, whose answers are judged here: it hides what they say."""

    def __init__(self, url: str, system: str, tokens: Tokens, timeout: float) -> None:
        super().__init__(url, tokens)
        self._system = {"X-Machine-Name": system}
        self.timeout = (min(timeout, _CONNECT), timeout)
        self.num_retries_rate_limit = 0
        self.disable_client_logging = True

    def get(self, path: str, **params: object) -> requests.Response:
        return _expected(self._get_request(endpoint=path, additional_headers=self._system, params=params), 200)

    def post(self, path: str, files: Any = None, **data: object) -> requests.Response:
        given: Json = {"files": files} if files else {}  # One that is there and `None` it cannot bear.
        return _expected(self._post_request(endpoint=path, additional_headers=self._system, data=data, **given), 201)

    def put(self, path: str, **data: object) -> requests.Response:
        return _expected(self._put_request(endpoint=path, additional_headers=self._system, data=data), 200)

    def delete(self, path: str, expect: int, **data: object) -> requests.Response:
        return _expected(self._delete_request(endpoint=path, additional_headers=self._system, data=data), expect)

    def invalidate(self, task: str) -> None:
        """Forget what was staged."""
        headers = {**self._system, "X-Task-Id": task}
        _expected(self._post_request(endpoint="/storage/xfer-external/invalidate", additional_headers=headers), 201)

    def close(self) -> None:
        self._session.close()


class ClusterV1(Cluster):
    """One system of a FirecREST v1, as one account. May be used by many threads at once.

    Methods raise what those of :class:`~aiida_marketplace_hpc.gateway.firecrest.client.Cluster` raise.
    """

    compares = True

    def _make_calls(self, timeout: float) -> _Threads:
        return _Threads(lambda: _Calls(self.url, self.system, self._tokens, timeout))

    def close(self) -> None:
        self._calls.close()

    @property
    def _call(self) -> _Calls:
        calls: _Calls = self._calls.get()
        return calls

    def usable(self, path: str) -> str:
        """Return a path that this FirecREST takes for what it is.

        :raises UnusableName: for any other.
        """
        super_usable = super().usable(path)
        if is_forbidden(path) or "$" in path or any(letter.isspace() for letter in path):
            raise UnusableName(
                f"FirecREST version 1 cannot be sent {path!r}: it has a blank or one of < > | ; \" ' & \\ [ ] ( ) ` $"
            )
        return super_usable

    # What it is

    def about(self) -> Json:
        """FirecREST's parameters, of all its systems; asked once.

        :raises CallFailed: if they are not known.
        """
        with self._lock:
            if self._about is None:
                self._about = dict(self._ask(lambda: self._call.get("/status/parameters").json())["out"])
            return self._about

    @property
    def largest_up(self) -> int:
        """Bytes of a file that can be sent at once."""
        return self._limit() - _FORM

    @property
    def largest_down(self) -> int:
        """Bytes of a file that can be fetched at once."""
        return self._limit()

    def _limit(self) -> int:
        names = ("UTILITIES_MAX_FILE_SIZE", "F7T_UTILITIES_MAX_FILE_SIZE")
        values = [one["value"] for one in self.about().get("utilities", ()) if one.get("name") in names]
        return int(float(values[0]) * _MIB) if values else 5 * _MIB

    @property
    def transfer_method(self) -> str | None:
        """How larger files are moved: by ``/storage/xfer-external``."""
        return "xfer-external"

    def partitions(self) -> list[str]:
        """Nothing: this version does not say."""
        return []

    # Jobs

    def submit(self, folder: str, script: str, name: str) -> str:
        """Store a script in a folder and submit it from there; its id. May not be repeated.

        :raises NotStored: it could not be stored.
        :raises TaskFailed: the submission failed, in sbatch's words if it has any.
        """
        path = posixpath.join(self.usable(folder), name)
        try:
            self.store(path, script.encode())
        except CallFailed as exc:
            raise NotStored(exc.message, status=exc.status, retry_after=exc.retry_after, own=exc.own) from exc
        started = self._do(lambda: self._call.post("/compute/jobs/path", targetPath=path).json())
        try:
            done = self._outcome(str(started["task_id"]), SUBMIT_TIME)
            id, of = str(done["jobid"]), done.get("job_file")
        except TaskFailed:
            raise
        except (CallFailed, KeyError, TypeError, AttributeError) as exc:
            said = getattr(exc, "message", "an answer that cannot be read")
            raise CallFailed(f"a submission was begun, and then: {said}", carried_out=True) from exc
        # After some failures of sbatch FirecREST goes on, and takes the last word of what it said for an id.
        if not id.isdecimal() or of != path:
            raise CallFailed(f"FirecREST says of a submission: {id} ({of})", carried_out=True, own=True)
        return id

    def jobs(self) -> list[Json]:
        """All jobs of the account that live, with their folders.

        FirecREST gives the first hundred, and up to 1.13.0 never the rest; those are named by the accounting, which leaves out
        jobs that are held or wait for a time or for others (seen with Slurm 22.05).
        """
        found = self._squeue(LIST_TIME, pageSize=AT_ONCE, pageNumber=0)
        if len(found) >= AT_ONCE:
            listed = {str(one["jobId"]).split("_")[0] for one in found}
            others = {str(row["jobid"]).split("_")[0].split("+")[0] for row in self.recorded(())} - listed
            for batch in batches(sorted(others), AT_ONCE):
                found += self.living(batch)
        return found

    def job(self, id: str) -> list[Json]:
        """What the queue says about a job; nothing where it does not know it (any more)."""
        return self.living([id])

    def living(self, ids: Sequence[str]) -> list[Json]:
        """What the queue says about jobs, :data:`AT_ONCE` at most."""
        try:
            found = self._squeue(LIST_TIME, jobs=",".join(ids), pageSize=AT_ONCE, pageNumber=0)
            if len(found) < AT_ONCE or len(ids) == 1:
                return found
            # The tasks of an array are many lines, which leave no room for those of other jobs.
            return [one for id in ids for one in self.living([id])]
        except TaskFailed as exc:
            if "Invalid job id" in exc.message:  # What squeue says where it knows none of them.
                return []
            raise

    def recorded(self, ids: Sequence[str]) -> list[Json]:
        """The rows of the accounting about jobs, as FirecREST gives them; none where Slurm has no accounting.

        Without ids those of the account that live or have ended today.
        """
        asked = {"jobs": ",".join(ids)} if ids else {}
        try:
            found = self._answer(lambda: self._call.get("/compute/acct", **asked).json())
        except TaskFailed as exc:
            if _NO_ACCOUNTING in exc.message:
                return []
            raise
        rows = list(found.values()) if isinstance(found, dict) else found
        return self._records(rows)

    def _squeue(self, within: float, **asked: object) -> list[Json]:
        found = self._answer(lambda: self._call.get("/compute/jobs", **asked).json(), within)
        rows = list(found.values()) if isinstance(found, dict) else found
        return [queued(row) for row in self._records(rows)]

    def script(self, id: str) -> str | None:
        """The script of a living job; ``None`` if the job is gone or no gateway has submitted it."""
        files = [str(one["script"]) for one in self.job(id) if one["script"]]
        if not files or not posixpath.basename(files[0]).startswith(GUARD_PREFIX):
            return None
        try:
            return self.fetch(files[0]).decode("utf-8", "surrogateescape")
        except UnusableName:
            return None
        except CallFailed as exc:
            if exc.own and _HEADERS["X-Not-Found"] in exc.message:
                return None
            raise

    def cancel(self, id: str) -> None:
        """Ask for the end of a job."""
        self._answer(lambda: self._call.delete(f"/compute/jobs/{id}", 200).json())

    def _answer(self, ask: Callable[[], Any], within: float = ANSWER_TIME) -> Any:
        """What a question to the batch system brings."""
        return self._outcome(str(self._ask(ask)["task_id"]), within)

    def _outcome(self, task: str, within: float) -> Any:
        """The data of a task, when it has an outcome; a question that gets lost is asked again.

        :param within: seconds.
        :raises TaskFailed: it ended with an error.
        """
        until, pause = self._clock() + within, 0.1
        while True:
            try:
                now = self._do(lambda: self._call.get(f"/tasks/{task}").json()["task"])
                status = int(now["status"])
                if status == 200:
                    return now["data"]
                if status >= 300:
                    raise TaskFailed(str(now.get("data") or now.get("description") or ""), carried_out=True, own=True)
                doubt = "FirecREST has not finished it"
            except (TaskFailed, TokenRefused):
                raise
            except (CallFailed, KeyError, TypeError, ValueError) as exc:
                doubt = getattr(exc, "message", "FirecREST answered what cannot be read")
            if self._clock() + pause > until:
                raise CallFailed(f"{doubt} after {within:g} s", status=408, carried_out=True)
            self._sleep(pause)
            pause = min(pause * 1.5, 2.0)

    # Files

    def stat(self, path: str, *, follow: bool = False) -> Json:
        """The numbers of a path, by the names of ``os.stat_result`` without ``st_``."""
        asked = {"targetPath": self.usable(path), **({"dereference": True} if follow else {})}
        return dict(self._ask(lambda: self._call.get("/utilities/stat", **asked).json())["output"])

    def listing(self, path: str, *, recursive: bool = False) -> list[Json]:
        """The lines of ``ls -lA``; recursive: of all folders below, one call for each."""
        top = self._ls(self.usable(path))
        if not recursive:
            return top
        found, todo = [], [("", top)]
        while todo:
            above, lines = todo.pop()
            for line in lines:
                name = above + line["name"]
                found.append({**line, "name": name})
                if line["type"] == "d":
                    todo.append((f"{name}/", self._ls(posixpath.join(path, name))))
        return found

    def _ls(self, path: str) -> list[Json]:
        found = self._ask(lambda: self._call.get("/utilities/ls", targetPath=path, showhidden=True).json())["output"]
        return [{**one, "linkTarget": one["link_target"], "lastModified": one["last_modified"]} for one in found]

    def checksum(self, path: str) -> str:
        """The SHA-256 of a file, in hexadecimal."""
        asked = self.usable(path)
        return str(self._ask(lambda: self._call.get("/utilities/checksum", targetPath=asked).json())["output"])

    def mkdir(self, path: str, *, parents: bool = False) -> None:
        """Make a folder; with ``parents`` it may be there already."""
        asked = {"targetPath": self.usable(path), **({"p": True} if parents else {})}
        self._do(lambda: self._call.post("/utilities/mkdir", **asked))

    def symlink(self, target: str, path: str) -> None:
        """Make ``path`` a link; where ``path`` is a folder, the link comes into it."""
        asked = {"targetPath": self.usable(target), "linkPath": self.usable(path)}
        self._do(lambda: self._call.post("/utilities/symlink", **asked))

    def chmod(self, path: str, mode: int) -> None:
        """Set the permission bits."""
        asked = self.usable(path)
        self._do(lambda: self._call.put("/utilities/chmod", targetPath=asked, mode=f"{mode:o}"))

    def remove(self, path: str) -> Json | None:
        """Remove whatever is there with all that is in it; what takes long is continued until it is done."""
        asked, begun = self.usable(path), False
        for left in range(_REMOVALS, -1, -1):
            try:
                self._do(lambda: self._call.delete("/utilities/rm", 204, targetPath=asked))
                break
            except CallFailed as exc:
                if begun and _HEADERS["X-Invalid-Path"] in exc.message:
                    break
                if exc.status != 408 or not left:
                    raise
                begun = True
        return None

    def fetch(self, path: str) -> bytes:
        """The content of a file of at most :attr:`largest_down` bytes, links followed."""
        asked = self.usable(path)
        return self._ask(lambda: self._call.get("/utilities/download", sourcePath=asked).content)

    def store(self, path: str, content: bytes, *, new: bool = False) -> None:
        """Write a file of at most :attr:`largest_up` bytes: it has its name, or its new content, when it is whole.

        :param new: it is known that there is no folder of that name.
        """
        folder, _ = posixpath.split(self.usable(path))
        if not new:
            self._refuse_folder(path)
        draft = _draft()
        form = {"file": (draft, io.BytesIO(content))}
        self._swapped_in(
            f"{folder}/{draft}",
            path,
            hashlib.sha256(content).hexdigest(),
            lambda: self._do(lambda: self._call.post("/utilities/upload", files=form, targetPath=folder)),
        )

    def _refuse_folder(self, path: str) -> None:
        """Make sure that no folder is there, into which a file would be moved."""
        try:
            found = self.stat(path, follow=True)
        except CallFailed as exc:
            if exc.own and _HEADERS["X-Invalid-Path"] in exc.message:
                return
            raise
        if found["mode"] & 0o170000 == 0o040000:
            raise CallFailed(f"{_HEADERS['X-A-Directory']}: {path}", status=400, own=True)

    def _swapped_in(self, draft: str, path: str, digest: str, send: Callable[[], object]) -> None:
        """Send a file under another name, compare it, and give it its name."""
        try:
            send()
            if self.checksum(draft) != digest:
                raise CallFailed(f"{path} did not arrive as it was sent: send it again", own=True)
            self._do(lambda: self._call.put("/utilities/rename", sourcePath=draft, targetPath=path))
        except CallFailed:
            with suppress(CallFailed):
                self.remove(draft)
            raise

    def pack(self, path: str, target: str, *, dereference: bool = False) -> None:
        """Nothing: this version makes no archives.

        :raises CallFailed: always.
        """
        raise CallFailed("FirecREST version 1 makes no archives", status=501, own=True)

    def unpack(self, path: str, target: str) -> None:
        """Nothing, as :meth:`pack`.

        :raises CallFailed: always.
        """
        raise CallFailed("FirecREST version 1 unpacks no archives", status=501, own=True)

    def start(self, what: str, path: str, target: str, **options: object) -> Json:
        """Copy (``cp``) or rename (``mv``), at once: when this comes back it is done.

        :raises CallFailed: it takes longer than FirecREST's 5 seconds, or links are to be followed.
        """
        asked = {"sourcePath": self.usable(path), "targetPath": self.usable(target)}
        if what == "mv":
            self._do(lambda: self._call.put("/utilities/rename", **asked))
        elif what == "cp" and not options.get("dereference"):
            self._do(lambda: self._call.post("/utilities/copy", **asked))
        elif what == "cp":
            raise CallFailed("FirecREST version 1 copies links, not what they lead to", status=501, own=True)
        else:
            raise CallFailed(f"FirecREST version 1 has no {what}", status=501, own=True)
        return {}

    # Large files

    def stage_up(self, local: str, size: int, path: str) -> Json:
        """Send a large file to FirecREST's store, from which it is fetched under another name; see :meth:`finished`."""
        folder, _ = posixpath.split(self.usable(path))
        self._refuse_folder(path)
        draft = _draft()
        asked = {"sourcePath": draft, "targetPath": folder}
        task = str(self._do(lambda: self._call.post("/storage/xfer-external/upload", **asked).json())["task_id"])
        form = self._staged(task, "111")["msg"]["parameters"]
        with Path(local).open("rb") as file:
            sending: Json = {
                "data": form.get("data") or {},
                "files": {"file": (draft, file)},
                "timeout": self._store_timeout,
            }
            self._stored(lambda: httpx.request(form["method"], form["url"], **sending))
        digest = hashlib.sha256()
        with Path(local).open("rb") as file:
            while chunk := file.read(_PIECE):
                digest.update(chunk)
        return {"task": task, "draft": f"{folder}/{draft}", "path": path, "digest": digest.hexdigest()}

    def stage_down(self, path: str) -> Json:
        """Have a large file brought to FirecREST's store; see :meth:`finished`, then :meth:`collect`."""
        asked = self.usable(path)
        started = self._do(lambda: self._call.post("/storage/xfer-external/download", sourcePath=asked).json())
        return {"task": str(started["task_id"])}

    def finished(self, job: Json) -> bool:
        """Whether what :meth:`start` or one of the two above has begun has ended well.

        :raises JobFailed: it has ended otherwise.
        """
        if "task" not in job:
            return True
        status, data = self._status(job["task"])
        if status in _STAGING_FAILED or int(status) >= 300:
            raise JobFailed(f"FirecREST's store: {data}", status=500, own=True)
        if "draft" not in job:
            return status == _FETCHED
        if status != _STAGED:
            return False
        try:
            self._swapped_in(job["draft"], job["path"], job["digest"], lambda: None)
        except CallFailed as exc:
            raise JobFailed(exc.message, status=exc.status, carried_out=exc.carried_out, own=exc.own) from exc
        return True

    def ended(self, id: str, folder: str) -> bool:
        """The same by the note that the job has left; without one, by the accounting."""
        if any(not read_state(str(one["status"]["state"])).final for one in self.job(id)):
            return False
        try:
            code = self.fetch(f"{folder}/ended").decode("ascii", "replace").strip()
            state = "FAILED"
        except CallFailed as exc:
            if _HEADERS["X-Not-Found"] not in exc.message:
                raise
            states = {str(row["state"]).split(" ")[0] for row in self.recorded([id])}
            state, code = ", ".join(sorted(states)), "?"
            if not states or any(not read_state(one).final for one in states):
                return False
        if code == "0":
            return True
        said = ""
        with suppress(CallFailed):  # A job that was ended before it began has written nothing.
            said = self.fetch(f"{folder}/errors").decode("utf-8", "replace").strip()[-500:]
        raise JobFailed(f"the job {id} ended as {state}: {said}", status=500, own=True)

    def forget(self, job: Json) -> None:
        """Nothing: such a thing leaves no logs."""

    def collect(self, job: Json, write: Callable[[bytes], object]) -> None:
        """Fetch what :meth:`stage_down` has brought, piece by piece."""
        _, data = self._status(job["task"])
        url = data.get("url") if isinstance(data, dict) else data  # The first up to 1.13.0.
        if not isinstance(url, str):
            raise CallFailed("FirecREST does not say where it has put the file", own=True)

        def fetch() -> httpx.Response:
            with httpx.stream("GET", url, timeout=self._store_timeout) as answer:
                if answer.status_code == 200:
                    for piece in answer.iter_bytes(_PIECE):
                        write(piece)
                return answer

        self._stored(fetch)
        with suppress(CallFailed):
            self._do(lambda: self._call.invalidate(job["task"]))

    @property
    def _store_timeout(self) -> httpx.Timeout:
        return httpx.Timeout(60.0, connect=_CONNECT)

    def _stored(self, exchange: Callable[[], httpx.Response]) -> None:
        try:
            answer = exchange()
        except httpx.HTTPError as exc:
            raise CallFailed(f"the store of FirecREST broke off: {type(exc).__name__}", carried_out=True) from exc
        if answer.status_code >= 300:
            raise CallFailed(
                f"the store of FirecREST answered {answer.status_code}", status=answer.status_code, carried_out=True
            )

    def _staged(self, task: str, wanted: str) -> Any:
        """The data of a task in a state that it comes to soon."""
        until = self._clock() + ANSWER_TIME
        while True:
            status, data = self._status(task)
            if status == wanted:
                return data
            if int(status) >= 300 or self._clock() > until:
                raise CallFailed(f"FirecREST's store: {data}", own=True)
            self._sleep(0.2)

    def _status(self, task: str) -> tuple[str, Any]:
        now = self._ask(lambda: self._call.get(f"/tasks/{task}").json()["task"])
        return str(now["status"]), now.get("data")

    # What all of them share

    def _told(self, call: Callable[..., T], *arguments: object, **options: object) -> T:
        try:
            return call(*arguments, **options)
        except NoToken as exc:
            raise TokenRefused(str(exc)) from exc
        except requests.ConnectionError as exc:
            refused = isinstance(getattr(exc.args[0] if exc.args else None, "reason", None), NewConnectionError)
            if refused or isinstance(exc, requests.ConnectTimeout):
                raise CallFailed(f"FirecREST cannot be reached: {type(exc).__name__}") from exc
            raise CallFailed(f"FirecREST gave no answer: {type(exc).__name__}", carried_out=True) from exc
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise CallFailed(
                f"FirecREST answered what cannot be read ({type(exc).__name__})", carried_out=True
            ) from exc
        except requests.RequestException as exc:
            raise CallFailed(f"FirecREST gave no answer: {type(exc).__name__}", carried_out=True) from exc


class _Threads:
    """The calls of each thread: a session of requests belongs to one."""

    def __init__(self, make: Callable[[], _Calls]) -> None:
        self._make = make
        self._local = threading.local()
        self._lock = threading.Lock()
        self._made: list[_Calls] = []

    def get(self) -> _Calls:
        calls: _Calls | None = getattr(self._local, "calls", None)
        if calls is None:
            calls = self._local.calls = self._make()
            with self._lock:
                self._made.append(calls)
        return calls

    def close(self) -> None:
        with self._lock:
            for calls in self._made:
                calls.close()
            self._made.clear()


def batches(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """The same ids, so many at a time."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _draft() -> str:
    """The name of a file that is under way; it has nothing in it that FirecREST would take away."""
    return f"marketplace-hpc-{secrets.token_hex(8)}.part"


def _expected(answer: requests.Response, status: int) -> requests.Response:
    """The answer, if it is the wished one.

    :raises CallFailed: for any other.
    """
    if answer.status_code == status:
        return answer
    found = answer.status_code
    said: Iterable[str] = ()
    own = False
    with suppress(ValueError, AttributeError):
        body = answer.json()
        own = "description" in body or "error" in body
        said = [str(body[name]) for name in ("description", "error") if body.get(name)]
    message = ": ".join(said) or f"something on the way to FirecREST answered {found}"
    headers = answer.headers
    if found == 429:
        raise CallFailed("FirecREST has asked for fewer calls", status=429, retry_after=retry_after(answer), own=own)
    if found == 401:
        raise TokenRefused(f"FirecREST refuses the token: {message}", status=401, own=own)
    if "X-Timeout" in headers:
        raise CallFailed(f"{message}: {headers['X-Timeout']}", status=408, carried_out=True, own=True)
    if "X-Size-Limit" in headers:
        raise CallFailed(f"{message}: {headers['X-Size-Limit']}", status=413, own=True)
    if "X-Machine-Not-Available" in headers:
        # Also what it says when it has not waited long enough.
        raise CallFailed(f"{message}: the cluster cannot be reached", status=424, carried_out=True, own=True)
    for name, words in _HEADERS.items():
        if name in headers:
            raise CallFailed(f"{message}: {words}", status=400, own=True)
    if "X-Error" in headers:
        raise CallFailed(f"{message}: {headers['X-Error']}", status=400, own=True)
    raise CallFailed(message, status=found, carried_out=found >= 500 or found < 400, own=own)
