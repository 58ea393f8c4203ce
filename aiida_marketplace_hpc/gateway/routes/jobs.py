"""Creating, launching, asking and cancelling, as published and with what was added."""

from __future__ import annotations

from typing import Any

from aiida_marketplace_hpc.errors import FileError, InvalidRequest
from aiida_marketplace_hpc.gateway.databases import is_storable
from aiida_marketplace_hpc.gateway.routes.call import Answer, Call, flag, text
from aiida_marketplace_hpc.gateway.routes.files import published_listing
from aiida_marketplace_hpc.protocol import CREATE_FIELDS_ADDED, CREATE_FIELDS_PUBLISHED, JobState


def create(call: Call) -> Answer:
    """Create a job, of a folder and a script in it or, as published, of a container image and a command."""
    jobs, caller, fields = call.gateway.jobs, call.caller, call.json
    unknown = sorted(set(fields) - set(CREATE_FIELDS_PUBLISHED) - set(CREATE_FIELDS_ADDED))
    if unknown:
        raise InvalidRequest(f"a job has no key {', '.join(unknown)}")
    machine = call.machine(_text(fields, "machine"))
    caller = caller.on(machine)
    launch = flag("launch", fields.get("launch", False))
    folder, script = _text(fields, "folder"), _text(fields, "script")
    if folder or script:
        if not (folder and script):
            raise InvalidRequest("a job of an existing folder needs both keys, folder and script")
        job = jobs.create_in_folder(
            caller.user, folder, script, client_ref=_reference(fields), key=_text(fields, "key"), machine=machine
        )
    else:
        if fields.get("key") is not None:
            raise InvalidRequest("a key needs folder and script")
        caller.prepare()
        published = {name: fields[name] for name in CREATE_FIELDS_PUBLISHED if name in fields}
        written, key = call.gateway.containers.script(published, caller.user.email), call.parameters.get("key")
        job = jobs.create_with_script(caller.user, caller.home, written, key=key, machine=machine)
    if launch:
        job = jobs.launch(caller.user, job)
    return jobs.as_wire(job)


def launch(call: Call) -> Answer:
    """Submit a job, unless it was."""
    jobs, caller = call.gateway.jobs, call.caller
    return jobs.as_wire(jobs.launch(caller.user, jobs.get(caller.user, call.parameters["jobid"])))


def state(call: Call) -> Answer:
    """The files in a job's folder, as published, and how the job is."""
    jobs, caller = call.gateway.jobs, call.caller
    job = jobs.get(caller.user, call.parameters["jobid"], fresh=True)
    try:
        listing = caller.on(job.machine).files.listing(job.folder)
    except FileError as exc:
        if not (job.job_state.final and exc.errno == "ENOENT"):
            raise
        listing = []  # How it ended is known longer than its folder is kept.
    return {
        "files": published_listing(listing),
        "message": "Files in the job folder.",
        "state": job.state,
        "job": jobs.as_wire(job),
    }


def cancel(call: Call) -> Answer:
    """Cancel a job; one that has ended stays as it is."""
    jobs, caller = call.gateway.jobs, call.caller
    job = jobs.get(caller.user, call.parameters["jobid"])
    job = jobs.cancel(job, unlaunched=bool(call.parameters.get("unlaunched")))
    return {
        **jobs.as_wire(job),
        "message": f"Send cancelling signal to job-{job.id}, of f7t job id={job.scheduler_id}",
    }


def list_jobs(call: Call) -> Answer:
    """The caller's jobs; ``state`` has the two published values, ``job_state`` the whole story."""
    listed: dict[str, Any] = {}
    for job in call.gateway.jobs.of_user(call.caller.user):
        listed[job.id] = {
            "_id": job.id,
            "remote_folder": job.folder,
            "state": "CREATED" if job.job_state is JobState.CREATED else "ACTIVATED",
            "user_id": job.user_id,
            "job_state": job.state,
            "scheduler_id": job.scheduler_id,
            "name": job.name,
            "client_ref": job.client_ref,
        }
        if job.scheduler_id and job.scheduler_id.isdigit():
            listed[job.id]["f7t_job_id"] = int(job.scheduler_id)
    return {"jobs": listed}


def _text(fields: Any, name: str) -> str | None:
    value = fields.get(name)
    if value is None or value == "":
        return None
    if len(text(name, value)) > 4096:
        raise InvalidRequest(f"{name} is a text of at most 4096 characters")
    return str(value)


def _reference(fields: Any) -> str | None:
    value = _text(fields, "client_ref")
    if value is not None and not (len(value) <= 255 and is_storable(value)):
        raise InvalidRequest("client_ref is a text of at most 255 characters of Unicode")
    return value
