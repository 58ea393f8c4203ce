"""What the published capabilities do, one function each."""

from __future__ import annotations

import json
import mimetypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.responses import Response

from aiida_marketplace_hpc.errors import FileError, InvalidRequest
from aiida_marketplace_hpc.gateway.classic import firecrest
from aiida_marketplace_hpc.gateway.classic.answers import Failed, Uncaught, as_json, disposition
from aiida_marketplace_hpc.gateway.classic.folder import JobFolder, Refusal
from aiida_marketplace_hpc.gateway.classic.jobs import ClassicJob, ClassicJobs
from aiida_marketplace_hpc.gateway.container import ContainerScripts
from aiida_marketplace_hpc.gateway.service import Caller, Gateway
from aiida_marketplace_hpc.protocol import CREATE_FIELDS_PUBLISHED

PAGE = "<!doctype html>\n<html lang=en>\n<title>HPC gateway</title>\n<h1>HPC gateway</h1>\n"
"""What a browser sees."""
UNIMPLEMENTED = (
    ("DELETE", "/api/v1/job/delete/{jobid}"),
    ("GET", "/api/v1/file/"),
    ("GET", "/api/v1/image/"),
    ("POST", "/api/v1/image/pull"),
)
"""Routes that the published gateway has without anything behind them."""


class Classic:
    """A gateway as the published one sees itself."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.machine = gateway.settings.machine_name
        self.jobs = ClassicJobs(gateway.ledger, gateway.backend)
        self.scripts = ContainerScripts(gateway.settings, Path(__file__).with_name("job.sh.j2"))


@dataclass
class Call:
    """One request.

    :param filename: the parameter of that name, empty where it was not given.
    :param range: the header of that name.
    :param content: the body of a request that has JSON.
    :param file: the part ``file`` of a form.
    """

    classic: Classic
    jobid: str = ""
    filename: str = ""
    range: str = ""
    identified: Caller | None = None
    content: bytes = b""
    content_type: str = ""
    file: UploadFile | None = None

    @property
    def caller(self) -> Caller:
        """Who asks."""
        assert self.identified is not None  # noqa: S101 - only the heartbeat needs no token.
        return self.identified

    @property
    def job(self) -> ClassicJob:
        """The job that is meant.

        :raises Uncaught: if it is none of the caller's.
        """
        job = self.classic.jobs.get(self.caller.user, self.jobid)
        if job is None:
            raise Uncaught
        return job

    def folder(self, job: ClassicJob) -> JobFolder:
        """The folder of a job."""
        gateway = self.classic.gateway
        return JobFolder(gateway.settings, gateway.local_files_of(self.caller.user), job.folder)

    def require_registration(self) -> None:
        """Make sure that the caller has called ``createOrUpdateCollection``."""
        if not self.classic.jobs.is_registered(self.caller.user):
            raise Failed(500, {"error": "We can not find your are registered."})


def _heartbeat(call: Call) -> Response:
    return as_json({"message": "HPC-gateway-App : application running."})


def _create_user(call: Call) -> Response:
    caller, jobs = call.caller, call.classic.jobs
    try:
        caller.files.roots.prepare()
    except FileError as exc:
        failure = {"error": f"mkdir {caller.home} on {call.classic.machine} fail.", "except_type": firecrest.HEADER}
        raise Failed(501, failure) from exc
    jobs.register(caller.user)
    return as_json(
        {
            "_id": caller.user.id,
            "email": caller.user.email,
            "home": caller.home,
            "message": "Success: Create user in database.",
            "name": caller.user.name,
        }
    )


def _list_jobs(call: Call) -> Response:
    call.require_registration()
    return as_json({"jobs": {job.id: job.as_wire() for job in call.classic.jobs.of_user(call.caller.user)}})


def _create_job(call: Call) -> Response:
    call.require_registration()
    fields = _fields(call)
    caller, jobs = call.caller, call.classic.jobs
    if set(fields) | {"email"} != set(CREATE_FIELDS_PUBLISHED):
        raise _not_created(call, "<class 'TypeError'>")
    try:
        script = call.classic.scripts.script(fields, caller.user.email)
    except InvalidRequest as exc:
        raise _not_created(call, "<class 'ValueError'>") from exc
    job = jobs.new(caller.user, caller.home)
    folder = call.folder(job)
    try:
        folder.make()
        folder.write_script(script)
    except Refusal as exc:
        raise _not_created(call, exc.kind) from exc
    jobs.add(job)
    return as_json({"jobid": job.id})


def _not_created(call: Call, kind: str) -> Failed:
    return Failed(400, {"error": f"unable to create job in machine {call.classic.machine}.", "except_type": kind})


def _fields(call: Call) -> dict[str, Any]:
    """The JSON object of a body.

    :raises Uncaught: with 400 for what does not parse, and with 500 for what is none.
    """
    kind = call.content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Uncaught
    try:
        fields = json.loads(call.content)
    except (ValueError, RecursionError) as exc:
        raise Uncaught(400, f"Failed to decode JSON object: {exc}") from exc
    if not isinstance(fields, dict):
        raise Uncaught
    return fields


def _list_files(call: Call) -> Response:
    try:
        files = call.folder(call.job).listing()
    except Refusal as exc:
        raise Failed(500, {"error": "unable to list files to job folder.", "except_type": exc.kind}) from exc
    return as_json({"files": files, "message": "Files in the job folder."})


def _launch(call: Call) -> Response:
    job = call.job
    try:
        call.classic.jobs.launch(job, call.folder(job))
    except Refusal as exc:
        error = f"unable to submit job in machine {call.classic.machine}."
        raise Failed(600, {"error": error, "except_type": exc.kind}) from exc
    return as_json({"jobid": job.id})


def _cancel(call: Call) -> Response:
    job = call.job
    if job.scheduler_id is None:
        raise Failed(505, {"error": f"Job {call.jobid} not launched yet."})
    try:
        call.classic.jobs.cancel(job)
    except Refusal as exc:
        error = f"unable to cancel job in machine {call.classic.machine}."
        raise Failed(600, {"error": error, "except_type": exc.kind}) from exc
    return as_json({"message": f"Send cancelling signal to job-{call.jobid}, of f7t job id={job.scheduler_id}"})


def _upload(call: Call) -> Response:
    folder, part = call.folder(call.job), call.file
    assert part is not None  # noqa: S101 - without one the application does not get here.
    size = part.file.seek(0, os.SEEK_END)
    part.file.seek(0)
    try:
        folder.write(call.filename or part.filename or "", part.file, size)
    except Refusal as exc:
        raise Failed(500, {"error": "unable to upload file to job folder.", "except_type": exc.kind}) from exc
    return as_json({"message": "File uploaded."})


def _download(call: Call) -> Response:
    folder, name = call.folder(call.job), call.filename
    if not name:
        raise Failed(500, {"error": "Please provide the filename to download."})
    try:
        content = folder.read(name)
    except Refusal as exc:
        failure = {"debug": f"filename: {name}", "error": "unable to download file.", "except_type": exc.kind}
        raise Failed(500, failure) from exc
    kind, encoding = mimetypes.guess_type(name)
    headers = {
        "Content-Type": kind or "application/octet-stream",
        "Content-Disposition": f"inline; {disposition(name)}",
        "Cache-Control": "no-cache",
    }
    if headers["Content-Type"].startswith("text/"):
        headers["Content-Type"] += "; charset=utf-8"
    if encoding:  # So that clients unpack what was never packed on the way.
        headers["Content-Encoding"] = encoding
    if call.range and content:
        start, end = _piece(call.range, len(content)) or (0, 0)
        if not end:
            failure = {"error": "unable to download file.", "except_type": _UNSATISFIABLE}
            raise Failed(500, {"debug": f"filename: {name}", **failure})
        headers |= {"Accept-Ranges": "bytes", "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        content = content[start:end]
    return Response(content, headers=headers)  # With a piece the published gateway says 200, too.


_UNSATISFIABLE = "<class 'werkzeug.exceptions.RequestedRangeNotSatisfiable'>"
_RANGE = re.compile(r"\s*bytes\s*=\s*(?:(\d+)-(\d*)|(-\d+))\s*", re.IGNORECASE)


def _piece(header: str, length: int) -> tuple[int, int] | None:
    """Where the one piece begins and ends that a ``Range`` asks for; ``None`` if it makes no sense."""
    match = _RANGE.fullmatch(header)
    if match is None:
        return None
    first, last, suffix = match.groups()
    start = length + int(suffix) if suffix else int(first)
    end = min(length, int(last) + 1) if last else length
    return (start, end) if 0 <= start < end else None


def _delete(call: Call) -> Response:
    folder = call.folder(call.job)
    if not call.filename:
        raise Failed(500, {"error": "Please provide the filename to delete."})
    try:
        folder.remove(call.filename)
    except Refusal as exc:
        raise Failed(500, {"error": "unable to delete file.", "except_type": exc.kind}) from exc
    return as_json({"message": "File deleted."})


HANDLERS: dict[str, Callable[[Call], Response]] = {
    "heartbeat": _heartbeat,
    "createOrUpdateCollection": _create_user,
    "newTransformation": _create_job,
    "updateTransformation": _launch,
    "getTransformationState": _list_files,
    "deleteTransformation": _cancel,
    "createDataset": _upload,
    "getDataset": _download,
    "deleteDataset": _delete,
    "listJobs": _list_jobs,
    "listFiles": _list_files,
}
