"""The Slurm backend runs the right commands, in the right environment, and combines their answers."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from aiida_marketplace_hpc.directives import Directives
from aiida_marketplace_hpc.gateway.backends.accounting import COLUMNS
from aiida_marketplace_hpc.gateway.backends.base import (
    Deferred,
    Fault,
    Refused,
    SchedulerDown,
    Submission,
    Trace,
    Unknown,
)
from aiida_marketplace_hpc.gateway.backends.slurm import (
    CLOCK_SKEW,
    IDS_PER_COMMAND,
    WHOSE_TIMEOUT,
    SlurmBackend,
    run_command,
)
from aiida_marketplace_hpc.gateway.backends.slurm_commands import Answer
from aiida_marketplace_hpc.gateway.backends.wrapper import GUARD_PREFIX, make_wrapper
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
    """Answers each command with what is set under its name: an answer, an exception, or what a function returns.

    Of squeue's two forms the one that tells exit codes is called ``statuses`` here, of sacct's the one that shows all records
    ``history``, of scontrol's the one that shows a script ``script``.
    """

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
        name = arguments[0]
        if any(argument.startswith("--Format=") for argument in arguments):
            name = "statuses"
        elif "--duplicates" in arguments:
            name = "history"
        elif "batch_script" in arguments:
            name = "script"
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Answer):
            return answer
        return answer(arguments[3] if name == "script" else self._separator(arguments))

    def names(self) -> list[str]:
        """The commands that were run, apart from those for the configuration."""
        return [call.arguments[0] for call in self.calls if list(call.arguments[:2]) != ["scontrol", "show"]]

    @staticmethod
    def _separator(arguments: Sequence[str]) -> str:
        options = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments[1:])
        if "delimiter" in options or "format" not in options:
            return options.get("delimiter", "")
        return options["format"].removeprefix("%i").partition("%T")[0]


def queue_of(*jobs: tuple[str, str, str, str]) -> Callable[[str], Answer]:
    """A queue of jobs: id, state, folder, submission."""

    def answer(separator: str) -> Answer:
        rows = [
            [id, state, "None", "debug", "", "", at, at, "N/A", "", "", folder, "job", id]
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


def config_of(storage: str = "accounting_storage/slurmdbd", timeout: int = 10) -> Answer:
    """What ``scontrol show config`` says."""
    text = (
        f"ClusterName             = c\nAccountingStorageType   = {storage}\nMessageTimeout          = {timeout} sec\n"
    )
    return Answer(0, text, "")


@pytest.fixture
def slurm() -> FakeSlurm:
    answers = {"sbatch": Answer(0, "12\n", ""), "squeue": queue_of(), "sacct": record_of(), "scontrol": config_of()}
    return FakeSlurm(dict(answers))


@pytest.fixture
def backend(slurm: FakeSlurm) -> SlurmBackend:
    """One that has started, and knows how Slurm is configured."""
    backend = SlurmBackend(user="alice", command_timeout=7, submit_timeout=9, run=slurm)
    backend.start()
    slurm.calls.clear()
    return backend


@pytest.fixture
def unaccounted(slurm: FakeSlurm) -> SlurmBackend:
    """One whose Slurm has no accounting."""
    slurm.answers["scontrol"] = config_of("accounting_storage/none")
    slurm.answers["sacct"] = Answer(1, "Slurm accounting storage is disabled\n", "")
    slurm.answers["statuses"] = Answer(0, "", "")
    backend = SlurmBackend(user="alice", run=slurm)
    backend.start()
    slurm.calls.clear()
    return backend


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


def test_without_a_guard_the_script_itself_is_submitted(
    tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend
) -> None:
    slurm.answers["sbatch"] = Answer(0, "42\n", "")
    job = replace(submission(tmp_path), guard=None, comment="")
    assert backend.submit(job) == "42"
    call = slurm.calls[-1]
    assert call.stdin == job.script_text
    assert call.arguments == ["sbatch", "--parsable", f"--chdir={tmp_path}", "--job-name=run me.sh"]
    assert call.folder == str(tmp_path)


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
    with pytest.raises(Fault, match="cannot run sbatch"):
        backend.submit(submission(tmp_path))
    for question in (backend.queue, lambda: backend.accounting({"1": "/a"}), lambda: backend.cancel("1")):
        with pytest.raises(SchedulerDown, match="cannot run"):
            question()
    assert "partitions" not in backend.describe()


def test_a_machine_that_starts_no_process_now_is_no_fault(
    tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend
) -> None:
    slurm.answers["sbatch"] = BlockingIOError(11, "Resource temporarily unavailable")
    with pytest.raises(Deferred, match="cannot run sbatch") as error:
        backend.submit(submission(tmp_path))
    assert error.type is Deferred


def test_a_folder_that_goes_in_the_last_moment_is_no_fault(
    tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend
) -> None:
    folder = tmp_path / "job"
    folder.mkdir()

    def vanish(_: str) -> Answer:
        folder.rmdir()
        raise FileNotFoundError(2, "No such file or directory", str(folder))

    slurm.answers["sbatch"] = vanish
    with pytest.raises(Refused, match="does not exist"):
        backend.submit(submission(folder))


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


def test_finds_a_job_by_its_guard_that_a_question_by_time_overlooks(
    tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend
) -> None:
    (tmp_path / f"{GUARD_PREFIX}7").write_text("12\nsha-256:0\n")
    now = datetime.now(timezone.utc)
    assert [(one.id, one.state) for one in backend.find(str(tmp_path), now)] == [("12", JobState.RUNNING)]
    by_id = record_of(("12", "FAILED", str(tmp_path), f"{now:%Y-%m-%dT%H:%M:%S}"))
    slurm.answers["sacct"] = lambda separator: (
        by_id(separator) if "--jobs=12" in slurm.calls[-1].arguments else record_of()(separator)
    )
    assert [(one.id, one.state) for one in backend.find(str(tmp_path), now)] == [("12", JobState.FAILED)]
    assert backend.find(str(tmp_path), now + timedelta(hours=1)) == []


@pytest.mark.parametrize("command", ["squeue", "sacct"])
def test_finding_nothing_needs_both_answers(slurm: FakeSlurm, backend: SlurmBackend, command: str) -> None:
    assert backend.find("/job", NOON) == []
    slurm.answers[command] = Answer(1, "", "down")
    with pytest.raises(SchedulerDown):
        backend.find("/job", NOON)


def test_describes_itself_and_remembers_the_partitions(slurm: FakeSlurm, backend: SlurmBackend) -> None:
    slurm.answers["sinfo"] = Answer(0, "debug\nlong\n", "")
    assert backend.describe() == {
        "name": "slurm",
        "backend": "slurm",
        "accounting": True,
        "partitions": ["debug", "long"],
    }
    slurm.answers["sinfo"] = Answer(1, "", "down")
    assert backend.describe()["partitions"] == ["debug", "long"]
    assert len(slurm.calls) == 1


def test_a_submitter_is_not_taken_for_dead_while_sbatch_may_run() -> None:
    assert SlurmBackend(submit_timeout=60).submission_limit > 60


@pytest.mark.parametrize(("timeout", "settled"), [(5, 30), (10, 30), (60, 180)])
def test_settles_after_three_message_timeouts_and_no_earlier_than_by_slurms_default(
    slurm: FakeSlurm, timeout: int, settled: int
) -> None:
    slurm.answers["scontrol"] = config_of(timeout=timeout)
    backend = SlurmBackend(run=slurm)
    assert backend.settling_time == 30
    backend.start()
    assert backend.settling_time == settled


class TestReusedIds:
    """Slurm comes round to its first job id again, or loses count."""

    def test_a_job_whose_id_was_given_to_another_is_found_among_all_records(
        self, slurm: FakeSlurm, backend: SlurmBackend
    ) -> None:
        slurm.answers["sacct"] = record_of(
            ("1", "RUNNING", "/stranger", "2026-11-22T12:00:00"), ("2", "COMPLETED", "/b", "2026-11-22T12:00:00")
        )
        slurm.answers["history"] = record_of(
            ("1", "REQUEUED", "/a", "2026-11-20T12:00:00"),
            ("1", "TIMEOUT", "/a", "2026-11-21T12:00:00"),
            ("1", "RUNNING", "/stranger", "2026-11-22T12:00:00"),
        )
        found = backend.accounting({"1": "/a", "2": "/b"})
        assert {id: one.state for id, one in found.items()} == {"1": JobState.TIMEOUT, "2": JobState.COMPLETED}
        assert [row[0] for row in found["1"].rows] == ["1"]
        assert "--jobs=1" in slurm.calls[-1].arguments
        assert slurm.names() == ["sacct", "sacct"]

    def test_a_strangers_end_is_never_taken_for_the_jobs(self, slurm: FakeSlurm, backend: SlurmBackend) -> None:
        slurm.answers["sacct"] = record_of(("1", "COMPLETED", "/stranger", "2026-11-22T12:00:00"))
        slurm.answers["history"] = slurm.answers["sacct"]
        assert backend.accounting({"1": "/a"}) == {}

    def test_a_stranger_is_not_cancelled(self, slurm: FakeSlurm, backend: SlurmBackend) -> None:
        slurm.answers["scancel"] = Answer(0, "", "")
        slurm.answers["squeue"] = queue_of(("1", "RUNNING", "/stranger", "2026-11-22T12:00:00"))
        backend.cancel("1", "/a")
        assert slurm.names() == ["squeue"]
        backend.cancel("1", "/stranger/")
        assert slurm.names() == ["squeue", "squeue", "scancel"]

    @pytest.mark.parametrize(
        "answer", [Answer(0, "", ""), Answer(1, "", "slurm_load_jobs error: Invalid job id specified\n")]
    )
    def test_a_job_that_is_gone_needs_no_cancelling(
        self, slurm: FakeSlurm, backend: SlurmBackend, answer: Answer
    ) -> None:
        slurm.answers["squeue"] = answer
        backend.cancel("1", "/a")
        assert slurm.names() == ["squeue"]

    def test_whose_id_it_is_must_be_known_first(self, slurm: FakeSlurm, backend: SlurmBackend) -> None:
        slurm.answers["squeue"] = Answer(None, "", "")
        with pytest.raises(SchedulerDown):
            backend.cancel("1", "/a")
        assert slurm.names() == ["squeue"]

    def test_whose_id_it_is_must_be_known_soon_because_somebody_waits(self, slurm: FakeSlurm) -> None:
        SlurmBackend(command_timeout=60, run=slurm).cancel("1", "/a")
        assert slurm.calls[-1].timeout == WHOSE_TIMEOUT


class TestTraces:
    """What living jobs say about their submissions."""

    @pytest.fixture
    def scripts(self, tmp_path: Path) -> dict[str, Answer]:
        wrapper = make_wrapper(submission(tmp_path), Directives((), {}))
        return {
            "1": Answer(0, wrapper.decode(), ""),
            "2": Answer(0, "#!/bin/sh\ntrue\n", ""),
            # Recorded from Slurm 22.05.8: with the exit code 0.
            "3": Answer(0, "", "job script retrieval failed: Invalid job id specified\n"),
            "4": Answer(0, "", "job script retrieval failed: Job script not specified\n"),
            "5": Answer(1, "", "job script retrieval failed: Access/permission denied\n"),
        }

    def test_jobs_that_have_gone_or_are_no_submissions_are_missing(
        self, tmp_path: Path, slurm: FakeSlurm, backend: SlurmBackend, scripts: dict[str, Answer]
    ) -> None:
        slurm.answers["script"] = lambda id: scripts[id]
        folder = str(tmp_path)
        assert backend.traces(["1", "2", "3", "4", "5"]) == {
            "1": Trace("7", folder, f"{folder}/run me.sh", "sha-256:0", None, "")
        }
        assert backend.traces([]) == {}

    @pytest.mark.parametrize(
        "answer",
        [
            Answer(0, "", "job script retrieval failed: Unable to contact slurm controller (connect failure)\n"),
            Answer(1, "", "scontrol: error: something\n"),
            Answer(None, "", ""),
            FileNotFoundError(2, "No such file", "scontrol"),
        ],
    )
    def test_one_that_is_not_known_makes_the_answer_not_whole(
        self, slurm: FakeSlurm, backend: SlurmBackend, scripts: dict[str, Answer], answer: Answer | Exception
    ) -> None:
        def read(id: str) -> Answer:
            if id in scripts:
                return scripts[id]
            if isinstance(answer, Exception):
                raise answer
            return answer

        slurm.answers["script"] = read
        with pytest.raises(SchedulerDown):
            backend.traces(["1", "9", "2"])

    def test_takes_no_longer_than_it_may(
        self, slurm: FakeSlurm, backend: SlurmBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("aiida_marketplace_hpc.gateway.backends.slurm.TRACES_TIME", -1.0)
        with pytest.raises(SchedulerDown, match="could not be read in"):
            backend.traces(["1"])
        assert slurm.names() == []


class TestWithoutAccounting:
    """What the controller remembers, and what the wrapper has noted."""

    NOTE = "{id}\nsha-256:0\nstarted {id} 2026-11-22T12:00:00 1\nended {id} 2026-11-22T12:01:40 {status}\n"

    def note(self, folder: Path, id: str, status: int = 0) -> str:
        folder.mkdir()
        (folder / f"{GUARD_PREFIX}{id}").write_text(self.NOTE.format(id=id, status=status))
        return str(folder)

    def test_says_so(self, slurm: FakeSlurm, unaccounted: SlurmBackend, caplog: pytest.LogCaptureFixture) -> None:
        slurm.answers["sinfo"] = Answer(0, "", "")
        assert unaccounted.describe()["accounting"] is False
        unaccounted.start()
        assert "has no accounting" in caplog.text

    @pytest.mark.parametrize("storage", ["accounting_storage/none", "(null)"])
    def test_the_wrapper_notes_the_end(self, tmp_path: Path, slurm: FakeSlurm, storage: str) -> None:
        slurm.answers["scontrol"] = config_of(storage)
        SlurmBackend(run=slurm).submit(submission(tmp_path))
        assert slurm.calls[-1].stdin.startswith(b"#!/usr/bin/env bash\n")

    def test_so_it_does_while_that_is_not_known(self, tmp_path: Path, slurm: FakeSlurm) -> None:
        slurm.answers["scontrol"] = Answer(1, "", "down")
        SlurmBackend(run=slurm).submit(submission(tmp_path))
        assert slurm.calls[-1].stdin.startswith(b"#!/usr/bin/env bash\n")

    def test_the_controller_tells_states_and_exit_codes(self, slurm: FakeSlurm, unaccounted: SlurmBackend) -> None:
        at = "2026-11-22T12:00:00"
        states = {"1": "COMPLETED", "2": "FAILED", "3": "FAILED", "4": "TIMEOUT", "5": "RUNNING", "6": "COMPLETED"}
        slurm.answers["squeue"] = queue_of(*((id, state, "/a", at) for id, state in states.items()))
        slurm.answers["statuses"] = Answer(
            0, "1 COMPLETED 0 \n2 FAILED 768 \n3 FAILED 9 \n4 TIMEOUT 0 \n5 RUNNING 0 \n6 RUNNING 0 \n", ""
        )
        found = unaccounted.accounting(dict.fromkeys([*states, "7"], "/a"))
        # The sixth has ended between the two answers: how, is known the next time.
        assert {id: (one.complete, one.exit_code, one.signal) for id, one in found.items()} == {
            "1": (True, 0, None),
            "2": (True, 3, None),
            "3": (True, None, 9),
            "4": (True, None, None),
            "5": (True, None, None),
            "6": (False, None, None),
        }
        assert "sacct" not in slurm.names()

    def test_the_record_is_what_aiida_reads(self, slurm: FakeSlurm, unaccounted: SlurmBackend) -> None:
        from aiida.engine import CalcJob
        from aiida.schedulers.plugins.slurm import SlurmScheduler

        slurm.answers["squeue"] = queue_of(("4", "TIMEOUT", "/a", "2026-11-22T12:00:00"))
        slurm.answers["statuses"] = Answer(0, "4 TIMEOUT 0 \n", "")
        job = unaccounted.accounting({"4": "/a"})["4"]
        text = "\n".join("|".join(row) for row in (job.columns, *job.rows))
        exit_code = SlurmScheduler().parse_output({"retval": 0, "stdout": text, "stderr": ""}, "", "")
        assert exit_code == CalcJob.exit_codes.ERROR_SCHEDULER_OUT_OF_WALLTIME

    def test_what_slurm_has_forgotten_is_in_the_folder(
        self, tmp_path: Path, slurm: FakeSlurm, unaccounted: SlurmBackend
    ) -> None:
        folders = {"1": self.note(tmp_path / "a", "1"), "2": self.note(tmp_path / "b", "2", 3)}
        folders["3"] = folders["1"]
        found = unaccounted.accounting(folders)
        assert {id: (one.state, one.exit_code) for id, one in found.items()} == {
            "1": (JobState.COMPLETED, 0),
            "2": (JobState.FAILED, 3),
        }

    def test_what_the_controller_says_outweighs_the_note(
        self, tmp_path: Path, slurm: FakeSlurm, unaccounted: SlurmBackend
    ) -> None:
        folder = self.note(tmp_path / "a", "1")
        slurm.answers["squeue"] = queue_of(("1", "PENDING", folder, "2026-11-22T12:00:00"))
        assert unaccounted.accounting({"1": folder})["1"].state is JobState.QUEUED

    @pytest.mark.parametrize("command", ["squeue", "statuses"])
    def test_no_note_is_believed_while_the_controller_is_silent(
        self, tmp_path: Path, slurm: FakeSlurm, unaccounted: SlurmBackend, command: str
    ) -> None:
        folder = self.note(tmp_path / "a", "1")
        slurm.answers[command] = Answer(None, "", "")
        with pytest.raises(SchedulerDown):
            unaccounted.accounting({"1": folder})

    def test_finds_a_forgotten_job_by_its_guard(
        self, tmp_path: Path, slurm: FakeSlurm, unaccounted: SlurmBackend
    ) -> None:
        folder = tmp_path / "a"
        folder.mkdir()
        now = datetime.now(timezone.utc)
        assert unaccounted.find(str(folder), now) == []
        (folder / f"{GUARD_PREFIX}7").write_text("12\nsha-256:0\n")
        assert [(one.id, one.state) for one in unaccounted.find(str(folder), now)] == [("12", JobState.RUNNING)]
        assert unaccounted.find(str(folder), now + timedelta(hours=1)) == []
        slurm.answers["squeue"] = queue_of(("12", "PENDING", str(folder), f"{now:%Y-%m-%dT%H:%M:%S}"))
        assert [(one.id, one.state) for one in unaccounted.find(str(folder), now)] == [("12", JobState.QUEUED)]

    def test_an_accounting_that_comes_or_goes_is_noticed(
        self, slurm: FakeSlurm, backend: SlurmBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("aiida_marketplace_hpc.gateway.backends.slurm_config.PAUSE", 0.0)
        slurm.answers["sacct"] = Answer(1, "Slurm accounting storage is disabled\n", "")
        slurm.answers["scontrol"] = config_of("accounting_storage/none")
        slurm.answers["statuses"] = Answer(0, "1 COMPLETED 0 \n", "")
        slurm.answers["squeue"] = queue_of(("1", "COMPLETED", "/a", "2026-11-22T12:00:00"))
        with pytest.raises(SchedulerDown):
            backend.accounting({"1": "/a"})
        assert backend.accounting({"1": "/a"})["1"].complete


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
