"""The accounting record of a job: the same columns from every backend, in the form of ``sacct --parsable2``.

AiiDA's Slurm scheduler plugin reads such a record when it is joined by ``|``, the names first: it finds the end state of the
job in the first row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone

COLUMNS = (
    "JobID",
    "JobName",
    "User",
    "Account",
    "Partition",
    "QOS",
    "State",
    "Reason",
    "ExitCode",
    "DerivedExitCode",
    "Submit",
    "Eligible",
    "Start",
    "End",
    "ElapsedRaw",
    "TimelimitRaw",
    "NNodes",
    "AllocCPUS",
    "NTasks",
    "ReqMem",
    "MaxRSS",
    "MaxVMSize",
    "TotalCPU",
    "CPUTimeRAW",
    "NodeList",
    "WorkDir",
    "JobIDRaw",
)
"""What is asked of sacct, in this order; times are in UTC, ``ElapsedRaw`` is in seconds, ``TimelimitRaw`` in minutes.

``JobIDRaw`` is last because nothing in it is chosen by a user: the end of a record is recognised by it.
"""


def make_row(values: Mapping[str, object]) -> tuple[str, ...]:
    """Put the values of one job or step in the order of :data:`COLUMNS`; columns without a value are empty."""
    return clean_row(str(values.get(column, "")) for column in COLUMNS)


def clean_row(values: Iterable[str]) -> tuple[str, ...]:
    """Replace what would break a record that is joined by ``|`` with a line per row."""
    return tuple(
        "".join(character if character.isprintable() else " " for character in value.replace("|", "/"))
        for value in values
    )


def format_time(moment: datetime | None, missing: str = "Unknown") -> str:
    """Write a time as sacct does in UTC."""
    return missing if moment is None else moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
