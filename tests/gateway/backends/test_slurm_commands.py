"""The arguments of Slurm's commands, and the reading of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiida_marketplace_hpc.directives import parse_directives
from aiida_marketplace_hpc.gateway.backends.accounting import COLUMNS
from aiida_marketplace_hpc.gateway.backends.base import SchedulerDown, Unknown
from aiida_marketplace_hpc.gateway.backends.slurm_commands import (
    Answer,
    draw_separator,
    parse_sacct,
    parse_sbatch,
    parse_scancel,
    parse_sinfo,
    parse_squeue,
    parse_statuses,
    sacct_arguments,
    sbatch_arguments,
    squeue_arguments,
    statuses_arguments,
)
from aiida_marketplace_hpc.protocol import JobState

SEPARATOR = "\x1f0123456789abcdef\x1f"


def at(text: str) -> datetime:
    return datetime.strptime(f"2026-11-22 {text}", "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc)


def recorded(text: str) -> Answer:
    return Answer(0, text.replace("¦", SEPARATOR), "")


# Recorded from Slurm 22.05.8; `¦` stands for the separator.
QUEUE = recorded(
    "2¦RUNNING¦None¦debug¦myproject¦vm¦2026-11-22T12:53:53¦2026-11-22T12:53:54¦2026-11-22T13:03:54¦10:00¦1:02¦/tmp/fx¦"
    "new\nline\x1fus¦2\n"
    "28_[0-3]¦PENDING¦JobHeldUser¦debug¦myproject¦¦2026-11-22T12:55:03¦N/A¦N/A¦10:00¦0:00¦/tmp/fx¦wrap¦28\n"
    "29¦PENDING¦Priority¦debug¦myproject¦¦2026-11-22T12:59:57¦2026-11-22T13:21:00¦2026-11-22T13:31:00¦10:00¦0:00¦/tmp/fx¦"
    "wrap¦29\n"
    "37¦SUSPENDED¦None¦debug¦myproject¦vm¦2026-11-22T13:00:06¦2026-11-22T13:00:49¦N/A¦10:00¦0:04¦/tmp/fx¦wrap¦37\n"
    "50¦CANCELLED¦Job's account not permitted to use this partition (debug allows foo not myproject)¦debug¦myproject¦¦"
    "2026-11-22T13:22:46¦2026-11-22T13:22:49¦2026-11-22T13:22:49¦10:00¦0:00¦/tmp/fx¦sbatch¦50\n"
    "43_0¦COMPLETED¦None¦debug¦myproject¦vm¦2026-11-22T13:20:44¦2026-11-22T13:20:45¦2026-11-22T13:20:45¦10:00¦0:00¦/tmp/a¦"
    "job's script.sh¦46\n"
    "43_2¦RUNNING¦None¦debug¦myproject¦vm¦2026-11-22T13:20:44¦2026-11-22T13:20:45¦2026-11-22T13:30:45¦10:00¦0:00¦/tmp/a¦"
    "job's script.sh¦43\n"
    "25+0¦PENDING¦Resources¦debug¦myproject¦¦2026-11-22T12:54:07¦N/A¦N/A¦1-00:00:00¦0:00¦/tmp/fx¦sbatch¦25\n"
    "25+1¦PENDING¦Resources¦debug¦myproject¦¦2026-11-22T12:54:07¦N/A¦N/A¦1-00:00:00¦0:00¦/tmp/fx¦sbatch¦26\n"
)

ACCOUNTING = recorded(
    "1¦na|me wä¦fireuser¦myproject¦debug¦normal¦FAILED¦None¦3:0¦0:0¦2026-11-22T12:53:53¦2026-11-22T12:53:53¦"
    "2026-11-22T12:53:54¦2026-11-22T12:53:54¦0¦10¦1¦1¦¦16000M¦¦¦00:00.005¦0¦vm¦/tmp/fx/a b'c|ü¦1\n"
    "1.batch¦batch¦¦myproject¦¦¦FAILED¦¦3:0¦¦2026-11-22T12:53:54¦2026-11-22T12:53:54¦2026-11-22T12:53:54¦"
    "2026-11-22T12:53:54¦0¦¦1¦1¦1¦¦¦¦00:00.005¦0¦vm¦¦1.batch\n"
    "2¦new\nline\x1fus¦fireuser¦myproject¦debug¦normal¦CANCELLED by 1001¦None¦0:0¦0:0¦2026-11-22T12:53:53¦"
    "2026-11-22T12:53:53¦2026-11-22T12:53:54¦2026-11-22T12:55:02¦68¦10¦1¦1¦¦16000M¦¦¦00:00.002¦68¦vm¦/tmp/fx¦2\n"
    "2.batch¦batch¦¦myproject¦¦¦CANCELLED¦¦0:15¦¦2026-11-22T12:53:54¦2026-11-22T12:53:54¦2026-11-22T12:53:54¦"
    "2026-11-22T12:55:02¦68¦¦1¦1¦1¦¦3160K¦5512K¦00:00.002¦68¦vm¦¦2.batch\n"
    "28_[0-3]¦wrap¦fireuser¦myproject¦debug¦normal¦CANCELLED by 0¦JobHeldUser¦0:0¦0:0¦2026-11-22T12:55:03¦Unknown¦None¦"
    "2026-11-22T13:00:30¦0¦10¦1¦1¦¦16000M¦¦¦00:00:00¦0¦None assigned¦/tmp/fx¦28\n"
    "32¦wrap¦fireuser¦myproject¦debug¦normal¦TIMEOUT¦None¦0:0¦0:0¦2026-11-22T13:00:06¦2026-11-22T13:00:06¦"
    "2026-11-22T13:00:49¦2026-11-22T13:01:53¦64¦1¦1¦1¦¦16000M¦¦¦00:00.002¦64¦vm¦/tmp/fx¦32\n"
    "40¦wrap¦fireuser¦myproject¦debug¦normal¦FAILED¦None¦0:9¦0:0¦2026-11-22T13:00:06¦2026-11-22T13:00:06¦"
    "2026-11-22T13:00:49¦2026-11-22T13:00:49¦0¦10¦1¦1¦¦16000M¦¦¦00:00.002¦0¦vm¦/tmp/fx¦40\n"
    "61¦job's script.sh¦fireuser¦myproject¦debug¦normal¦DEADLINE¦None¦1:0¦0:0¦2026-11-22T13:41:51¦2026-11-22T13:41:51¦"
    "None¦2026-11-22T13:41:56¦0¦1¦1¦32¦¦16000M¦¦¦00:00:00¦0¦None assigned¦/tmp/fx/dl¦61\n"
    "56¦job's script.sh¦fireuser¦myproject¦debug¦normal¦RUNNING¦None¦0:0¦0:0¦2026-11-22T13:25:53¦2026-11-22T13:25:53¦"
    "2026-11-22T13:25:53¦Unknown¦29¦1¦1¦1¦¦16000M¦¦¦00:00:00¦29¦vm¦/tmp/fx/to¦56\n"
    "55¦job's script.sh¦fireuser¦myproject¦debug¦normal¦PENDING¦BeginTime¦0:0¦0:0¦2026-11-22T13:25:54¦2026-11-22T13:27:55¦"
    "Unknown¦Unknown¦0¦10¦1¦1¦¦16000M¦¦¦00:00:00¦0¦None assigned¦/tmp/fx/rq¦55\n"
    "33¦wrap¦fireuser¦myproject¦debug¦normal¦REQUEUED¦None¦0:0¦0:0¦2026-11-22T13:00:06¦2026-11-22T13:00:06¦"
    "2026-11-22T13:00:49¦2026-11-22T13:00:53¦4¦10¦1¦1¦¦16000M¦¦¦00:00.002¦4¦vm¦/tmp/fx¦33\n"
)

# Recorded from Slurm 22.05.8 with --duplicates: a job that was requeued, ran again, and was cancelled.
HISTORY = recorded(
    "1¦s.sh¦fireuser¦project¦debug¦normal¦REQUEUED¦None¦0:0¦0:0¦2026-11-25T22:13:55¦2026-11-25T22:13:55¦"
    "2026-11-25T22:13:57¦2026-11-25T22:13:59¦2¦10¦1¦1¦¦16000M¦¦¦00:00.002¦2¦node1¦/work/t¦1\n"
    "1.batch¦batch¦¦project¦¦¦CANCELLED¦¦0:15¦¦2026-11-25T22:13:57¦2026-11-25T22:13:57¦2026-11-25T22:13:57¦"
    "2026-11-25T22:13:59¦2¦¦1¦1¦1¦¦1616K¦2920K¦00:00.002¦2¦node1¦¦1.batch\n"
    "1¦s.sh¦fireuser¦project¦debug¦normal¦CANCELLED by 0¦BeginTime¦0:0¦0:0¦2026-11-25T22:13:59¦2026-11-25T22:14:02¦"
    "2026-11-25T22:14:03¦2026-11-25T22:14:04¦1¦10¦1¦1¦¦16000M¦¦¦00:00.002¦1¦node1¦/work/t¦1\n"
    "1.batch¦batch¦¦project¦¦¦CANCELLED¦¦0:15¦¦2026-11-25T22:14:03¦2026-11-25T22:14:03¦2026-11-25T22:14:03¦"
    "2026-11-25T22:14:04¦1¦¦1¦1¦1¦¦1660K¦2920K¦00:00.002¦1¦node1¦¦1.batch\n"
)
# Recorded from Slurm 22.05.8, whose controller was away for two minutes: the record of a job that has run, without its start.
STARTLESS = recorded(
    "2¦run.sh¦fireuser¦project¦debug¦normal¦FAILED¦Dependency¦4:0¦0:0¦2026-11-25T22:34:31¦Unknown¦None¦"
    "2026-11-25T22:37:44¦0¦10¦1¦1¦¦16000M¦¦¦00:00.003¦0¦None assigned¦/work/t¦2\n"
    "2.batch¦batch¦¦project¦¦¦FAILED¦¦4:0¦¦2026-11-25T22:37:43¦2026-11-25T22:37:43¦2026-11-25T22:37:43¦"
    "2026-11-25T22:37:44¦1¦¦1¦1¦1¦¦¦¦00:00.003¦1¦node1¦¦2.batch\n"
)
REQUEUED, CANCELLED = (
    "".join(line + "\n" for line in HISTORY.stdout.splitlines()[start : start + 2]) for start in (0, 2)
)


def record(**values: str) -> Answer:
    """One job record as sacct writes it, complete and successful where ``values`` do not say otherwise."""
    fields = dict.fromkeys(COLUMNS, "") | {
        "JobID": "7",
        "JobIDRaw": "7",
        "JobName": "job",
        "Partition": "debug",
        "State": "COMPLETED",
        "ExitCode": "0:0",
        "Submit": "2026-11-22T12:00:00",
        "Start": "2026-11-22T12:00:01",
        "End": "2026-11-22T12:00:02",
    }
    return Answer(0, SEPARATOR.join((fields | values).values()) + "\n", "")


class TestSbatch:
    def arguments(self, script: bytes) -> list[str]:
        return sbatch_arguments("/work/a b", parse_directives(script), name="job.sh", comment="gw-7")

    def test_adds_what_the_script_does_not_set(self) -> None:
        assert self.arguments(b"#!/bin/sh\n") == [
            "sbatch",
            "--parsable",
            "--chdir=/work/a b",
            "--job-name=job.sh",
            "--comment=gw-7",
            "--open-mode=append",
        ]

    def test_leaves_alone_what_the_script_sets(self) -> None:
        script = b"#!/bin/sh\n#SBATCH -J mine\n#SBATCH --comment=mine --open-mode=truncate\n"
        assert self.arguments(script) == ["sbatch", "--parsable", "--chdir=/work/a b"]

    @pytest.mark.parametrize(
        "answer",
        [
            Answer(0, "12\n", ""),
            Answer(0, "12;cluster\n", "sbatch: lua: welcome\n"),
            Answer(0, "Welcome to the cluster!\n12\n", ""),
            # A script with `#SBATCH --wait`: the id, then the end of the job, or ours.
            Answer(4, "12\n", ""),
            Answer(None, "12\n", ""),
        ],
    )
    def test_reads_the_id_wherever_there_is_one(self, answer: Answer) -> None:
        assert parse_sbatch(answer) == "12"

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (Answer(None, "", ""), "sbatch did not answer in time"),
            (
                Answer(None, "", "sbatch: error: sleeping and retrying\n"),
                "sbatch did not answer in time: sleeping and retrying",
            ),
            (Answer(0, "", "sbatch: Job 20 to start at 2027-01-02T15:55:57\n"), "no job id: Job 20 to start at"),
            (Answer(0, "12\n13\n", ""), "no job id"),
            (Answer(0, "12", ""), "no job id"),  # It may be the first half of 1234.
            (Answer(0, "Submitted batch job\n", ""), "no job id: Submitted batch job"),
        ],
    )
    def test_everything_else_is_ambiguous(self, answer: Answer, message: str) -> None:
        with pytest.raises(Unknown, match=message):
            parse_sbatch(answer)


class TestSqueue:
    def test_asks_for_all_jobs_of_the_account(self) -> None:
        arguments = squeue_arguments("alice", "|x|")
        assert arguments[:4] == ["squeue", "--noheader", "--states=all", "--user=alice"]
        assert arguments[4].startswith("--format=%i|x|%T|x|")

    def test_reads_a_recorded_queue(self) -> None:
        queue = parse_squeue(QUEUE, SEPARATOR)
        assert {id: job.state for id, job in queue.items()} == {
            "2": JobState.RUNNING,
            "28": JobState.HELD,
            "29": JobState.QUEUED,
            "37": JobState.SUSPENDED,
            "50": JobState.CANCELLED,
            "43": JobState.RUNNING,
            "25": JobState.QUEUED,
        }
        running = queue["2"]
        assert running.name == "new\nline\x1fus"
        assert (running.folder, running.partition, running.account, running.nodes) == (
            "/tmp/fx",
            "debug",
            "myproject",
            "vm",
        )
        assert (running.time_limit, running.elapsed, running.reason) == (600, 62, "")
        assert (running.submitted_at, running.started_at, running.ended_at) == (at("12:53:53"), at("12:53:54"), None)
        assert queue["25"].time_limit == 86400

    def test_does_not_take_an_expected_start_for_a_start(self) -> None:
        assert parse_squeue(QUEUE, SEPARATOR)["29"].started_at is None

    def test_an_end_is_not_complete_because_the_exit_code_is_not_known(self) -> None:
        queue = parse_squeue(QUEUE, SEPARATOR)
        assert not queue["50"].complete
        assert queue["50"].exit_code is None
        assert queue["29"].complete

    def test_an_empty_queue_is_an_answer(self) -> None:
        assert parse_squeue(Answer(0, "", ""), SEPARATOR) == {}

    @pytest.mark.parametrize(
        "answer",
        [
            Answer(None, QUEUE.stdout, ""),
            Answer(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"),
            Answer(1, "", "slurm_load_jobs error: Socket timed out on send/recv operation\n"),
            # Recorded: exit code 0 and no jobs.
            Answer(0, "", "squeue: error: Invalid user: nobodyx\n"),
            Answer(0, QUEUE.stdout[:-1], ""),
            Answer(0, QUEUE.stdout[:-40], ""),
            Answer(0, QUEUE.stdout + "warning: something\n", ""),
            Answer(0, "JOBID PARTITION\n", ""),
            Answer(0, recorded("x¦RUNNING¦¦¦¦¦¦¦¦¦¦¦¦2\n").stdout, ""),
        ],
    )
    def test_what_is_not_a_whole_answer_says_nothing(self, answer: Answer) -> None:
        with pytest.raises(SchedulerDown):
            parse_squeue(answer, SEPARATOR)


class TestStatuses:
    """Exit codes as the controller remembers them."""

    def test_asks_for_nothing_that_users_write(self) -> None:
        assert statuses_arguments("alice") == [
            "squeue",
            "--noheader",
            "--states=all",
            "--user=alice",
            "--Format=JobID:24 ,State:24 ,exit_code:24 ",
        ]

    # Recorded from Slurm 22.05.8, where the columns are wider.
    RECORDED = Answer(0, "46      COMPLETED       0       \n43      RUNNING         0       \n2  FAILED  9  \n", "")

    def test_reads_them(self) -> None:
        assert parse_statuses(self.RECORDED) == {"46": ("COMPLETED", 0), "43": ("RUNNING", 0), "2": ("FAILED", 9)}
        assert parse_statuses(Answer(0, "", "")) == {}

    def test_what_is_no_status_is_none(self) -> None:
        assert parse_statuses(Answer(0, "7 CANCELLED 4294967294 \n", "")) == {"7": ("CANCELLED", 0)}

    @pytest.mark.parametrize(
        "answer",
        [Answer(1, "", "error"), Answer(None, "1 A 0\n", ""), Answer(0, "1 A\n", ""), Answer(0, "1 A B\n", "")],
    )
    def test_what_is_not_a_whole_answer_says_nothing(self, answer: Answer) -> None:
        with pytest.raises(SchedulerDown):
            parse_statuses(answer)

    def test_an_array_has_ended_when_all_its_tasks_have(self) -> None:
        row = (
            "{0}¦{1}¦None¦debug¦p¦vm¦2026-11-22T13:20:44¦2026-11-22T13:20:45¦2026-11-22T13:20:50¦10:00¦0:05¦/a¦n¦{2}\n"
        )

        def array(*states: str) -> Answer:
            tasks = [row.format(f"43_{task}", state, 43 + task) for task, state in enumerate(states)]
            return recorded("".join(tasks))

        statuses = {"43": ("COMPLETED", 0), "44": ("FAILED", 512)}
        living = parse_squeue(array("COMPLETED", "RUNNING"), SEPARATOR, statuses)["43"]
        assert living.state is JobState.RUNNING
        half = parse_squeue(array("COMPLETED", "TIMEOUT"), SEPARATOR, statuses)["43"]
        assert not half.complete
        ended = parse_squeue(array("COMPLETED", "FAILED"), SEPARATOR, statuses)["43"]
        assert (ended.state, ended.complete, ended.exit_code, ended.elapsed) == (JobState.FAILED, True, 2, 5)
        assert [(row[0], row[-1]) for row in ended.rows] == [("43_0", "43"), ("43_1", "44")]


class TestSacct:
    def test_asks_by_id_or_by_time(self) -> None:
        by_id = sacct_arguments("alice", "|x|", ids=["9", "10"])
        assert by_id[:4] == ["sacct", "--noheader", "--parsable2", "--delimiter=|x|"]
        assert by_id[5:] == ["--user=alice", "--jobs=10,9"]
        since = datetime(2026, 11, 22, 13, 30, tzinfo=timezone(timedelta(hours=1)))
        assert sacct_arguments("alice", "|x|", since=since)[5:] == ["--user=alice", "--starttime=2026-11-22T12:30:00"]
        assert sacct_arguments("alice", "|x|", ids=["9"], duplicates=True)[6:] == ["--jobs=9", "--duplicates"]

    def test_reads_recorded_jobs(self) -> None:
        jobs = parse_sacct(ACCOUNTING, SEPARATOR)
        assert {id: (job.state, job.exit_code, job.signal) for id, job in jobs.items()} == {
            "1": (JobState.FAILED, 3, None),
            "2": (JobState.CANCELLED, None, None),
            "28": (JobState.CANCELLED, None, None),
            "32": (JobState.TIMEOUT, None, None),
            "40": (JobState.FAILED, None, 9),
            "61": (JobState.DEADLINE, None, None),
            "56": (JobState.RUNNING, None, None),
            "55": (JobState.HELD, None, None),
            "33": (JobState.QUEUED, None, None),
        }
        assert all(job.complete for job in jobs.values())
        failed = jobs["1"]
        assert (failed.name, failed.folder, failed.nodes) == ("na|me wä", "/tmp/fx/a b'c|ü", "vm")
        assert (failed.submitted_at, failed.started_at, failed.ended_at) == (
            at("12:53:53"),
            at("12:53:54"),
            at("12:53:54"),
        )
        assert (failed.time_limit, failed.elapsed) == (600, 0)
        assert jobs["28"].started_at is None
        assert jobs["28"].nodes == ""
        assert jobs["33"].ended_at is None

    @pytest.mark.parametrize("text", [REQUEUED + CANCELLED, CANCELLED + REQUEUED])
    def test_of_all_records_the_one_submitted_last_counts(self, text: str) -> None:
        job = parse_sacct(Answer(0, text, ""), SEPARATOR)["1"]
        assert (job.state, job.elapsed) == (JobState.CANCELLED, 1)
        assert [(row[0], row[14]) for row in job.rows] == [("1", "1"), ("1.batch", "1")]

    def test_records_of_other_folders_are_left_out_with_their_steps(self) -> None:
        assert parse_sacct(HISTORY, SEPARATOR, folders={"1": "/work/other"}) == {}
        assert parse_sacct(HISTORY, SEPARATOR, folders={"5": "/work/t"}) == {}
        mixed = Answer(0, REQUEUED.replace("/work/t", "/work/other") + CANCELLED, "")
        assert parse_sacct(mixed, SEPARATOR, folders={"1": "/work/t/"})["1"].state is JobState.CANCELLED
        job = parse_sacct(mixed, SEPARATOR, folders={"1": "/work/other"})["1"]
        assert [(row[0], row[14]) for row in job.rows] == [("1", "2"), ("1.batch", "2")]

    def test_a_missing_start_is_that_of_the_script(self) -> None:
        job = parse_sacct(STARTLESS, SEPARATOR)["2"]
        assert (job.state, job.exit_code, job.elapsed, job.nodes) == (JobState.FAILED, 4, 1, "node1")
        assert job.started_at == datetime(2026, 11, 25, 22, 37, 43, tzinfo=timezone.utc)
        assert job.rows[0][12] == "None"
        assert len(job.rows) == 2

    def test_the_record_of_a_requeue_is_no_end(self) -> None:
        assert not parse_sacct(Answer(0, REQUEUED, ""), SEPARATOR)["1"].state.final

    @pytest.mark.parametrize(
        ("states", "state"),
        [
            (("COMPLETED", "RUNNING"), JobState.RUNNING),
            (("COMPLETED", "PENDING"), JobState.QUEUED),
            (("FAILED", "COMPLETED"), JobState.FAILED),
        ],
    )
    @pytest.mark.parametrize("form", ["7_{}", "7+{}"])
    def test_arrays_and_heterogeneous_jobs_live_as_long_as_a_part_of_them(
        self, states: tuple[str, str], state: JobState, form: str
    ) -> None:
        text = "".join(record(JobID=form.format(part), State=one).stdout for part, one in enumerate(states))
        assert parse_sacct(Answer(0, text, ""), SEPARATOR)["7"].state is state

    def test_the_waiting_tasks_of_an_array_keep_it_alive(self) -> None:
        text = record(JobID="7_3").stdout + record(JobID="7_[4-9%2]", State="PENDING", End="Unknown").stdout
        assert parse_sacct(Answer(0, text, ""), SEPARATOR)["7"].state is JobState.QUEUED

    def test_the_record_is_what_aiida_reads(self) -> None:
        from aiida.engine import CalcJob
        from aiida.schedulers.plugins.slurm import SlurmScheduler

        job = parse_sacct(ACCOUNTING, SEPARATOR)["32"]
        text = "\n".join("|".join(row) for row in (job.columns, *job.rows))
        exit_code = SlurmScheduler().parse_output({"retval": 0, "stdout": text, "stderr": ""}, "", "")
        assert exit_code == CalcJob.exit_codes.ERROR_SCHEDULER_OUT_OF_WALLTIME

    def test_the_record_holds_the_steps_and_no_separators(self) -> None:
        jobs = parse_sacct(ACCOUNTING, SEPARATOR)
        assert [row[0] for row in jobs["2"].rows] == ["2", "2.batch"]
        assert jobs["2"].rows[0][1] == "new line us"
        assert jobs["1"].rows[0][1] == "na/me wä"
        assert all(len(row) == len(COLUMNS) for job in jobs.values() for row in job.rows)

    @pytest.mark.parametrize(
        "values",
        [
            {"JobName": "allocation", "Partition": "", "State": "PENDING", "End": "Unknown", "Start": "Unknown"},
            {"JobName": "allocation", "Partition": ""},
            {"End": "Unknown"},
            {"State": "CANCELLED by 1000", "End": ""},
        ],
    )
    def test_half_a_record_is_not_complete(self, values: dict[str, str]) -> None:
        assert not parse_sacct(record(**values), SEPARATOR)["7"].complete

    def test_a_job_that_is_named_allocation_is_like_any_other(self) -> None:
        assert parse_sacct(record(JobName="allocation"), SEPARATOR)["7"].complete

    @pytest.mark.parametrize(
        ("limit", "seconds"), [("90", 5400), ("UNLIMITED", None), ("Partition_Limit", None), ("", None)]
    )
    def test_reads_time_limits(self, limit: str, seconds: int | None) -> None:
        assert parse_sacct(record(TimelimitRaw=limit), SEPARATOR)["7"].time_limit == seconds

    def test_jobs_that_are_not_on_record_are_missing(self) -> None:
        assert parse_sacct(Answer(0, "", ""), SEPARATOR) == {}

    @pytest.mark.parametrize(
        "answer",
        [
            Answer(None, "", ""),
            Answer(1, "Slurm accounting storage is disabled\n", ""),
            Answer(1, "", "sacct: error: Problem talking to the database: Connection refused\n"),
            Answer(0, "", "sacct: error: slurmdbd: Getting response to message type: DBD_GET_JOBS_COND\n"),
            Answer(0, ACCOUNTING.stdout[:-30], ""),
            Answer(0, ACCOUNTING.stdout.replace(SEPARATOR, "|", 1), ""),
        ],
    )
    def test_what_is_not_a_whole_answer_says_nothing(self, answer: Answer) -> None:
        with pytest.raises(SchedulerDown):
            parse_sacct(answer, SEPARATOR)


text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)


@given(st.lists(st.tuples(text, text, text), max_size=5))
def test_no_name_or_folder_can_break_or_forge_a_record(jobs: Sequence[tuple[str, str, str]]) -> None:
    separator = draw_separator()
    lines = []
    for number, (name, folder, reason) in enumerate(jobs, start=1):
        fields = dict.fromkeys(COLUMNS, "") | {"JobID": f"{number}", "JobIDRaw": f"{number}", "State": "RUNNING"}
        fields |= {"JobName": name, "WorkDir": folder, "Reason": reason}
        lines.append(separator.join(fields.values()) + "\n")
    observed = parse_sacct(Answer(0, "".join(lines), ""), separator)
    assert list(observed) == [f"{number}" for number in range(1, len(jobs) + 1)]
    assert [(job.name, job.folder) for job in observed.values()] == [(name, folder) for name, folder, _ in jobs]
    assert all("|" not in value and "\n" not in value for job in observed.values() for row in job.rows for value in row)


class TestScancel:
    @pytest.mark.parametrize(
        "answer",
        [
            Answer(0, "", ""),
            Answer(0, "", "scancel: error: Kill job error on job id 1: Job/step already completing or completed\n"),
            Answer(1, "", "scancel: error: Kill job error on job id 1: Invalid job id specified\n"),
        ],
    )
    def test_a_job_that_has_ended_needs_no_cancelling(self, answer: Answer) -> None:
        parse_scancel(answer)

    @pytest.mark.parametrize(
        "answer",
        [
            Answer(None, "", ""),
            Answer(
                8,
                "",
                "scancel: error: Kill job error on job id 3: Unable to contact slurm controller (connect failure)\n",
            ),
        ],
    )
    def test_a_request_that_was_not_taken_is_an_error(self, answer: Answer) -> None:
        with pytest.raises(SchedulerDown, match="scancel"):
            parse_scancel(answer)


def test_reads_partitions() -> None:
    assert parse_sinfo(Answer(0, "xfer\ndebug\nxfer\n", "")) == ["debug", "xfer"]
