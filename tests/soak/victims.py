"""Who is at work on a submission now, as one sees it from outside, and how they are killed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Collection
from pathlib import Path

from aiida_marketplace_hpc.testing.aiida_profile import AiidaProfile
from aiida_marketplace_hpc.testing.machine import Machine, ProcessEntry, process_table, wait_until

_SUBMIT = re.compile(r"<(\d+)> .*(scheduled request to submit|submitting) CalcJob<(\d+)>( successful)?")


def held_sbatch(machine: Machine, besides: Collection[int] = ()) -> ProcessEntry:
    """The shim of ``sbatch`` that is held up now: the process that stays.

    :param besides: processes that are held up already.
    :raises RigError: if there is none, or more than one.
    """
    seen = {*_shims(machine)}
    found: dict[int, ProcessEntry] = {}

    def one_stays() -> bool:
        nonlocal seen, found
        now = _shims(machine)
        found = {pid: entry for pid, entry in now.items() if pid in seen and pid not in besides}
        seen = {*now}
        return len(found) == 1

    wait_until(one_stays, within=10, failure=lambda: f"sbatch is held in {sorted(found)}", poll=0.1)
    return next(iter(found.values()))


def uuid_of(sbatch: ProcessEntry) -> str:
    """The calculation for which this sbatch was called: AiiDA makes the last three parts of the folder of its UUID."""
    (folder,) = (word.partition("=")[2] for word in sbatch.command() if word.startswith("--chdir="))
    return "".join(folder.split("/")[-3:])


def submitter(profile: AiidaProfile, pk: int) -> int | None:
    """The process id of the daemon worker that waits for the submission of a calculation now, as the daemon's log says.

    ``None``: nobody waits for it.
    """
    worker = None
    for log in sorted((profile.path / ".aiida" / "daemon" / "log").glob("aiida-*.log")):
        for pid, _, calculation, successful in _SUBMIT.findall(log.read_text(encoding="utf-8", errors="replace")):
            if int(calculation) == pk:
                worker = None if successful else int(pid)
    return worker if worker in profile.workers() else None


def kill(pid: int) -> None:
    """Kill a process as ``kill -9`` does, and wait until it is gone.

    :raises RigError: if it is not gone after 10 s.
    """
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    wait_until(lambda: not is_alive(pid), within=10, failure=lambda: f"process {pid} does not end")


def is_alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    return any(entry.pid == pid for entry in process_table())


def _shims(machine: Machine) -> dict[int, ProcessEntry]:
    """The shells that run the shim of sbatch: a call that nothing happens to replaces itself at once by the real one."""
    return {
        entry.pid: entry
        for entry in machine.processes()
        if Path("".join(entry.command()[1:2])).name == "sbatch" and entry.name == "sbatch"
    }
