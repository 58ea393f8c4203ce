"""The backend ``slurm``: a cluster whose Slurm commands can be run on the gateway's machine."""

from __future__ import annotations

import os
import posixpath
import pwd
import subprocess
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from aiida_marketplace_hpc.gateway.backends.base import (
    Backend,
    Deferred,
    Observation,
    Refused,
    SchedulerDown,
    Submission,
    Trace,
    is_in,
)
from aiida_marketplace_hpc.gateway.backends.directives import DirectiveError, Directives, parse_directives
from aiida_marketplace_hpc.gateway.backends.environment import job_environment
from aiida_marketplace_hpc.gateway.backends.slurm_commands import (
    Answer,
    draw_separator,
    parse_sacct,
    parse_sbatch,
    parse_scancel,
    parse_sinfo,
    parse_squeue,
    sacct_arguments,
    sbatch_arguments,
    scancel_arguments,
    sinfo_arguments,
    squeue_arguments,
)
from aiida_marketplace_hpc.gateway.backends.wrapper import check_folder, make_wrapper, read_trace

IDS_PER_COMMAND = 500
CLOCK_SKEW = timedelta(seconds=60)
"""How far the clocks of the gateway and of slurmctld may be apart without a lost submission being overlooked."""
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
    """Slurm, through ``sbatch``, ``squeue``, ``sacct``, ``scancel`` and ``sinfo``.

    All jobs belong to one Unix account. Each is submitted as a wrapper that takes the submission's guard and then becomes
    the user's script, with the script's own ``#SBATCH`` lines; its working directory is always the job's folder, by which
    it is found again. Accounting (slurmdbd) is required: nothing else tells how a job ended.

    :param machine: the name that users know the cluster by.
    :param user: the account that the jobs belong to; default: the account that the gateway runs under.
    :param command_timeout: seconds after which a question to Slurm is given up.
    :param submit_timeout: seconds after which sbatch is given up; whether it has submitted is then unknown.
    :param message_timeout: Slurm's ``MessageTimeout`` in seconds, by which a request on its way is taken or lost.
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
        message_timeout: float = 10.0,
        run: Runner | None = None,
    ) -> None:
        self._machine = machine
        self._user = user or pwd.getpwuid(os.geteuid()).pw_name
        self._command_timeout = command_timeout
        self._submit_timeout = submit_timeout
        self._message_timeout = message_timeout
        self._run = run or run_command
        self._partitions: list[str] = []
        self._partitions_asked: float | None = None
        self._partitions_lock = threading.Lock()

    def submit(self, submission: Submission) -> str:
        directives = _read_directives(submission)
        wrapper = make_wrapper(submission, directives)
        check_folder(submission.folder)
        arguments = sbatch_arguments(
            submission.folder,
            directives,
            name=posixpath.basename(submission.script),
            comment=submission.comment,
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
        except OSError as error:
            raise Deferred(f"the gateway cannot run sbatch: {error}") from error
        return parse_sbatch(answer)

    def cancel(self, id: str) -> None:
        parse_scancel(self._ask(scancel_arguments(id)))

    def queue(self) -> Mapping[str, Observation]:
        separator = draw_separator()
        return parse_squeue(self._ask(squeue_arguments(self._user, separator)), separator)

    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        observations: dict[str, Observation] = {}
        wanted = sorted(folders)
        for start in range(0, len(wanted), IDS_PER_COMMAND):
            separator = draw_separator()
            batch = wanted[start : start + IDS_PER_COMMAND]
            answer = self._ask(sacct_arguments(self._user, separator, ids=batch))
            observations.update(parse_sacct(answer, separator))
        return {id: one for id, one in observations.items() if id in folders and is_in(one, folders[id])}

    def traces(self, ids: Collection[str]) -> Mapping[str, Trace]:
        found: dict[str, Trace] = {}
        for id in ids:
            answer = self._ask(["scontrol", "write", "batch_script", id, "-"])
            trace = read_trace(answer.stdout.encode())
            if trace is not None:
                found[id] = trace
        return found

    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        """Find the jobs of a folder in the queue and in accounting.

        Jobs that were submitted up to :data:`CLOCK_SKEW` earlier are found too: a job too many is looked at by the caller,
        a job that is overlooked would be submitted again.
        """
        earliest = since - CLOCK_SKEW
        # The queue first: what leaves it meanwhile is in accounting by then.
        found = dict(self.queue())
        separator = draw_separator()
        recorded = parse_sacct(self._ask(sacct_arguments(self._user, separator, since=earliest)), separator)
        for id, observation in recorded.items():
            if id not in found or found[id].state.final:
                found[id] = observation
        return [
            observation
            for observation in found.values()
            if is_in(observation, folder) and (observation.submitted_at is None or observation.submitted_at >= earliest)
        ]

    @property
    def submission_limit(self) -> float:
        # Beside sbatch there are a few file operations.
        return self._submit_timeout + 15.0

    @property
    def settling_time(self) -> float:
        """Three times Slurm's ``MessageTimeout``: the request, the answer, and as much again for a busy controller."""
        return 3 * self._message_timeout

    def describe(self) -> dict[str, object]:
        description: dict[str, object] = {"name": self._machine, "backend": self.name}
        if partitions := self._known_partitions():
            description["partitions"] = partitions
        return description

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

    def _ask(self, arguments: Sequence[str]) -> Answer:
        try:
            return self._run(
                arguments,
                stdin=b"",
                folder=None,
                environment=_query_environment(),
                timeout=self._command_timeout,
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
        done = subprocess.run(
            arguments,
            input=stdin,
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
