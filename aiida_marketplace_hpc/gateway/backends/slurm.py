"""The backend ``slurm``: a cluster whose Slurm commands can be run on the gateway's machine."""

from __future__ import annotations

import logging
import os
import posixpath
import pwd
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Protocol

from aiida_marketplace_hpc.directives import DirectiveError, Directives, parse_directives
from aiida_marketplace_hpc.gateway.backends.base import (
    Backend,
    Deferred,
    Fault,
    Observation,
    Refused,
    SchedulerDown,
    Submission,
    Trace,
    is_in,
)
from aiida_marketplace_hpc.gateway.backends.environment import job_environment
from aiida_marketplace_hpc.gateway.backends.guard import read_guards
from aiida_marketplace_hpc.gateway.backends.slurm_commands import (
    Answer,
    draw_separator,
    observe_guard,
    parse_sacct,
    parse_sbatch,
    parse_scancel,
    parse_script,
    parse_sinfo,
    parse_squeue,
    parse_squeue_of_one,
    parse_statuses,
    sacct_arguments,
    sbatch_arguments,
    scancel_arguments,
    script_arguments,
    sinfo_arguments,
    squeue_arguments,
    statuses_arguments,
)
from aiida_marketplace_hpc.gateway.backends.slurm_config import (
    Configuration,
    KnownConfiguration,
    config_arguments,
    parse_config,
)
from aiida_marketplace_hpc.gateway.backends.wrapper import check_folder, make_wrapper, read_trace

logger = logging.getLogger(__name__)

IDS_PER_COMMAND = 500
CLOCK_SKEW = timedelta(seconds=60)
"""How far the clocks of the gateway and of slurmctld may be apart without a lost submission being overlooked."""
MESSAGE_TIMEOUT = 10.0
"""Slurm's own default, in seconds; what the gateway reckons with at least."""
WHOSE_TIMEOUT = 8.0
"""Seconds after which the question whose job an id is now is given up: somebody waits for the cancellation to be answered."""
TRACES_TIME = 60.0
"""Seconds in which all job scripts that were asked for have to be read."""
_TRACES_AT_ONCE = 4
_PARTITIONS_AGE = 600.0

_NOT_SERVED = {
    "clusters": "jobs on other clusters cannot be followed",
    "test-only": "nothing would be submitted",
    "uid": "jobs run under the gateway's account",
    "gid": "jobs run under the gateway's account",
}


class Runner(Protocol):
    """Runs one command."""

    def __call__(
        self,
        arguments: Sequence[str],
        *,
        stdin: bytes,
        folder: str | None,
        environment: Mapping[str, str],
        timeout: float,
    ) -> Answer:
        """Run a command to its end, or kill it after ``timeout`` seconds.

        :raises OSError: if it cannot be started; then it has done nothing.
        """


class SlurmBackend(Backend):
    """Slurm, through ``sbatch``, ``squeue``, ``sacct``, ``scancel``, ``scontrol`` and ``sinfo``.

    All jobs belong to one Unix account. Each is submitted as a wrapper that takes the submission's guard and then becomes
    the user's script, with the script's own ``#SBATCH`` lines; its working directory is always the job's folder, by which
    it is found again.

    How a job ended is in the accounting (slurmdbd). A cluster without is served, too, with less certainty: the controller
    tells it as long as it remembers the job (Slurm's ``MinJobAge``), afterwards what the wrapper has noted in the guard.

    :param machine: the name that users know the cluster by.
    :param user: the account that the jobs belong to; default: the account that the gateway runs under.
    :param command_timeout: seconds after which a question to Slurm is given up.
    :param submit_timeout: seconds after which sbatch is given up; whether it has submitted is then unknown.
    :param run: runs the commands.
    """

    name = "slurm"

    def __init__(
        self,
        *,
        machine: str = "slurm",
        user: str | None = None,
        command_timeout: float = 15.0,
        submit_timeout: float = 30.0,
        run: Runner | None = None,
    ) -> None:
        self._machine = machine
        self._user = user or pwd.getpwuid(os.geteuid()).pw_name
        self._command_timeout = command_timeout
        self._submit_timeout = submit_timeout
        self._run = run or run_command
        self._configuration = KnownConfiguration(self._read_configuration)
        self._partitions: list[str] = []
        self._partitions_asked: float | None = None
        self._partitions_lock = threading.Lock()

    def start(self) -> None:
        configuration = self._configuration.get()
        if configuration is not None and not configuration.accounting:
            logger.warning(
                "this Slurm has no accounting: how a job ended may not be known long after, nor what it used"
            )

    def submit(self, submission: Submission) -> str:
        directives = _read_directives(submission)
        wrapper = self._wrapper(submission, directives)
        check_folder(submission.folder)
        arguments = sbatch_arguments(
            submission.folder,
            directives,
            name=posixpath.basename(submission.script),
            comment=submission.comment,
            defaults=submission.options,
            guarded=submission.guard is not None,
        )
        try:
            answer = self._run(
                arguments,
                stdin=wrapper,
                # Slurm takes SLURM_SUBMIT_DIR from here.
                folder=submission.folder,
                environment=_submit_environment(),
                timeout=self._submit_timeout,
            )
        except (FileNotFoundError, PermissionError) as error:
            check_folder(submission.folder)  # It may have gone a moment ago.
            raise Fault(f"the gateway cannot run sbatch: {error}") from error
        except OSError as error:
            raise Deferred(f"the gateway cannot run sbatch: {error}") from error
        return parse_sbatch(answer)

    def _wrapper(self, submission: Submission, directives: Directives) -> bytes:
        if submission.guard is None:
            return submission.script_text
        configuration = self._configuration.get()
        # Where it is not known whether there is an accounting, a note too much does no harm.
        return make_wrapper(submission, directives, note_end=configuration is None or not configuration.accounting)

    def cancel(self, id: str, folder: str | None = None) -> None:
        """Ask for the end of a job.

        With a folder the queue is asked first, which costs as much as the cancellation itself. Between the two Slurm would
        have to forget the job, which takes it ``MinJobAge``, and to come round to its id again: that is not to be feared.
        """
        if folder is not None:
            separator = draw_separator()
            question = squeue_arguments(self._user, separator, id=id)
            answer = self._ask(question, timeout=min(WHOSE_TIMEOUT, self._command_timeout))
            job = parse_squeue_of_one(answer, separator)
            if job is None or not is_in(job, folder):
                return
        parse_scancel(self._ask(scancel_arguments(id)))

    def queue(self) -> Mapping[str, Observation]:
        separator = draw_separator()
        return parse_squeue(self._ask(squeue_arguments(self._user, separator)), separator)

    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        if not folders:
            return {}
        found = self._on_record(folders) if self._has_accounting() else self._remembered()
        found = {id: one for id, one in found.items() if id in folders and is_in(one, folders[id])}
        return {**self._noted({id: folder for id, folder in folders.items() if id not in found}), **found}

    def _on_record(self, folders: Mapping[str, str]) -> dict[str, Observation]:
        """What the accounting says about jobs."""
        found = self._sacct(sorted(folders))
        # The newest job of an id is a stranger: its predecessor may be on record, too.
        reused = {id: folders[id] for id, one in found.items() if id in folders and not is_in(one, folders[id])}
        return {**found, **self._sacct(sorted(reused), among=reused)}

    def _sacct(self, ids: Sequence[str], among: Mapping[str, str] | None = None) -> dict[str, Observation]:
        """Ask for the newest record of each job; or, of all records, for the newest in the job's folder."""
        found: dict[str, Observation] = {}
        for start in range(0, len(ids), IDS_PER_COMMAND):
            separator = draw_separator()
            batch = ids[start : start + IDS_PER_COMMAND]
            answer = self._ask(sacct_arguments(self._user, separator, ids=batch, duplicates=among is not None))
            if "accounting storage is disabled" in answer.stdout + answer.stderr:
                self._configuration.doubt()
            found.update(parse_sacct(answer, separator, folders=among))
        return found

    def _remembered(self) -> dict[str, Observation]:
        """What the controller still knows about jobs, with their exit codes."""
        # The statuses first: an end that comes between the two has none yet, and is not believed for now.
        statuses = parse_statuses(self._ask(statuses_arguments(self._user)))
        separator = draw_separator()
        return parse_squeue(self._ask(squeue_arguments(self._user, separator)), separator, statuses)

    def _noted(self, folders: Mapping[str, str]) -> dict[str, Observation]:
        """What the wrappers of jobs have noted about their ends."""
        noted: dict[str, Observation] = {}
        for id, folder in folders.items():
            for guard in read_guards(folder):
                if guard.holder == id and guard.ended:
                    noted[id] = observe_guard(guard, folder)
        return noted

    def traces(self, ids: Collection[str]) -> Mapping[str, Trace]:
        """Read the scripts of jobs that have not ended, one command for each: Slurm has none for several."""
        until = time.monotonic() + TRACES_TIME

        def read(id: str) -> Trace | None:
            if time.monotonic() > until:
                raise SchedulerDown(f"the scripts of {len(ids)} jobs could not be read in {TRACES_TIME:g} s")
            script = parse_script(self._ask(script_arguments(id)))
            return None if script is None else read_trace(script)

        with ThreadPoolExecutor(_TRACES_AT_ONCE, thread_name_prefix="traces") as readers:
            found = dict(zip(ids, readers.map(read, ids), strict=True))
        return {id: trace for id, trace in found.items() if trace is not None}

    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        """Find the jobs of a folder in the queue, in accounting, and by the guards that lie there.

        Jobs that were submitted up to :data:`CLOCK_SKEW` earlier are found too: a job too many is looked at by the caller,
        a job that is overlooked would be submitted again.

        A job that has run has left its guard, and is found by it however long ago that was: also where there is no accounting,
        and where accounting has lost its start, so that a question by time overlooks it. Without accounting a job that was
        cancelled before it ran, and then forgotten by Slurm, is not found any more: it may be submitted again, and its script
        is executed once all the same.
        """
        earliest = since - CLOCK_SKEW
        # The queue first: what leaves it meanwhile is in accounting by then.
        found = dict(self.queue())
        if self._has_accounting():
            separator = draw_separator()
            answer = self._ask(sacct_arguments(self._user, separator, since=earliest))
            for id, observation in parse_sacct(answer, separator).items():
                if id not in found or found[id].state.final:
                    found[id] = observation
        found = {
            id: one
            for id, one in found.items()
            if is_in(one, folder) and (one.submitted_at is None or one.submitted_at >= earliest)
        }
        guards = {guard.holder: guard for guard in read_guards(folder) if guard.changed_at >= earliest}
        others = guards.keys() - found.keys()
        recorded = self.accounting(dict.fromkeys(others, folder))
        return [*found.values(), *(recorded.get(id) or observe_guard(guards[id], folder) for id in sorted(others))]

    @property
    def submission_limit(self) -> float:
        # Beside sbatch there are a few file operations.
        return self._submit_timeout + 15.0

    @property
    def settling_time(self) -> float:
        """Three times Slurm's ``MessageTimeout``: the request, the answer, and as much again for a busy controller."""
        known = self._configuration.last
        return 3 * max(MESSAGE_TIMEOUT, known.message_timeout if known else 0.0)

    def describe(self) -> dict[str, object]:
        description: dict[str, object] = {"name": self._machine, "backend": self.name}
        configuration = self._configuration.get()
        if configuration is not None:
            description["accounting"] = configuration.accounting
        if partitions := self._known_partitions():
            description["partitions"] = partitions
        return description

    def _has_accounting(self) -> bool:
        """Whether to ask the accounting; also where that is not known, because an answer of it is worth most."""
        configuration = self._configuration.get()
        return configuration is None or configuration.accounting

    def _read_configuration(self) -> Configuration:
        return parse_config(self._ask(config_arguments()))

    def _known_partitions(self) -> list[str]:
        with self._partitions_lock:
            now = time.monotonic()
            if self._partitions_asked is None or now - self._partitions_asked > _PARTITIONS_AGE:
                self._partitions_asked = now
                try:
                    self._partitions = parse_sinfo(self._ask(sinfo_arguments()))
                except SchedulerDown:
                    # An extra that nobody depends on: what was known before is as good.
                    pass
            return list(self._partitions)

    def _ask(self, arguments: Sequence[str], *, timeout: float | None = None) -> Answer:
        try:
            return self._run(
                arguments,
                stdin=b"",
                folder=None,
                environment=_query_environment(),
                timeout=timeout or self._command_timeout,
            )
        except OSError as error:
            raise SchedulerDown(f"the gateway cannot run {arguments[0]}: {error}") from error


def run_command(
    arguments: Sequence[str],
    *,
    stdin: bytes,
    folder: str | None,
    environment: Mapping[str, str],
    timeout: float,
) -> Answer:
    """Run a command on this machine, as :class:`Runner` says."""
    try:
        # Not through a pipe: if the gateway is killed meanwhile, sbatch would take half a script for a whole one.
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            done = subprocess.run(
                arguments,
                stdin=file,
                capture_output=True,
                cwd=folder,
                env=environment,
                timeout=timeout,
                check=False,
                # A key press in the gateway's terminal must not end a submission that is under way.
                start_new_session=True,
            )
    except subprocess.TimeoutExpired as expired:
        return Answer(None, _decode(expired.stdout), _decode(expired.stderr))
    return Answer(done.returncode, _decode(done.stdout), _decode(done.stderr))


def _decode(output: bytes | None) -> str:
    return (output or b"").decode("utf-8", "replace")


def _read_directives(submission: Submission) -> Directives:
    try:
        directives = parse_directives(submission.script_text)
    except DirectiveError as error:
        raise Refused(str(error)) from error
    for option, reason in _NOT_SERVED.items():
        if option in directives.options:
            raise Refused(f"#SBATCH --{option} is not possible through this gateway: {reason}")
    return directives


def _submit_environment() -> dict[str, str]:
    """What sbatch runs with: it hands its own environment on to the job."""
    environment = job_environment()
    if "SLURM_CONF" in os.environ:
        environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
    return environment


def _query_environment() -> dict[str, str]:
    """What all other commands run with. They print times of the zone that they are told, without naming it."""
    return {**_submit_environment(), "LC_ALL": "C.UTF-8", "TZ": "UTC0"}
