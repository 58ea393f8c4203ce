"""Slurm behind FirecREST: what both versions share, and what is version 2's.

What FirecREST says about a job it has from ``sacct`` and ``squeue``, put together: an end comes with its exit code, and one
question answers for all jobs that live or have ended within a day. What is older is asked for one by one, and where nobody
knows it any more, the note that the wrapper has left in the job's folder is read.
"""

from __future__ import annotations

import logging
import posixpath
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

from aiida_marketplace_hpc.directives import DirectiveError, Directives, parse_directives
from aiida_marketplace_hpc.gateway.backends.accounting import COLUMNS, format_time, make_row
from aiida_marketplace_hpc.gateway.backends.base import (
    Backend,
    Deferred,
    Fault,
    Observation,
    Refused,
    SchedulerDown,
    Submission,
    Trace,
    Unknown,
    is_in,
)
from aiida_marketplace_hpc.gateway.backends.guard import Guard, parse_guard
from aiida_marketplace_hpc.gateway.backends.slurm_commands import observe_guard
from aiida_marketplace_hpc.gateway.backends.slurm_refusals import read_failure
from aiida_marketplace_hpc.gateway.backends.slurm_states import combine, read_state
from aiida_marketplace_hpc.gateway.backends.wrapper import GUARD_PREFIX, make_wrapper, read_trace
from aiida_marketplace_hpc.gateway.firecrest.accounts import Accounts
from aiida_marketplace_hpc.gateway.firecrest.client import (
    TIMEOUT,
    CallFailed,
    Cluster,
    Json,
    TokenRefused,
    UnusableName,
    usable,
)
from aiida_marketplace_hpc.protocol import JobState

logger = logging.getLogger(__name__)

SETTLING_TIME = 60.0
"""Seconds after which a submission that FirecREST has stopped waiting for has come to Slurm, or never will: FirecREST ends
sbatch after 5 s, and Slurm's own messages have 10 s each."""
CLOCK_SKEW = timedelta(seconds=60)
"""How far the clocks of the gateway and of slurmctld may be apart without a lost submission being overlooked."""
ASKED_AT_ONCE = 20
"""Jobs that are asked for one by one in a round of questions, at most; the others wait for the next round."""
_PARTITIONS_AGE = 600.0
FRESH = 2.0
"""Seconds for which one listing answers two questions of the same round."""
_ID = re.compile(r"(\d+)(?:[_+].*)?")
_SBATCH = re.compile(r"exit_status:(-?\d+) std_err:(.*)", re.DOTALL)
WRAPPER_PREFIX = f"{GUARD_PREFIX}script-"
_ENDED = re.compile(r"already completing or completed|Invalid job id specified", re.IGNORECASE)

_NOT_SERVED = {
    "clusters": "jobs on other clusters cannot be followed",
    "test-only": "nothing would be submitted",
    "uid": "jobs run under the account that FirecREST is called with",
    "gid": "jobs run under the account that FirecREST is called with",
    "wait": "FirecREST waits a few seconds only",
}


class FirecrestBackend(Backend):
    """Slurm, through FirecREST.

    :param accounts: as whom FirecREST is called.
    :param machine: the name that users know the cluster by.
    :param settling_time: see :data:`SETTLING_TIME`.
    """

    name = "firecrest"
    _breaking = "|"
    """Characters that break FirecREST's list of jobs, of everybody, for a day: it cuts lines at them."""

    def __init__(
        self,
        accounts: Accounts,
        *,
        machine: str = "firecrest",
        settling_time: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._accounts = accounts
        self._machine = machine
        self._settling_time = SETTLING_TIME if settling_time is None else settling_time
        self._clock = clock
        self._lock = threading.Lock()
        self._whose: dict[str, Cluster] = {}
        self._looked: set[Cluster] = set()
        self._listed: tuple[float, dict[str, Observation]] | None = None
        self._next = 0
        self._partitions: list[str] = []
        self._partitions_asked: float | None = None

    def stop(self) -> None:
        self._accounts.close()

    def submit(self, submission: Submission) -> str:
        cluster = self._account(submission.folder)
        wrapper = _wrapper(submission, self._breaking)
        if cluster is None:
            raise Refused(
                f"the folder {submission.folder} is nobody's: the gateway does not know whose job it would be"
            )
        self._look_before(cluster, submission)
        try:
            return cluster.submit(submission.folder, wrapper, wrapper_name(submission))
        except UnusableName as exc:
            raise Refused(str(exc)) from exc
        except CallFailed as exc:
            raise self._submission_failed(exc) from exc

    def _submission_failed(self, failure: CallFailed) -> Exception:
        return _submission_failed(failure)

    def _look_before(self, cluster: Cluster, submission: Submission) -> None:
        """Before the first submission of an account, make sure that the job is not there already.

        A user's jobs can be seen only when they have sent a token: a survey at the gateway's start did not see them, and the
        ledger may have been lost.

        :raises Deferred: it is, and the survey will find it; or that cannot be known now.
        """
        with self._lock:
            if cluster in self._looked:
                return
        try:
            listed = read_jobs(asked(cluster.jobs))
            here = [id for id, one in listed.items() if not one.state.final and is_in(one, submission.folder)]
            with self._lock:
                self._whose.update(dict.fromkeys(here, cluster))
            traces = self.traces(here)
        except SchedulerDown as exc:
            raise Deferred(f"it is not known yet which jobs there are: {exc}") from exc
        if any(trace.jobid != submission.jobid for trace in traces.values()):
            raise Deferred(f"a job that the gateway had forgotten lives in {submission.folder}")
        with self._lock:
            self._looked.add(cluster)

    def cancel(self, id: str, folder: str | None = None) -> None:
        cluster = (None if folder is None else self._account(folder)) or self._whose.get(id)
        clusters = [cluster] if cluster is not None else self._accounts.usable()
        for one in clusters:
            if folder is not None:
                known = read_jobs(asked(lambda one=one: one.job(id))).get(id)  # type: ignore[misc]
                if known is None or known.state.final or not is_in(known, folder):
                    continue
            try:
                one.cancel(id)
            except CallFailed as exc:
                # scancel says so of a job that has ended, and FirecREST takes that for a fault.
                if not _ENDED.search(exc.message):
                    raise SchedulerDown(f"the cancellation was not taken: {exc.message}") from exc

    def queue(self) -> Mapping[str, Observation]:
        """All jobs of all accounts that answer: one that does not keeps nobody else's from being known.

        :raises SchedulerDown: none of them answers.
        """
        found: dict[str, Observation] = {}
        whose: dict[str, Cluster] = {}
        problems: list[SchedulerDown] = []
        clusters = self._accounts.usable()
        for cluster in clusters:
            try:
                jobs = read_jobs(asked(cluster.jobs))
            except SchedulerDown as exc:
                problems.append(exc)
                continue
            found.update(jobs)
            whose.update(dict.fromkeys(jobs, cluster))
        if problems and len(problems) == len(clusters):
            raise problems[0]
        for problem in problems:
            logger.warning("the jobs of one account are not known now: %s", problem)
        with self._lock:
            self._whose = whose
            self._listed = self._clock(), found
        # A record that has no folder yet says nothing about anybody's job: it is left out until it is whole.
        return {id: one for id, one in found.items() if one.folder}

    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        with self._lock:
            listed = self._listed
        if listed is None or self._clock() - listed[0] > FRESH:
            self.queue()
            with self._lock:
                listed = self._listed
        known = listed[1] if listed is not None else {}
        found = {id: known[id] for id in folders if id in known and is_in(known[id], folders[id])}
        # What ended in this moment is complete in the next round; what is not listed at all is older, or too young.
        silent: set[Cluster] = set()
        for id in self._in_turn(sorted(folders.keys() - known.keys())):
            cluster = self._account(folders[id])
            if cluster is None or cluster in silent:
                continue
            try:
                one = self._one(cluster, id, folders[id])
            except CallFailed as exc:
                logger.warning("what became of job %s is not known now: %s", id, exc.message)
                silent.add(cluster)
                continue
            if one is not None:
                found[id] = one
        return found

    def _in_turn(self, ids: list[str]) -> list[str]:
        """At most so many as are asked for at once, others each time."""
        if len(ids) <= ASKED_AT_ONCE:
            return ids
        start = self._next % len(ids)
        self._next = start + ASKED_AT_ONCE
        return [*ids[start:], *ids[:start]][:ASKED_AT_ONCE]

    def _one(self, cluster: Cluster, id: str, folder: str) -> Observation | None:
        """What is known about a job that is not listed: on record, or in the note of its wrapper.

        :raises CallFailed: that is not known now.
        """
        found = read_jobs(cluster.job(id)).get(id)
        if found is not None and is_in(found, folder):
            return found
        for guard in self._guards(cluster, folder):
            if guard.holder == id and guard.ended:
                return observe_guard(guard, folder)
        return None

    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        """Find the jobs of a folder among those listed, and by the guards that lie there.

        FirecREST does not say when a job was submitted: whoever asks gets jobs too many rather than too few. A record that is
        not whole yet has no folder: while there is one, nothing is proven.
        """
        earliest = since - CLOCK_SKEW
        cluster = self._account(folder)
        if cluster is None:
            raise SchedulerDown(f"the folder {folder} is nobody's now: its jobs cannot be asked for")
        listed = read_jobs(asked(cluster.jobs))
        if any(not one.folder and not _before(one, earliest) for one in listed.values()):
            raise SchedulerDown("Slurm's accounting has a record that is not whole yet")
        found = {id: one for id, one in listed.items() if is_in(one, folder) and not _before(one, earliest)}
        try:
            guards = {guard.holder: guard for guard in self._guards(cluster, folder) if guard.changed_at >= earliest}
        except CallFailed as exc:
            raise SchedulerDown(f"the folder {folder} cannot be looked at: {exc.message}") from exc
        for id in sorted(guards.keys() - found.keys()):
            recorded = self._recorded(cluster, id, folder)
            is_ours = recorded is not None and is_in(recorded, folder)
            found[id] = recorded if recorded is not None and is_ours else observe_guard(guards[id], folder)
        return list(found.values())

    def _recorded(self, cluster: Cluster, id: str, folder: str) -> Observation | None:
        """What is on record about the job that has left a guard in a folder.

        :raises SchedulerDown: that is not known now.
        """
        return read_jobs(asked(lambda: cluster.job(id))).get(id)

    def traces(self, ids: Collection[str]) -> Mapping[str, Trace]:
        """Read the scripts of living jobs, one call for each."""
        found: dict[str, Trace] = {}
        for id in ids:
            cluster = self._whose.get(id)
            for one in [cluster] if cluster is not None else self._accounts.usable():
                script = asked(lambda one=one, id=id: one.script(id))  # type: ignore[misc]
                trace = None if script is None else read_trace(str(script).encode())
                if trace is not None:
                    found[id] = trace
        return found

    @property
    def submission_limit(self) -> float:
        # The call, once more after a refused token, and what comes before it.
        return 2 * TIMEOUT + 15.0

    @property
    def settling_time(self) -> float:
        return self._settling_time

    def describe(self) -> dict[str, object]:
        description: dict[str, object] = {"name": self._machine, "backend": self.name, "accounting": True}
        if partitions := self._known_partitions():
            description["partitions"] = partitions
        return description

    def _known_partitions(self) -> list[str]:
        now = self._clock()
        if self._partitions_asked is None or now - self._partitions_asked > _PARTITIONS_AGE:
            usable_now = self._accounts.usable()
            if usable_now:
                self._partitions_asked = now
                try:
                    self._partitions = usable_now[0].partitions()
                except CallFailed as exc:  # An extra that nobody depends on.
                    logger.info("the partitions are not known: %s", exc.message)
        return list(self._partitions)

    def _account(self, folder: str) -> Cluster | None:
        return self._accounts.of_folder(folder)

    def _guards(self, cluster: Cluster, folder: str) -> list[Guard]:
        """Read all guards in a folder."""
        return self._read_guards(cluster, folder, self._lines(cluster, folder) or [])

    def _lines(self, cluster: Cluster, folder: str) -> list[Json] | None:
        """What lies in a folder; ``None`` if there is no such folder."""
        try:
            return cluster.listing(f"{folder}/")
        except UnusableName:
            return []
        except CallFailed as exc:
            if exc.own and "No such file or directory" in exc.message:
                return None
            raise

    def _read_guards(self, cluster: Cluster, folder: str, lines: list[Json]) -> list[Guard]:
        guards = []
        for name in (str(line["name"]) for line in lines if line["type"] == "-"):
            if name.startswith(GUARD_PREFIX) and not name.startswith(WRAPPER_PREFIX):
                path = posixpath.join(folder, name)
                text = cluster.fetch(path).decode("ascii", "replace")
                changed = datetime.fromtimestamp(int(cluster.stat(path)["mtime"]), timezone.utc)
                guard = parse_guard(text, changed)
                if guard is not None:
                    guards.append(guard)
        return guards


def asked(question: Callable[[], Any]) -> Any:
    """The answer to a question about jobs.

    :raises SchedulerDown: there is none.
    """
    try:
        return question()
    except CallFailed as exc:
        hint = " (a job with a | in its name does that for a day)" if "Error executing Slurm" in exc.message else ""
        raise SchedulerDown(f"FirecREST does not answer about jobs: {exc.message}{hint}") from exc


def _wrapper(submission: Submission, breaking: str) -> str:
    """The script that is submitted.

    FirecREST hands sbatch no name, no comment and no open mode: they stand in the script, before its own directives, of which
    the last one counts.
    """
    try:
        directives = parse_directives(submission.script_text)
    except DirectiveError as error:
        raise Refused(str(error)) from error
    for option, reason in _NOT_SERVED.items():
        if option in directives.options:
            raise Refused(f"#SBATCH --{option} is not possible through this gateway: {reason}")
    for option, value in directives.options.items():
        _check_word(f"#SBATCH --{option}", value, breaking if option == "job-name" else "|")
    _check_word("the path of the job's folder", submission.folder)
    try:
        usable(submission.folder)
    except UnusableName as error:
        raise Refused(str(error)) from error
    added = []
    if "job-name" not in directives.options:
        name = posixpath.basename(submission.script)
        added.append(b"#SBATCH --job-name=" + _quoted("job.sh" if _is_awkward(name, breaking) else name))
    if "comment" not in directives.options and submission.comment:
        added.append(b"#SBATCH --comment=" + _quoted(submission.comment))
    if "open-mode" not in directives.options:
        # Slurm empties the output files before the wrapper runs: a second copy would wipe out what the first one wrote.
        added.append(b"#SBATCH --open-mode=append")
    added += [
        f"#SBATCH --{option}=".encode() + _quoted(value)
        for option, value in submission.options.items()
        if option not in directives.options
    ]
    lines = Directives((*added, *directives.lines), directives.options, directives.heterogeneous)
    try:
        # Where nobody knows the job any more, its note says how it ended.
        return make_wrapper(submission, lines, note_end=True).decode()
    except UnicodeDecodeError:
        raise Refused("a job script that goes through FirecREST needs its directives and comments in UTF-8") from None


def _is_awkward(text: str, breaking: str = "|") -> bool:
    return any(letter in text for letter in breaking) or not text.isprintable()


def _check_word(what: str, value: str, breaking: str = "|") -> None:
    """Refuse what would break FirecREST's list of jobs, of everybody, for a day: it cuts lines there.

    :raises Refused: for such a word.
    """
    if _is_awkward(value, breaking):
        raise Refused(
            f"{what} has a {' or '.join(breaking)} or a character that is not printable, with which FirecREST cannot "
            "list jobs any more"
        )


def wrapper_name(submission: Submission) -> str:
    """The name of the wrapper's file beside the job's guard, where FirecREST submits from files only."""
    return f"{WRAPPER_PREFIX}{submission.jobid}-{submission.attempt}"


def _quoted(text: str) -> bytes:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'.encode("utf-8", "surrogateescape")


def _submission_failed(failure: CallFailed) -> Exception:
    """What a failed submission means."""
    message = failure.message
    if isinstance(failure, TokenRefused):
        return Deferred(message)
    if failure.status == 429:
        return Deferred(message)
    if failure.own and failure.status in (400, 403, 500) and (said := _SBATCH.search(message)):
        return read_failure(int(said[1]), said[2])
    if failure.own and failure.status == 403:
        # A limit of Slurm's accounting, in its own words.
        return read_failure(1, message)
    if failure.own and failure.status == 503 and "unhealthy" in message:
        return Deferred(message)
    if failure.own and failure.status == 400:
        return Refused(message)
    if failure.own and failure.status == 404:
        return Fault(f"FirecREST does not know what the gateway asks for: {message}")
    if failure.carried_out:
        return Unknown(f"whether FirecREST has submitted the job is not known: {message}")
    return Deferred(message)


def read_jobs(records: Iterable[Json]) -> dict[str, Observation]:
    """Read FirecREST's records, by job id: tasks of an array and components of a job count as one.

    :raises SchedulerDown: if one cannot be read.
    """
    jobs: dict[str, list[Observation]] = {}
    for record in records:
        try:
            base = _ID.fullmatch(str(record["jobId"]))
            if base is None:
                raise ValueError(record["jobId"])
            jobs.setdefault(base[1], []).append(_read_job(base[1], record))
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as exc:
            raise SchedulerDown(f"FirecREST says about a job what cannot be read ({exc!r})") from exc
    return {
        id: replace(combine(tasks), columns=COLUMNS, rows=tuple(row for task in tasks for row in task.rows))
        for id, tasks in jobs.items()
    }


def _read_job(id: str, record: Json) -> Observation:
    status, moments = record["status"], record["time"]
    native = str(status["state"])
    reason = "" if status.get("stateReason") in (None, "None") else str(status["stateReason"])
    state = read_state(native, reason)
    code, signal = status.get("exitCode"), status.get("interruptSignal") or None
    has_started = state.final or state in (JobState.RUNNING, JobState.SUSPENDED)
    # Of a job that ended before it began, sacct gives the same time for both.
    started = _moment(moments.get("start")) if has_started and record.get("nodes") != "None assigned" else None
    ended = _moment(moments.get("end")) if state.final else None
    folder, partition = str(record["workingDirectory"] or ""), str(record["partition"] or "")
    # slurmctld sends the start, the steps and the end of a job one by one: until all have come, the record is named
    # `allocation` and has no partition, or has no end. One of squeue's has no exit code.
    half = not partition or not folder or (state.final and (ended is None or code is None))
    exit_code = None
    if state.final and signal is None and started is not None and not (code == 0 and state is not JobState.COMPLETED):
        exit_code = None if code is None else int(code)
    limit, elapsed = moments.get("limit"), moments.get("elapsed")
    observation = Observation(
        id=id,
        state=state,
        native_state=native,
        complete=not half,
        reason=reason,
        name=str(record["name"]),
        partition=partition,
        account=str(record.get("account") or ""),
        nodes="" if record.get("nodes") in (None, "None assigned") else str(record["nodes"]),
        exit_code=exit_code,
        signal=int(signal) if signal and state.final else None,
        started_at=started,
        ended_at=ended,
        time_limit=None if limit is None else int(limit),
        elapsed=None if elapsed is None else int(elapsed),
        folder=folder,
    )
    return replace(observation, rows=tuple(_rows(observation, record))) if state.final else observation


def _rows(job: Observation, record: Json) -> Iterable[tuple[str, ...]]:
    """The accounting record, as far as FirecREST tells it."""
    shared = {"WorkDir": job.folder, "NodeList": job.nodes, "Account": job.account}
    tasks = [one for one in record.get("tasks") or [] if isinstance(one, dict)]
    for one, name, kind in [(record, job.name, "job"), *((task, str(task.get("name")), "step") for task in tasks)]:
        status, moments = one["status"], one["time"]
        identifier = str(one["jobId"] if kind == "job" else one["id"])
        limit = moments.get("limit")
        yield make_row(
            {
                **shared,
                "JobID": identifier,
                "JobIDRaw": identifier,
                "JobName": name,
                "User": record.get("user") or "" if kind == "job" else "",
                "Partition": job.partition if kind == "job" else "",
                "State": status["state"],
                "Reason": status.get("stateReason") or "None" if kind == "job" else "",
                "ExitCode": f"{status.get('exitCode') or 0}:{status.get('interruptSignal') or 0}",
                "Start": format_time(_moment(moments.get("start"))),
                "End": format_time(_moment(moments.get("end"))),
                "ElapsedRaw": "" if moments.get("elapsed") is None else moments["elapsed"],
                "TimelimitRaw": limit // 60 if kind == "job" and isinstance(limit, int) else "",
                "NNodes": record.get("allocationNodes", "") if kind == "job" else "",
            }
        )


def _moment(seconds: object) -> datetime | None:
    return datetime.fromtimestamp(int(seconds), timezone.utc) if isinstance(seconds, int) and seconds > 0 else None


def _before(one: Observation, earliest: datetime) -> bool:
    """Whether a job had certainly been submitted before."""
    known = [moment for moment in (one.started_at, one.ended_at) if moment is not None]
    return bool(known) and min(known) < earliest
