"""A FirecREST v1, as far as its clients can tell: the routes of version 1.13.0 over real commands and real jobs.

For what plugs into FirecREST's first version, whose programs need Docker, Keycloak, Redis and an object store. The client
``firecrest.v1`` of pyfirecrest works with it, and so does pyfirecrest 1.2.0. Paths, parameters, headers and bodies follow
FirecREST's published OpenAPI document and what its services answer; what cannot be had on one machine is a stand-in: one
cluster, one account on it, tokens of its own, and a folder in place of the object store.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import jwt
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from aiida_marketplace_hpc.gateway.classic.firecrest import is_forbidden, secure_filename
from aiida_marketplace_hpc.testing.firecrest_v1_calls import Call, Refused, content_of
from aiida_marketplace_hpc.testing.firecrest_v1_cluster import (
    Commands,
    JobFailed,
    Jobs,
    LocalJobs,
    SlurmJobs,
    refusal_header,
)
from aiida_marketplace_hpc.testing.firecrest_v1_utilities import Utilities
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

Json = dict[str, Any]

CLIENT, SECRET = "firecrest-client", "secret-of-the-firecrest-client"
"""The client that may get tokens."""
_MIB = 1024 * 1024
_KEY = secrets.token_hex(32)
_DESCRIPTIONS = {
    "100": "Queued",
    "101": "In progress",
    "110": "Waiting for Form URL from Object Storage to be retrieved",
    "111": "Form URL from Object Storage received",
    "112": "Object Storage confirms that upload to Object Storage has finished",
    "114": "Download from Object Storage to server has finished",
    "115": "Download from Object Storage error",
    "116": "Started upload from filesystem to Object Storage",
    "117": "Upload from filesystem to Object Storage has finished succesfully",
    "118": "Upload from filesystem to Object Storage has finished with errors",
    "200": "Finished successfully",
    "302": "Task not longer valid",
    "400": "Finished with errors",
}


@dataclass
class Fault:
    """What goes wrong with calls.

    :param route: which, by their names in :attr:`FirecrestV1.requests`.
    :param status: what is answered; ``None``: the connection breaks in the middle of the answer.
    :param carried_out: whether the call has its effect all the same.
    :param times: with so many calls.
    :param own: whether FirecREST says it; else something on the way.
    :param task: the call is answered well, but this, status and data, is what its task comes to.
    """

    route: str
    status: int | None = 504
    carried_out: bool = False
    times: int = 1
    own: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)
    task: tuple[str, Any] | None = None

    def answer(self) -> Response:
        if self.status is None:
            return Response(b"", headers={"Content-Length": "10"})
        if not self.own:
            return Response("<html>", self.status, headers=self.headers)
        return JSONResponse({"description": "a fault of the test's"}, self.status, headers=self.headers)


@dataclass
class _Task:
    """Something that goes on while its client asks for it again and again."""

    id: str
    service: str
    work: Future[tuple[str, Any]]
    shown_from: float
    """A monotonic time: before it the task is under way, whatever has come of it."""
    state: tuple[str, Any] | None = None
    """Its status and data, where that is not what the work returned."""
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S"))

    def now(self) -> tuple[str, Any]:
        """Status and data."""
        if self.state is not None:
            return self.state
        if not self.work.done():
            return "100", _DESCRIPTIONS["100"]
        if time.monotonic() < self.shown_from:
            return "101", _DESCRIPTIONS["101"]
        return self.work.result()


class FirecrestV1:
    """A FirecREST v1 on a port of 127.0.0.1; a context manager. The attributes may be changed while it runs.

    :param slurm: whose jobs, files and account it serves. Without one, jobs are processes of this machine
        (:class:`~aiida_marketplace_hpc.gateway.backends.local.LocalBackend`), and files and account are this process's.
    :param machine: what the cluster is called.
    :param port: 0: any free one.
    :param tokens: tokens that are accepted for ever, beside those that the client of :data:`CLIENT` gets.
    """

    def __init__(
        self,
        slurm: SlurmCluster | None = None,
        *,
        machine: str = "cluster",
        port: int = 0,
        tokens: tuple[str, ...] = (),
    ) -> None:
        self.machine = machine
        self.slurm = slurm
        self.clients = {CLIENT: SECRET}
        self.token_lifetime = 300.0
        """Seconds that a token lives."""
        self.file_names: Literal["secure", "raw"] = "secure"
        """Up to 1.13.0 uploads are renamed to what Werkzeug's ``secure_filename`` makes of their names; later ones are not."""
        self.listing: Literal["split", "quoted"] = "split"
        """Names with blanks are cut, as up to 1.13.0; or listed whole, as later."""
        self.max_file_size: float = 5
        """MiB of a file that is downloaded, and of a whole request that uploads one."""
        self.command_timeout = 5.0
        """Seconds after which a command on files is ended."""
        self.task_delay = 0.0
        """Seconds for which every task stays under way."""
        self.down = False
        """Whether the cluster cannot be reached."""
        self.requests: Counter[str] = Counter()
        """How often each route was asked: by method and path, as in ``GET /utilities/ls``."""
        self.faults: list[Fault] = []
        self._store = Path(tempfile.mkdtemp(prefix="mphpc-firecrest-v1-store-"))
        self._commands = Commands(slurm, self._store)
        self._utilities = Utilities(self, self._commands)
        self._local = None if slurm is not None else LocalJobs()
        self._jobs: Jobs = self._local or SlurmJobs(self._commands)
        self._tokens = {token: float("inf") for token in tokens}
        self._tasks: dict[str, _Task] = {}
        self._threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="firecrest-v1")
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._socket.listen(128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.token_url = f"{self.url}/auth/token"
        application = Starlette(routes=[*self._routes()])
        self._server = uvicorn.Server(uvicorn.Config(application, http="h11", log_config=None, ws="none"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> FirecrestV1:
        if self._local is not None:
            self._local.start()
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the FirecREST double did not start")
            time.sleep(0.01)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        self._socket.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._local is not None:
            self._local.stop()
        shutil.rmtree(self._store, ignore_errors=True)

    def fail(self, route: str, **options: Any) -> Fault:
        """Let calls fail: :class:`Fault`."""
        fault = Fault(route, **options)
        self.faults.append(fault)
        return fault

    def revoke(self, token: str) -> None:
        """Let a token have expired."""
        self._tokens[token] = 0.0

    @property
    def options(self) -> list[str]:
        """What ``gateway serve`` is told about it, with :attr:`env`, so that it uses an account of its own."""
        where = ["--firecrest-version", "1", "--firecrest-url", self.url, "--firecrest-system", self.machine]
        return [*where, "--firecrest-token-url", self.token_url, "--firecrest-client-id", CLIENT]

    @property
    def env(self) -> dict[str, str]:
        """The secret that goes with :attr:`options`."""
        return {"MARKETPLACE_HPC_FIRECREST_CLIENT_SECRET": SECRET}

    @property
    def command_delay(self) -> float:
        """Seconds that each command takes longer, which count for its time-out."""
        return self._commands.delay

    @command_delay.setter
    def command_delay(self, seconds: float) -> None:
        self._commands.delay = seconds

    def issue(self) -> str:
        """Make a token."""
        until = time.time() + self.token_lifetime
        claims = {"preferred_username": self._commands.user, "exp": until, "jti": secrets.token_hex(8)}
        token = jwt.encode(claims, _KEY, algorithm="HS256")
        self._tokens[token] = until
        return token

    # ---- routes -----------------------------------------------------------------------------------------------------

    def _routes(self) -> list[Route]:
        made = [Route("/auth/token", self._token, methods=["POST"])]
        for name, command in self._utilities.routes().items():
            method, _, path = name.partition(" ")
            made.append(self._route(method, path, command))
        for name, handler in {
            "GET /status/services": self._services,
            "GET /status/services/{name}": self._service,
            "GET /status/systems": self._systems,
            "GET /status/systems/{name}": self._system,
            "GET /status/parameters": self._parameters,
            "GET /tasks": self._list_tasks,
            "GET /tasks/": self._list_tasks,
            "GET /tasks/{id}": self._show_task,
            "DELETE /tasks/{id}": self._delete_task,
            "POST /compute/jobs/path": self._submit_path,
            "POST /compute/jobs/upload": self._submit_upload,
            "GET /compute/jobs": self._queue,
            "GET /compute/jobs/{id}": self._queue,
            "DELETE /compute/jobs/{id}": self._cancel,
            "GET /compute/acct": self._accounting,
            "POST /storage/xfer-internal/{command}": self._transfer,
            "POST /storage/xfer-external/upload": self._stage_in,
            "POST /storage/xfer-external/download": self._stage_out,
            "POST /storage/xfer-external/invalidate": self._invalidate,
        }.items():
            method, _, path = name.partition(" ")
            made.append(self._route(method, path, handler))
        return [*made, Route("/store/{id}/{name}", self._stored, methods=["GET", "POST"])]

    def _route(self, method: str, path: str, handler: Callable[[Call], Response]) -> Route:
        limited = path in ("/utilities/upload", "/compute/jobs/upload")

        async def endpoint(request: Request) -> Response:
            fault = self._fault_of(f"{method} {path}")
            try:
                self._check_token(request)
                if fault is not None and not fault.carried_out:
                    return self._begin(fault) if fault.task else fault.answer()
                if limited and int(request.headers.get("content-length", "0")) > self.limit:
                    async for _ in request.stream():  # Clients read no answer before they have sent all.
                        pass
                    what = "file" if path == "/utilities/upload" else "batch script"
                    size = f"{self.limit} bytes" if what == "file" else f"{self.max_file_size:g} MB"
                    raise Refused(f"Failed to upload {what}. The file is over {size}", status=413)
                async with request.form() as form:
                    call = Call(request, form, await content_of(form))
                    answer = await run_in_threadpool(handler, call)
                if fault is None:
                    return answer
                if fault.task is None:
                    return fault.answer()
                self._tasks[json.loads(bytes(answer.body))["task_id"]].state = fault.task
                return answer
            except Refused as exc:
                return JSONResponse(exc.body, exc.status, headers=exc.headers)

        return Route(path, endpoint, methods=[method])

    def _fault_of(self, route: str) -> Fault | None:
        self.requests[route] += 1
        fault = next((one for one in self.faults if one.route == route and one.times > 0), None)
        if fault is not None:
            fault.times -= 1
        return fault

    def _begin(self, fault: Fault) -> Response:
        """A task that does nothing and fails."""
        task = self._start("compute", dict)
        task.state = fault.task
        return self._created(task, 200 if fault.route.startswith(("GET", "DELETE")) else 201)

    @property
    def limit(self) -> int:
        """:attr:`max_file_size` in bytes."""
        return int(self.max_file_size * _MIB)

    def _check_token(self, request: Request) -> None:
        header = request.headers.get("authorization")
        if header is None:
            raise Refused("No Auth Header given", status=401)
        until = self._tokens.get(header[len("Bearer ") :])
        if until is None:
            raise Refused("Bad header or JWT, general exception raised", status=401)
        if time.time() > until:
            raise Refused("JWT token has expired", status=401)

    async def _token(self, request: Request) -> Response:
        self.requests["POST /auth/token"] += 1
        async with request.form() as form:
            client, secret = str(form.get("client_id", "")), str(form.get("client_secret", ""))
            if form.get("grant_type") != "client_credentials":
                return JSONResponse({"error": "unsupported_grant_type"}, 400)
        basic = request.headers.get("authorization", "")
        if basic.startswith("Basic "):
            client, _, secret = base64.b64decode(basic[len("Basic ") :]).decode().partition(":")
        if not client or self.clients.get(client) != secret:
            return JSONResponse({"error": "unauthorized_client"}, 401)
        return JSONResponse(
            {"access_token": self.issue(), "expires_in": int(self.token_lifetime), "token_type": "Bearer"}
        )

    def require_machine(self, call: Call, description: str) -> None:
        """Make sure that a request is for this cluster, and that this one can be reached."""
        name = call.request.headers.get("x-machine-name")
        if name is None:
            raise Refused("No machine name given")
        if name != self.machine:
            # The service for jobs has another word for it than the one for files, which pyfirecrest does not know.
            said = "exist" if call.request.url.path.startswith("/utilities/") else "exists"
            missing = {f"X-Machine-Does-Not-{said.title()}": f"Machine does not {said}"}
            raise Refused(description, f"Machine does not {said}", headers=missing)
        if self.down:
            raise Refused(description, headers={"X-Machine-Not-Available": "Machine is not available"})

    # ---- status and tasks -------------------------------------------------------------------------------------------

    def _service_row(self, name: str) -> Json:
        row = {"description": "server up & flask running", "service": name, "status": "available"}
        return {**row, "status_code": 200}

    def _services(self, call: Call) -> Response:
        rows = [self._service_row(name) for name in ("certificator", "compute", "storage", "tasks", "utilities")]
        return JSONResponse({"description": "List of services with status and description.", "out": rows})

    def _service(self, call: Call) -> Response:
        name = call.request.path_params["name"]
        if name not in ("certificator", "compute", "storage", "tasks", "utilities"):
            return JSONResponse({"description": "Service does not exists", "status_code": 404}, 404)
        return JSONResponse(self._service_row(name))

    def _system_row(self) -> Json:
        state = ("not available", "System down") if self.down else ("available", "System ready")
        return {"system": self.machine, "status": state[0], "description": state[1]}

    def _systems(self, call: Call) -> Response:
        return JSONResponse(
            {"description": "List of systems with status and description.", "out": [self._system_row()]}
        )

    def _system(self, call: Call) -> Response:
        if call.request.path_params["name"] != self.machine:
            raise Refused("System does not exists.", status=404)
        return JSONResponse({"description": "System information", "out": self._system_row()})

    def _parameters(self, call: Call) -> Response:
        mounted = [{"system": self.machine, "mounted": ["/"]}]
        out = {
            "utilities": [
                {"name": "UTILITIES_MAX_FILE_SIZE", "value": f"{self.max_file_size:g}", "unit": "MB"},
                {"name": "UTILITIES_TIMEOUT", "value": f"{self.command_timeout:g}", "unit": "seconds"},
            ],
            "storage": [
                {"name": "OBJECT_STORAGE", "value": "s3v4", "unit": ""},
                {"name": "STORAGE_TEMPURL_EXP_TIME", "value": "604800", "unit": "seconds"},
                {"name": "STORAGE_MAX_FILE_SIZE", "value": "5120", "unit": "MB"},
                {"name": "FILESYSTEMS", "value": mounted, "unit": ""},
            ],
        }
        return JSONResponse({"description": "Firecrest's parameters", "out": out})

    def _start(self, service: str, work: Callable[[], Any], *, done: str = "200", failed: str = "400") -> _Task:
        def outcome() -> tuple[str, Any]:
            try:
                return done, work()
            except JobFailed as exc:
                return failed, str(exc)

        task = _Task(secrets.token_hex(16), service, self._threads.submit(outcome), time.monotonic() + self.task_delay)
        self._tasks[task.id] = task
        return task

    def _created(self, task: _Task, status: int) -> Response:
        location = f"{self.url}/tasks/{task.id}"
        return JSONResponse({"success": "Task created", "task_id": task.id, "task_url": location}, status)

    def _task_as_wire(self, task: _Task) -> Json:
        status, data = task.now()
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        return {
            "task_id": task.id,
            "hash_id": task.id,
            "user": self._commands.user,
            "status": status,
            "description": _DESCRIPTIONS[status],
            "data": data,
            "service": task.service,
            "created_at": task.created,
            "updated_at": now,
            "last_modify": now,
            "task_url": f"{self.url}/tasks/{task.id}",
        }

    def _list_tasks(self, call: Call) -> Response:
        wanted = call.request.query_params.get("tasks")
        ids = list(self._tasks) if wanted is None else wanted.split(",")
        found = {id: self._task_as_wire(self._tasks[id]) for id in ids if id in self._tasks}
        return JSONResponse({"tasks": found})

    def _task(self, call: Call) -> _Task:
        id = call.request.path_params["id"]
        if id not in self._tasks:
            raise Refused(f"Task {id} does not exist", status=404)
        return self._tasks[id]

    def _show_task(self, call: Call) -> Response:
        return JSONResponse({"task": self._task_as_wire(self._task(call))})

    def _delete_task(self, call: Call) -> Response:
        self._task(call).state = ("302", "")
        return Response(status_code=204)

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def _submit_path(self, call: Call) -> Response:
        failure = "Failed to submit job"
        self.require_machine(call, failure)
        script = call.path(failure, "targetPath", whole=True)
        readable = self._commands.run("head", "-c", "1", "--", script)
        if readable.code:
            raise Refused(failure, headers=refusal_header(readable))
        account = call.account()
        return self._created(
            self._start("compute", lambda: self._jobs.submit(posixpath.dirname(script), script, account)), 201
        )

    def _submit_upload(self, call: Call) -> Response:
        failure = "Failed to submit job file"
        self.require_machine(call, failure)
        if call.file is None or not (filename := secure_filename(call.file[0])):
            raise Refused(failure, "No batch file selected" if call.file else "No batch file part")
        content, account = call.file[1], call.account()
        home = self._utilities.run("submit", "sh", "-c", "echo ~").stdout.strip()
        folder = f"{home}/firecrest/{secrets.token_hex(16)}"

        def submit() -> Any:
            self._commands.run("mkdir", "-p", "--", folder)
            self._commands.run("bash", "-c", 'cat > "$0"', f"{folder}/{filename}", input=content)
            return self._jobs.submit(folder, f"{folder}/{filename}", account)

        return self._created(self._start("compute", submit), 201)

    def _queue(self, call: Call) -> Response:
        self.require_machine(call, "Failed to retrieve jobs information")
        ids = call.jobids()
        asked = call.request.query_params
        size, page = asked.get("pageSize", ""), asked.get("pageNumber", "")
        most = int(size) if page.isdigit() and size in ("10", "25", "50", "100") else 25

        def rows() -> Any:
            # Of a later page 1.13.0 gives one row, or none.
            found = self._jobs.queue(ids)
            first = int(page or 0) * most if 0 <= int(page or 0) * most < len(found) else 0
            return {
                str(number): {**row, **self._files_of(row["jobid"])}
                for number, row in enumerate(found[first : int(page or 0) + most] if first else found[:most])
            }

        return self._created(self._start("compute", rows), 200)

    def _files_of(self, id: str) -> dict[str, str]:
        """The files of a job, and the ends of its output."""
        files = self._jobs.files(id)
        for what in ("out", "err"):
            tail = self._commands.run("tail", "-c", "1000", "--", files.get(f"job_file_{what}", ""))
            files[f"job_data_{what}"] = "" if tail.code else tail.stdout
        return files

    def _accounting(self, call: Call) -> Response:
        self.require_machine(call, "Failed to retrieve account information")
        ids = call.jobids()
        return self._created(self._start("compute", lambda: self._jobs.accounting(ids) or {}), 200)

    def _cancel(self, call: Call) -> Response:
        self.require_machine(call, "Failed to delete job")
        id = call.request.path_params["id"]
        if is_forbidden(id):
            raise Refused("Failed to delete job", "'jobid' has invalid char")
        return self._created(self._start("compute", lambda: self._jobs.cancel(id)), 200)

    # ---- storage ----------------------------------------------------------------------------------------------------

    def _transfer(self, call: Call) -> Response:
        """A job of the cluster's that copies, moves or removes."""
        command = call.request.path_params["command"]
        if command not in _TRANSFERS:
            raise Refused(f"Command {command} not allowed")
        failure = f"Error on {command} operation"
        self.require_machine(call, failure)
        target = call.path(failure, "targetPath", whole=True)
        source = "" if command == "rm" else call.path(failure, "sourcePath", whole=True)
        name = str(call.form.get("jobName", f"{command}-job"))
        if is_forbidden(name):
            raise Refused("Invalid jobName", "'jobName' has invalid char")
        home = self._utilities.run(command, "sh", "-c", "echo ~").stdout.strip()
        folder = f"{home}/firecrest/{secrets.token_hex(16)}"
        lines = ("#!/bin/bash -l", f"#SBATCH --job-name='{name}'", "#SBATCH --time=02:00:00", "#SBATCH --ntasks=1")
        script = "\n".join([*lines, _TRANSFERS[command].format(source=f"'{source}'", target=f"'{target}'"), ""])
        account = call.account()

        def submit() -> Any:
            self._commands.run("mkdir", "-p", "--", folder)
            self._commands.run("bash", "-c", 'cat > "$0"', f"{folder}/sbatch-job.sh", input=script.encode())
            return self._jobs.submit(folder, f"{folder}/sbatch-job.sh", account)

        return self._created(self._start("storage", submit), 201)

    def _stage_in(self, call: Call) -> Response:
        failure = "Failed to upload file"
        self.require_machine(call, failure)
        folder = call.path(failure, "targetPath", whole=True)
        source = call.path(failure, "sourcePath", whole=True)
        name = posixpath.basename(source)
        checked = self._commands.run("test", "-d", folder)
        if checked.code:
            raise Refused(failure, headers={"X-Invalid-Path": f"{folder} is an invalid path."})
        task = self._start("storage", dict)
        address = f"{self.url}/store/{task.id}/{quote(name)}"
        message = {
            "command": f"curl --show-error -s -X POST '{address}' -F 'file=@{source}'",
            "parameters": {"method": "POST", "url": address, "data": {}, "files": source},
        }
        task.state = ("111", {"hash_id": task.id, "msg": message, "target": f"{folder}/{name}"})
        return self._created(task, 201)

    def _stage_out(self, call: Call) -> Response:
        failure = "Failed to download file"
        self.require_machine(call, failure)
        source = call.path(failure, "sourcePath", whole=True)
        readable = self._commands.run("head", "-c", "1", "--", source)
        if readable.code:
            raise Refused(failure, headers=refusal_header(readable))
        key, name = secrets.token_hex(16), posixpath.basename(source)

        def copy() -> Any:
            said = self._commands.run("base64", "--wrap=0", "--", source)
            (self._store / key).write_bytes(base64.b64decode(said.stdout))
            return f"{self.url}/store/{key}/{quote(name)}"

        return self._created(self._start("storage", copy, done="117", failed="118"), 201)

    def _invalidate(self, call: Call) -> Response:
        task = self._tasks.get(call.request.headers.get("x-task-id", ""))
        if task is None:
            raise Refused("Invalid X-Task-Id")
        _, data = task.now()
        if isinstance(data, str):
            (self._store / data.split("/")[-2]).unlink(missing_ok=True)
        task.state = ("302", "")
        return JSONResponse({"success": "URL invalidated successfully"}, 201)

    async def _stored(self, request: Request) -> Response:
        """The object store: no token, since the address is one."""
        id = request.path_params["id"]
        if request.method == "GET":
            path = self._store / id
            known = re.fullmatch(r"[0-9a-f]{32}", id) and path.is_file()
            return Response(path.read_bytes()) if known else Response(status_code=404)
        task = self._tasks.get(id)
        if task is None or task.now()[0] != "111":
            return Response(status_code=404)
        target = task.now()[1]["target"]
        async with request.form() as form:
            content = (await content_of(form) or ("", b""))[1]
        task.state = ("112", {"msg": _DESCRIPTIONS["112"]})

        def deliver() -> None:
            outcome = self._commands.run("bash", "-c", 'cat > "$0"', target, input=content)
            status = "115" if outcome.code else "114"
            task.state = (status, outcome.words or _DESCRIPTIONS[status])

        self._threads.submit(deliver)
        return Response(status_code=204)


_TRANSFERS = {
    "cp": "cp --force -dR --preserve=all -- {source} {target}",
    "mv": "mv --force -- {source} {target}",
    "rm": "rm -rf -- {target}",
    "rsync": "rsync -av -- {source} {target}",
    "compress": 'tar -czf {target} -C "$(dirname {source})" -- "$(basename {source})"',
    "extract": "tar -xf {source} -C {target}",
}
