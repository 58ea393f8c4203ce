"""The port to a batch system.

A backend has few methods, each of one action, and does not know users, ledger or HTTP. It says what it knows and never
guesses: an answer that is empty, failed or late is an exception, not an empty list. The ledger decides what follows.
"""

from __future__ import annotations

import abc
import os
import posixpath
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from aiida_marketplace_hpc.protocol import JobState


class BackendError(Exception):
    """The root of what a backend raises on purpose; the message is for a person."""


class Refused(BackendError):
    """*Permanent*: the batch system refuses this job and will refuse it again. Nothing was submitted."""


class Deferred(BackendError):
    """*Temporary*: the batch system takes no job now (limit, maintenance, down). Nothing was submitted; try again later."""


class Fault(Deferred):
    """*A fault of ours*: the gateway, or its set-up on this machine, is wrong, not the job. Nothing was submitted; it is tried
    again like any :class:`Deferred`, but an operator must mend something first, and is told so."""


class Unknown(BackendError):
    """*Ambiguous*: whether the job was submitted is not known. Look for it before submitting again."""


class SchedulerDown(BackendError):
    """A question was not answered. It says nothing about any job."""


@dataclass(frozen=True)
class Submission:
    """One intention to submit.

    :param jobid: the gateway's id of the job.
    :param folder: absolute path of the working directory on the cluster.
    :param script: absolute path of the job script; ``script_text`` is its content, ``script_digest`` its digest.
    :param guard: the name of the file in ``folder`` that a job takes exclusively before it runs ``script``, so that a second
        copy of the same submission ends before user code; ``None``: there is none, and each submission runs the script, as
        the published gateway does.
    :param comment: added where the batch system keeps one and the script sets none.
    :param client_ref: the caller's own reference, such as the UUID of an AiiDA node.
    :param owner: tells users apart without naming them.
    :param options: what the batch system is to be told beside the script, which names none of them: the site's defaults, by
        the long names of sbatch's options without dashes.
    :param attempt: the first, or a later one after a refusal; each has its own guard.
    """

    jobid: str
    folder: str
    script: str
    script_text: bytes
    script_digest: str
    guard: str | None
    comment: str
    client_ref: str | None = None
    owner: str = ""
    attempt: int = 1
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """What a living job says about the submission that it came from: from it a lost row of the ledger is made again.

    :param jobid: the gateway's id of the job; the other fields are those of the :class:`Submission`.
    """

    jobid: str
    folder: str
    script: str
    script_digest: str
    client_ref: str | None
    owner: str
    attempt: int = 1


@dataclass(frozen=True)
class Observation:
    """What the batch system says about one job at one moment.

    :param id: the batch system's own id; of a machine that is not the default one of several, with its name before it.
    :param machine: the one that it is on, where a backend has several.
    :param state: the job's state on the map of :class:`~aiida_marketplace_hpc.protocol.JobState`.
    :param native_state: the state in the batch system's own words.
    :param complete: for an ended job, whether the record is whole; a half record (just submitted, just ended) is not
        believed.
    :param exit_code: of the job script; ``None`` while it lives or where it is not known.
    :param signal: that ended it, or ``None``.
    :param time_limit: seconds; ``None``: unlimited or unknown.
    :param elapsed: seconds of run time so far.
    :param folder: the working directory, by which a lost submission is found again.
    :param columns: with ``rows``, the accounting record as the batch system words it.
    """

    id: str
    state: JobState
    native_state: str
    complete: bool = True
    reason: str = ""
    name: str = ""
    partition: str = ""
    account: str = ""
    nodes: str = ""
    exit_code: int | None = None
    signal: int | None = None
    submitted_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    time_limit: int | None = None
    elapsed: int | None = None
    folder: str = ""
    machine: str = ""
    columns: Sequence[str] = field(default=(), compare=False)
    rows: Sequence[Sequence[str]] = field(default=(), compare=False)


class Backend(abc.ABC):
    """A batch system.

    All methods block and are called from worker threads, several at a time. Times are aware, in UTC. Whatever goes wrong is
    raised as a :class:`BackendError`; any other exception is a fault of the backend's.
    """

    name: str
    """What ``--backend`` calls it."""
    machine: str = ""
    """Of a part that :meth:`on` gives: the name of its machine."""
    problem: str | None = None
    """Of a part that :meth:`on` gives: why that machine did not answer in the last round, though others did."""

    @abc.abstractmethod
    def submit(self, submission: Submission) -> str:
        """Submit a job and return the batch system's id for it.

        May not be repeated: whoever calls it has made sure that this submission is not under way or done already.

        :raises Refused: it will never be taken; nothing was submitted.
        :raises Deferred: it is not taken now; nothing was submitted.
        :raises Unknown: it may or may not have been submitted.
        """

    @abc.abstractmethod
    def cancel(self, id: str, folder: str | None = None) -> None:
        """Ask for the end of a job. May be repeated; cancelling a job that has ended is no error.

        :param folder: the job's working directory. Batch systems use ids again: a job of another folder is left alone.
        :raises SchedulerDown: the request was not taken.
        """

    @abc.abstractmethod
    def queue(self) -> Mapping[str, Observation]:
        """All jobs that the batch system holds now, by id; also jobs that have just ended, if it still shows them.

        A job that is missing here has not ended by that: only :meth:`accounting` says so.

        :raises SchedulerDown: there was no complete answer.
        """

    @abc.abstractmethod
    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        """What is on record about jobs, by id; jobs that are not on record are missing.

        :param folders: the working directory of each job, by id. Batch systems use ids again: a record of another folder is
            about another job, and missing here.
        :raises SchedulerDown: there was no complete answer.
        """

    @abc.abstractmethod
    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        """All jobs, living or ended, that were submitted from ``folder`` since then: a lost submission is found with it.

        An empty answer is a *successful* answer of everything that could know (queue *and* accounting).

        :raises SchedulerDown: there was no complete answer.
        """

    @abc.abstractmethod
    def traces(self, ids: Collection[str]) -> Mapping[str, Trace]:
        """What living jobs were submitted as, by id; a job that no gateway has submitted is missing.

        :raises SchedulerDown: there was no complete answer.
        """

    def on(self, machine: str) -> Backend:
        """The part of it that has the jobs of one machine, by the same ids; itself, where there is only one.

        :param machine: one that there is not stands for the default one.
        """
        return self

    def id_of(self, number: str) -> str:
        """The id of a job of this machine's, which knows itself by its number only."""
        return number

    @property
    def is_silent(self) -> bool:
        """Of a part that :meth:`on` gives: whether that machine lets everybody wait now who asks it for anything."""
        return False

    @property
    def parts(self) -> Sequence[Backend]:
        """What :meth:`on` gives for each of its machines; itself, where there is only one."""
        return (self,)

    @property
    def submission_limit(self) -> float:
        """Seconds after which a call of :meth:`submit` has certainly ended: a submitter is not taken for dead before."""
        return 45.0

    @property
    def settling_time(self) -> float:
        """Seconds after a submission's death until an empty :meth:`find` proves that there was none."""
        return 0.0

    def start(self) -> None:  # noqa: B027
        """Start what the backend runs in the background; called once, before any other method."""

    def stop(self) -> None:  # noqa: B027
        """Stop what :meth:`start` started. Jobs go on."""

    @abc.abstractmethod
    def describe(self) -> dict[str, object]:
        """What ``getInfo`` says about this machine: at least ``name`` and ``backend``; ``partitions`` where known.

        Of several, about the default one; about each with :meth:`on`.
        """


def is_in(observation: Observation, folder: str) -> bool:
    """Whether an observation is about a job of this folder; batch systems lose bytes that are not UTF-8."""
    printed = os.fsencode(folder).decode("utf-8", "replace")
    return posixpath.normpath(observation.folder) in (posixpath.normpath(printed), posixpath.normpath(folder))
