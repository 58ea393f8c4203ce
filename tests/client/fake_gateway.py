"""A small gateway in a thread: the wire as the protocol says it, over a folder on disk, with faults on demand.

It shares the table, the bundle format and the error tree with the client, but none of the client's code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email import policy
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, unquote, urlsplit

from aiida_marketplace_hpc import bundle, protocol
from aiida_marketplace_hpc.errors import (
    FileError,
    Forbidden,
    GatewayError,
    InvalidRequest,
    NotFound,
    Unauthorized,
)

APP_ID = "13f59545-cb1f"


@dataclass
class Seen:
    """A request that arrived."""

    method: str
    target: str
    capability: str
    parameters: dict[str, str]
    headers: dict[str, str]
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


Fault = Callable[["_Handler", Callable[[], Reply]], None]


def drop(handler: _Handler, answer: Callable[[], Reply]) -> None:
    """Close the connection; nothing was done."""
    handler.hang_up()


def drop_after(handler: _Handler, answer: Callable[[], Reply]) -> None:
    """Do what was asked, and close the connection without a word."""
    answer()
    handler.hang_up()


def reply(body: bytes | str, status: int = 200, content_type: str = "text/html", **headers: str) -> Fault:
    """Answer this instead, as a proxy on the way may."""
    content = body.encode() if isinstance(body, str) else body
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def fault(handler: _Handler, answer: Callable[[], Reply]) -> None:
        handler.read_body()
        handler.send(Reply(content, status, {"Content-Type": content_type, **named}))

    return fault


def refuse(error: GatewayError, **headers: str) -> Fault:
    """Answer with an error of the gateway's own."""
    return reply(json.dumps(error.to_wire()), error.status, "application/json", **headers)


def refuse_early(error: GatewayError) -> Fault:
    """The same before the body was read, and close the connection."""

    def fault(handler: _Handler, answer: Callable[[], Reply]) -> None:
        handler.close_connection = True
        handler.send(Reply(json.dumps(error.to_wire()).encode(), error.status))

    return fault


def altered(change: Callable[[bytes], bytes]) -> Fault:
    """Answer with other bytes than the right ones."""

    def fault(handler: _Handler, answer: Callable[[], Reply]) -> None:
        right = answer()
        handler.send(Reply(change(right.body), right.status, right.headers))

    return fault


def truncated(keep: int) -> Fault:
    """Break off after so many bytes of the answer's body."""

    def fault(handler: _Handler, answer: Callable[[], Reply]) -> None:
        right = answer()
        handler.send_head(right)
        handler.wfile.write(right.body[:keep])
        handler.hang_up()

    return fault


def stall(handler: _Handler, answer: Callable[[], Reply]) -> None:
    """Take the request and never answer."""
    handler.read_body()
    handler.fake.released.wait(10)
    handler.hang_up()


def deaf(handler: _Handler, answer: Callable[[], Reply]) -> None:
    """Not even read the request's body."""
    handler.fake.released.wait(10)
    handler.hang_up()


def trickle(handler: _Handler, answer: Callable[[], Reply]) -> None:
    """Answer byte by byte, without end."""
    handler.read_body()
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not handler.fake.released.wait(0.02):
            handler.wfile.write(b"X-A: b\r\n")
    except OSError:
        pass
    handler.hang_up()


class FakeGateway:
    """Serves until :meth:`close`; two roots, ``home`` and the read-only ``software``."""

    def __init__(self, disk: Path, *, tls: ssl.SSLContext | None = None) -> None:
        self.home, self.software = disk / "home", disk / "software"
        self.home.mkdir(parents=True)
        self.software.mkdir()
        self.tokens = {"good"}
        self.classic = False
        self.application: dict[str, Any] | None = None
        """What the platform says of the app; by default that it offers everything."""
        self.application_status = 200
        self.application_asked = 0
        self.seen: list[Seen] = []
        self.faults: deque[Fault | None] = deque()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.submissions: list[str] = []
        self.connections = 0
        self.released = threading.Event()
        fake = self

        class Handler(_Handler):
            pass

        Handler.fake = fake
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def capabilities(self) -> list[str]:
        """The names of the capabilities that were asked for, in order."""
        return [seen.capability for seen in self.seen]

    def named(self, capability: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.capability == capability]

    def platform_answer(self) -> Reply:
        """What the platform in front says of the app."""
        if self.application_status != 200:
            return Reply(b'{"message": "no"}', self.application_status)
        offered = [{"name": row.name} for row in protocol.CAPABILITIES if row.registered]
        return Reply(json.dumps(self.application or {"api_version": "0.3.0", "capabilities": offered}).encode())

    # What the capabilities do

    def heartbeat(self, seen: Seen) -> Any:
        return {"message": "HPC-gateway-App : application running."}

    def createOrUpdateCollection(self, seen: Seen) -> Any:  # noqa: N802
        return {
            "_id": "1",
            "email": "ada@example.org",
            "home": str(self.home),
            "message": "Success: Create user in database.",
            "name": "Ada",
            "username": "ada",
        }

    def getInfo(self, seen: Seen) -> Any:  # noqa: N802
        return {
            "name": "fake",
            "version": "0.1.0",
            "api_version": protocol.API_VERSION,
            "oldest_client": protocol.OLDEST_CLIENT,
            "extensions": list(protocol.EXTENSIONS),
            "machines": [{"name": "fake", "backend": "none", "accounting": False}],
            "account_mode": "own",
            "username": "ada",
            "email": "ada@example.org",
            "home": str(self.home),
            "roots": [
                {"name": "home", "path": str(self.home), "read_only": False, "free": 1},
                {"name": "software", "path": str(self.software), "read_only": True, "free": None},
            ],
            "limits": {},
        }

    def newTransformation(self, seen: Seen) -> Any:  # noqa: N802
        fields = seen.json
        unknown = set(fields) - {*protocol.CREATE_FIELDS_PUBLISHED, *protocol.CREATE_FIELDS_ADDED}
        if unknown:
            raise InvalidRequest(f"a job has no key {', '.join(unknown)}")
        for job in self.jobs.values():
            if fields.get("folder") and (job["folder"], job["script"]) == (fields["folder"], fields["script"]):
                return job
        jobid = f"{len(self.jobs) + 1:024x}"
        folder = fields.get("folder") or str(self.home / jobid)
        Path(folder).mkdir(exist_ok=True)
        job = dict.fromkeys(protocol.JOB_FIELDS) | {
            "jobid": jobid,
            "state": "CREATED",
            "final": False,
            "folder": folder,
            "script": fields.get("script", "job.sh"),
            "client_ref": fields.get("client_ref"),
            "machine": fields.get("machine", "fake"),
        }
        self.jobs[jobid] = job
        return self._launch(job) if fields.get("launch") else job

    def updateTransformation(self, seen: Seen) -> Any:  # noqa: N802
        return self._launch(self._job(seen.parameters["jobid"]))

    def getTransformationState(self, seen: Seen) -> Any:  # noqa: N802
        job = self._job(seen.parameters["jobid"])
        return {"files": self._files(Path(job["folder"])), "message": "m", "state": job["state"], "job": job}

    def deleteTransformation(self, seen: Seen) -> Any:  # noqa: N802
        job = self._job(seen.parameters["jobid"])
        job.update(state="CANCELLED", final=True)
        return {"message": "cancelled", **job}

    def listJobs(self, seen: Seen) -> Any:  # noqa: N802
        return {"jobs": {jobid: {"remote_folder": job["folder"], **job} for jobid, job in self.jobs.items()}}

    def listFiles(self, seen: Seen) -> Any:  # noqa: N802
        return {"files": self._files(self._path(seen)), "message": "m"}

    def createDataset(self, seen: Seen) -> Any:  # noqa: N802
        content = seen.body
        form = seen.headers["Content-Type"].startswith("multipart/form-data")
        if form:
            head = f"Content-Type: {seen.headers['Content-Type']}\r\n\r\n".encode()
            (part,) = BytesParser(policy=policy.HTTP).parsebytes(head + content).iter_parts()
            assert part.get_param("name", header="Content-Disposition") == "file"
            content = bytes(part.get_payload(decode=True))
        given = seen.parameters
        path = self._path(seen, write=True)
        if given.get("parents") == "true":
            path.parent.mkdir(parents=True, exist_ok=True)
        if given.get("into") and path.is_dir():
            path = path / given["into"]
        if given.get("overwrite") == "false" and path.exists():
            raise FileExistsError(17, "File exists")
        if given.get("bundle") == "true":
            count = 0
            for entry, chunks in bundle.Reader(_reader(content)):
                count += 1
                target = path / entry.path
                if entry.type == "directory":
                    target.mkdir(exist_ok=True)
                elif entry.type == "symlink":
                    target.symlink_to(entry.target)
                else:
                    target.write_bytes(b"".join(chunks))
                    target.chmod(entry.mode)
            return {"message": "File uploaded.", "path": str(path), "entries": count}
        digest = bundle.digest_of(content)
        if given.get("digest", digest) != digest:
            raise InvalidRequest("wrong digest")
        path.write_bytes(content)
        if "mode" in given:
            path.chmod(int(given["mode"]))
        if self.classic:
            return {"message": "File uploaded."}
        return {"message": "File uploaded.", "path": str(path), "size": len(content), "digest": digest}

    def getDataset(self, seen: Seen) -> Any:  # noqa: N802
        path = self._path(seen)
        if seen.parameters.get("bundle") == "true":
            follow = seen.parameters.get("dereference", "true") == "true"
            return b"".join(bundle.write(_entries(path, "", follow, top=True)))
        content = path.read_bytes()
        if "length" not in seen.parameters:
            return content
        offset = int(seen.parameters["offset"])
        piece = content[offset : offset + int(seen.parameters["length"])]
        return Reply(
            piece, headers={"Content-Type": "text/plain", protocol.DIGEST_HEADER: bundle.header_digest_of(piece)}
        )

    def deleteDataset(self, seen: Seen) -> Any:  # noqa: N802
        path = self._path(seen, write=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {"message": "File deleted."}

    def query(self, seen: Seen) -> Any:
        results: list[dict[str, Any]] = []
        for operation in seen.json["operations"]:
            try:
                results.append({"ok": True, "result": self._operate(operation)})
            except (GatewayError, OSError) as exc:
                results.append({"ok": False, "error": _error(exc).to_wire()})
                if seen.json["stop_on_error"]:
                    break
        return {"results": results}

    def _operate(self, fields: dict[str, Any]) -> Any:
        op = fields["op"]
        if op == "jobs.states":
            known = {jobid: self.jobs[jobid] for jobid in fields["jobids"] if jobid in self.jobs}
            return {"jobs": known, "unknown": [jobid for jobid in fields["jobids"] if jobid not in self.jobs]}
        if op == "jobs.show":
            table = {"columns": ["JobID", "State"], "rows": [["1", "RUNNING"]]}
            return {"job": {**self._job(fields["jobid"]), "accounting": table}}
        if op == "jobs.active":
            return {"jobs": [job for job in self.jobs.values() if not job["final"]]}
        path = Path(fields["path"])
        if not path.resolve().is_relative_to(self.home.parent.resolve()):
            raise Forbidden(f"{path} lies outside")
        if op == "stat":
            return {"path": str(path), **_attributes(path)}
        if op == "list":
            return {"entries": [{"name": name, **_attributes(path / name)} for name in sorted(os.listdir(path))]}
        if op == "realpath":
            return {"path": str(path.resolve())}
        if op == "mkdir":
            path.mkdir(parents=fields.get("parents", False), exist_ok=fields.get("exist_ok", False))
            return {}
        assert op == "remove"
        if fields.get("recursive") and path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=fields.get("missing_ok", False))
        return {}

    def _launch(self, job: dict[str, Any]) -> dict[str, Any]:
        if job["state"] == "CREATED":
            self.submissions.append(job["jobid"])
            job.update(state="QUEUED", scheduler_id=str(len(self.submissions)))
        return job

    def _job(self, jobid: str) -> dict[str, Any]:
        if jobid not in self.jobs:
            raise NotFound(f"you have no job {jobid}")
        return self.jobs[jobid]

    def _path(self, seen: Seen, *, write: bool = False) -> Path:
        jobid, name = seen.parameters["jobid"], seen.parameters.get("filename") or "."
        if ".." in name.split("/"):
            raise InvalidRequest("not below")
        if jobid == "software" and write:
            raise Forbidden("software is read-only")
        roots = {"home": self.home, "software": self.software}
        return (roots[jobid] if jobid in roots else Path(self._job(jobid)["folder"])) / name

    def _files(self, folder: Path) -> list[dict[str, str]]:
        return [
            {"name": path.name, "size": str(path.stat().st_size), "type": "d" if path.is_dir() else "-"}
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        ]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeGateway
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.fake.connections += 1

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # The client has left; the test says whether it should have.
            pass

    def handle_one_request(self) -> None:
        self._body: bytes | None = None
        super().handle_one_request()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == f"/api/applications/{APP_ID}":
            self.fake.application_asked += 1
            self.send(self.fake.platform_answer())
            return
        given = dict(parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape"))
        capability, in_path = _capability(self.command, parts.path)
        seen = Seen(self.command, self.path, capability, {**given, **in_path}, dict(self.headers.items()))
        self.fake.seen.append(seen)

        def answer() -> Reply:
            seen.body = self.read_body()
            return self._answer(seen)

        fault = self.fake.faults.popleft() if self.fake.faults else None
        if fault is not None:
            fault(self, answer)
        else:
            self.send(answer())

    do_PUT = do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def _answer(self, seen: Seen) -> Reply:
        try:
            row = protocol.BY_NAME.get(seen.capability)
            if row is None or (self.fake.classic and not row.published):
                return Reply(b"<html>Not Found</html>", 404, {"Content-Type": "text/html"})
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if row.authenticated and token not in self.fake.tokens:
                raise Unauthorized("Invalid Authentication token!")
            result = getattr(self.fake, row.name)(seen)
        except (GatewayError, OSError) as exc:
            error = _error(exc)
            error.request_id = seen.headers.get(protocol.REQUEST_ID_HEADER)
            return Reply(json.dumps(error.to_wire()).encode(), error.status)
        if isinstance(result, Reply):
            return result
        if isinstance(result, bytes):
            return Reply(result, 200, {"Content-Type": "application/octet-stream"})
        return Reply(json.dumps(result).encode())

    def read_body(self) -> bytes:
        if self._body is None:
            length = int(self.headers.get("Content-Length", "0"))
            self._body = self.rfile.read(length)
            if len(self._body) < length:
                self.close_connection = True
                raise ConnectionAbortedError("the client broke off")
        return self._body

    def send(self, reply: Reply) -> None:
        self.send_head(reply)
        self.wfile.write(reply.body)

    def send_head(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()

    def hang_up(self) -> None:
        self.close_connection = True
        try:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def _capability(method: str, path: str) -> tuple[str, dict[str, str]]:
    prefix = f"/api/applications/proxy/{APP_ID}/"
    if path.startswith(prefix):
        row = protocol.BY_NAME.get(path.removeprefix(prefix))
        return (row.name, {}) if row and row.registered and row.method == method else ("", {})
    for row in protocol.CAPABILITIES:
        match = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", row.path), path)
        if match and row.method == method:
            return row.name, {name: unquote(text) for name, text in match.groupdict().items()}
    return "", {}


def _entries(
    path: Path, name: str, follow: bool, *, top: bool = False
) -> Iterator[tuple[bundle.Entry, BinaryIO | None]]:
    if path.is_symlink() and not (follow or top):
        yield bundle.Entry(name, "symlink", target=os.readlink(path)), None
    elif path.is_dir():
        yield bundle.Entry(name, "directory", path.stat().st_mode & 0o7777), None
        for child in sorted(os.listdir(path)):
            yield from _entries(path / child, f"{name}/{child}" if name else child, follow)
    else:
        with path.open("rb") as content:
            yield bundle.Entry(name, "file", path.stat().st_mode & 0o7777, path.stat().st_size), content


def _attributes(path: Path) -> dict[str, Any]:
    found = path.lstat()
    kind = "symlink" if path.is_symlink() else "directory" if path.is_dir() else "file"
    return {"type": kind, "mode": found.st_mode, "size": found.st_size, "mtime": found.st_mtime}


def _error(exc: Exception) -> GatewayError:
    if isinstance(exc, GatewayError):
        return exc
    assert isinstance(exc, OSError)
    return FileError.from_os_error(exc, str(exc.filename or ""))


def _reader(content: bytes) -> Callable[[int], bytes]:
    at = 0

    def read(size: int) -> bytes:
        nonlocal at
        piece = content[at : at + size]
        at += len(piece)
        return piece

    return read


def wait_until(condition: Callable[[], bool]) -> None:
    """Give the server's thread a moment to note what the client has just done."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()
