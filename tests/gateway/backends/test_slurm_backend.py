"""The Slurm backend runs the right commands, in the right environment, and combines their answers."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from aiida_marketplace_hpc.gateway.backends.accounting import COLUMNS
from aiida_marketplace_hpc.gateway.backends.base import Deferred, Refused, SchedulerDown, Submission, Unknown
from aiida_marketplace_hpc.gateway.backends.slurm import CLOCK_SKEW, IDS_PER_COMMAND, SlurmBackend, run_command
from aiida_marketplace_hpc.gateway.backends.slurm_commands import Answer
from aiida_marketplace_hpc.protocol import JobState

NOON = datetime(2026, 11, 22, 12, tzinfo=timezone.utc)


@dataclass
class Call:
    arguments: Sequence[str]
    stdin: bytes
    folder: str | None
    environment: Mapping[str, str]
    timeout: float


@dataclass
class FakeSlurm:
    """Answers each command with what is set under its name: an answer, an exception, or what a function returns."""

    answers: dict[str, Answer | Exception | Callable[[str], Answer]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def __call__(
        self,
        arguments: Sequence[str],
        *,
        stdin: bytes,
        folder: str | None,
        environment: Mapping[str, str],
        timeout: float,
    ) -> Answer:
        self.calls.append(Call(arguments, stdin, folder, environment, timeout))
        answer = self.answers[arguments[0]]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Answer) else answer(self._separator(arguments))

    @staticmethod
    def _separator(arguments: Sequence[str]) -> str:
        options = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments[1:])
        return options.get("delimiter") or options["format"].removeprefix("%i").partition("%T")[0]


def queue_of(*jobs: tuple[str, str, str, str]) -> Callable[[str], Answer]:
    """A queue of jobs: id, state, folder, submission."""

    def answer(separator: str) -> Answer:
        rows = [
            [id, state, "None", "debug", "", "", at, "N/A", "N/A", "", "", folder, "job", id]
            for id, state, folder, at in jobs
        ]
        return Answer(0, "".join(separator.join(row) + "\n" for row in rows), "")

    return answer


def record_of(*jobs: tuple[str, str, str, str]) -> Callable[[str], Answer]:
    """Records of jobs: id, state, folder, submission."""

    def answer(separator: str) -> Answer:
        text = ""
        for id, state, folder, at in jobs:
            values = {"JobID": id, "JobIDRaw": id, "State": state, "WorkDir": folder, "Submit": at, "End": at}
            text += separator.join((dict.fromkeys(COLUMNS, "x") | values).values()) + "\n"
        return Answer(0, text, "")

    return answer


@pytest.fixture
def slurm() -> FakeSlurm:
    return FakeSlurm({"sbatch": Answer(0, "12\n", ""), "squeue": queue_of(), "sacct": record_of()})


@pytest.fixture
def backend(slurm: FakeSlurm) -> SlurmBackend:
    return SlurmBackend(user="alice", command_timeout=7, submit_timeout=9, run=slurm)


def submission(folder: Path, text: bytes = b"#!/bin/bash\n#SBATCH -n 2\nuser code\n") -> Submission:
    return Submission("7", str(folder), f"{folder}/run me.sh", text, "sha-256:0", ".guard", "gw-7")


def test_submits_the_wrapper_on_standard_input_from_the_jobs_folder(
    tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend
) -> None:
    assert backend.submit(submission(tmp_path)) == "12"
    (call,) = slurm.calls
    assert list(call.arguments) == [
        "sbatch",
        "--parsable",
        f"--chdir={tmp_path}",
        "--job-name=run me.sh",
        "--comment=gw-7",
        "--open-mode=append",
    ]
    assert (call.folder, call.timeout) == (str(tmp_path), 9)
    assert call.stdin.startswith(b"#!/bin/sh\n#SBATCH -n 2\n")
    assert b"user code" not in call.stdin


def test_no_command_sees_the_gateways_environment(
    tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MP_ACCESS_TOKEN", "hunter2")
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SLURM_CONF", "/opt/slurm.conf")
    monkeypatch.setenv("TZ", "Europe/Zurich")
    backend.submit(submission(tmp_path))
    backend.queue()
    backend.accounting({"1": "/a"})
    submit, *questions = (call.environment for call in slurm.calls)
    assert set(submit) == {"PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "SLURM_CONF"}
    assert submit["TZ"] == "Europe/Zurich"
    assert submit["SLURM_CONF"] == "/opt/slurm.conf"
    for environment in questions:
        assert environment == {**submit, "TZ": "UTC0", "LC_ALL": "C.UTF-8"}


def test_jobs_do_not_find_the_gateways_own_programs(
    tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/opt/site/bin:/usr/bin")
    backend.submit(submission(tmp_path))
    assert slurm.calls[0].environment["PATH"] == "/opt/site/bin:/usr/bin"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-M other", "--clusters is not possible"),
        ("--test-only", "--test-only is not possible"),
        ("--uid=root", "--uid is not possible"),
        ("--gid=root", "--gid is not possible"),
        ('--comment="', "Unmatched"),
    ],
)
def test_refuses_what_it_could_not_follow(
    tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend, line: str, message: str
) -> None:
    with pytest.raises(Refused, match=message):
        backend.submit(submission(tmp_path, f"#!/bin/sh\n#SBATCH {line}\n".encode()))
    assert slurm.calls == []


def test_refuses_a_job_whose_folder_is_not_there(tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend) -> None:
    with pytest.raises(Refused, match="does not exist"):
        backend.submit(submission(tmp_path / "missing"))
    assert slurm.calls == []


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "sbatch"), PermissionError(13, "Denied", "sbatch")]
)
def test_without_slurms_commands_nothing_was_submitted_and_nothing_is_known(
    tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend, error: OSError
) -> None:
    slurm.answers = dict.fromkeys(["sbatch", "squeue", "sacct", "scancel", "sinfo"], error)
    with pytest.raises(Deferred, match="cannot run sbatch"):
        backend.submit(submission(tmp_path))
    for question in (backend.queue, lambda: backend.accounting({"1": "/a"}), lambda: backend.cancel("1")):
        with pytest.raises(SchedulerDown, match="cannot run"):
            question()
    assert "partitions" not in backend.describe()


def test_a_submission_that_takes_too_long_is_unknown(tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend) -> None:
    slurm.answers["sbatch"] = Answer(None, "", "")
    with pytest.raises(Unknown):
        backend.submit(submission(tmp_path))


def folders(count: int) -> dict[str, str]:
    """Jobs from the id 1 on, all of one folder."""
    return {str(id): "/a" for id in range(1, count + 1)}


def test_accounting_asks_once_for_many_jobs(slurm: FakeSlurm, backend: SlurmBackend) -> None:
    slurm.answers["sacct"] = record_of(("1", "COMPLETED", "/a", "2026-11-22T12:00:00"))
    assert set(backend.accounting(folders(IDS_PER_COMMAND))) == {"1"}
    assert len(slurm.calls) == 1
    backend.accounting(folders(2 * IDS_PER_COMMAND + 1))
    assert len(slurm.calls) == 4
    assert backend.accounting({}) == {}
    assert len(slurm.calls) == 4


def test_accounting_is_one_whole_answer_or_none(slurm: FakeSlurm, backend: SlurmBackend) -> None:
    answers = iter([record_of(), lambda _: Answer(1, "", "sacct: error: down\n")])
    slurm.answers["sacct"] = lambda separator: next(answers)(separator)
    with pytest.raises(SchedulerDown):
        backend.accounting(folders(IDS_PER_COMMAND + 1))


def test_finds_the_jobs_of_a_folder_in_queue_and_accounting(slurm: FakeSlurm, backend: SlurmBackend) -> None:
    slurm.answers["squeue"] = queue_of(
        ("1", "RUNNING", "/job", "2026-11-22T12:00:00"),
        ("2", "FAILED", "/job", "2026-11-22T12:00:00"),
        ("3", "RUNNING", "/other", "2026-11-22T12:00:00"),
    )
    slurm.answers["sacct"] = record_of(
        ("1", "COMPLETED", "/job", "2026-11-22T12:00:00"),
        ("2", "TIMEOUT", "/job", "2026-11-22T12:00:00"),
        ("4", "COMPLETED", "/job", "2026-11-22T12:00:00"),
        ("5", "COMPLETED", "/other", "2026-11-22T12:00:00"),
        ("6", "COMPLETED", "/job", "2026-11-22T11:00:00"),
    )
    found = {one.id: one.state for one in backend.find("/job/", NOON)}
    # A job that the queue shows alive is alive, whatever accounting says; about an end accounting knows better.
    assert found == {"1": JobState.RUNNING, "2": JobState.TIMEOUT, "4": JobState.COMPLETED}
    assert f"--starttime={NOON - CLOCK_SKEW:%Y-%m-%dT%H:%M:%S}" in slurm.calls[1].arguments


def test_finds_a_job_although_the_clocks_differ(slurm: FakeSlurm, backend: SlurmBackend) -> None:
    slurm.answers["squeue"] = queue_of(("1", "PENDING", "/job", "2026-11-22T11:59:30"))
    assert [one.id for one in backend.find("/job", NOON)] == ["1"]
    assert backend.find("/job", NOON + timedelta(hours=1)) == []


@pytest.mark.parametrize("command", ["squeue", "sacct"])
def test_finding_nothing_needs_both_answers(slurm: FakeSlurm, backend: SlurmBackend, command: str) -> None:
    assert backend.find("/job", NOON) == []
    slurm.answers[command] = Answer(1, "", "down")
    with pytest.raises(SchedulerDown):
        backend.find("/job", NOON)


def test_describes_itself_and_remembers_the_partitions(slurm: FakeSlurm, backend: SlurmBackend) -> None:
    slurm.answers["sinfo"] = Answer(0, "debug\nlong\n", "")
    assert backend.describe() == {"name": "slurm", "backend": "slurm", "partitions": ["debug", "long"]}
    slurm.answers["sinfo"] = Answer(1, "", "down")
    assert backend.describe()["partitions"] == ["debug", "long"]
    assert len(slurm.calls) == 1


def test_a_submitter_is_not_taken_for_dead_while_sbatch_may_run() -> None:
    assert SlurmBackend(submit_timeout=60).submission_limit > 60


def test_settles_after_three_message_timeouts() -> None:
    assert SlurmBackend(message_timeout=5).settling_time == 15


class TestRunCommand:
    """The runner of real processes."""

    def program(self, folder: Path, body: str) -> str:
        path = folder / "program"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    def run(self, program: str, folder: Path, timeout: float = 10) -> Answer:
        return run_command([program], stdin=b"in", folder=str(folder), environment={"A": "1"}, timeout=timeout)

    def test_hands_over_input_folder_and_environment(self, tmp_path: Path) -> None:
        program = self.program(tmp_path, 'cat; pwd; echo "$A$HOME"; echo bad >&2; exit 3')
        assert self.run(program, tmp_path) == Answer(3, f"in{tmp_path}\n1\n", "bad\n")

    def test_keeps_what_a_command_said_before_it_was_killed(self, tmp_path: Path) -> None:
        program = self.program(tmp_path, "echo 12; exec sleep 60")
        assert self.run(program, tmp_path, timeout=0.3) == Answer(None, "12\n", "")

    def test_survives_output_that_is_no_text(self, tmp_path: Path) -> None:
        assert self.run(self.program(tmp_path, r"printf '\377'"), tmp_path).stdout == "\ufffd"

    def test_a_command_that_cannot_be_started_is_an_os_error(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="No such file"):
            self.run(str(tmp_path / "missing"), tmp_path)
        assert not os.listdir(tmp_path)
