"""``query``: an ordered list of operations in one request, each with its own result or error."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from aiida_marketplace_hpc.errors import GatewayError, InvalidRequest, TooLarge
from aiida_marketplace_hpc.gateway import archives
from aiida_marketplace_hpc.gateway.config import GIB
from aiida_marketplace_hpc.gateway.files import Files
from aiida_marketplace_hpc.gateway.operations import Running
from aiida_marketplace_hpc.gateway.routes.call import Answer, Call, Later, flag, text
from aiida_marketplace_hpc.gateway.storage import AnyFiles
from aiida_marketplace_hpc.protocol import MAX_JOBIDS, MAX_OPERATIONS, OPERATIONS

if TYPE_CHECKING:
    from aiida_marketplace_hpc.gateway.firecrest.packing import Packing

Fields = Mapping[str, Any]
_MAX_WAIT = 10.0
_MAX_SECONDS = 1e9
_NOTED = 20
"""Elements of a list that are taken down, and of each text the characters."""
_MAX_NOTED = 4200
_KEY = re.compile(r"[A-Za-z0-9]{16,64}")


def query(call: Call) -> Answer:
    """Carry out the operations in order; with ``stop_on_error`` the list of results ends at the first error.

    With a ``key`` the answer does not let wait: it is ``pending`` while the list is under way, to be asked for with the key
    alone. The same list with the same key is carried out once.
    """
    body, lists = call.json, call.gateway.operations
    machine = call.machine(text("machine", body["machine"]) if body.get("machine") is not None else None)
    key = _key(body)
    if key is not None and "operations" not in body:
        return _ask_again(call, key)
    operations = body.get("operations")
    if not isinstance(operations, list):
        raise InvalidRequest('a query is {"operations": [{"op": …}, …]}')
    if len(operations) > MAX_OPERATIONS:
        raise TooLarge(f"a query has at most {MAX_OPERATIONS} operations, not {len(operations)}")
    stop_on_error = _flag(body, "stop_on_error")
    running = lists.start(
        call.caller.user.id,
        key,
        lambda running: _carry_out(call, running, machine, operations, stop_on_error),
        mark=_mark(machine, operations, stop_on_error) if key is not None else "",
        repeatable=all(_is_repeatable(fields) for fields in operations),
        again=_seconds(body, "again"),
    )
    return Later(running.future, running.meanwhile, None if key is None else lists.patience)


def _ask_again(call: Call, key: str) -> Answer:
    lists = call.gateway.operations
    running = lists.find(call.caller.user.id, key)
    if running is None:
        return {"unknown": {"key": key}}
    if _flag(call.json, "stop"):
        running.stop("the client gave up waiting: this was not carried out to its end")
    wait = _seconds(call.json, "wait")
    return Later(running.future, running.meanwhile, lists.patience if wait is None else min(wait, lists.patience))


def _carry_out(
    call: Call, running: Running, machine: str, operations: list[Any], stop_on_error: bool
) -> dict[str, Any]:
    # Whoever asks for jobs only does not wait for the machine's disk.
    caller = call.caller.on(machine) if any(map(_is_about_files, operations)) else call.caller
    watched = replace(call, identified=caller.watched(running.advance))
    results: list[dict[str, Any]] = []
    for fields in operations:
        outcome = "server_fault"
        try:
            running.advance(1)
            results.append({"ok": True, "result": _run(watched, fields)})
            outcome = "ok"
        except GatewayError as exc:
            results.append({"ok": False, "error": exc.to_wire()})
            outcome = exc.code
            if stop_on_error:
                break
        finally:
            _note(call, fields, outcome)
    return {"results": results}


def _note(call: Call, fields: Any, outcome: str) -> None:
    if isinstance(fields, dict) and isinstance(name := fields.get("op"), str) and name in OPERATIONS:
        known = {*OPERATIONS[name].required, *OPERATIONS[name].optional}
        call.note(name, {field: _brief(value) for field, value in fields.items() if field in known}, outcome)
    else:
        call.note(None, {}, outcome)


def _brief(value: Any) -> Any:
    """The value of a field as it is taken down: not longer than it needs to be, whatever was sent."""
    if isinstance(value, list):
        shown = [_brief_text(one) for one in value[:_NOTED]]
        return shown if len(value) <= _NOTED else [*shown, f"... {len(value)} in all"]
    return _brief_text(value)


def _brief_text(value: Any) -> Any:
    if isinstance(value, str):
        return value[:_MAX_NOTED]
    return value if value is None or isinstance(value, int) else type(value).__name__


def _key(body: Fields) -> str | None:
    key = body.get("key")
    if key is not None and not (isinstance(key, str) and _KEY.fullmatch(key)):
        raise InvalidRequest("a key is a random text of 16 to 64 letters and digits")
    return key


def _seconds(body: Fields, name: str) -> float | None:
    value = body.get(name)
    if value is not None and not (isinstance(value, int | float) and 0 <= value < _MAX_SECONDS):
        raise InvalidRequest(f"{name} is a number of seconds, not {value!r}")
    return value


def _mark(machine: str, operations: list[Any], stop_on_error: bool) -> str:
    content = json.dumps([machine, operations, stop_on_error], sort_keys=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()


def _is_about_files(fields: Any) -> bool:
    return isinstance(fields, dict) and not str(fields.get("op")).startswith("jobs.")


def _is_repeatable(fields: Any) -> bool:
    operation = OPERATIONS.get(str(fields.get("op"))) if isinstance(fields, dict) else None
    return operation is None or operation.repeatable


def _run(call: Call, fields: Any) -> Any:
    name = fields.get("op") if isinstance(fields, dict) else None
    operation = OPERATIONS.get(name) if isinstance(name, str) else None
    if operation is None:
        raise InvalidRequest(f"there is no operation {name!r}; there are {', '.join(OPERATIONS)}")
    allowed = {"op", *operation.required, *operation.optional}
    missing = [field for field in operation.required if field not in fields]
    unknown = sorted(set(fields) - allowed)
    if missing or unknown:
        problem = f"needs {', '.join(missing)}" if missing else f"has no {', '.join(unknown)}"
        raise InvalidRequest(f"the operation {name} {problem}")
    return RUN[operation.name](call, fields)


def _text(fields: Fields, name: str) -> str:
    return text(name, fields[name])


def _texts(fields: Fields, name: str, what: str) -> list[str]:
    values = fields[name]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InvalidRequest(f"{name} is a list of {what}")
    return [text(name, value) for value in values]


def _flag(fields: Fields, name: str, default: bool = False) -> bool:
    return flag(name, fields.get(name, default))


def _number(fields: Fields, name: str, default: int = 0) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidRequest(f"{name} is a number, not {value!r}")
    return value


def _stat(call: Call, fields: Fields) -> Any:
    return call.caller.files.stat(_text(fields, "path"), follow=_flag(fields, "follow"))


def _list(call: Call, fields: Fields) -> Any:
    pattern = _text(fields, "pattern") if fields.get("pattern") is not None else None
    entries = call.caller.files.listing(
        _text(fields, "path"),
        recursive=_flag(fields, "recursive"),
        pattern=pattern,
        follow=_flag(fields, "follow"),
    )
    return {"entries": entries}


def _glob(call: Call, fields: Fields) -> Any:
    if _flag(fields, "attributes"):
        return {"entries": call.caller.files.glob_attributes(_text(fields, "pattern"))}
    return {"paths": call.caller.files.glob(_text(fields, "pattern"))}


def _realpath(call: Call, fields: Fields) -> Any:
    return {"path": call.caller.files.realpath(_text(fields, "path"))}


def _checksum(call: Call, fields: Fields) -> Any:
    return call.caller.files.checksum(_text(fields, "path"))


def _usage(call: Call, fields: Fields) -> Any:
    return asdict(call.caller.files.usage(_text(fields, "path")))


def _mkdir(call: Call, fields: Fields) -> Any:
    call.caller.files.mkdir(
        _text(fields, "path"),
        parents=_flag(fields, "parents"),
        exist_ok=_flag(fields, "exist_ok"),
        mode=_number(fields, "mode", 0o777),
    )
    return {}


def _changing(call: Call, fields: Fields) -> AnyFiles:
    """What the caller can do with files, with ``force`` also where live jobs of their own are concerned."""
    return call.caller.files.forced() if _flag(fields, "force") else call.caller.files


def _rename(call: Call, fields: Fields) -> Any:
    _changing(call, fields).rename(_text(fields, "path"), _text(fields, "target"))
    return {}


def _copy(call: Call, fields: Fields) -> Any:
    _changing(call, fields).copy(
        _text(fields, "path"),
        _text(fields, "target"),
        dereference=_flag(fields, "dereference"),
        exact=_flag(fields, "exact"),
        directory=_flag(fields, "directory"),
    )
    return {}


def _symlink(call: Call, fields: Fields) -> Any:
    call.caller.files.symlink(_text(fields, "path"), _text(fields, "target"))
    return {}


def _chmod(call: Call, fields: Fields) -> Any:
    call.caller.files.chmod(_text(fields, "path"), _number(fields, "mode"))
    return {}


def _remove(call: Call, fields: Fields) -> Any:
    _changing(call, fields).remove(
        _text(fields, "path"),
        directory=_flag(fields, "directory"),
        recursive=_flag(fields, "recursive"),
        missing_ok=_flag(fields, "missing_ok"),
    )
    return {}


def _compress(call: Call, fields: Fields) -> Any:
    files = _changing(call, fields)
    sources, target, root_dir = _texts(fields, "sources", "paths"), _text(fields, "target"), _text(fields, "root_dir")
    format, overwrite = _text(fields, "format"), _flag(fields, "overwrite", True)
    dereference = _flag(fields, "dereference")
    if isinstance(files, Files):
        return archives.compress(
            files, sources, target, root_dir, format=format, overwrite=overwrite, dereference=dereference
        )
    packing = _packing(call, files)
    members = archives.members_to_pack(files, sources, target, root_dir, format=format, overwrite=overwrite)
    return packing.compress(members, target, root_dir, format=format, overwrite=overwrite, dereference=dereference)


def _extract(call: Call, fields: Fields) -> Any:
    files, path, target = _changing(call, fields), _text(fields, "path"), _text(fields, "target")
    strip = _number(fields, "strip_components")
    most = (call.gateway.settings.archive_members, call.gateway.settings.archive_size * GIB)
    if isinstance(files, Files):
        return archives.extract(files, path, target, strip_components=strip, most=most)
    return _packing(call, files).extract(path, target, strip_components=strip, most=most)


def _packing(call: Call, files: AnyFiles) -> Packing:
    """Archives where the cluster's file system is not here."""
    from aiida_marketplace_hpc.gateway.firecrest.files import RemoteFiles
    from aiida_marketplace_hpc.gateway.firecrest.packing import Packing

    assert isinstance(files, RemoteFiles)  # noqa: S101 - there is no third kind.
    return Packing(files, call.gateway.settings.policy.options(b"#!/bin/bash\n"))


def _jobs_states(call: Call, fields: Fields) -> Any:
    jobids = _texts(fields, "jobids", "job ids")
    if len(jobids) > MAX_JOBIDS:
        raise TooLarge(f"the states of at most {MAX_JOBIDS} jobs can be asked for at once, not of {len(jobids)}")
    found, unknown = call.gateway.jobs.states(call.caller.user, jobids)
    return {"jobs": found, "unknown": unknown}


def _jobs_show(call: Call, fields: Fields) -> Any:
    jobs, user, jobid = call.gateway.jobs, call.caller.user, _text(fields, "jobid")
    deadline = time.monotonic() + min(_number(fields, "wait"), _MAX_WAIT)
    job = jobs.get(user, jobid, fresh=True)
    while not job.job_state.final and time.monotonic() < deadline:
        time.sleep(0.2)
        job = jobs.get(user, jobid, fresh=True)
    return {"job": jobs.as_wire(job, accounting=True)}


def _jobs_active(call: Call, fields: Fields) -> Any:
    return {"jobs": call.gateway.jobs.active(call.caller.user)}


RUN: dict[str, Callable[[Call, Fields], Any]] = {
    "stat": _stat,
    "list": _list,
    "glob": _glob,
    "realpath": _realpath,
    "checksum": _checksum,
    "usage": _usage,
    "mkdir": _mkdir,
    "rename": _rename,
    "copy": _copy,
    "symlink": _symlink,
    "chmod": _chmod,
    "remove": _remove,
    "compress": _compress,
    "extract": _extract,
    "jobs.states": _jobs_states,
    "jobs.show": _jobs_show,
    "jobs.active": _jobs_active,
}
