"""What FirecREST v1 says about jobs, in the words of version 2.

Version 1 passes on a line of ``squeue`` with the job's script, or one of ``sacct``; neither names the job's folder, and times
are those of the cluster's walls (source: FirecREST 1.13.0, ``src/common/schedulers/slurm.py``).
"""

from __future__ import annotations

import posixpath
from datetime import datetime, timezone
from typing import Any

Json = dict[str, Any]


def queued(row: Json) -> Json:
    """A line of ``squeue``, and beside it the job's ``script``.

    The folder is that of the script, because FirecREST submits from there. Where ``scontrol`` gave no answer neither is
    known; a job that has no script in a file lies nowhere.
    """
    nodes = str(row.get("nodelist") or "")
    waits = nodes.startswith("(")
    script = str(row["job_file"]) if "job_file" in row else ""
    folder = posixpath.dirname(script) if script.startswith("/") else script
    return {
        "jobId": str(row["jobid"]),
        "name": str(row["name"]),
        "status": {"state": str(row["state"]), "stateReason": nodes.strip("()") if waits else None},
        "time": {},
        "partition": str(row["partition"]),
        "nodes": None if waits or not nodes else nodes,
        "user": row.get("user"),
        "workingDirectory": folder,
        "script": script if script.startswith("/") else "",
    }


def recorded(row: Json, folder: str, ahead: int | None) -> Json:
    """A line of ``sacct``.

    :param folder: where the job is known to be.
    :param ahead: seconds that the cluster's wall clock is ahead of UTC; ``None``: that is not known, nor then are the times.
    """
    start, end = wall(row.get("start_time")), ended_at(row)
    code, _, signal = str(row.get("exit_code") or "0:0").partition(":")
    nodes = str(row.get("nodelist") or "")
    return {
        "jobId": str(row["jobid"]),
        "name": str(row["name"]),
        "status": {
            "state": str(row["state"]),
            "stateReason": None,
            "exitCode": int(code),
            "interruptSignal": int(signal or 0),
        },
        "time": {
            "start": None if start is None or ahead is None else start - ahead,
            "end": None if end is None or ahead is None else end - ahead,
            "elapsed": None if start is None or end is None else end - start,
        },
        "partition": str(row["partition"]),
        "nodes": nodes or None,
        "allocationNodes": row.get("nodes", ""),
        "user": row.get("user"),
        "workingDirectory": folder,
    }


def ended_at(row: Json) -> int | None:
    """When a job ended by the cluster's wall clock, in seconds as if that were UTC; ``None`` if it has not."""
    return wall(row.get("time_left"))  # That is how FirecREST calls it.


def wall(text: object) -> int | None:
    """A time as ``sacct`` or ``ls`` prints it, in seconds as if it were UTC; ``None`` if it is none."""
    try:
        moment = datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return None
    return int(moment.replace(tzinfo=timezone.utc).timestamp())
