"""The cluster behind the FirecREST v1 double: commands with a time-out, what their failures are called, and jobs.

Source of the commands and of the names of failures: FirecREST 1.13.0, ``src/utilities/utilities.py``,
``src/common/cscs_api_common.py`` and ``src/common/schedulers/slurm.py``.
"""

from __future__ import annotations

import os
import posixpath
import pwd
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from aiida_marketplace_hpc.gateway.backends.base import BackendError, Observation, Submission
from aiida_marketplace_hpc.gateway.backends.environment import job_environment
from aiida_marketplace_hpc.gateway.backends.local import LocalBackend
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

_OVER = 124
"""The exit code of ``timeout`` for a command that it has ended."""


@dataclass(frozen=True)
class Outcome:
    """What came of a command; both outputs as text."""

    code: int
    stdout: str
    stderr: str

    @property
    def words(self) -> str:
        """What it has to say about its failure, in one line."""
        return "".join((self.stderr or self.stdout).splitlines()).strip()


class JobFailed(Exception):
    """A command about jobs failed; the message is the scheduler's."""


class Jobs(Protocol):
    """A batch system as FirecREST sees it: rows of text."""

    def submit(self, folder: str, script: str, account: str | None) -> dict[str, object]:
        """Submit a script and return what FirecREST says about the new job.

        :raises JobFailed: it is not taken.
        """

    def queue(self, ids: Sequence[str]) -> list[dict[str, str]]:
        """The living jobs, or those of them that are named.

        :raises JobFailed: there is no answer, or an id is not known.
        """

    def accounting(self, ids: Sequence[str]) -> list[dict[str, str]]:
        """What is on record about jobs.

        :raises JobFailed: there is no answer.
        """

    def files(self, id: str) -> dict[str, str]:
        """The script of a job, and where its output goes; nothing where that is not known (any more)."""

    def cancel(self, id: str) -> str:
        """Ask for the end of a job; of one that has ended, too.

        :raises JobFailed: there is no answer.
        """


class Commands:
    """Runs commands where the cluster is, each with a time-out.

    :param slurm: on whose machine, and under whose user's account; else here, under the account of this process.
    :param home: what commands that run here take for their home, so that they leave the real one alone.
    """

    def __init__(self, slurm: SlurmCluster | None, home: Path) -> None:
        self._slurm = slurm
        self._home = home
        self.delay = 0.0
        """Seconds that each command takes longer."""

    @property
    def user(self) -> str:
        """The account."""
        return self._slurm.user if self._slurm else pwd.getpwuid(os.geteuid()).pw_name

    def run(self, *argv: str, input: bytes = b"", timeout: float | None = None) -> Outcome:
        """Run a command to its end.

        :param timeout: seconds; the exit code is then 124.
        """
        command = list(argv)
        if self.delay:
            command = ["sh", "-c", 'sleep "$0" && exec "$@"', str(self.delay), *command]
        if timeout is not None:
            command = ["timeout", str(timeout), *command]
        if self._slurm is not None:
            done = self._slurm.machine.run(command, user=self.user, env=self._slurm.env, input=input)
            return Outcome(done.returncode, done.stdout, done.stderr)
        environment = {**job_environment(), "LANG": "C.UTF-8", "HOME": str(self._home)}
        here = subprocess.run(command, input=input, capture_output=True, env=environment, cwd="/", check=False)
        return Outcome(here.returncode, here.stdout.decode(errors="replace"), here.stderr.decode(errors="replace"))


def refusal_header(outcome: Outcome) -> dict[str, str]:
    """The header that tells how a command failed."""
    said = outcome.words
    if outcome.code == _OVER:
        return {"X-Timeout": "Command has finished with timeout signal"}
    if "No such file" in said and "cannot stat" in said:
        return {"X-Not-Found": "sourcePath not found"}
    for words, header, text in _FAILURES:
        if all(word in said for word in words):
            return {header: text}
    return {"X-Error": said.encode("ascii", "replace").decode()}


_DENIED = "User does not have permissions to access path"
_FAILURES = (
    (("cannot access",), "X-Invalid-Path", "path is an invalid path"),
    (("No such file",), "X-Invalid-Path", "path is an invalid path"),
    (("cannot open",), "X-Permission-Denied", _DENIED),
    (("Permission denied",), "X-Permission-Denied", _DENIED),
    (("exists", "mkdir"), "X-Exists", "targetPath directory already exists"),
    (("directory",), "X-A-Directory", "path is a directory, can't checksum directories"),
    (("overwrite",), "X-Exists", "targetPath already exists"),
    (("not permitted",), "X-Permission-Denied", _DENIED),
    (("invalid group",), "X-Invalid-Group", "group is an invalid group"),
    (("invalid user",), "X-Invalid-Owner", "owner is an invalid user"),
    (("invalid mode",), "X-Invalid-Mode", "mode is an invalid mode"),
)


_QUEUE = ("jobid", "partition", "name", "user", "state", "start_time", "time", "time_left", "nodes", "nodelist")
_RECORD = (*_QUEUE, "exit_code")


class SlurmJobs:
    """The jobs of a real Slurm."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    def submit(self, folder: str, script: str, account: str | None) -> dict[str, object]:
        options = [f"--account={account}"] if account else []
        said = self._ask("sbatch", *options, f"--chdir={folder}", "--", script).split()
        jobid: object = int(said[-1]) if said and said[-1].isdigit() else " ".join(said)
        return {"result": "Job submitted", "jobid": jobid, **self.files(str(jobid))}

    def files(self, id: str) -> dict[str, str]:
        try:
            said = self._ask("scontrol", "-o", "show", f"job={id}")
        except JobFailed as exc:
            return {"job_file_out": "Not available", "job_file_err": "Not available", "job_info_extra": str(exc)}
        fields = dict(word.split("=")[:2] for word in said.split() if "=" in word)
        return about(fields["Command"], fields["StdOut"], fields["StdErr"])

    def queue(self, ids: Sequence[str]) -> list[dict[str, str]]:
        separator = ".:."
        wanted = [f"--jobs={','.join(ids)}"] if ids else []
        form = separator.join(("%i", "%P", "%j", "%u", "%T", "%M", "%S", "%L", "%D", "%R"))
        said = self._ask("squeue", f"--user={self._commands.user}", *wanted, f"--format={form}", "--noheader")
        return [dict(zip(_QUEUE, line.split(separator), strict=False)) for line in said.splitlines()]

    def accounting(self, ids: Sequence[str]) -> list[dict[str, str]]:
        wanted = [f"--jobs={','.join(ids)}"]  # Also where none is named.
        columns = "jobid,partition,jobname,user,state,start,cputime,end,NNodes,NodeList,ExitCode"
        said = self._ask("sacct", "-X", *wanted, f"--format={columns}", "--noheader", "--parsable2")
        return [dict(zip(_RECORD, line.split("|"), strict=False)) for line in said.splitlines()]

    def cancel(self, id: str) -> str:
        outcome = self._commands.run("scancel", "-v", id)
        # With -v it says what it does where errors are said, and ends with 0 also for a job that has ended, which FirecREST
        # takes for a success (seen with Slurm 22.05).
        if outcome.code or (outcome.stderr.strip() and "scancel: Terminating job" not in outcome.stderr):
            raise JobFailed(outcome.words)
        return outcome.stdout.strip()

    def _ask(self, *argv: str) -> str:
        outcome = self._commands.run(*argv)
        if outcome.code:
            raise JobFailed(outcome.words)
        return outcome.stdout.strip()


class LocalJobs:
    """Jobs as processes of this machine, where there is no Slurm: the package's backend ``local``."""

    def __init__(self) -> None:
        self._spool = tempfile.TemporaryDirectory(prefix="mphpc-firecrest-v1-", ignore_cleanup_errors=True)
        self._backend = LocalBackend(Path(self._spool.name), partitions=("debug", "normal"))
        self._scripts: dict[str, str] = {}

    def start(self) -> None:
        """Start what runs jobs."""
        self._backend.start()

    def stop(self) -> None:
        """End all jobs, and what runs them."""
        for id in self._backend.queue():
            self._backend.cancel(id)
        deadline = time.monotonic() + 10
        while self._backend.queue() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._backend.stop()
        self._spool.cleanup()

    def submit(self, folder: str, script: str, account: str | None) -> dict[str, object]:
        text = Path(script).read_bytes()
        try:
            id = self._backend.submit(Submission("", folder, script, text, "", guard=None, comment=""))
        except BackendError as exc:
            raise JobFailed(f"sbatch: error: {exc}") from exc
        self._scripts[id] = script
        return {"result": "Job submitted", "jobid": int(id), **self.files(id)}

    def files(self, id: str) -> dict[str, str]:
        script = self._scripts[id]
        output = posixpath.join(posixpath.dirname(script), f"slurm-{id}.out")
        return about(script, output, output)

    def queue(self, ids: Sequence[str]) -> list[dict[str, str]]:
        found = self._backend.queue()
        if ids and not any(id in found for id in ids):
            raise JobFailed("slurm_load_jobs error: Invalid job id specified")
        return [_row(job, _QUEUE) for id, job in found.items() if not ids or id in ids]

    def accounting(self, ids: Sequence[str]) -> list[dict[str, str]]:
        wanted = {id: posixpath.dirname(script) for id, script in self._scripts.items() if not ids or id in ids}
        living = {id: job for id, job in self._backend.queue().items() if id in wanted}
        return [_row(job, _RECORD) for job in {**living, **self._backend.accounting(wanted)}.values()]

    def cancel(self, id: str) -> str:
        self._backend.cancel(id)
        return ""


def _wall(moment: datetime | None) -> str:
    return "Unknown" if moment is None else moment.astimezone().strftime("%Y-%m-%dT%H:%M:%S")


def _row(job: Observation, columns: Sequence[str]) -> dict[str, str]:
    clock = str(timedelta(seconds=job.elapsed or 0))
    row = {
        "jobid": job.id,
        "partition": job.partition,
        "name": job.name,
        "user": pwd.getpwuid(os.geteuid()).pw_name,
        "state": job.native_state,
        "start_time": _wall(job.started_at),
        "time": clock,
        "time_left": _wall(job.ended_at),
        "nodes": "1",
        "nodelist": job.nodes or "None assigned",
        "exit_code": f"{job.exit_code or 0}:{job.signal or 0}",
    }
    return {name: row[name] for name in columns}


def about(script: str, output: str, error: str) -> dict[str, str]:
    """What FirecREST says about the files of a job."""
    return {
        "job_file": script,
        "job_file_out": output,
        "job_file_err": error,
        "job_data_out": "",
        "job_data_err": "",
        "job_info_extra": "Job info returned successfully",
    }
