"""Slurm's commands: the arguments of each, and what its answer means. Nothing here runs anything.

Job names, comments and folders are chosen by users and may hold any character, line breaks included. The fields of an answer
are therefore separated by a word that is drawn anew for each command, and lines are never counted.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from aiida_marketplace_hpc.directives import Directives, parse_duration
from aiida_marketplace_hpc.gateway.backends.accounting import COLUMNS, clean_row, format_time, make_row
from aiida_marketplace_hpc.gateway.backends.base import Observation, SchedulerDown, Unknown, is_in
from aiida_marketplace_hpc.gateway.backends.guard import Guard
from aiida_marketplace_hpc.gateway.backends.slurm_refusals import plain_words, read_failure
from aiida_marketplace_hpc.gateway.backends.slurm_states import combine, read_state
from aiida_marketplace_hpc.protocol import JobState


@dataclass(frozen=True)
class Answer:
    """What came of a command.

    :param returncode: the exit code, negative for a signal; ``None``: it was killed because it took too long.
    """

    returncode: int | None
    stdout: str
    stderr: str


def draw_separator() -> str:
    """Draw a separator that no user can have put into a field."""
    return f"\x1f{secrets.token_hex(8)}\x1f"


# --- sbatch ----------------------------------------------------------------------------------------------------------


def sbatch_arguments(
    folder: str,
    directives: Directives,
    *,
    name: str,
    comment: str,
    defaults: Mapping[str, str] | None = None,
    guarded: bool = True,
) -> list[str]:
    """Make the command that submits a script from standard input.

    :param folder: absolute path of the job's working directory; it overrules the script's.
    :param name: used where the script sets no name.
    :param comment: used where the script sets none.
    :param defaults: further options that are used where the script sets none.
    :param guarded: whether a second copy of the same submission ends before user code.
    """
    arguments = ["sbatch", "--parsable", f"--chdir={folder}"]
    options = directives.options
    if "job-name" not in options:
        arguments.append(f"--job-name={name}")
    if "comment" not in options and comment:
        arguments.append(f"--comment={comment}")
    if guarded and "open-mode" not in options:
        # Slurm empties the output files before the wrapper runs: a second copy would wipe out what the first one wrote.
        arguments.append("--open-mode=append")
    arguments += [f"--{option}={value}" for option, value in (defaults or {}).items() if option not in options]
    return arguments


_SUBMITTED = re.compile(r"^(\d+)(?:;\S*)?\n", re.MULTILINE)


def parse_sbatch(answer: Answer) -> str:
    """Read the id of the new job.

    An id that was printed counts even if sbatch failed or was killed afterwards: with ``--wait`` it prints the id and then
    waits for the end of the job, whose exit code becomes its own.

    :raises Refused: Slurm will never take the job.
    :raises Deferred: Slurm does not take it now.
    :raises Unknown: it may have been submitted.
    """
    found = _SUBMITTED.findall(answer.stdout)
    if len(found) == 1:
        return str(found[0])
    if answer.returncode is None:
        words = plain_words(answer.stderr)
        raise Unknown(f"sbatch did not answer in time{': ' if words else ''}{words}")
    if answer.returncode != 0:
        raise read_failure(answer.returncode, answer.stderr)
    raise Unknown(f"sbatch succeeded but printed no job id: {_excerpt(answer.stdout or answer.stderr)}")


# --- squeue ----------------------------------------------------------------------------------------------------------

_QUEUE_FIELDS = ("%i", "%T", "%r", "%P", "%a", "%N", "%V", "%S", "%e", "%l", "%M", "%Z", "%j", "%A")


Statuses = Mapping[str, tuple[str, int]]
"""By the raw id of each task: its state in Slurm's words, and its wait status."""


def squeue_arguments(user: str, separator: str, *, id: str | None = None) -> list[str]:
    """Make the command that lists all jobs of a user, those that have just ended included.

    :param id: only this one.
    """
    arguments = ["squeue", "--noheader", "--states=all", f"--user={user}", f"--format={separator.join(_QUEUE_FIELDS)}"]
    return arguments if id is None else [*arguments, f"--jobs={id}"]


def statuses_arguments(user: str) -> list[str]:
    """Make the command that lists how the jobs of a user have ended, as far as the controller remembers it.

    Only this form of squeue knows exit codes. It cuts fields off, so it is asked for nothing that users write.
    """
    return ["squeue", "--noheader", "--states=all", f"--user={user}", "--Format=JobID:24 ,State:24 ,exit_code:24 "]


def parse_statuses(answer: Answer) -> dict[str, tuple[str, int]]:
    """Read how jobs have ended: :data:`Statuses`.

    :raises SchedulerDown: if it is not a whole answer.
    """
    require_success("squeue", answer)
    statuses = {}
    for line in answer.stdout.splitlines():
        match line.split():
            case [id, state, status] if id.isdecimal() and status.isdecimal():
                # What is no wait status is Slurm's word for none.
                statuses[id] = (state, int(status) if int(status) <= 0xFFFF else 0)
            case _:
                raise SchedulerDown(f"squeue answered what cannot be read: {_excerpt(line)}")
    return statuses


def parse_squeue(answer: Answer, separator: str, statuses: Statuses | None = None) -> dict[str, Observation]:
    """Read a listing of the queue, by job id.

    Jobs that have ended are not complete without ``statuses``: the queue does not tell their exit code.

    :raises SchedulerDown: if it is not a whole answer.
    """
    require_success("squeue", answer)
    jobs: dict[str, list[Observation]] = {}
    for record in _split_records("squeue", answer.stdout, separator, len(_QUEUE_FIELDS)):
        fields = dict(zip(_QUEUE_FIELDS, record, strict=True))
        reason = "" if fields["%r"] == "None" else fields["%r"]
        state = read_state(fields["%T"], reason)
        has_started = state.final or state in {JobState.RUNNING, JobState.SUSPENDED}
        base, _ = _split_id("squeue", fields["%i"])
        observation = Observation(
            id=base,
            state=state,
            native_state=fields["%T"],
            complete=not state.final,
            reason=reason,
            name=fields["%j"],
            partition=fields["%P"],
            account=fields["%a"],
            nodes=fields["%N"],
            submitted_at=_read_time(fields["%V"]),
            # For waiting jobs these are what Slurm expects, and for running ones the end is.
            started_at=_read_time(fields["%S"]) if has_started else None,
            ended_at=_read_time(fields["%e"]) if state.final else None,
            time_limit=_read_duration(fields["%l"]),
            elapsed=_read_duration(fields["%M"]),
            folder=fields["%Z"],
        )
        ended_as, status = (statuses or {}).get(fields["%A"], ("", 0))
        if state.final and ended_as == fields["%T"]:
            observation = with_status(observation, status, fields["%i"], fields["%A"])
        jobs.setdefault(base, []).append(observation)
    return {
        base: replace(combine(tasks), rows=tuple(row for task in tasks for row in task.rows)) if tasks[1:] else tasks[0]
        for base, tasks in jobs.items()
    }


def with_status(observation: Observation, status: int, id: str, raw_id: str) -> Observation:
    """Complete an observation of an end by the wait status, and make an accounting record of it.

    :param id: as Slurm writes it: of a task of an array, both ids.
    """
    signal = status & 0x7F
    exit_code = None if signal else _own_exit_code(status >> 8, observation.state, observation.started_at)
    minutes = "" if observation.time_limit is None else observation.time_limit // 60
    row = make_row(
        {
            "JobID": id,
            "JobName": observation.name,
            "Account": observation.account,
            "Partition": observation.partition,
            "State": observation.native_state,
            "Reason": observation.reason or "None",
            "ExitCode": f"{status >> 8}:{signal}",
            "Submit": format_time(observation.submitted_at),
            "Start": format_time(observation.started_at),
            "End": format_time(observation.ended_at),
            "ElapsedRaw": "" if observation.elapsed is None else observation.elapsed,
            "TimelimitRaw": minutes,
            "NodeList": observation.nodes,
            "WorkDir": observation.folder,
            "JobIDRaw": raw_id,
        }
    )
    return replace(observation, complete=True, exit_code=exit_code, signal=signal or None, columns=COLUMNS, rows=(row,))


# --- the guard -------------------------------------------------------------------------------------------------------


def observe_guard(guard: Guard, folder: str) -> Observation:
    """Make an observation of what the wrapper has noted; of a job that has not, as far as it is noted, as of one that runs.

    Why a script came to its end (cancelled, over its time limit, preempted) is Slurm's knowledge, and is not noted.
    """
    runs = guard.runs.values()
    started_at = guard.started_at
    if not guard.ended:
        return Observation(guard.holder, JobState.RUNNING, "RUNNING", started_at=started_at, folder=folder)
    ended_at = max((run.ended_at for run in runs if run.ended_at), default=guard.changed_at)
    code = max(run.status or 0 for run in runs)
    state = JobState.FAILED if code else JobState.COMPLETED
    observation = Observation(
        guard.holder,
        state,
        state.value,
        started_at=started_at or guard.changed_at,
        ended_at=ended_at,
        elapsed=None if started_at is None else int((ended_at - started_at).total_seconds()),
        folder=folder,
    )
    return with_status(observation, code << 8, guard.holder, guard.holder)


# --- sacct -----------------------------------------------------------------------------------------------------------


def sacct_arguments(
    user: str,
    separator: str,
    *,
    ids: Collection[str] = (),
    since: datetime | None = None,
    duplicates: bool = False,
) -> list[str]:
    """Make the command that reads the accounting records of a user's jobs.

    :param ids: of these jobs, whatever their age; or
    :param since: of all jobs that were there since then.
    :param duplicates: where an id was used several times, or a job started several times, show all of it; else the newest.
    """
    arguments = ["sacct", "--noheader", "--parsable2", f"--delimiter={separator}", f"--format={','.join(COLUMNS)}"]
    arguments.append(f"--user={user}")
    if ids:
        arguments.append(f"--jobs={','.join(sorted(ids))}")
    if duplicates:
        arguments.append("--duplicates")
    if since is not None:
        arguments.append(f"--starttime={since.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%S}")
    return arguments


def parse_sacct(answer: Answer, separator: str, *, folders: Mapping[str, str] | None = None) -> dict[str, Observation]:
    """Read accounting records, by job id; of several of one job, the one that was submitted last.

    :param folders: leave out records of other folders than these, by id.
    :raises SchedulerDown: if it is not a whole answer.
    """
    require_success("sacct", answer)
    jobs: dict[str, dict[str, Observation]] = {}
    records: dict[str, list[dict[str, str]]] = {}
    left_out = ""
    for record in _split_records("sacct", answer.stdout, separator, len(COLUMNS)):
        fields = dict(zip(COLUMNS, record, strict=True))
        base, step = _split_id("sacct", fields["JobID"])
        task = fields["JobID"].partition(".")[0]
        if not step:
            job = _read_job_record(base, fields)
            before = jobs.setdefault(base, {}).get(task)
            left_out = ""
            if (folders is not None and not is_in(job, folders.get(base, ""))) or (before and _is_older(job, before)):
                left_out = task
                continue
            jobs[base][task] = job
            records[task] = []
        elif task == left_out:
            continue
        records.setdefault(task, []).append(fields)
    return {
        base: replace(
            combine([_started(job, records[task]) for task, job in tasks.items()]),
            columns=COLUMNS,
            rows=tuple(clean_row(fields.values()) for task in tasks for fields in records[task]),
        )
        for base, tasks in jobs.items()
        if tasks
    }


def _started(job: Observation, records: Sequence[Mapping[str, str]]) -> Observation:
    """Take the start of a job that has run, where its record has none, from that of its script.

    slurmdbd may get the end of a job and not its start: seen where a controller came back after some minutes, and a waiting
    job ran at once.
    """
    script = next((fields for fields in records if fields["JobID"].endswith(".batch")), None)
    if not job.state.final or job.started_at is not None or script is None:
        return job
    return _read_job_record(
        job.id, {**records[0], **{name: script[name] for name in ("Start", "ElapsedRaw", "NodeList")}}
    )


def _is_older(job: Observation, other: Observation) -> bool:
    return bool(job.submitted_at and other.submitted_at and job.submitted_at < other.submitted_at)


def _read_job_record(base: str, fields: Mapping[str, str]) -> Observation:
    reason = "" if fields["Reason"] == "None" else fields["Reason"]
    native = fields["State"]
    state = read_state(native, reason)
    ended_at = _read_time(fields["End"])
    exit_code, signal = _read_exit_code(fields["ExitCode"]) if state.final else (None, None)
    started_at = _read_time(fields["Start"]) if state is not JobState.QUEUED else None
    exit_code = _own_exit_code(exit_code, state, started_at)
    # slurmctld sends the start, the steps and the end of a job one by one; until all have come, the record is named
    # `allocation`, has no partition or no end.
    half = not fields["Partition"] or (state.final and ended_at is None)
    minutes = fields["TimelimitRaw"]
    return Observation(
        id=base,
        state=state,
        native_state=native,
        complete=not half,
        reason=reason,
        name=fields["JobName"],
        partition=fields["Partition"],
        account=fields["Account"],
        nodes="" if fields["NodeList"] == "None assigned" else fields["NodeList"],
        exit_code=exit_code,
        signal=signal,
        submitted_at=_read_time(fields["Submit"]),
        started_at=started_at,
        ended_at=ended_at if state.final else None,
        time_limit=int(minutes) * 60 if minutes.isdecimal() else None,
        elapsed=int(fields["ElapsedRaw"]) if fields["ElapsedRaw"].isdecimal() else None,
        folder=fields["WorkDir"],
    )


def _own_exit_code(code: int | None, state: JobState, started_at: datetime | None) -> int | None:
    """Leave out an exit code that is Slurm's own word about a script that it did not start, or did not let come to its end."""
    return None if started_at is None or (code == 0 and state is not JobState.COMPLETED) else code


def _read_exit_code(text: str) -> tuple[int | None, int | None]:
    """Split ``code:signal``; what a signal has ended has no exit code."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        return None, None
    code, signal = int(match[1]), int(match[2])
    return (None, signal) if signal else (code, None)


# --- scontrol write --------------------------------------------------------------------------------------------------

_NO_SCRIPT = re.compile(r"Invalid job id specified|Job script not specified|Access/permission denied", re.IGNORECASE)


def script_arguments(id: str) -> list[str]:
    """Make the command that shows the script of a job that has not ended."""
    return ["scontrol", "write", "batch_script", id, "-"]


def parse_script(answer: Answer) -> bytes | None:
    """Read the script of a job; ``None`` if the job is gone, has no script, or belongs to somebody else.

    :raises SchedulerDown: if it is not a whole answer.
    """
    # Whatever is wrong, scontrol may end with 0.
    if "retrieval failed" in answer.stderr and _NO_SCRIPT.search(answer.stderr):
        return None
    require_success("scontrol", answer if "retrieval failed" not in answer.stderr else replace(answer, returncode=1))
    return answer.stdout.encode()


# --- scancel, sinfo --------------------------------------------------------------------------------------------------

_ENDED = re.compile(r"already completing or completed|Invalid job id specified", re.IGNORECASE)


def scancel_arguments(id: str) -> list[str]:
    """Make the command that asks for the end of a job."""
    return ["scancel", id]


def parse_squeue_of_one(answer: Answer, separator: str) -> Observation | None:
    """Read what the queue says about one job; ``None`` if Slurm does not know it any more.

    :raises SchedulerDown: if it is not a whole answer.
    """
    if answer.returncode is not None and _ENDED.search(answer.stderr):
        return None
    return next(iter(parse_squeue(answer, separator).values()), None)


def parse_scancel(answer: Answer) -> None:
    """Check that the request was taken, or is not needed.

    :raises SchedulerDown: if it was not taken.
    """
    if answer.returncode != 0 and not _ENDED.search(answer.stderr):
        require_success("scancel", answer)


def sinfo_arguments() -> list[str]:
    """Make the command that lists the partitions."""
    return ["sinfo", "--noheader", "--format=%R"]


def parse_sinfo(answer: Answer) -> list[str]:
    """Read the names of the partitions.

    :raises SchedulerDown: if it is not a whole answer.
    """
    require_success("sinfo", answer)
    return sorted({line.strip() for line in answer.stdout.splitlines() if line.strip()})


# --- what all of them share ------------------------------------------------------------------------------------------

_ID = re.compile(r"(\d+)(?:_(?:\d+|\[[^\]]*\]))?(?:\+\d+)?(?:\.(\S+))?")


def require_success(command: str, answer: Answer) -> None:
    """Refuse an answer that may not be whole. squeue ends with 0 also after ``error: Invalid user``.

    :raises SchedulerDown: with the command's words.
    """
    if answer.returncode == 0 and "error:" not in answer.stderr:
        return
    if answer.returncode is None:
        raise SchedulerDown(f"{command} did not answer in time")
    raise SchedulerDown(f"{command} failed ({answer.returncode}): {_excerpt(answer.stderr or answer.stdout)}")


def _split_records(command: str, text: str, separator: str, width: int) -> Iterator[list[str]]:
    """Cut an answer into records of ``width`` fields.

    The last field of a record and the first one of the next, which no user has chosen, share one piece and are parted by
    a line break.

    :raises SchedulerDown: if the answer is not made of whole records.
    """
    if not text.strip():
        return
    pieces = text.split(separator)
    if (len(pieces) - 1) % (width - 1) or not text.endswith("\n"):
        raise SchedulerDown(f"{command} answered what cannot be read: {_excerpt(text)}")
    first = pieces[0]
    for start in range(1, len(pieces), width - 1):
        middle = pieces[start : start + width - 2]
        last, _, following = pieces[start + width - 2].partition("\n")
        yield [first, *middle, last]
        first = following
    if first:
        raise SchedulerDown(f"{command} answered what cannot be read: {_excerpt(first)}")


def _split_id(command: str, text: str) -> tuple[str, str]:
    """Take the base id and the step from ``12``, ``12_3``, ``12_[4-9%2]``, ``12+1``, ``12_3.batch``.

    :raises SchedulerDown: if it is no job id.
    """
    match = _ID.fullmatch(text)
    if match is None:
        raise SchedulerDown(f"{command} answered what cannot be read: {_excerpt(text)} is no job id")
    return match[1], match[2] or ""


def _read_time(text: str) -> datetime | None:
    """Read a time in UTC; ``N/A``, ``None``, ``Unknown`` and the like are none."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)
    except ValueError:
        return None


def _read_duration(text: str) -> int | None:
    try:
        return parse_duration(text)
    except ValueError:
        return None


def _excerpt(text: str) -> str:
    words = plain_words(text)
    return words if len(words) <= 500 else f"{words[:500]}…"
