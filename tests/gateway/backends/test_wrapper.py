"""The wrapper lets a job script run once, as it is."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from aiida_marketplace_hpc.directives import parse_directives
from aiida_marketplace_hpc.gateway.backends.base import Deferred, Refused, Submission, Trace
from aiida_marketplace_hpc.gateway.backends.guard import Guard, read_guards
from aiida_marketplace_hpc.gateway.backends.wrapper import (
    EXIT_NO_GUARD,
    EXIT_SECOND_COPY,
    GUARD_PREFIX,
    check_folder,
    make_wrapper,
    read_trace,
    script_command,
)

COUNTING_SCRIPT = b'#!/bin/sh\necho "ran $# $0" >> ran.txt\nexit 3\n'


def submission(folder: Path, text: bytes, name: str = "job.sh") -> Submission:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / name
    script.write_bytes(text)
    return Submission("7", str(folder), str(script), text, "sha-256:0", ".guard-7", "")


def run(wrapper: bytes, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [wrapper.split(b"\n", 1)[0].decode().removeprefix("#!").rsplit(" ", 1)[-1], "/dev/stdin"],
        input=wrapper.decode(errors="surrogateescape"),
        cwd=folder,
        env={"PATH": os.defpath, **environment},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=20,
    )


def wrap(job: Submission) -> bytes:
    return make_wrapper(job, parse_directives(job.script_text))


def wrap_to_stay(job: Submission) -> bytes:
    """The wrapper for a cluster without accounting."""
    return make_wrapper(replace(job, guard=f"{GUARD_PREFIX}7"), parse_directives(job.script_text), note_end=True)


def test_the_script_runs_with_its_own_exit_code_and_the_guard_names_the_job(tmp_path: Path) -> None:
    job = submission(tmp_path, COUNTING_SCRIPT)
    assert run(wrap(job), tmp_path, SLURM_JOB_ID="12").returncode == 3
    assert (tmp_path / "ran.txt").read_text() == f"ran 0 {job.script}\n"
    assert (tmp_path / ".guard-7").read_text() == "12\nsha-256:0\n"
    assert (tmp_path / "job.sh").read_bytes() == COUNTING_SCRIPT


def test_without_a_guard_each_copy_runs_the_script(tmp_path: Path) -> None:
    job = replace(submission(tmp_path, COUNTING_SCRIPT), guard=None)
    for _ in range(2):
        assert run(wrap(job), tmp_path, SLURM_JOB_ID="12").returncode == 3
    assert (tmp_path / "ran.txt").read_text() == f"ran 0 {job.script}\n" * 2
    assert {path.name for path in tmp_path.iterdir()} == {"job.sh", "ran.txt"}
    assert read_trace(wrap(job)) is None


def test_a_second_copy_ends_before_user_code_and_says_so(tmp_path: Path) -> None:
    wrapper = wrap(submission(tmp_path, COUNTING_SCRIPT))
    run(wrapper, tmp_path, SLURM_JOB_ID="12")
    second = run(wrapper, tmp_path, SLURM_JOB_ID="13")
    assert second.returncode == EXIT_SECOND_COPY
    assert second.stderr.startswith("marketplace-hpc: job 13 is a second copy of job 12 ")
    assert second.stderr.count("\n") == 1
    assert (tmp_path / "ran.txt").read_text().count("ran") == 1


def test_the_same_job_id_alone_is_no_excuse(tmp_path: Path) -> None:
    wrapper = wrap(submission(tmp_path, COUNTING_SCRIPT))
    assert run(wrapper, tmp_path, SLURM_JOB_ID="12").returncode == 3
    assert run(wrapper, tmp_path, SLURM_JOB_ID="12").returncode == EXIT_SECOND_COPY


def test_a_job_that_slurm_requeues_runs_again(tmp_path: Path) -> None:
    wrapper = wrap(submission(tmp_path, COUNTING_SCRIPT))
    assert run(wrapper, tmp_path, SLURM_JOB_ID="12").returncode == 3
    assert run(wrapper, tmp_path, SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1").returncode == 3
    assert run(wrapper, tmp_path, SLURM_JOB_ID="13", SLURM_RESTART_COUNT="1").returncode == EXIT_SECOND_COPY


def test_all_tasks_of_one_array_run_and_none_of_another(tmp_path: Path) -> None:
    wrapper = wrap(submission(tmp_path, COUNTING_SCRIPT))
    for task in ("46", "47", "43"):
        assert run(wrapper, tmp_path, SLURM_JOB_ID=task, SLURM_ARRAY_JOB_ID="43").returncode == 3
    assert run(wrapper, tmp_path, SLURM_JOB_ID="50", SLURM_ARRAY_JOB_ID="48").returncode == EXIT_SECOND_COPY


def test_of_many_copies_at_once_one_runs(tmp_path: Path) -> None:
    wrapper = wrap(submission(tmp_path, COUNTING_SCRIPT))
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda id=id: codes.append(run(wrapper, tmp_path, SLURM_JOB_ID=str(id)).returncode))
        for id in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [3] + [EXIT_SECOND_COPY] * 11
    assert (tmp_path / "ran.txt").read_text().count("ran") == 1


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    wrapper = wrap(submission(folder, COUNTING_SCRIPT))
    (folder / "job.sh").unlink()
    folder.rmdir()
    done = run(wrapper, tmp_path, SLURM_JOB_ID="12")
    assert done.returncode == EXIT_NO_GUARD
    assert str(folder) in done.stderr


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'a"b', "$(touch pwned)", "`id`", "ü€", "back\\slash", "-n", "a\nb", "*"]
)
def test_any_path_is_safe(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    assert run(wrap(submission(folder, COUNTING_SCRIPT, f"{name}.sh")), tmp_path, SLURM_JOB_ID="1").returncode == 3
    assert sorted(os.listdir(tmp_path)) == sorted([name, "ran.txt"])


def test_the_header_is_copied_and_the_body_is_not(tmp_path: Path) -> None:
    text = b"#!/bin/bash -l\n#SBATCH --job-name=\xff\n# remark\n\necho body\n#SBATCH -n 5\n"
    wrapper = wrap(submission(tmp_path, text))
    assert wrapper.startswith(b"#!/bin/sh\n#SBATCH --job-name=\xff\n# remark\n")
    assert b"body" not in wrapper
    assert parse_directives(wrapper).options == parse_directives(text).options


def test_a_wrapper_says_which_submission_it_is(tmp_path: Path) -> None:
    others = b'{"jobid": "8", "folder": "/", "script": "/x", "script_digest": "", "client_ref": "", "owner": ""}'
    forged = b"# marketplace-hpc-submission: " + others
    job = replace(submission(tmp_path, b"#!/bin/sh\n" + forged + b"\necho body\n"), client_ref="node", owner="me")
    trace = read_trace(wrap(job))
    assert trace == Trace("7", job.folder, job.script, "sha-256:0", "node", "me")
    assert run(wrap(job), tmp_path, SLURM_JOB_ID="1").stdout == "body\n"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"#!/bin/sh\necho 1\n",
        b"#!/bin/sh\n# marketplace-hpc-submission: nonsense\n",
        b"#!/bin/sh\n# marketplace-hpc-submission: [1]\n",
        b'#!/bin/sh\n# marketplace-hpc-submission: {"jobid": 7}\n',
    ],
)
def test_any_other_script_is_no_submission(text: bytes) -> None:
    assert read_trace(text) is None


def test_the_script_sees_no_variable_of_the_wrapper(tmp_path: Path) -> None:
    done = run(wrap(submission(tmp_path, b"#!/bin/sh\nset\n")), tmp_path, SLURM_JOB_ID="1")
    assert "mphpc" not in done.stdout


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (b"#!/bin/bash", ["/bin/bash"]),
        (b"#! /usr/bin/env python3", ["/usr/bin/env", "python3"]),
        (b"#!/bin/bash -l -e  \t", ["/bin/bash", "-l -e"]),
        (b"#!\t/bin/sh\t-e", ["/bin/sh", "-e"]),
        (b"#!", ["/bin/sh"]),
        (b"#!   ", ["/bin/sh"]),
        (b"#!bash", ["./bash"]),
    ],
)
def test_the_interpreter_line_is_read_as_the_kernel_reads_it(tmp_path: Path, line: bytes, command: list[str]) -> None:
    job = submission(tmp_path, line + b"\ntrue\n")
    assert script_command(job) == [*command, job.script]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Batch script is empty!"),
        (b" \n\t\n", "Batch script contains only whitespace!"),
        (b"echo hello\n", "This does not look like a batch script."),
        (b"\n#!/bin/sh\n", "This does not look like a batch script."),
        (b"#!/bin/sh\n\0\n", "The Slurm controller does not allow scripts that contain a NULL character"),
        (b"#!/bin/sh\ntrue\r\n", "Batch script contains DOS line breaks"),
    ],
)
def test_what_sbatch_does_not_read_is_refused_in_its_words(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(Refused) as error:
        wrap(submission(tmp_path, text))
    assert str(error.value).startswith(message)


def test_a_missing_folder_is_refused_and_an_unreachable_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_folder(str(tmp_path))
    with pytest.raises(Refused, match="does not exist"):
        check_folder(str(tmp_path / "missing"))

    def stale(path: str) -> None:
        raise OSError(116, "Stale file handle", path)

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(Deferred, match="Stale file handle"):
        check_folder(str(tmp_path))


class TestAWrapperThatStays:
    """Where there is no accounting: the same script, guard, output and exit code, and a note of the end."""

    def guard(self, folder: Path) -> Guard:
        (guard,) = read_guards(str(folder))
        return guard

    @pytest.mark.parametrize(
        ("line", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -SEGV $$", 139), ("exit 255", 255)]
    )
    def test_notes_how_the_script_ended_and_ends_like_it(self, tmp_path: Path, line: str, code: int) -> None:
        job = submission(tmp_path, f"#!/bin/sh\necho out; echo err >&2\n{line}\n".encode())
        done = run(wrap_to_stay(job), tmp_path, SLURM_JOB_ID="12")
        assert (done.returncode, done.stdout, done.stderr) == (code, "out\n", "err\n")
        guard = self.guard(tmp_path)
        assert (guard.holder, guard.ended, guard.runs["12"].status) == ("12", True, code)
        assert guard.started_at is not None
        assert guard.runs["12"].ended_at is not None
        assert guard.runs["12"].ended_at >= guard.started_at

    def test_a_script_that_cannot_be_run_is_said_on_its_own_output(self, tmp_path: Path) -> None:
        done = run(wrap_to_stay(submission(tmp_path, b"#!/no/such/shell\n")), tmp_path, SLURM_JOB_ID="12")
        assert done.returncode == 127
        assert "/no/such/shell" in done.stderr
        assert self.guard(tmp_path).runs["12"].status == 127

    def test_the_script_finds_what_it_would_find_alone(self, tmp_path: Path) -> None:
        seen = b"#!/bin/sh\ncat; echo $#; set | grep -c mphpc; grep Sig[IC] /proc/self/status; ls /proc/self/fd\n"
        job = submission(tmp_path, seen)
        (tmp_path / "input").write_text("hello\n")
        outputs = []
        for number, wrapper in enumerate((wrap(job), wrap_to_stay(job))):
            program = tmp_path / f"wrapper-{number}"
            program.write_bytes(wrapper)
            program.chmod(0o755)
            with (tmp_path / "input").open() as stdin:
                done = subprocess.run(
                    [program],
                    stdin=stdin,
                    cwd=tmp_path,
                    env={"PATH": os.defpath},
                    capture_output=True,
                    text=True,
                    timeout=20,
                )
            outputs.append(done.stdout)
        assert outputs[0].startswith("hello\n0\n0\nSigIgn")
        assert outputs[0] == outputs[1]

    @contextmanager
    def running(self, folder: Path, script: bytes) -> Iterator[subprocess.Popen[bytes]]:
        """A wrapper whose script has said that it is ready."""
        wrapper = folder / "wrapper"
        wrapper.write_bytes(wrap_to_stay(submission(folder, script)))
        wrapper.chmod(0o755)
        environment = {"PATH": os.defpath, "SLURM_JOB_ID": "12"}
        with subprocess.Popen(
            [wrapper], cwd=folder, env=environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == b"ready\n"
                yield process
            finally:
                process.kill()

    @pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "USR1", "USR2", "ALRM", "TERM", "XCPU"])
    def test_signals_reach_the_script(self, tmp_path: Path, name: str) -> None:
        script = (
            f"#!/bin/sh\ntrap 'echo got {name}; exit 4' {name}\necho ready\n"
            "for _ in $(seq 500); do sleep 0.02; done\n".encode()
        )
        with self.running(tmp_path, script) as process:
            process.send_signal(getattr(signal, f"SIG{name}"))
            assert process.stdout is not None
            assert process.stdout.readline() == f"got {name}\n".encode()
            assert process.wait(10) == 4
        assert self.guard(tmp_path).runs["12"].status == 4

    def test_a_script_goes_on_after_a_signal(self, tmp_path: Path) -> None:
        script = (
            b"#!/bin/sh\ntrap 'n=$((n + 1)); echo again' USR1\nn=0\necho ready\n"
            b"while [ $n -lt 2 ]; do sleep 0.02; done\nexit 6\n"
        )
        with self.running(tmp_path, script) as process:
            assert process.stdout is not None
            for _ in range(2):
                process.send_signal(signal.SIGUSR1)
                assert process.stdout.readline() == b"again\n"
            assert process.wait(10) == 6
        assert self.guard(tmp_path).runs["12"].status == 6

    def test_a_signal_just_when_the_script_ends_is_survived(self, tmp_path: Path) -> None:
        """As Slurm sends it: to all processes at once, so that the script dies when the wrapper is told, too."""
        with ExitStack() as stack:
            folders = [tmp_path / str(number) for number in range(24)]
            for folder in folders:
                folder.mkdir()
            script = b"#!/bin/sh\necho ready\nexec sleep 60\n"
            processes = [stack.enter_context(self.running(folder, script)) for folder in folders]
            parents = {process.pid for process in processes}
            listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
            rows = [[int(word) for word in line.split()] for line in listed.splitlines()[1:]]
            for pid in [pid for pid, parent in rows if pid in parents or parent in parents]:
                with suppress(ProcessLookupError):  # The script has ended by what its wrapper passed on.
                    os.kill(pid, signal.SIGTERM)
            assert {process.wait(10) for process in processes} == {128 + signal.SIGTERM}
        assert {self.guard(folder).runs["12"].status for folder in folders} == {128 + signal.SIGTERM}

    def test_a_wrapper_that_is_killed_notes_no_end(self, tmp_path: Path) -> None:
        with self.running(tmp_path, b"#!/bin/sh\necho ready\nexec sleep 1\n") as process:
            process.kill()
            process.wait(10)
        guard = self.guard(tmp_path)
        assert guard.started_at is not None
        assert not guard.ended

    def test_a_second_copy_notes_nothing(self, tmp_path: Path) -> None:
        wrapper = wrap_to_stay(submission(tmp_path, COUNTING_SCRIPT))
        run(wrapper, tmp_path, SLURM_JOB_ID="12")
        assert run(wrapper, tmp_path, SLURM_JOB_ID="13").returncode == EXIT_SECOND_COPY
        assert set(self.guard(tmp_path).runs) == {"12"}

    def test_a_requeued_job_has_not_ended_by_its_first_run(self, tmp_path: Path) -> None:
        wrapper = wrap_to_stay(submission(tmp_path, COUNTING_SCRIPT))
        run(wrapper, tmp_path, SLURM_JOB_ID="12")
        begun = (tmp_path / f"{GUARD_PREFIX}7").read_text().replace("ended", "started")
        assert begun.count("started") == 2
        (tmp_path / f"{GUARD_PREFIX}7").write_text(begun)
        assert not self.guard(tmp_path).ended
        assert run(wrapper, tmp_path, SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1").returncode == 3
        assert self.guard(tmp_path).ended

    def test_an_array_has_ended_when_all_its_tasks_have(self, tmp_path: Path) -> None:
        wrapper = wrap_to_stay(submission(tmp_path, COUNTING_SCRIPT))
        array = {"SLURM_ARRAY_JOB_ID": "43", "SLURM_ARRAY_TASK_COUNT": "3"}
        for count, task in enumerate(("46", "47", "43"), start=1):
            assert run(wrapper, tmp_path, SLURM_JOB_ID=task, **array).returncode == 3
            assert self.guard(tmp_path).ended is (count == 3)
        assert self.guard(tmp_path).holder == "43"
