"""What the pages show: jobs, files and the end of a file that grows, each through the caller's own objects."""

from __future__ import annotations

from datetime import timezone
from pathlib import PurePosixPath
from typing import Any

from markupsafe import Markup
from starlette.responses import Response

from aiida_marketplace_hpc.errors import GatewayError, NotFound
from aiida_marketplace_hpc.gateway import streams
from aiida_marketplace_hpc.gateway.ledger import utc_now
from aiida_marketplace_hpc.gateway.pages import front_content
from aiida_marketplace_hpc.gateway.people import readable
from aiida_marketplace_hpc.gateway.people.visit import Visit
from aiida_marketplace_hpc.gateway.routes import files as file_routes
from aiida_marketplace_hpc.gateway.routes.call import Call, Stream
from aiida_marketplace_hpc.gateway.service import Caller

PAGE = 50
"""Jobs on a page."""
MOST_FILES = 1000
"""Files of a folder that are listed."""
_GLIMPSE = 4 * 1024
"""Bytes of the output on the page of a job."""
REFRESH = 5
"""Seconds after which the page of a file that may grow is loaded again."""
_OUTPUTS = ("_scheduler-stdout.txt", "slurm-{scheduler_id}.out")
"""Where AiiDA and Slurm let the output of a job go, unless somebody says otherwise."""
_LIKELY = (".out", ".log", ".stdout", "stdout.txt")


def home(visit: Visit) -> Response:
    """The first page: one's own jobs, or to whom is not signed in, what this is."""
    if visit.signed_in is None:
        return visit.show("welcome", about=Markup(front_content(visit.gateway.settings)))  # noqa: S704 - it escapes.
    asked = visit.query.get("page", "")
    number = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 7 and int(asked) else 1
    jobs = visit.gateway.jobs.newest(visit.caller.user, limit=PAGE + 1, offset=(number - 1) * PAGE)
    shown = [{**job, "title": _title(job)} for job in jobs[:PAGE]]
    return visit.show("jobs", jobs=shown, number=number, more=len(jobs) > PAGE)


def job(visit: Visit) -> Response:
    """One job: how it is, its output and its files."""
    row = visit.gateway.jobs.get(visit.caller.user, visit.jobid, fresh=True)
    facts = visit.gateway.jobs.as_wire(row, accounting=True)
    entries: list[dict[str, Any]] = []
    problem, output, glimpse, skipped = "", "", "", 0
    try:
        caller = visit.caller.on(row.machine)
        entries = caller.files.listing(row.folder, follow=True)
        output = _output(entries, facts)
        if output:
            glimpse, skipped = _end_of(caller, f"{row.folder}/{output}", _GLIMPSE)
    except GatewayError as exc:
        problem = exc.message
    return visit.show(
        "job",
        job=facts,
        title=_title(facts),
        entries=entries[:MOST_FILES],
        left_out=max(0, len(entries) - MOST_FILES),
        folder="",
        problem=problem,
        output=output,
        glimpse=glimpse,
        skipped=skipped,
    )


def files(visit: Visit) -> Response:
    """A file as an attachment, or what is in a folder."""
    row = visit.gateway.jobs.get(visit.caller.user, visit.jobid)
    name = visit.path_after("files").strip("/")
    call = _call(visit, name)
    caller, path = file_routes.place_of(call, name)
    if caller.files.stat(path, follow=True)["type"] != "directory":
        answer = file_routes.download(call)
        assert isinstance(answer, Stream)  # noqa: S101 - without a bundle it is one.
        return streams.response(answer)
    entries = caller.files.listing(path, follow=True)
    return visit.show(
        "folder",
        job=visit.gateway.jobs.as_wire(row),
        title=_title(visit.gateway.jobs.as_wire(row)),
        folder=f"{name}/" if name else "",
        entries=entries[:MOST_FILES],
        left_out=max(0, len(entries) - MOST_FILES),
    )


def tail(visit: Visit) -> Response:
    """The end of a file; while the job lives, the page is loaded again every few seconds, unless that is not wanted."""
    row = visit.gateway.jobs.get(visit.caller.user, visit.jobid, fresh=True)
    name = visit.path_after("tail")
    content, skipped = _end_of(*file_routes.place_of(_call(visit, name), name), readable.WINDOW)
    facts = visit.gateway.jobs.as_wire(row)
    following = not facts["final"] and "still" not in visit.query
    return visit.show(
        "tail",
        job=facts,
        title=_title(facts),
        name=name,
        content=content,
        skipped=skipped,
        following=following,
        refresh=REFRESH if following else None,
        interval=REFRESH,
        now=utc_now().astimezone(timezone.utc).isoformat(),
    )


def cancel(visit: Visit) -> Response:
    """Cancel a job; one that was never launched is ended, too."""
    user = visit.caller.user
    visit.check_form(visit.secret)
    row = visit.gateway.jobs.get(user, visit.jobid)
    visit.gateway.jobs.cancel(row, unlaunched=True)
    return visit.go(f"jobs/{row.id}")


def _call(visit: Visit, name: str) -> Call:
    """The request of a program that asks for the same file."""
    if "\0" in name:
        raise NotFound("no file has such a name")
    return Call(visit.gateway, {"jobid": visit.jobid, "filename": name}, {}, visit.caller)


def _end_of(caller: Caller, path: str, window: int) -> tuple[str, int]:
    file, attributes = caller.files.read(path)
    with file:
        return readable.tail(file, attributes.st_size, window)


def _title(facts: dict[str, Any]) -> str:
    return str(facts["name"] or PurePosixPath(facts["folder"]).name)


def _output(entries: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The file that most likely has the output of a job; empty if none looks like it."""
    regular = {str(entry["name"]): entry for entry in entries if entry["type"] == "file"}
    for pattern in _OUTPUTS:
        name = pattern.format(scheduler_id=facts["scheduler_id"])
        if name in regular:
            return name
    likely = [name for name in regular if name.lower().endswith(_LIKELY)]
    return max(likely, key=lambda name: float(regular[name]["mtime"]), default="")
