"""``job run``: there and back in one command, against a gateway that is served over HTTP."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from aiida_marketplace_hpc.cli import job_run, main
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import ConnectionFailed
from aiida_marketplace_hpc.gateway.backends.base import Submission
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.platform import APP_ID, Platform
from aiida_marketplace_hpc.testing.served import ServedGateway

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local folder, with a script and its inputs."""
    monkeypatch.setattr(job_run, "_PAUSE", 0.0)
    path = tmp_path / "here"
    (path / "data" / "sub").mkdir(parents=True)
    (path / "data" / "sub" / "x").write_text("x")
    (path / "in.txt").write_text("in")
    (path / "my job.sh").write_text("#!/bin/sh\n")
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def run(served: ServedGateway) -> Run:
    def run(*arguments: str, **environment: str) -> Result:
        settings = {"MP_HOST": served.url, "MP_APP_ID": "", **environment}
        return CliRunner().invoke(main, ["job", "run", "my job.sh", *arguments], env=settings)

    return run


@pytest.fixture(autouse=True)
def _runs(backend: FakeBackend) -> None:
    """Let jobs run, leave files, and end with the code that ``in.txt`` names, as soon as they are submitted."""

    def submit(submission: Submission) -> str:
        identifier = backend.accept(submission)
        backend.run(identifier)
        folder = Path(submission.folder)
        (folder / "out.txt").write_text(f"run {len(backend.executed)}\n")
        (folder / "results").mkdir(exist_ok=True)
        (folder / "results" / "a.dat").write_text("a")
        (folder / "results" / "b.dat").write_text("b")
        text = (folder / "in.txt").read_text() if (folder / "in.txt").exists() else ""
        code = int(text) if text.isdecimal() else 0
        backend.end(identifier, JobState.FAILED if code else JobState.COMPLETED, code)
        return identifier

    backend.on_submit = submit


def test_a_script_goes_there_and_its_outputs_come_back(run: Run, backend: FakeBackend, here: Path) -> None:
    result = run("-i", "in.txt", "-i", "data", "-o", "out.txt", "-o", "results/*.dat", "--into", "back")
    assert result.exit_code == 0, result.output
    assert (here / "back" / "out.txt").read_text() == "run 1\n"
    assert (here / "back" / "results" / "b.dat").read_text() == "b"
    folder = Path(backend.submissions[0].folder)
    assert folder.parent.name == "runs"
    assert (folder / "data" / "sub" / "x").read_text() == "x"
    assert "COMPLETED, exit code 0\nback/out.txt\nback/results/a.dat\nback/results/b.dat\n" in result.stdout


def test_the_same_command_is_the_same_job(run: Run, backend: FakeBackend, here: Path) -> None:
    for _ in range(2):
        assert run("-i", "in.txt", "-o", "out.txt").exit_code == 0
    assert len(backend.submissions) == 1
    assert (here / "out.txt").read_text() == "run 1\n"
    assert run("-i", "in.txt", "--new").exit_code == 0
    assert len(backend.submissions) == 2
    (here / "in.txt").write_text("other")
    assert run("-i", "in.txt").exit_code == 0
    assert len(backend.submissions) == 3
    # A name is a part of what is run, too.
    (here / "in.txt").rename("in2.txt")
    assert run("-i", "in2.txt").exit_code == 0
    assert len(backend.submissions) == 4


def test_an_upload_that_broke_off_is_finished_before_anything_is_submitted(
    run: Run, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = HpcGateway.put_tree

    def broken(*_: Any, **__: Any) -> Any:
        raise ConnectionFailed("cut")

    monkeypatch.setattr(HpcGateway, "put_tree", broken)
    assert run("-i", "in.txt", "-i", "data").exit_code == 3
    assert backend.submissions == []
    monkeypatch.setattr(HpcGateway, "put_tree", right)
    assert run("-i", "in.txt", "-i", "data").exit_code == 0
    assert Path(backend.submissions[0].folder, "data", "sub", "x").exists()


def test_the_exit_code_is_the_jobs(run: Run, here: Path) -> None:
    (here / "in.txt").write_text("7")
    result = run("-i", "in.txt", "-o", "out.txt", "--json")
    assert result.exit_code == 7
    document = json.loads(result.stdout)
    assert (document["state"], document["exit_code"], document["outputs"]) == ("FAILED", 7, ["out.txt"])


@pytest.mark.parametrize(
    ("job", "code"),
    [
        ({"state": "COMPLETED", "exit_code": 0}, 0),
        ({"state": "FAILED", "exit_code": 3, "signal": None}, 3),
        ({"state": "FAILED", "exit_code": 0, "signal": 9}, 137),
        ({"state": "TIMEOUT", "exit_code": 0, "signal": None}, 1),
        ({"state": "REFUSED", "exit_code": None}, 1),
    ],
)
def test_exit_codes_of_all_ends(job: dict[str, Any], code: int) -> None:
    assert job_run.exit_code_of(job) == code


def test_what_breaks_off_after_the_end_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ConnectionFailed("cut")

    monkeypatch.setattr(HpcGateway, "get", broken)
    result = run("-o", "out.txt")
    assert result.exit_code == 3
    assert "has ended: the same command fetches its outputs" in result.stderr


def test_a_program_among_the_inputs_can_be_executed(run: Run, backend: FakeBackend, here: Path) -> None:
    (here / "in.txt").chmod(0o755)
    assert run("-i", "in.txt").exit_code == 0
    assert os.access(Path(backend.submissions[0].folder, "in.txt"), os.X_OK)


def test_an_output_that_is_missing_is_an_error(run: Run) -> None:
    result = run("-o", "out.txt", "-o", "nothing", "-o", "no*thing")
    assert result.exit_code == 1
    assert "left no nothing, no*thing in " in result.stderr
    assert "out.txt" in result.stdout


@pytest.mark.parametrize(
    "arguments", [["-o", "/etc/passwd"], ["-o", "../x"], ["-i", "in.txt", "-i", "data/../in.txt"], ["-i", "my job.sh"]]
)
def test_what_cannot_be_meant_is_a_usage_error(run: Run, served: ServedGateway, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2
    assert served.requests() == []


def test_a_gateway_that_is_gone_for_a_while_is_waited_for(
    run: Run, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.on_submit = None
    right = HpcGateway.show_job
    asked: list[str] = []

    def show(gateway: HpcGateway, jobid: str, wait: int = 0) -> Any:
        asked.append(jobid)
        if len(asked) < 3:
            raise ConnectionFailed("cut")
        if len(asked) == 3:
            backend.run(backend.ids[0])
            backend.end(backend.ids[0])
        return right(gateway, jobid, wait)

    monkeypatch.setattr(HpcGateway, "show_job", show)
    result = run()
    assert result.exit_code == 0, result.output
    assert result.stderr.count("no answer, the job runs on: cut") == 2
    monkeypatch.setattr(job_run, "PATIENCE", -1.0)
    asked.clear()
    result = run("--new")
    assert result.exit_code == 3
    assert "runs on (QUEUED): the same command waits for it again" in result.stderr


def test_ctrl_c_says_what_runs_on_and_how_to_cancel_it(served: ServedGateway, backend: FakeBackend) -> None:
    backend.on_submit = None
    arguments = [sys.executable, "-m", "aiida_marketplace_hpc", "job", "run", "my job.sh", "--url", served.url]
    environment = {name: value for name, value in os.environ.items() if name not in ("MP_HOST", "MP_APP_ID")}
    with subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        jobid = process.stderr.readline().split()[1]
        assert process.stderr.readline() == "queued\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    command = f"marketplace-hpc --url {served.url} job cancel {jobid}"
    assert f"The job {jobid} runs on (QUEUED): the same command waits for it again, {command} cancels it." in said
    assert backend.cancelled == []
    assert CliRunner().invoke(main, shlex.split(command)[1:]).exit_code == 0
    assert backend.cancelled == backend.ids


def test_a_machine_that_the_gateway_has_not_is_refused(run: Run, backend: FakeBackend) -> None:
    result = run("--machine", "elsewhere")
    assert result.exit_code == 2
    assert "no machine elsewhere: it has the machine" in result.stderr
    assert backend.submissions == []


def test_ctrl_c_before_anything_was_submitted(run: Run, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(HpcGateway, "put_file", interrupted)
    result = run()
    assert result.exit_code == 130
    assert "Nothing was submitted" in result.stderr
    monkeypatch.undo()
    assert backend.submissions == []


def test_it_works_through_the_platform(run: Run, served: ServedGateway, here: Path) -> None:
    with Platform(served.url, known_headers_only=True, max_body=1024 * 1024, refuse_chunked=True) as platform:
        result = run("-i", "data", "-o", "results", MP_HOST=platform.url, MP_APP_ID=APP_ID)
    assert result.exit_code == 0, result.output
    assert (here / "results" / "a.dat").read_text() == "a"
