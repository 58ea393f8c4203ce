"""What the wrapper leaves in a job's folder: which job took the guard, and, where it stays, how the script ended.

The file is in the reach of the folder's owner: whoever forges it deceives only themself, and it is read with care for what
else may lie there under its name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone

from aiida_marketplace_hpc.gateway.backends.wrapper import GUARD_PREFIX

_MAX_SIZE = 1024 * 1024


@dataclass
class Run:
    """One task of a job: its last start, and its end if it had one since."""

    started_at: datetime | None
    ended_at: datetime | None = None
    status: int | None = None
    """The exit status as shells have it: above 128 mostly a signal's number and 128."""


@dataclass(frozen=True)
class Guard:
    """A guard that was taken.

    :param holder: the scheduler's id of the job that took it.
    :param changed_at: when something was written to it last; for a wrapper that does not stay: when it was taken.
    :param runs: what a wrapper that stays has noted, by the id of the task.
    :param tasks: how many tasks the job has; more than one in a job array.
    """

    holder: str
    changed_at: datetime
    runs: dict[str, Run] = field(default_factory=dict)
    tasks: int = 1

    @property
    def ended(self) -> bool:
        """Whether all of the job has ended; a job that was killed by SIGKILL has left no note of it."""
        return len(self.runs) >= self.tasks and all(run.status is not None for run in self.runs.values())

    @property
    def started_at(self) -> datetime | None:
        """The first start of a task that is known."""
        return min((run.started_at for run in self.runs.values() if run.started_at), default=None)


def read_guards(folder: str) -> list[Guard]:
    """Read all guards in a folder; what is none, and what cannot be read now, is missing."""
    return [guard for path in _paths(folder) if (guard := _read(path)) is not None]


def _paths(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from [entry.path for entry in entries if entry.name.startswith(GUARD_PREFIX)]
    except OSError:
        return


def _read(path: str) -> Guard | None:
    try:
        # Not through a link, and without waiting for whoever is at the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            attributes = os.fstat(descriptor)
            if not stat.S_ISREG(attributes.st_mode):
                return None
            text = file.read(_MAX_SIZE).decode("ascii", "replace")
    except OSError:
        return None
    return parse_guard(text, datetime.fromtimestamp(attributes.st_mtime, timezone.utc))


def parse_guard(text: str, changed_at: datetime) -> Guard | None:
    """Read the text of a guard; a line without its end is being written, and says nothing yet."""
    holder, *notes = text.split("\n")[:-1] or [""]
    if not holder.isdecimal():
        return None
    runs: dict[str, Run] = {}
    tasks = 1
    for note in notes:
        match note.split(" "):
            case ["started", task, time, count] if count.isdecimal():
                runs[task] = Run(_read_time(time))
                tasks = int(count)
            case ["ended", task, time, status] if status.isdecimal() and task in runs:
                runs[task].ended_at = _read_time(time)
                runs[task].status = int(status)
    return Guard(holder, changed_at, runs, tasks)


def _read_time(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)
    except ValueError:
        return None
