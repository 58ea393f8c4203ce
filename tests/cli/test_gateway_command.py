"""``marketplace-hpc gateway serve``: what it says when something is wrong, and when it is ready."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner

from aiida_marketplace_hpc.cli import main

COMMAND = [str(Path(sys.executable).with_name("marketplace-hpc")), "gateway", "serve"]
TOKEN = ["--dev-token", "me@example.org=a-token-of-mine"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith("MARKETPLACE_HPC_")]:
        monkeypatch.delenv(key)


def refused(tmp_path: Path, *arguments: str) -> str:
    """What the command says when it does not start."""
    done = CliRunner().invoke(main, ["gateway", "serve", "--state", str(tmp_path / "state"), *arguments])
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.stdout == ""
    return done.stderr


def test_a_taken_port_is_named_with_the_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(tmp_path, *TOKEN, "--host", "127.0.0.1", "--port", str(port))
    assert str(port) in said
    assert "--port" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--dev-token"),
        (["--dev-token", "nonsense"], "USER=TOKEN"),
        (["--dev-token", "me=short"], "8 characters"),
        ([*TOKEN, "--backend", "slurm"], "--home"),
        ([*TOKEN, "--host", "0.0.0.0", "--port", "0"], "--allow-dev-tokens"),  # noqa: S104
        (["--auth", "oidc", "--issuer", "https://login.example.org"], "--audience"),
        ([*TOKEN, "--account", "delegated"], "firecrest"),
        ([*TOKEN, "--backend", "firecrest", "--home", "/tmp/x/{username}"], "firecrest_url"),
        ([*TOKEN, "--root", "software=/no/such/folder:ro"], "/no/such/folder"),
        ([*TOKEN, "--home", "/proc/no/{username}"], "/proc/no"),
        ([*TOKEN, "--config", "/no/such.toml"], "/no/such.toml"),
        ([*TOKEN, "--container-template", "/no/such.j2"], "/no/such.j2"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path: Path, arguments: list[str], named: str) -> None:
    assert named in refused(tmp_path, *arguments)


def test_it_serves_https_and_stops_while_somebody_is_connected(tmp_path: Path, certificate: Path) -> None:
    arguments = [*COMMAND, *TOKEN, "--port", "0", "--state", str(tmp_path / "state"), "--certfile", str(certificate)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on https://127.0.0.1:")
        with requests.Session() as session:
            url = line.removeprefix("listening on ").strip()
            assert session.get(f"{url}/heartbeat", verify=str(certificate), timeout=20).ok
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=8)  # It would be 10 s if it waited for the other side.


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    assert "--state" in refused(tmp_path, *TOKEN)


def test_it_says_when_it_is_ready_and_stops_on_request(tmp_path: Path) -> None:
    arguments = [*COMMAND, *TOKEN, "--host", "127.0.0.1", "--port", "0", "--state", str(tmp_path / "state")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:")
        answer = requests.get(line.removeprefix("listening on ").strip() + "/heartbeat", timeout=20)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        # uvicorn ends in good order and then by the signal itself, as shells expect.
        assert process.wait(timeout=20) in (0, -signal.SIGTERM)
        assert process.stdout.read() == ""


def test_it_serves_nothing_but_what_was_published(tmp_path: Path) -> None:
    settings = ["--classic-file-names", "raw", "--classic-listing", "whole"]
    settings += ["--classic-file-limit", "0.001", "--classic-command-timeout", "60"]
    arguments = [*COMMAND, *TOKEN, "--port", "0", "--state", str(tmp_path / "state"), "--classic", *settings]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline().removeprefix("listening on ").strip()
        assert requests.get(f"{url}/heartbeat", timeout=20).text.startswith('{\n  "message"')
        assert requests.get(f"{url}/api/v1/info", timeout=20).status_code == 404
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
        assert "only what was published is served" in process.stderr.read()
