"""The local backend runs jobs as processes of this machine, and says nothing about them that is not true."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from aiida_marketplace_hpc.gateway.backends import local_supervisor
from aiida_marketplace_hpc.gateway.backends.accounting import COLUMNS
from aiida_marketplace_hpc.gateway.backends.base import Deferred, Observation, Refused, SchedulerDown, Submission
from aiida_marketplace_hpc.gateway.backends.local import LocalBackend
from aiida_marketplace_hpc.gateway.backends.local_supervisor import read_json
from aiida_marketplace_hpc.gateway.backends.wrapper import EXIT_SECOND_COPY
from aiida_marketplace_hpc.protocol import JobState

KILL_WAIT = 0.4
# A script goes on when its file `go` is there; until then it is alive.
UNTIL_GO = 'until [ -e "$SLURM_SUBMIT_DIR/go" ]; do sleep 0.05; done'


def wait_until(condition: Callable[[], object], within: float = 15.0) -> None:
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.02)


def exists(pid: int) -> bool:
    return any(local_supervisor.processes([pid]))


class Site:
    """A spool, the backends on it, and jobs in folders of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spool = path / "spool"
        self.backends: list[LocalBackend] = []

    def backend(self, slots: int = 2) -> LocalBackend:
        backend = LocalBackend(self.spool, slots=slots, kill_wait=KILL_WAIT)
        backend.start()
        self.backends.append(backend)
        return backend

    def submission(self, name: str, *lines: str, interpreter: str = "/bin/sh") -> Submission:
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        text = "\n".join((f"#!{interpreter}", *lines, "")).encode()
        (folder / "job.sh").write_bytes(text)
        return Submission(f"gw-{name}", str(folder), f"{folder}/job.sh", text, "sha-256:0", f".guard-{name}", "comment")

    def go(self, *names: str) -> None:
        for name in names:
            (self.path / name / "go").touch()

    def read(self, name: str, file: str) -> str:
        return (self.path / name / file).read_text()

    def pid(self, name: str, file: str = "pid") -> int:
        """The process id that a script writes; waited for."""
        path = self.path / name / file
        wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
        return int(path.read_text())

    def supervisor(self, id: str) -> int:
        path = self.spool / "jobs" / id / "started.json"
        wait_until(path.exists)
        return int(read_json(path)["supervisor"])

    def kill_supervisor(self, id: str) -> None:
        pid = self.supervisor(id)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not exists(pid))


def folder_of(backend: LocalBackend, id: str) -> str:
    job = backend._spool.get(id)
    assert job is not None
    return str(job.spec["folder"])


def observe(backend: LocalBackend, id: str) -> Observation:
    """What the backend says of a job: it is never in doubt."""
    queue = backend.queue()
    return queue[id] if id in queue else backend.accounting({id: folder_of(backend, id)})[id]


def final(backend: LocalBackend, id: str, within: float = 15.0) -> Observation:
    wait_until(lambda: observe(backend, id).state.final, within)
    assert id not in backend.queue()
    return backend.accounting({id: folder_of(backend, id)})[id]


def running(backend: LocalBackend, id: str) -> None:
    wait_until(lambda: observe(backend, id).state is JobState.RUNNING)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    if site.backends:
        last = site.backends[-1]
        if last._dispatcher is None:
            last.start()
        for id in last.queue():
            last.cancel(id)
        wait_until(lambda: not last.queue())
    for backend in site.backends:
        backend.stop()


class TestJobs:
    """What becomes of a job that nobody disturbs."""

    def test_runs_to_its_end(self, site: Site) -> None:
        backend = site.backend()
        before = datetime.now(timezone.utc)
        id = backend.submit(
            site.submission("a", "#SBATCH --job-name=first -A project", "pwd", "echo bad >&2", f'echo "$0"; {UNTIL_GO}')
        )
        running(backend, id)
        alive = backend.queue()[id]
        assert (alive.native_state, alive.exit_code, alive.ended_at) == ("RUNNING", None, None)
        site.go("a")
        job = final(backend, id)
        assert (job.state, job.native_state, job.exit_code, job.signal) == (JobState.COMPLETED, "COMPLETED", 0, None)
        assert (job.name, job.partition, job.account, job.complete) == ("first", "local", "project", True)
        assert job.folder == str(site.path / "a")
        assert job.submitted_at is not None
        assert job.started_at is not None
        assert job.ended_at is not None
        assert before <= job.submitted_at <= job.started_at <= job.ended_at
        assert site.read("a", f"slurm-{id}.out") == f"{job.folder}\nbad\n{job.folder}/job.sh\n"
        assert site.read("a", ".guard-a") == f"{id}\nsha-256:0\n"

    def test_fails_with_its_exit_code(self, site: Site) -> None:
        backend = site.backend()
        job = final(backend, backend.submit(site.submission("a", "exit 7")))
        assert (job.state, job.exit_code, job.signal) == (JobState.FAILED, 7, None)

    def test_fails_by_a_signal(self, site: Site) -> None:
        backend = site.backend()
        job = final(backend, backend.submit(site.submission("a", "kill -SEGV $$")))
        assert (job.state, job.exit_code, job.signal) == (JobState.FAILED, None, signal.SIGSEGV)

    def test_fails_when_its_interpreter_is_missing(self, site: Site) -> None:
        backend = site.backend()
        id = backend.submit(site.submission("a", "true", interpreter="/no/such/shell"))
        assert final(backend, id).exit_code == 127
        assert "/no/such/shell" in site.read("a", f"slurm-{id}.out")

    def test_fails_with_the_reason_when_its_output_cannot_be_written(self, site: Site) -> None:
        backend = site.backend()
        job = final(backend, backend.submit(site.submission("a", "#SBATCH -o missing/out", "touch ran")))
        assert job.state is JobState.FAILED
        assert "missing/out" in job.reason
        assert not (site.path / "a" / "ran").exists()

    def test_its_environment_is_its_own(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MP_ACCESS_TOKEN", "hunter2")
        monkeypatch.delenv("TZ", raising=False)
        backend = site.backend()
        id = backend.submit(
            site.submission("a", "#SBATCH --export=ALL,THREADS=4 -J name", "env", interpreter="/bin/bash")
        )
        final(backend, id)
        environment = dict(line.split("=", 1) for line in site.read("a", f"slurm-{id}.out").splitlines())
        for of_the_shell in ("PWD", "SHLVL", "_"):
            environment.pop(of_the_shell, None)
        assert environment.pop("PATH")
        assert environment == {
            "HOME": environment["HOME"],
            "USER": environment["USER"],
            "LOGNAME": environment["USER"],
            "LANG": environment["LANG"],
            "THREADS": "4",
            "SLURM_JOB_ID": id,
            "SLURM_JOB_NAME": "name",
            "SLURM_SUBMIT_DIR": str(site.path / "a"),
        }

    def test_writes_where_its_directives_say(self, site: Site) -> None:
        backend = site.backend()
        (site.path / "a").mkdir()
        (site.path / "a" / "in").write_text("from input\n")
        lines = ("#SBATCH -J x -o %x-%4j.%%.out -e err -i in", "cat", "echo bad >&2")
        id = backend.submit(site.submission("a", *lines))
        final(backend, id)
        assert site.read("a", f"x-{int(id):04}.%.out") == "from input\n"
        assert site.read("a", "err") == "bad\n"

    @pytest.mark.parametrize(("line", "content"), [("", "old\nnew\n"), ("#SBATCH --open-mode=truncate", "new\n")])
    def test_does_not_wipe_out_what_is_there_unless_told(self, site: Site, line: str, content: str) -> None:
        backend = site.backend()
        submission = site.submission("a", "#SBATCH -o out", line, "echo new")
        (site.path / "a" / "out").write_text("old\n")
        final(backend, backend.submit(submission))
        assert site.read("a", "out") == content

    def test_ignored_signals_are_not_inherited(self, site: Site) -> None:
        backend = site.backend()
        final(backend, backend.submit(site.submission("a", "#SBATCH -o out", "grep SigIgn /proc/self/status")))
        # The C library keeps the signals 32 and 33 to itself: nobody can set them, here or anywhere.
        assert int(site.read("a", "out").split()[1], 16) & ~(0b11 << 31) == 0

    def test_has_the_record_that_sacct_would_have(self, site: Site) -> None:
        backend = site.backend()
        id = backend.submit(site.submission("a", "#SBATCH -t 90 -J a|b", "exit 3"))
        job = final(backend, id)
        assert tuple(job.columns) == COLUMNS
        record, step = (dict(zip(job.columns, row, strict=True)) for row in job.rows)
        expected = {"JobID": id, "JobName": "a/b", "State": "FAILED", "ExitCode": "3:0", "TimelimitRaw": "90"}
        assert expected.items() <= record.items()
        assert step["JobID"] == f"{id}.batch"
        assert int(step["MaxRSS"].removesuffix("K")) > 0
        assert record["End"] == f"{job.ended_at:%Y-%m-%dT%H:%M:%S}"


class TestEnds:
    """What brings a job to its end from outside."""

    def test_the_time_limit_is_kept_to_the_second(self, site: Site) -> None:
        backend = site.backend()
        job = final(backend, backend.submit(site.submission("a", "#SBATCH --time=0:01", "exec sleep 60")), within=10)
        assert (job.state, job.exit_code, job.signal, job.time_limit) == (JobState.TIMEOUT, None, signal.SIGTERM, 1)
        assert job.started_at is not None
        assert job.ended_at is not None
        assert 1.0 <= (job.ended_at - job.started_at).total_seconds() < 3.0

    def test_a_cancelled_job_may_clean_up(self, site: Site) -> None:
        backend = site.backend()
        lines = ("trap 'echo cleaned > cleaned; exit 5' TERM", "echo $$ > pid", "sleep 60 & wait")
        id = backend.submit(site.submission("a", *lines))
        site.pid("a")
        backend.cancel(id)
        job = final(backend, id)
        assert (job.state, job.exit_code) == (JobState.CANCELLED, 5)
        assert site.read("a", "cleaned") == "cleaned\n"
        backend.cancel(id)

    def test_a_job_that_does_not_listen_is_killed(self, site: Site) -> None:
        backend = site.backend()
        id = backend.submit(site.submission("a", "trap '' TERM", "echo $$ > pid", "while :; do sleep 0.1; done"))
        pid = site.pid("a")
        backend.cancel(id)
        job = final(backend, id)
        assert (job.state, job.signal) == (JobState.CANCELLED, signal.SIGKILL)
        assert not exists(pid)

    def test_a_stopped_job_can_be_cancelled(self, site: Site) -> None:
        backend = site.backend()
        id = backend.submit(site.submission("a", "echo $$ > pid", "kill -STOP $$"))
        site.pid("a")
        backend.cancel(id)
        assert final(backend, id).state is JobState.CANCELLED

    def test_a_job_that_is_cancelled_while_it_waits_never_starts(self, site: Site) -> None:
        backend = site.backend(slots=1)
        first = backend.submit(site.submission("a", UNTIL_GO))
        running(backend, first)
        second = backend.submit(site.submission("b", "touch ran"))
        assert observe(backend, second).state is JobState.QUEUED
        backend.cancel(second)
        job = final(backend, second)
        assert (job.state, job.started_at, job.exit_code) == (JobState.CANCELLED, None, None)
        site.go("a")
        final(backend, first)
        last = backend.submit(site.submission("c", "true"))
        final(backend, last)
        assert not (site.path / "b" / "ran").exists()

    def test_cancelling_what_is_not_there_is_no_error(self, site: Site) -> None:
        backend = site.backend()
        backend.cancel("99")
        backend.cancel("../jobs")

    def test_what_a_script_leaves_behind_ends_with_it(self, site: Site) -> None:
        backend = site.backend()
        lines = (
            "(trap '' TERM HUP; sleep 61; true) & echo $! > pid",
            "setsid sh -c 'echo $$ > daemon; exec sleep 62 >&- 2>&- <&-' &",
            "until [ -s daemon ]; do sleep 0.02; done; exit 4",
        )
        job = final(backend, backend.submit(site.submission("a", *lines)))
        assert (job.state, job.exit_code) == (JobState.FAILED, 4)
        assert not exists(site.pid("a"))
        assert not exists(site.pid("a", "daemon"))


class TestOrder:
    """Slots, and the order in which they are given."""

    def test_no_more_jobs_run_than_there_are_slots(self, site: Site) -> None:
        backends = [site.backend(slots=2), site.backend(slots=2)]
        names = "abcdef"
        ids = [backends[index % 2].submit(site.submission(name, UNTIL_GO)) for index, name in enumerate(names)]

        def started() -> list[str]:
            states = backends[0].accounting({id: folder_of(backends[0], id) for id in ids})
            return [id for id in ids if states[id].state is JobState.RUNNING]

        for turn in range(0, 6, 2):
            wait_until(lambda turn=turn: started() == ids[turn : turn + 2])
            for backend in backends:
                backend._step()
            assert started() == ids[turn : turn + 2]
            site.go(*names[turn : turn + 2])
        for id in ids:
            assert final(backends[1], id).state is JobState.COMPLETED

    def test_ids_grow_whoever_draws_them(self, site: Site) -> None:
        backends = [site.backend(slots=1) for _ in range(3)]
        blocker = backends[0].submit(site.submission("a", UNTIL_GO))
        submission = site.submission("b", "true")
        ids: list[str] = []
        threads = [
            threading.Thread(target=lambda backend=backend: ids.extend(backend.submit(submission) for _ in range(5)))
            for backend in backends
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(int, ids)) == list(range(int(blocker) + 1, int(blocker) + 16))
        for id in ids:
            backends[1].cancel(id)

    def test_the_same_submission_twice_runs_user_code_once(self, site: Site) -> None:
        backend = site.backend()
        submission = site.submission("a", "#SBATCH -o out", "echo ran")
        jobs = [final(backend, id) for id in (backend.submit(submission), backend.submit(submission))]
        assert sorted((job.state.value, job.exit_code) for job in jobs) == [
            ("COMPLETED", 0),
            ("FAILED", EXIT_SECOND_COPY),
        ]
        output = site.read("a", "out").splitlines()
        assert output.count("ran") == 1
        assert len(output) == 2


class TestDeaths:
    """What dies while a job lives, or before."""

    def test_jobs_go_on_without_a_gateway(self, site: Site) -> None:
        first = site.backend(slots=1)
        one = first.submit(site.submission("a", f"{UNTIL_GO}; exit 3"))
        two = first.submit(site.submission("b", "exit 4"))
        running(first, one)
        first.stop()
        site.go("a")
        wait_until((site.spool / "jobs" / one / "ended.json").exists)
        assert observe(first, two).state is JobState.QUEUED
        second = site.backend(slots=1)
        assert final(second, one).exit_code == 3
        assert final(second, two).exit_code == 4

    def test_jobs_survive_the_death_of_the_gateway(self, site: Site) -> None:
        site.submission("a", f"echo $$ > pid; {UNTIL_GO}; exit 3")
        program = f"""
import time
from pathlib import Path
from aiida_marketplace_hpc.gateway.backends.base import Submission
from aiida_marketplace_hpc.gateway.backends.local import LocalBackend
folder = {str(site.path / "a")!r}
backend = LocalBackend(Path({str(site.spool)!r}), slots=1)
backend.start()
text = Path(folder, "job.sh").read_bytes()
for _ in range(2):
    backend.submit(Submission("gw", folder, folder + "/job.sh", text, "", f".guard-{{_}}", ""))
time.sleep(60)
"""
        gateway = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
        try:
            pid = site.pid("a")
        finally:
            os.killpg(gateway.pid, signal.SIGKILL)
            gateway.wait()
        assert exists(pid)
        backend = site.backend(slots=1)
        assert observe(backend, "1").state is JobState.RUNNING
        assert observe(backend, "2").state is JobState.QUEUED
        site.go("a")
        assert final(backend, "1").exit_code == 3
        assert final(backend, "2").exit_code == 3

    def test_a_job_is_running_until_its_last_process_is_gone(self, site: Site) -> None:
        backend = site.backend(slots=1)
        id = backend.submit(site.submission("a", f"echo $$ > pid; {UNTIL_GO}"))
        waiting = backend.submit(site.submission("b", "true"))
        pid = site.pid("a")
        site.kill_supervisor(id)
        for _ in range(3):
            backend._step()
            assert exists(pid)
            assert observe(backend, id).state is JobState.RUNNING
            # Its slot is not free either.
            assert observe(backend, waiting).state is JobState.QUEUED
        site.go("a")
        job = final(backend, id)
        assert not exists(pid)
        assert (job.state, job.reason, job.exit_code) == (JobState.NODE_FAIL, "its supervisor died", None)
        assert final(backend, waiting).state is JobState.COMPLETED

    @pytest.mark.parametrize(
        "child",
        [
            # Has closed the mark, but is of the session.
            "import os, time; os.closerange(3, 200); open('pid', 'w').write(f'{os.getpid()}\\n'); time.sleep(60)",
            # Has left the session, but bears the mark.
            "import os, time; os.setsid(); open('pid', 'w').write(f'{os.getpid()}\\n'); time.sleep(60)",
        ],
    )
    def test_an_orphan_is_found_by_its_session_or_by_its_mark(self, site: Site, child: str) -> None:
        backend = site.backend()
        lines = ("echo $$ > shell", f'{sys.executable} -S -c "{child}" &', "wait")
        id = backend.submit(site.submission("a", *lines, interpreter="/bin/bash"))
        pid, shell = site.pid("a"), site.pid("a", "shell")
        site.kill_supervisor(id)
        os.kill(shell, signal.SIGKILL)
        wait_until(lambda: not exists(shell))
        assert observe(backend, id).state is JobState.RUNNING
        backend.cancel(id)
        assert final(backend, id).state is JobState.CANCELLED
        assert not exists(pid)

    def test_an_orphan_is_ended_at_its_time_limit(self, site: Site) -> None:
        backend = site.backend()
        id = backend.submit(
            site.submission("a", "#SBATCH -t 0:1", "trap '' TERM; echo $$ > pid; while :; do sleep 0.1; done")
        )
        pid = site.pid("a")
        site.kill_supervisor(id)
        assert final(backend, id).state is JobState.TIMEOUT
        assert not exists(pid)

    def test_a_process_of_another_run_of_the_machine_is_none_of_the_jobs(self, site: Site) -> None:
        backend = site.backend()
        id = backend.submit(site.submission("a", "echo $$ > pid; exec sleep 60"))
        pid = site.pid("a")
        site.kill_supervisor(id)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not exists(pid))
        folder = site.spool / "jobs" / id
        stranger = {"started_at": time.time(), "supervisor": 1, "session": os.getsid(0), "start": 0, "boot": "another"}
        assert local_supervisor.members(folder, stranger) == set()
        reused = {**stranger, "boot": local_supervisor.boot_id(), "session": os.getpid()}
        assert local_supervisor.members(folder, reused) == set()

    def test_a_gateway_that_looks_at_an_orphan_is_not_taken_for_one_of_its_processes(self, site: Site) -> None:
        backend = site.backend()
        id = backend.submit(site.submission("a", "echo $$ > pid; exec sleep 60"))
        pid = site.pid("a")
        site.kill_supervisor(id)
        folder = site.spool / "jobs" / id
        with open(folder / "alive") as probe:
            found = local_supervisor.members(folder, read_json(folder / "started.json"))
            assert not probe.closed
        assert found == {pid}

    def test_a_supervisor_that_does_not_start_is_given_up(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(local_supervisor, "__file__", str(site.path / "missing.py"))
        backend = site.backend()
        id = backend.submit(site.submission("a", "touch ran"))
        job = final(backend, id)
        assert job.state is JobState.NODE_FAIL
        assert "its supervisor does not start" in job.reason
        assert "missing.py" in (site.spool / "jobs" / id / "log").read_text()
        assert caplog.text.count("its supervisor ended with exit code") == 3
        assert not (site.path / "a" / "ran").exists()


class TestAnswers:
    """What is refused, found, kept and not known."""

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("#SBATCH -p debug", "Batch job submission failed: Invalid partition name specified: debug"),
            ("#SBATCH -N 2", "Batch job submission failed: Node count specification invalid"),
            ("#SBATCH -N 2-4", "Batch job submission failed: Node count specification invalid"),
            ("#SBATCH -N x", '"x" is not a valid node count'),
            ("#SBATCH -t soon", "Invalid --time specification"),
            ("#SBATCH word", "Invalid directive found in batch script: word"),
            ("#SBATCH --array=0-3", "#SBATCH --array is not possible"),
            ("#SBATCH -d afterok:1", "#SBATCH --dependency is not possible"),
            ("#SBATCH -H", "#SBATCH --hold is not possible"),
            ("#SBATCH hetjob", "heterogeneous jobs are not possible"),
        ],
    )
    def test_refuses_what_it_cannot_do(self, site: Site, line: str, message: str) -> None:
        backend = site.backend()
        with pytest.raises(Refused) as error:
            backend.submit(site.submission("a", line))
        assert str(error.value).startswith(message)
        assert backend.queue() == {}

    def test_refuses_a_script_without_an_interpreter_and_a_folder_that_is_gone(self, site: Site) -> None:
        backend = site.backend()
        no_script = Submission("g", str(site.path), str(site.path / "x"), b"echo\n", "", ".g", "")
        with pytest.raises(Refused, match="This does not look like a batch script"):
            backend.submit(no_script)
        no_folder = Submission("g", str(site.path / "gone"), str(site.path / "x"), b"#!/bin/sh\n", "", ".g", "")
        with pytest.raises(Refused, match="does not exist"):
            backend.submit(no_folder)

    def test_accepts_its_own_partitions_and_any_resources(self, site: Site) -> None:
        backend = LocalBackend(site.spool, slots=2, partitions=("short", "long"))
        backend.start()
        site.backends.append(backend)
        jobs = [
            final(
                backend, backend.submit(site.submission("a", "#SBATCH --partition=other,long --mem=1T -n 99 -N 1-4"))
            ),
            final(backend, backend.submit(site.submission("b", "true"))),
        ]
        assert [job.partition for job in jobs] == ["long", "short"]
        assert backend.describe() == {"name": "local", "backend": "local", "partitions": ["short", "long"], "slots": 2}

    def test_finds_the_jobs_of_a_folder(self, site: Site) -> None:
        backend = site.backend(slots=1)
        before = datetime.now(timezone.utc)
        ended = backend.submit(site.submission("a", "true"))
        final(backend, ended)
        between = datetime.now(timezone.utc)
        living = backend.submit(site.submission("a", UNTIL_GO))
        other = backend.submit(site.submission("b", "true"))
        assert {one.id for one in backend.find(str(site.path / "a"), before)} == {ended, living}
        assert {one.id for one in backend.find(f"{site.path}/a/", between)} == {living}
        assert {one.id for one in backend.find(str(site.path / "b"), between)} == {other}
        assert backend.find(str(site.path / "a"), between + timedelta(minutes=1)) == []
        backend.cancel(living)

    def test_forgets_a_job_only_when_it_is_old(self, site: Site) -> None:
        backend = site.backend()
        id = backend.submit(site.submission("a", "true"))
        final(backend, id)
        backend.stop()
        backend.start()
        assert id in backend.accounting({id: folder_of(backend, id)})
        backend.stop()
        forgetful = LocalBackend(site.spool, retention=0)
        site.backends.append(forgetful)
        forgetful.start()
        assert forgetful.accounting({id: "/"}) == {}
        assert int(forgetful.submit(site.submission("b", "true"))) == int(id) + 1

    def test_without_its_spool_it_knows_nothing(self, site: Site) -> None:
        backend = site.backend()
        id = backend.submit(site.submission("a", "true"))
        final(backend, id)
        backend.stop()
        (site.spool / "jobs").rename(site.spool / "away")
        submission = site.submission("b", "true")
        with pytest.raises(Deferred):
            backend.submit(submission)
        with pytest.raises(SchedulerDown):
            backend.queue()
        with pytest.raises(SchedulerDown):
            backend.find(submission.folder, datetime.now(timezone.utc))
        (site.spool / "away").rename(site.spool / "jobs")
        assert backend.queue() == {}

    def test_nobody_else_can_read_the_spool(self, site: Site) -> None:
        site.backend()
        assert site.spool.stat().st_mode & 0o077 == 0
