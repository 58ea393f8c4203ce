"""Slurm behind FirecREST v1.

Jobs are followed by the accounting, one question for all that are known to live: the queue costs FirecREST three commands
for each job that it shows, and shows a hundred at most. The queue is asked for all jobs at the start, where a job is looked
for, and now and then; and about each job of which the accounting says that it has ended, because it may have been requeued.
The accounting names no folder: that a record is about a job is known by the guard in the folder, or by when the job's script
was put there.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import cast

from aiida_marketplace_hpc.gateway.backends.base import (
    Deferred,
    Fault,
    Observation,
    Refused,
    SchedulerDown,
    Submission,
    Unknown,
    is_in,
)
from aiida_marketplace_hpc.gateway.backends.firecrest import (
    CLOCK_SKEW,
    FRESH,
    WRAPPER_PREFIX,
    FirecrestBackend,
    asked,
    read_jobs,
)
from aiida_marketplace_hpc.gateway.backends.slurm_commands import observe_guard
from aiida_marketplace_hpc.gateway.backends.slurm_refusals import read_failure
from aiida_marketplace_hpc.gateway.firecrest.accounts import Accounts
from aiida_marketplace_hpc.gateway.firecrest.client import TIMEOUT, CallFailed, Cluster, Json, TokenRefused
from aiida_marketplace_hpc.gateway.firecrest.client_v1 import (
    AT_ONCE,
    SUBMIT_TIME,
    ClusterV1,
    NotStored,
    TaskFailed,
    batches,
)
from aiida_marketplace_hpc.gateway.firecrest.records_v1 import ended_at, recorded, wall

logger = logging.getLogger(__name__)

SETTLING_TIME = 120.0
"""Seconds after which a submission that nobody waits for any more has come to Slurm, or never will: sbatch has no time-out
there, and gives up by itself when slurmctld has not answered several times."""
SURVEY_AGE = 900.0
"""Seconds for which nobody looks for jobs of which the gateway knows nothing, while there are some that it follows."""
_QUARTER = 900
"""Seconds: zones are whole quarters of an hour."""


class FirecrestV1Backend(FirecrestBackend):
    """Slurm, through FirecREST v1."""

    _breaking = "|$"

    def __init__(
        self,
        accounts: Accounts,
        *,
        machine: str = "firecrest",
        settling_time: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        settling_time = SETTLING_TIME if settling_time is None else settling_time
        super().__init__(accounts, machine=machine, settling_time=settling_time, clock=clock)
        self._followed: dict[str, str] = {}
        self._surveyed: float | None = None
        self._rows: tuple[float, dict[str, list[Json]]] | None = None

    def _submission_failed(self, failure: CallFailed) -> Exception:
        message = failure.message
        if isinstance(failure, TaskFailed):
            if "sbatch" in message:
                return read_failure(1, message)
            return Unknown(f"whether FirecREST has submitted the job is not known: {message}")
        if isinstance(failure, NotStored):
            if failure.own and "No such file or directory" in message:
                return Refused(f"the job's folder is not there: {message}")
            return Deferred(f"the script was not stored: {message}")
        if isinstance(failure, TokenRefused) or failure.status in (424, 429):
            return Deferred(message)  # Before anything is submitted it is tried whether the cluster can be reached.
        if failure.own and failure.status in (400, 404) and not failure.carried_out:
            return Fault(f"FirecREST does not take the submission: {message}")
        if failure.carried_out:
            return Unknown(f"whether FirecREST has submitted the job is not known: {message}")
        return Deferred(message)

    def submit(self, submission: Submission) -> str:
        id = super().submit(submission)
        with self._lock:
            self._followed[id] = submission.folder
        return id

    def queue(self) -> Mapping[str, Observation]:
        """The jobs that are followed, as the accounting has them; all that the queue has where a survey is due.

        :raises SchedulerDown: no account answers.
        """
        now = self._clock()
        with self._lock:
            followed = dict(self._followed)
            due = self._surveyed is None or now - self._surveyed > SURVEY_AGE
        if due or not followed:
            found = super().queue()
            with self._lock:
                self._surveyed = now
                self._followed |= {id: one.folder for id, one in found.items() if not one.state.final}
            return found
        rows = self._ask_accounting(followed)
        living = {id: one for id, one in self._observed(rows, followed).items() if not one.state.final}
        with self._lock:
            for id in rows.keys() - living.keys():  # It is asked for once more by whoever wants to know its end.
                self._followed.pop(id, None)
        return living

    def _ask_accounting(self, folders: Mapping[str, str]) -> dict[str, list[Json]]:
        """The rows of the accounting about jobs, by id; those of an account that does not answer are missing.

        :raises SchedulerDown: none answers.
        """
        found: dict[str, list[Json]] = defaultdict(list)
        problems, accounts = [], list(self._by_account(folders))
        for cluster, ids in accounts:
            try:
                for id, rows in _rows(cluster, ids).items():
                    found[id] += rows
            except CallFailed as exc:
                problems.append(exc)
                logger.warning("the jobs of one account are not known now: %s", exc.message)
        if problems and len(problems) == len(accounts):
            raise SchedulerDown(f"FirecREST does not answer about jobs: {problems[0].message}") from problems[0]
        with self._lock:
            self._rows = self._clock(), dict(found)
        return dict(found)

    def _by_account(self, folders: Mapping[str, str]) -> Iterator[tuple[ClusterV1, list[str]]]:
        """The accounts whose jobs these are."""
        whose: dict[Cluster, list[str]] = defaultdict(list)
        usable = self._accounts.usable()
        for id, folder in sorted(folders.items()):
            cluster = self._account(folder)
            if cluster is not None and cluster in usable:
                whose[cluster].append(id)
        for cluster, ids in whose.items():
            yield cast(ClusterV1, cluster), ids

    def _observed(self, rows: Mapping[str, list[Json]], folders: Mapping[str, str]) -> dict[str, Observation]:
        found: dict[str, Observation] = {}
        zones: dict[Cluster, int | None] = {}
        for id, of_one in rows.items():
            cluster = self._account(folders[id]) if id in folders else None
            if cluster is not None:
                if cluster not in zones:
                    zones[cluster] = self._ahead(cluster, folders[id])
                found[id] = _read(id, of_one, folders[id], zones[cluster])
        return found

    def _ahead(self, cluster: Cluster, folder: str) -> int | None:
        """Seconds that the cluster's wall clock is ahead of UTC; asked for now and then."""
        try:
            return (
                cluster.zone() if cluster.zone() is not None else _zone(cluster, folder, self._lines(cluster, folder))
            )
        except CallFailed:
            return None

    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        with self._lock:
            self._followed.update(folders)
            known = self._rows
        if known is not None and self._clock() - known[0] <= FRESH and folders.keys() <= known[1].keys():
            rows = {id: known[1][id] for id in folders}
        else:
            rows = self._ask_accounting(folders)
        observed = self._observed(rows, folders)
        found = {id: one for id, one in observed.items() if not one.state.final}
        unclear = {id: folders[id] for id in self._in_turn(sorted(folders.keys() - found.keys()))}
        for cluster, ids in self._by_account(unclear):
            try:
                for id, one in self._ends(cluster, ids, unclear, rows):
                    found[id] = one
            except (CallFailed, SchedulerDown) as exc:
                logger.warning("what became of jobs is not known now: %s", exc)
        with self._lock:
            for id, one in found.items():
                if one.state.final and one.complete:
                    self._followed.pop(id, None)
        return found

    def _ends(
        self, cluster: ClusterV1, ids: Sequence[str], folders: Mapping[str, str], rows: Mapping[str, list[Json]]
    ) -> Iterator[tuple[str, Observation]]:
        """What became of jobs that the accounting does not show living.

        :raises CallFailed: that is not known now.
        """
        alive: dict[str, Observation] = {}
        for batch in batches(ids, AT_ONCE):
            alive |= read_jobs(cluster.living(batch))
        for id in ids:
            one = alive.get(id)
            if one is not None and not one.state.final:
                if is_in(one, folders[id]):
                    yield id, one
                continue  # It is another one's by now, or FirecREST does not say whose it is.
            end = self._end(cluster, id, folders[id], rows.get(id, []))
            if end is not None:
                yield id, end

    def _end(self, cluster: ClusterV1, id: str, folder: str, rows: list[Json]) -> Observation | None:
        """How a job ended that the queue does not have any more; ``None`` if nobody says so."""
        lines = self._lines(cluster, folder)
        guards = self._read_guards(cluster, folder, lines or [])
        guard = next((one for one in guards if one.holder == id), None)
        if not rows:
            return observe_guard(guard, folder) if guard is not None and guard.ended else None
        if guard is None and _is_older(rows, lines or []):
            return None  # An id that was used before, whose new job is not on record yet.
        end = _read(id, rows, folder, _zone(cluster, folder, lines) or 0)
        if guard is not None and guard.ended and end.state.final:
            # The note has the times without a doubt about the zone.
            noted = observe_guard(guard, folder)
            end = replace(end, started_at=noted.started_at, ended_at=noted.ended_at or end.ended_at)
        return end

    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        """Find the jobs of a folder in the queue, and by the guards that lie there.

        A job that has ended and left no guard has run nothing, and is not found.
        """
        with self._lock:
            self._surveyed = None  # Whoever looks wants to see all of them.
        return super().find(folder, since)

    def _recorded(self, cluster: Cluster, id: str, folder: str) -> Observation | None:
        assert isinstance(cluster, ClusterV1)  # noqa: S101 - there are no others here.
        rows = asked(lambda: _rows(cluster, [id])).get(id)
        return _read(id, rows, folder, cluster.zone() or 0) if rows else None

    @property
    def submission_limit(self) -> float:
        # The script is stored in four calls; then the submission, and the last question about it.
        return 4 * TIMEOUT + TIMEOUT + SUBMIT_TIME + TIMEOUT + 15.0


def _rows(cluster: ClusterV1, ids: Sequence[str]) -> dict[str, list[Json]]:
    """The rows of the accounting about jobs, by id; none where there is no accounting.

    :raises CallFailed: there is no answer.
    """
    found: dict[str, list[Json]] = defaultdict(list)
    for batch in batches(ids, AT_ONCE):
        for row in cluster.recorded(batch):
            found[str(row.get("jobid")).split("_")[0].split("+")[0]].append(row)
    return dict(found)


def _read(id: str, rows: Iterable[Json], folder: str, ahead: int | None) -> Observation:
    """Read the rows about a job.

    :param ahead: seconds that the cluster's wall clock is ahead of UTC; ``None``: not known, and times are left out.
    :raises SchedulerDown: if one cannot be read.
    """
    try:
        records = [recorded(row, folder, ahead) for row in rows]
    except (KeyError, ValueError, TypeError) as exc:
        raise SchedulerDown(f"FirecREST says about a job what cannot be read ({exc!r})") from exc
    return read_jobs(records)[id]


def _is_older(rows: Iterable[Json], lines: Iterable[Json]) -> bool:
    """Whether what is on record ended before the script of this job was put into its folder, by the same wall clock."""
    stored = [wall(line["lastModified"]) for line in lines if str(line["name"]).startswith(WRAPPER_PREFIX)]
    earliest = min((moment for moment in stored if moment is not None), default=None)
    ends = [ended_at(row) for row in rows]
    if earliest is None or not ends or any(end is None for end in ends):
        return False
    return max(end for end in ends if end is not None) < earliest - CLOCK_SKEW.total_seconds()


def _zone(cluster: Cluster, folder: str, lines: Sequence[Json] | None) -> int | None:
    """Seconds that the cluster's wall clock is ahead of UTC: ``ls`` and ``sacct`` name no zone."""
    if cluster.zone() is None:
        for line in lines or ():
            moment = wall(line["lastModified"])
            if moment is not None and str(line["name"]).startswith(WRAPPER_PREFIX):
                exact = int(cluster.stat(f"{folder}/{line['name']}")["mtime"])
                cluster.note_zone(round((moment - exact) / _QUARTER) * _QUARTER)
                break
    return cluster.zone()
