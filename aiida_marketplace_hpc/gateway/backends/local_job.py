"""One local job: what its directives ask for, how it is run, and how it is reported. Nothing here starts or ends anything."""

from __future__ import annotations

import os
import posixpath
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from aiida_marketplace_hpc.directives import DirectiveError, Directives, parse_directives
from aiida_marketplace_hpc.gateway.backends.accounting import COLUMNS, format_time, make_row
from aiida_marketplace_hpc.gateway.backends.base import Observation, Refused, Submission
from aiida_marketplace_hpc.gateway.backends.environment import job_environment
from aiida_marketplace_hpc.gateway.backends.local_spool import SpooledJob
from aiida_marketplace_hpc.gateway.backends.slurm_states import STATES

_NOT_SERVED = {
    "array": "there are no job arrays",
    "begin": "jobs start in the order in which they come",
    "clusters": "there is only this machine",
    "dependency": "jobs start in the order in which they come",
    "hold": "a held job could not be released",
    "test-only": "nothing would be submitted",
}


@dataclass(frozen=True)
class Request:
    """What a submission asks of this machine, checked.

    :param time_limit: seconds; ``None``: no limit.
    :param variables: of the job's environment, as ``--export`` sets them.
    """

    submission: Submission
    directives: Directives
    name: str
    partition: str
    account: str
    time_limit: int | None
    variables: Mapping[str, str]


def read_request(submission: Submission, partitions: Sequence[str]) -> Request:
    """Read the directives of a submission and check that the job can be run here.

    What would change the meaning of the job is refused; requests for resources are not looked at.

    :param partitions: the partitions that there are; the first is the default.
    :raises Refused: in Slurm's words where Slurm has any.
    """
    try:
        directives = parse_directives(submission.script_text)
        directives = replace(directives, options={**submission.options, **directives.options})
        time_limit = directives.time_limit
    except DirectiveError as error:
        raise Refused(str(error)) from error
    options = directives.options
    for option, reason in _NOT_SERVED.items():
        if option in options:
            raise Refused(f"#SBATCH --{option} is not possible on this machine: {reason}")
    if directives.heterogeneous:
        raise Refused("heterogeneous jobs are not possible on this machine")
    asked = options.get("partition")
    partition = partitions[0] if asked is None else next((one for one in asked.split(",") if one in partitions), None)
    if partition is None:
        raise Refused(f"Batch job submission failed: Invalid partition name specified: {asked}")
    _check_nodes(options.get("nodes", "1"))
    return Request(
        submission=submission,
        directives=directives,
        name=options.get("job-name") or posixpath.basename(submission.script),
        partition=partition,
        account=options.get("account", ""),
        time_limit=time_limit,
        variables=_read_export(options.get("export", "")),
    )


def _check_nodes(text: str) -> None:
    match = re.fullmatch(r"(\d+)(?:-\d+)?", text)
    if match is None or int(match[1]) < 1:
        raise Refused(f'"{text}" is not a valid node count')
    if int(match[1]) > 1:
        raise Refused("Batch job submission failed: Node count specification invalid: this machine is one node")


def _read_export(text: str) -> dict[str, str]:
    """Take the assignments from ``ALL,NAME=value,...``; there is nothing else to export."""
    items = (item.partition("=") for item in text.split(",") if "=" in item)
    return {name: value for name, _, value in items}


def make_spec(id: str, request: Request, *, node: str, kill_wait: float) -> dict[str, Any]:
    """Make the ``spec.json`` of a job, which says all that its supervisor must know."""
    submission, options = request.submission, request.directives.options
    environment = {
        **job_environment(),
        **request.variables,
        "SLURM_JOB_ID": id,
        "SLURM_JOB_NAME": request.name,
        "SLURM_SUBMIT_DIR": submission.folder,
    }

    def place(pattern: str) -> str:
        return posixpath.join(submission.folder, _expand(pattern, id, request.name, environment["USER"], node))

    stdout = place(options.get("output", "slurm-%j.out"))
    # As with Slurm: a second copy must not wipe out what the first one wrote.
    mode = options.get("open-mode", "truncate" if submission.guard is None else "append")
    stderr = place(options["error"]) if "error" in options else None
    return {
        "jobid": submission.jobid,
        "folder": submission.folder,
        "script": submission.script,
        "script_digest": submission.script_digest,
        "comment": options.get("comment", submission.comment),
        "name": request.name,
        "partition": request.partition,
        "account": request.account,
        "user": environment["USER"],
        "submitted_at": time.time(),
        "time_limit": request.time_limit,
        "kill_wait": kill_wait,
        "environment": environment,
        "stdin": place(options["input"]) if "input" in options else os.devnull,
        "stdout": stdout,
        "stderr": None if stderr == stdout else stderr,
        "append": mode.startswith("a"),
    }


def _expand(pattern: str, id: str, name: str, user: str, node: str) -> str:
    """Fill in the names of output files as Slurm does."""
    if "\\" in pattern:
        return pattern.replace("\\", "")
    numbers = {"A": id, "J": id, "j": id, "a": "4294967294", "n": "0", "t": "0"}
    words = {"N": node.partition(".")[0], "s": "batch", "u": user, "x": name, "%": "%"}

    def replacement(match: re.Match[str]) -> str:
        width, letter = match.groups()
        if letter in numbers:
            return numbers[letter].zfill(int(width or 0))
        return words.get(letter, match[0])

    return re.sub(r"%(\d*)([A-Za-z%])", replacement, pattern)


def observe(job: SpooledJob, node: str) -> Observation | None:
    """Say how a job is; ``None`` if there is none.

    :raises OSError: if the spool cannot be read or written.
    """
    try:
        spec = job.spec
        ended = job.settle()
        started = job.started
    except FileNotFoundError:
        return None
    begin = None if started is None else float(started["started_at"])
    end = None if ended is None else float(ended["ended_at"])
    if ended is not None:
        native, reason = str(ended["state"]), str(ended["reason"])
    elif started is not None:
        native, reason = "RUNNING", ""
    else:
        native, reason = "PENDING", "Resources"
    observation = Observation(
        id=job.id,
        state=STATES[native],
        native_state=native,
        reason=reason,
        name=spec["name"],
        partition=spec["partition"],
        account=spec["account"],
        nodes="" if started is None else node,
        exit_code=None if ended is None else ended["exit_code"],
        signal=None if ended is None else ended["signal"],
        submitted_at=_moment(spec["submitted_at"]),
        started_at=_moment(begin),
        ended_at=_moment(end),
        time_limit=spec["time_limit"],
        elapsed=None if begin is None else max(0, int((time.time() if end is None else end) - begin)),
        folder=spec["folder"],
    )
    return replace(observation, columns=COLUMNS, rows=_make_rows(observation, spec, ended or {}))


def _make_rows(observation: Observation, spec: Mapping[str, Any], ended: Mapping[str, Any]) -> list[Sequence[str]]:
    """Make the record that sacct would have: a row for the job, and one for what its script has used."""
    limit = observation.time_limit
    common = {
        "Account": observation.account,
        "State": observation.native_state,
        "ExitCode": f"{observation.exit_code or 0}:{observation.signal or 0}",
        "Submit": format_time(observation.submitted_at),
        "Start": format_time(observation.started_at),
        "End": format_time(observation.ended_at),
        "ElapsedRaw": observation.elapsed or 0,
        "NNodes": 1,
        "NodeList": observation.nodes or "None assigned",
    }
    job = {
        **common,
        "JobID": observation.id,
        "JobIDRaw": observation.id,
        "JobName": observation.name,
        "User": spec["user"],
        "Partition": observation.partition,
        "Reason": observation.reason or "None",
        "DerivedExitCode": "0:0",
        "Eligible": common["Submit"],
        "TimelimitRaw": "UNLIMITED" if limit is None else -(-limit // 60),
        "WorkDir": observation.folder,
    }
    rows: list[Sequence[str]] = [make_row(job)]
    if observation.started_at is not None:
        step = f"{observation.id}.batch"
        usage: dict[str, object] = {}
        if "cpu_seconds" in ended:
            # What sacct calls CPUTime is elapsed time on all CPUs; TotalCPU is what was used.
            usage = {"TotalCPU": _clock(ended["cpu_seconds"]), "MaxRSS": f"{ended['max_rss_kib']}K"}
        rows.append(make_row({**common, **usage, "JobID": step, "JobIDRaw": step, "JobName": "batch", "NTasks": 1}))
    return rows


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours:02}:{minutes:02}:{rest:06.3f}"


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
