"""A FirecREST v2 for tests: the same paths, commands, answers and faults as the real one, on a machine of the rig.

It was written after FirecREST's OpenAPI document and what the real server was seen to do; the list of calls in
``tests/rig/test_rig_firecrest.py`` is made to both. Like the real one it runs a shell command for every call, with paths
between single quotes and nothing else, and takes the command's words for what went wrong. Jobs are processes
(:class:`~aiida_marketplace_hpc.testing.firecrest_jobs.Processes`) or those of a real Slurm
(:class:`~aiida_marketplace_hpc.testing.firecrest_jobs.SlurmCommands`).
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
import secrets
import shlex
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt

from aiida_marketplace_hpc.testing.firecrest_jobs import CommandFailed, Jobs
from aiida_marketplace_hpc.testing.machine import Machine
from aiida_marketplace_hpc.testing.oidc import SERVICE, SERVICE_SECRET, OidcProvider
from aiida_marketplace_hpc.testing.web import WebServer

Json = dict[str, Any]
MIN_TOKEN_TTL = 30
"""Seconds that a token has to live, or it is refused."""
_WINDOW = 2 * 1024 * 1024
"""Bytes that SSH holds for a reader who does not read."""
_COMPRESSION = {"none": "", "gzip": "z", "bzip2": "j", "xz": "J"}


class Answered(Exception):
    """An answer other than the wished one."""

    def __init__(self, status: int, message: str, *, caused_by: list[str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.caused_by = status, message, caused_by


@dataclass
class Fault:
    """What goes wrong with calls.

    :param operation: which, by their names in :attr:`FirecrestDouble.calls`.
    :param status: what is answered; ``None``: the connection is closed instead.
    :param carried_out: whether the call has its effect all the same.
    :param times: with so many calls.
    :param own: whether FirecREST says it; else something on the way.
    """

    operation: str
    status: int | None = 408
    carried_out: bool = False
    times: int = 1
    own: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "Command execution timeout limit exceeded."


@dataclass
class _Upload:
    target: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)


class FirecrestDouble:
    """The server, on a free port of 127.0.0.1; a context manager.

    :param jobs: where jobs run.
    :param provider: whose tokens are accepted.
    :param system: the name of its system.
    :param beside: others, each of which is one more system of this FirecREST: they have faults, folders and jobs of their own,
        and their calls count there. They start and end with this one.
    :param largest: bytes of a file that is taken or given at once, and of what a command may print.
    """

    def __init__(
        self,
        machine: Machine,
        jobs: Jobs,
        provider: OidcProvider,
        *,
        system: str = "cluster",
        beside: Sequence[FirecrestDouble] = (),
        largest: int = 5 * 1024 * 1024,
        part_size: int = 1024 * 1024,
    ) -> None:
        self.machine = machine
        self.jobs = jobs
        self.provider = provider
        self.system = system
        self.beside = tuple(beside)
        self.largest = largest
        self.part_size = part_size
        self.faults: list[Fault] = []
        self.calls: Counter[str] = Counter()
        """How often each operation was called: ``submit``, ``jobs``, ``job``, ``metadata``, ``cancel``, ``systems``,
        ``partitions``, the names of ``ops`` as they are, and ``transfer/`` with the names of ``transfer``."""
        self.young: set[str] = set()
        """Jobs that are in no answer yet."""
        self.old: set[str] = set()
        """Jobs that have ended more than 24 hours ago: they are on record, and not listed."""
        self.locked: set[str] = set()
        """Users whom the cluster does not let in."""
        self.before_answer: Callable[[str], None] | None = None
        """Called with the name of an operation when that has acted, before its answer is sent."""
        self._lock = threading.Lock()
        self._staged: dict[str, bytes] = {}
        self._uploads: dict[str, _Upload] = {}
        self._moves: dict[str, Json] = {}
        self._server = _Server(self)
        self.url = self._server.url

    def __enter__(self) -> FirecrestDouble:
        for one in self.beside:
            one.__enter__()
        self._server.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.stop()
        self.jobs.close()
        for one in self.beside:
            one.__exit__(*exc_info)

    def fail(self, operation: str, **options: Any) -> Fault:
        """Let calls fail: :class:`Fault`."""
        fault = Fault(operation, **options)
        with self._lock:
            self.faults.append(fault)
        return fault

    @property
    def options(self) -> list[str]:
        """What ``gateway serve`` is told about it, with :attr:`env`, so that it uses an account of its own."""
        token_url = f"{self.provider.issuer}/protocol/openid-connect/token"
        systems = ",".join(one.system for one in (self, *self.beside))
        where = ["--firecrest-url", self.url, "--firecrest-system", systems, "--firecrest-token-url", token_url]
        return [*where, "--firecrest-client-id", SERVICE]

    @property
    def env(self) -> dict[str, str]:
        """The secret that goes with :attr:`options`."""
        return {"MARKETPLACE_HPC_FIRECREST_CLIENT_SECRET": SERVICE_SECRET}

    # What the handler asks for

    def fault_of(self, operation: str) -> Fault | None:
        with self._lock:
            self.calls[operation] += 1
            for fault in self.faults:
                if fault.operation == operation and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def user_of(self, authorization: str) -> str:
        token = authorization.removeprefix("Bearer ")
        try:
            claims = jwt.decode(token, self.provider.private_key.public_key(), ["RS256"], options={"verify_aud": False})
        except jwt.ExpiredSignatureError:
            raise Answered(401, "Access token expired") from None
        except jwt.PyJWTError:
            raise Answered(401, "Access token is invalid.") from None
        if claims["exp"] - time.time() < MIN_TOKEN_TTL:
            raise Answered(401, f"Access token expires too soon (less than {MIN_TOKEN_TTL}s remaining).")
        return str(claims["preferred_username"])

    def answer(self, operation: str, user: str, query: Mapping[str, str], body: Json, raw: tuple[str, bytes]) -> Any:
        """Carry out an operation; its status and body."""
        if user in self.locked and operation != "systems":
            raise Answered(424, "Unable to establish SSH connection.")
        if operation == "systems":
            return 200, {"systems": [one._about() for one in (self, *self.beside)]}
        if operation == "partitions":
            return 200, {"partitions": [{"name": name} for name in self.jobs.partitions()]}
        if operation in ("jobs", "job", "submit", "metadata", "cancel"):
            return self._job(operation, user, query, body)
        if operation.startswith("transfer/"):
            return self._transfer(operation.removeprefix("transfer/"), user, query, body)
        return self._file(operation, query, body, raw)

    # Jobs

    def _job(self, operation: str, user: str, query: Mapping[str, str], body: Json) -> Any:
        id = query.get("id", "")
        try:
            if operation == "submit":
                job = body["job"]
                folder = job.get("workingDirectory") or job.get("working_directory")
                if not folder or job.get("script") is None:
                    raise Answered(400, "1 validation error")
                return 201, {"jobId": self.jobs.submit(job["script"], folder, user)}
            if operation == "cancel":
                self.jobs.cancel(id)
                return 204, None
            if operation == "metadata":
                script = None if id in self.young else self.jobs.script(id)
                if script is None:
                    raise Answered(404, "Job not found.")
                return 200, {"jobs": [{"jobId": id, "script": script}]}
            found = {**self._moves, **{one["jobId"]: one for one in self.jobs.records(user, id or None)}}
        except CommandFailed as exc:
            if operation in ("jobs", "job"):
                raise Answered(500, "Error executing Slurm command.") from None
            raise Answered(500, exc.said) from None
        if operation == "job":
            # Tasks of an array come with their job.
            mine = [one for key, one in found.items() if re.split(r"[_+]", key)[0] == id and id not in self.young]
            if not mine:
                raise Answered(404, "Job not found.")
            return 200, {"jobs": mine}
        listed = [one for key, one in found.items() if not {re.split(r"[_+]", key)[0]} & (self.young | self.old)]
        return 200, {"jobs": listed}

    # Files

    def _file(self, what: str, query: Mapping[str, str], body: Json, raw: tuple[str, bytes]) -> Any:
        path = query.get("path") or body.get("sourcePath") or body.get("source_path") or body.get("path") or ""
        target = body.get("targetPath") or body.get("target_path") or ""
        if what == "upload":
            name, content = raw
            if len(content) > self.largest:
                raise Answered(413, "File to upload is too large.")
            self.run(f"base64 -d > '{path}/{name}'", base64.b64encode(content))
            return 204, None
        if what == "download":
            content = base64.b64decode(self.run(f"base64 --wrap=0 -- '{path}'"))
            return 200, content
        if what == "stat":
            follow = "--dereference " if query.get("dereference") == "true" else ""
            said = self.run(f"stat {follow}-c '%f %i %d %h %u %g %s %X %Y %Z' -- '{path}'").split()
            names = ("mode", "ino", "dev", "nlink", "uid", "gid", "size", "atime", "mtime", "ctime")
            return 200, {
                "output": {
                    name: int(text, 16 if name == "mode" else 10) for name, text in zip(names, said, strict=True)
                }
            }
        if what == "ls":
            return 200, {"output": self._ls(path, query)}
        if what == "checksum":
            line = self.run(f"sha256sum -- '{path}'")
            if len(line.split()) != 2:
                raise Answered(500, f"Invalid output: {line} ")
            return 200, {"output": {"algorithm": "SHA256", "checksum": line.split()[0]}}
        if what == "mkdir":
            self.run(f"mkdir {'-p ' if body.get('parent') else ''} -- '{path}'")
            return 201, {"output": self._ls(path, {}, itself=True)[0]}
        if what == "symlink":
            link = body.get("linkPath") or body.get("link_path") or ""
            self.run(f"ln -s -- '{path}' '{link}'")
            return 201, {"output": self._ls(link, {}, itself=True)[0]}
        if what == "chmod":
            self.run(f"chmod -v '{body['mode']}' -- '{path}'")
            return 200, {"output": self._ls(path, {}, itself=True)[0]}
        if what == "rm":
            self.run(f"rm -r --interactive=never -- '{path}'")
            return 204, None
        flag = _COMPRESSION[body.get("compression", "gzip")]
        if what == "compress":
            self.run(self._packing(body, path, target, flag))
            return 204, None
        if what == "extract":
            self.run(f"tar -x{flag}f '{path}' -C '{target}'")
            return 204, None
        raise Answered(404, "Not Found")

    @staticmethod
    def _packing(body: Json, path: str, target: str, flag: str) -> str:
        follow = "--dereference " if body.get("dereference") else ""
        folder, name = posixpath.split(path)
        return f"tar {follow}-c{flag}vf '{target}' -C '{folder}' '{name}'"

    def _ls(self, path: str, query: Mapping[str, str], *, itself: bool = False) -> list[Json]:
        switches = {"showHidden": "-A", "numericUid": "--numeric-uid-gid", "recursive": "-R", "dereference": "-L"}
        options = " ".join(switch for name, switch in switches.items() if query.get(name) == "true")
        options += " -d" if itself else ""
        said = self.run(f"ls -l --quoting-style=c --time-style='+%Y-%m-%dT%H:%M:%S' {options} -- '{path}'")
        entries: list[Json] = []
        top, below = None, ""
        for line in said.splitlines():
            if line.startswith('"') and line.endswith('":'):
                folder = line[1:-2].rstrip("/")
                top = folder if top is None else top
                below = f"{folder}/"[len(top) + 1 :]
                continue
            found = re.match(r"(\S)(\S+)\s+\d+\s+(\S+)\s+(\S+)\s+(\d+)\s+([-\dT:]+)\s+(.+)$", line)
            words = shlex.split(found[7]) if found else []
            if found and len(words) in (1, 3):
                kind, bits, user, group, size, moment = found.groups()[:6]
                entries.append(
                    {
                        "name": below + words[0],
                        "type": kind,
                        "linkTarget": words[2] if len(words) == 3 else None,
                        "user": user,
                        "group": group,
                        "permissions": bits,
                        "lastModified": moment,
                        "size": size,
                    }
                )
        return entries

    def run(self, command: str, stdin: bytes = b"") -> str:
        """Run a command as FirecREST does, and say what went wrong in its way."""
        done = self.machine.run(["bash", "-c", command], user=self.machine.user, input=stdin)
        if len(done.stdout) >= self.largest + _WINDOW:
            # It stops reading, the command stops writing, and both wait until the time is up.
            raise Answered(408, "Command execution timeout limit exceeded.")
        if max(len(done.stdout), len(done.stderr)) >= self.largest:
            raise Answered(413, "Command output exceeded buffer limit.")
        if done.returncode == 0:
            return done.stdout
        said = done.stderr.strip()
        message = f"Remote process failed with exit status:{done.returncode}"
        message += f" and error message:{said}" if said else ""
        for words, status in (
            ("No such file or directory", 404),
            ("Permission denied", 403),
            ("Operation not permitted", 403),
            ("File exists", 400),
        ):
            if words in said:
                raise Answered(status, message)
        raise Answered(500, message)

    # What takes a job

    def _transfer(self, what: str, user: str, query: Mapping[str, str], body: Json) -> Any:
        path = query.get("path") or body.get("sourcePath") or body.get("source_path") or body.get("path") or ""
        target = body.get("targetPath") or body.get("target_path") or ""
        flag = _COMPRESSION[body.get("compression", "gzip")]
        commands = {
            "mv": f"mv -- '{path}' '{target}'",
            "cp": f"cp --force -R{'L' if body.get('dereference') else 'd'} --preserve=all -- '{path}' '{target}'",
            "rm": f"rm -R -- '{path}'",
            "compress": self._packing(body, path, target, flag),
            "extract": f"tar -x{flag}f '{path}' -C '{target}'",
        }
        if what in commands:
            job = self._move(user, lambda: self.run(commands[what]))
            return (200 if what == "rm" else 201), {"transferJob": job}
        key = secrets.token_hex(8)
        if what == "upload":
            size = int((body.get("transfer_directives") or {}).get("file_size") or 0)
            count = -(-size // self.part_size)
            upload = self._uploads[key] = _Upload(path, size)
            job = self._move(user, lambda: self._arrive(key, upload))
            directives = {
                "transferMethod": "s3",
                "maxPartSize": self.part_size,
                "partsUploadUrls": [f"{self.url}/store/{key}?part={number + 1}" for number in range(count)],
                "completeUploadUrl": f"{self.url}/store/{key}?complete=1",
            }
            return 201, {"transferJob": job, "transferDirectives": directives}
        if what == "download":
            self.run(f"stat --dereference -- '{path}'")

            def bring() -> None:
                # Not by `run`: a file may be larger than what a command may print.
                done = self.machine.run(["base64", "--wrap=0", "--", path], user=self.machine.user)
                self._staged[key] = base64.b64decode(done.stdout)

            job = self._move(user, bring)
            directives = {"transferMethod": "s3", "downloadUrl": f"{self.url}/store/{key}"}
            return 201, {"transferJob": job, "transferDirectives": directives}
        raise Answered(404, "Not Found")

    def _arrive(self, key: str, upload: _Upload) -> None:
        """What the job of an upload does: wait for all of it, and write it."""
        deadline = time.monotonic() + 60
        while key not in self._staged:
            if time.monotonic() > deadline:
                raise Answered(500, "File was not uploaded")
            time.sleep(0.02)
        content = base64.b64encode(self._staged.pop(key))
        self.machine.run(
            ["bash", "-c", f"base64 -d > '{upload.target}'"], user=self.machine.user, input=content, check=True
        )

    def _move(self, user: str, work: Callable[[], object]) -> Json:
        """Do something as a job of its own; what is answered about it."""
        with self._lock:
            id = str(900_000 + len(self._moves))
        logs = {
            name: f"{self.machine.home}/.f7t_{name}_{secrets.token_hex(4)}.log" for name in ("outputLog", "errorLog")
        }
        record = _record(id, user, self.machine.home)
        self._moves[id] = record

        def run() -> None:
            error = ""
            try:
                work()
            except Exception as exc:  # noqa: BLE001 - it is what the job says.
                error = str(exc)
            for name, text in (("outputLog", "" if error else "Files were successfully moved."), ("errorLog", error)):
                self.machine.run(["tee", logs[name]], user=self.machine.user, input=text)
            record["status"] = {
                "state": "FAILED" if error else "COMPLETED",
                "stateReason": "None",
                "exitCode": 1 if error else 0,
                "interruptSignal": 0,
            }
            record["time"]["end"] = int(time.time())

        threading.Thread(target=run, daemon=True).start()
        return {"jobId": id, "system": self.system, "workingDirectory": self.machine.home, "logs": logs}

    def store(
        self, method: str, key: str, query: Mapping[str, str], content: bytes
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """The store for large files."""
        if method == "GET":
            return (200, self._staged[key], {}) if key in self._staged else (404, b"", {})
        upload = self._uploads[key]
        if method == "PUT":
            upload.parts[int(query["part"])] = content
            return 200, b"", {"ETag": f'"{len(upload.parts)}"'}
        self._staged[key] = b"".join(upload.parts[number] for number in sorted(upload.parts))
        return 200, b"", {}

    def _about(self) -> Json:
        return {
            "name": self.system,
            "scheduler": {"type": "slurm", "connectionMode": "ssh", "version": "22.05.0"},
            "fileSystems": [{"path": self.machine.path, "dataType": "users", "defaultWorkDir": True}],
            "dataOperation": {"max_ops_file_size": self.largest, "data_transfer": {"serviceType": "s3"}},
        }


def _record(id: str, user: str, folder: str) -> Json:
    now = int(time.time())
    return {
        "jobId": id,
        "name": "MoveFiles",
        "status": {"state": "RUNNING", "stateReason": "None", "exitCode": 0, "interruptSignal": 0},
        "tasks": [],
        "time": {"elapsed": 0, "start": now, "end": None, "suspended": 0, "limit": 600},
        "account": "project",
        "allocationNodes": 1,
        "cluster": "double",
        "group": user,
        "nodes": "node1",
        "partition": "xfer",
        "killRequestUser": None,
        "user": user,
        "workingDirectory": folder,
        "priority": 0,
    }


class _Server(WebServer):
    def __init__(self, double: FirecrestDouble) -> None:
        self.double = double
        super().__init__(_Handler)


_ROUTES = (
    ("GET", r"/status/systems", "systems"),
    ("GET", r"/status/(?P<system>[^/]+)/partitions", "partitions"),
    ("GET", r"/compute/(?P<system>[^/]+)/jobs", "jobs"),
    ("POST", r"/compute/(?P<system>[^/]+)/jobs", "submit"),
    ("GET", r"/compute/(?P<system>[^/]+)/jobs/(?P<id>[a-zA-Z0-9]+)", "job"),
    ("GET", r"/compute/(?P<system>[^/]+)/jobs/(?P<id>[a-zA-Z0-9]+)/metadata", "metadata"),
    ("DELETE", r"/compute/(?P<system>[^/]+)/jobs/(?P<id>[a-zA-Z0-9]+)", "cancel"),
    ("ANY", r"/filesystem/(?P<system>[^/]+)/ops/(?P<op>[a-z]+)", ""),
    ("ANY", r"/filesystem/(?P<system>[^/]+)/transfer/(?P<op>[a-z]+)", "transfer/"),
)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def do_DELETE(self) -> None:
        self._handle()

    def _handle(self) -> None:
        double = self.server.double
        split = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if split.path.startswith("/store/"):
            status, body, headers = double.store(self.command, split.path.split("/")[2], query, content)
            self._send(status, body, headers)
            return
        operation = self._operation(split.path.lower(), query)
        double = next((one for one in double.beside if one.system == query.get("system")), double)
        fault = double.fault_of(operation)
        status, answer = 0, None
        if fault is None or fault.carried_out:
            status, answer = self._carried_out(double, operation, query, content)
        if double.before_answer is not None:
            double.before_answer(operation)
        if fault is not None:
            if fault.status is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, answer = fault.status, _error(fault.message) if fault.own else b"<html>bad gateway</html>"
        self._send(status, answer, {} if fault is None else fault.headers)

    def _carried_out(
        self, double: FirecrestDouble, operation: str, query: dict[str, str], content: bytes
    ) -> tuple[int, Any]:
        try:
            if not operation:
                raise Answered(404, "Not Found")
            user = double.user_of(self.headers.get("Authorization") or "")
            if query.get("system") not in (None, double.system):
                raise Answered(404, "System not found")
            kind = self.headers.get("Content-Type") or ""
            raw = _part(kind, content) if kind.startswith("multipart/") else ("", b"")
            body = json.loads(content) if content and kind.startswith("application/json") else {}
            status, answer = double.answer(operation, user, query, body, raw)
        except Answered as exc:
            return exc.status, _error(exc.message)
        return status, answer

    def _operation(self, path: str, query: dict[str, str]) -> str:
        for method, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method in ("ANY", self.command):
                parts = found.groupdict()
                query.update({key: parts[key] for key in ("system", "id") if key in parts})
                return name + parts.get("op", "")
        return ""

    def _send(self, status: int, answer: Any, headers: Mapping[str, str]) -> None:
        is_bytes = isinstance(answer, bytes)
        content = b"" if answer is None else answer if is_bytes else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if is_bytes else "application/json")
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if status != 204:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests look at what was called."""


def _error(message: str) -> Json:
    return {"errorType": "error", "message": message, "causedBy": None, "data": None, "user": None}


def _part(kind: str, content: bytes) -> tuple[str, bytes]:
    """The name and the content of the only file in a form."""
    boundary = re.search(r"boundary=\"?([^\";]+)", kind)
    head, _, rest = content.partition(b"\r\n\r\n")
    name = re.search(rb'filename="([^"]*)"', head)
    if boundary is None or name is None:
        raise Answered(400, "1 validation error: a file is missing")
    # As the client escapes it, of which a quotation mark keeps its %22.
    return name[1].decode().replace("\\\\", "\\"), rest[: rest.rindex(f"\r\n--{boundary[1]}".encode())]
