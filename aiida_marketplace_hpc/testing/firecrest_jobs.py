"""The jobs of a FirecREST for tests: processes of a machine, or those of a real Slurm, asked as FirecREST asks it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aiida_marketplace_hpc.directives import DirectiveError, parse_directives
from aiida_marketplace_hpc.gateway.backends.base import Refused
from aiida_marketplace_hpc.gateway.backends.wrapper import check_script
from aiida_marketplace_hpc.testing.machine import Machine
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

Json = dict[str, Any]


class CommandFailed(Exception):
    """A command of Slurm's that failed; ``said`` is how FirecREST passes it on."""

    def __init__(self, status: int, stderr: str) -> None:
        super().__init__(stderr)
        self.said = f"Unexpected Slurm command response. exit_status:{status} std_err:{stderr}"


class Jobs(Protocol):
    """Where jobs run. All methods raise :class:`CommandFailed`."""

    def submit(self, script: str, folder: str, user: str) -> str:
        """Submit a script; its id."""
        ...

    def records(self, user: str, id: str | None = None) -> list[Json]:
        """What there is on record about a user's jobs, or about one job."""
        ...

    def script(self, id: str) -> str | None:
        """The script of a job."""
        ...

    def cancel(self, id: str) -> None:
        """Ask for the end of a job."""
        ...

    def partitions(self) -> Sequence[str]:
        """Their names."""
        ...

    def close(self) -> None:
        """End what runs."""
        ...


@dataclass
class _Process:
    id: str
    user: str
    script: str
    folder: str
    name: str
    process: subprocess.Popen[bytes] | None
    started: int
    ended: int | None = None
    cancelled: bool = False

    @property
    def state(self) -> str:
        if self.process is None:
            return "CANCELLED by 999" if self.cancelled else "PENDING"
        code = self.process.poll()
        if code is None:
            return "RUNNING"
        self.ended = self.ended or int(time.time())
        return "CANCELLED by 999" if self.cancelled else "FAILED" if code else "COMPLETED"


class Processes:
    """Every job is a process of the machine's user, and starts at once unless it is held (``#SBATCH --hold``)."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._lock = threading.Lock()
        self._jobs: dict[str, _Process] = {}
        self._count = 0
        self._scripts = machine.make_directory("firecrest-jobs", user=machine.user)

    @property
    def ids(self) -> list[str]:
        """Of all jobs that were ever submitted, oldest first."""
        return list(self._jobs)

    def submit(self, script: str, folder: str, user: str) -> str:
        machine = self._machine
        try:
            check_script(script.encode())
            options = parse_directives(script.encode()).options
        except (Refused, DirectiveError) as exc:
            raise CommandFailed(1, _as_sbatch(str(exc))) from exc
        if options.get("partition") == "nowhere":
            raise CommandFailed(1, "sbatch: error: Batch job submission failed: Invalid partition name specified\n")
        with self._lock:
            self._count += 1
            id = str(self._count)
            path = f"{self._scripts}/{id}"
            machine.write(path, script, user=machine.user, mode=0o755)
            output = os.path.join(folder, options.get("output", "slurm-%j.out").replace("%j", id))
            error = os.path.join(folder, options["error"].replace("%j", id)) if "error" in options else ""
            command = f"cd {shlex.quote(folder)} && exec {path} < /dev/null >> {shlex.quote(output)} 2>> "
            command += shlex.quote(error) if error else "/dev/stdout"
            command = command.replace("2>> /dev/stdout", "2>&1")
            process = None
            if "hold" not in options:
                process = machine.popen(
                    ["bash", "-c", command],
                    user=machine.user,
                    env={"SLURM_JOB_ID": id, "SLURM_SUBMIT_DIR": folder},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            name = options.get("job-name", "sbatch")
            self._jobs[id] = _Process(id, user, script, folder, name, process, int(time.time()))
        return id

    def records(self, user: str, id: str | None = None) -> list[Json]:
        with self._lock:
            jobs = [job for job in self._jobs.values() if (job.user == user if id is None else job.id == id)]
        # As the real one: such a line has a field too many, and that of its first step then has no job.
        if any("|" in job.name + job.folder and job.process is not None for job in jobs):
            raise CommandFailed(0, "KeyError")
        return [self._record(job) for job in jobs]

    @staticmethod
    def _record(job: _Process) -> Json:
        state = job.state
        code = None if job.process is None else job.process.poll()
        ended = state not in ("RUNNING", "PENDING")
        end = job.ended or job.started
        signalled = code is not None and code < 0 and not job.cancelled
        return {
            "jobId": job.id,
            "name": job.name,
            "status": {
                "state": state,
                "stateReason": "JobHeldUser" if state == "PENDING" else "None",
                "exitCode": (max(code or 0, 0) if not job.cancelled else 0) if ended else None,
                "interruptSignal": (-(code or 0) if signalled else 0) if ended else None,
            },
            "tasks": [],
            "time": {
                "elapsed": (end if ended else int(time.time())) - job.started,
                "start": job.started if job.process is not None or ended else None,
                "end": end if ended else None,
                "suspended": 0,
                "limit": 600,
            },
            "account": "project",
            "allocationNodes": 1,
            "cluster": "double",
            "group": job.user,
            "nodes": "node1" if job.process is not None else "None assigned" if ended else "",
            "partition": "debug",
            "killRequestUser": None,
            "user": job.user,
            "workingDirectory": job.folder,
            "priority": 1,
        }

    def script(self, id: str) -> str | None:
        with self._lock:
            job = self._jobs.get(id)
        return None if job is None else job.script

    def forget(self, id: str) -> None:
        """Let a job be as if it had never been; it is ended."""
        with self._lock:
            _end(self._jobs.pop(id).process)

    def cancel(self, id: str) -> None:
        with self._lock:
            job = self._jobs.get(id)
        said = f"scancel: Terminating job {id}\nscancel: error: Kill job error on job id {id}: "
        if job is None:
            raise CommandFailed(0, f"{said}Invalid job id specified\n")
        if job.state not in ("RUNNING", "PENDING"):
            raise CommandFailed(0, f"{said}Job/step already completing or completed\n")
        job.cancelled = True
        job.ended = int(time.time())
        _end(job.process)

    def partitions(self) -> Sequence[str]:
        return ["debug"]

    def close(self) -> None:
        for job in self._jobs.values():
            _end(job.process)


def _as_sbatch(words: str) -> str:
    """The words as sbatch breaks them into lines."""
    words = words.replace("batch script. The first line", "batch script.  The first\nline")
    words = words.replace("interpreter. For", "interpreter.\nFor")
    return "".join(f"sbatch: error: {line}\n" for line in words.split("\n"))


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


_SACCT = (
    "JobID,AllocNodes,Cluster,ExitCode,Group,Account,JobName,NodeList,Partition,Priority,State,Reason,ElapsedRaw,"
    "Submit,Start,End,Suspended,TimelimitRaw,User,WorkDir"
)
_SQUEUE = (
    "JobID:|,NumNodes:|,Cluster:||,GroupName:|,Account:|,Name:|,NodeList:|,Partition:|,PriorityLong:|,State:|,Reason:|,"
    "TimeUsed:|,SubmitTime:|,StartTime:|,EndTime:||,TimeLimit:|,UserName:|,WorkDir:"
)
_WIDTH = 20


class SlurmCommands:
    """A real Slurm, through the commands that FirecREST runs over SSH, under the machine's user."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self._cluster = cluster
        self._user = cluster.machine.user

    def submit(self, script: str, folder: str, user: str) -> str:
        arguments = ["sbatch", "--export=ALL,F7T_version=v2.0.0", f"--chdir={folder}"]
        done = self._cluster.run(*arguments, user=self._user, input=script)
        if done.returncode:
            raise CommandFailed(done.returncode, done.stderr)
        found = re.search("Submitted batch job ([0-9]+)", done.stdout)
        if found is None:
            raise CommandFailed(done.returncode, done.stderr)
        return found[1]

    def records(self, user: str, id: str | None = None) -> list[Json]:
        jobs = {}
        which = ["--allusers", f"--jobs={id}"] if id else ["--starttime=now-24hours"]
        for job in self._ask("sacct", *which, "--parsable2", "--noheader", f"--format={_SACCT}"):
            jobs[job["jobId"]] = job
        which = [f"--jobs={id}"] if id else [f"--user={self._user}"]
        for job in self._ask("squeue", *which, "--noheader", f"--Format={_SQUEUE}"):
            if job["jobId"] not in jobs or job["status"]["state"] == "PENDING":
                jobs[job["jobId"]] = job
        return list(jobs.values())

    def _ask(self, *argv: str) -> list[Json]:
        env = {**self._cluster.env, "SLURM_TIME_FORMAT": "%s"}
        done = self._cluster.machine.run(list(argv), user=self._user, env=env)
        if done.returncode == 1 and "Invalid job id specified" in done.stderr:
            return []
        if done.returncode:
            raise CommandFailed(done.returncode, done.stderr)
        jobs: dict[str, Json] = {}
        for line in done.stdout.split("\n"):
            fields = line.split("|")
            if len(fields) != _WIDTH:
                continue
            id, _, step = fields[0].partition(".")
            if step and id not in jobs:  # As the real one: the job's own line had a | too many.
                raise CommandFailed(0, f"KeyError: {id}")
            if step:
                jobs[id]["tasks"].append(_step(fields))
            else:
                jobs[id] = _job(fields)
        return list(jobs.values())

    def script(self, id: str) -> str | None:
        done = self._cluster.run("scontrol", "write", "batch_script", id, "-", user=self._user)
        return None if done.returncode or "retrieval failed" in done.stderr else done.stdout

    def cancel(self, id: str) -> None:
        done = self._cluster.run("scancel", "--verbose", id, user=self._user)
        if done.returncode or re.search(".+error:.*", done.stderr):
            raise CommandFailed(done.returncode, done.stderr)

    def partitions(self) -> Sequence[str]:
        done = self._cluster.run("sinfo", "--noheader", "--format=%R", user=self._user)
        return sorted(set(done.stdout.split()))

    def close(self) -> None:
        """Nothing: the Slurm is its owner's."""


def _job(fields: list[str]) -> Json:
    return {
        "jobId": fields[0],
        "name": fields[6],
        "status": _status(fields, reason=fields[11]),
        "tasks": [],
        "time": {**_time(fields), "limit": _limit(fields[17])},
        "account": fields[5],
        "allocationNodes": int(fields[1]),
        "cluster": fields[2],
        "group": fields[4],
        "nodes": fields[7],
        "partition": fields[8],
        "killRequestUser": None,
        "user": fields[18],
        "workingDirectory": fields[19],
        "priority": int(fields[9]) if fields[9] else None,
    }


def _step(fields: list[str]) -> Json:
    return {
        "id": fields[0],
        "name": fields[6],
        "status": _status(fields, reason=None),
        "time": {**_time(fields), "limit": None},
    }


def _status(fields: list[str], reason: str | None) -> Json:
    code, _, number = fields[3].partition(":")
    return {
        "state": fields[10],
        "stateReason": reason,
        "exitCode": int(code) if code else None,
        "interruptSignal": int(number) if number else None,
    }


def _time(fields: list[str]) -> Json:
    start, end = (int(text) if text.isdecimal() else None for text in fields[14:16])
    elapsed = int(fields[12]) if fields[12].isdecimal() else 0
    return {"elapsed": elapsed, "start": start, "end": end, "suspended": 0}


def _limit(text: str) -> int | None:
    if text.isdecimal():
        return int(text) * 60
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
