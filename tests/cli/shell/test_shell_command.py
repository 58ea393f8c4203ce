"""``marketplace-hpc shell`` without a person: -c, a pipe, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from tests.client.fake_gateway import FakeGateway

Shell = Callable[..., Result]


@pytest.fixture
def shell(served: ServedGateway, home: Path, here: Path) -> Shell:
    def shell(*arguments: str, input: str | bytes | None = None, **environment: str) -> Result:
        settings = {"MP_HOST": served.url, "MP_APP_ID": "", **environment}
        return CliRunner().invoke(main, ["shell", *arguments], input=input, env=settings)

    return shell


def process(served: ServedGateway, *arguments: str, **options: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "MP_HOST": served.url, "MP_ACCESS_TOKEN": TOKENS[ALICE]}
    command = [sys.executable, "-m", "aiida_marketplace_hpc", "shell", *arguments]
    return subprocess.Popen(command, env=environment, **options)  # type: ignore[call-overload, no-any-return]


def test_commands_from_an_option(shell: Shell, home: Path) -> None:
    (home / "work").mkdir()
    (home / "work" / "a b").write_text("content\n")
    for where in ("work", f"{home}/work", "~/work"):
        done = shell(where, "-c", "pwd; ls -1; cat 'a b'")
        assert (done.exit_code, done.stdout, done.stderr) == (0, f"{home}/work\na b\ncontent\n", "")
    assert shell("-c", "pwd").stdout == f"{home}\n"


def test_commands_from_a_pipe(shell: Shell, home: Path) -> None:
    done = shell(input="mkdir a\n\n# a comment\ncd a &&\n  pwd\ncat 'not\nthere'\npwd")
    assert done.stdout == f"{home}/a\n{home}/a\n"
    assert done.exit_code == 1
    (home / os.fsdecode(b"odd \xff")).write_text("odd")
    assert shell(input=b"cat 'odd \xff'\n").stdout == "odd"


def test_the_exit_code_is_that_of_the_last_command_that_failed(shell: Shell, home: Path) -> None:
    assert shell("-c", "cat gone; pwd").exit_code == 1
    assert shell("-c", "cat gone; ls --wrong; pwd").exit_code == 2
    assert shell("-c", "frobnicate").exit_code == 127
    assert shell("-c", "cat gone; exit; pwd").exit_code == 1
    assert shell("-c", "cat gone; exit 0; pwd").stdout == ""
    assert shell("-c", "exit 9").exit_code == 9
    assert shell("-c", "cat gone; exit 0").exit_code == 0


def test_a_line_that_cannot_be_understood_ends_a_script(shell: Shell, home: Path) -> None:
    for script in ("cd gone | rm x\nmkdir a\n", "mkdir 'a", "cd gone &&"):
        done = shell(input=script)
        assert done.exit_code == 2
        assert done.stderr
        assert not (home / "a").exists()
    assert shell("-c", "ls > x").exit_code == 2


def test_nobody_is_asked_in_a_script(shell: Shell, home: Path) -> None:
    (home / "a" / "b").mkdir(parents=True)
    (home / "f1").write_text("")
    done = shell(input="rm f*\ny\nrm -r a\n")
    assert (home / "f1").exists()
    assert not (home / "a").exists()
    assert "y: no such command" in done.stderr
    assert "[y/N]" not in done.output


def test_where_it_cannot_begin(shell: Shell, home: Path, served: ServedGateway) -> None:
    (home / "file").write_text("")
    for arguments, code, message in (
        (["gone", "-c", "pwd"], 1, f"No such file or directory: {home}/gone"),
        (["file", "-c", "pwd"], 1, f"Not a directory: {home}/file"),
        (["/etc", "-c", "pwd"], 1, "outside the roots"),
        (["-c", "pwd", "--url", "http://127.0.0.1:1"], 3, "127.0.0.1:1"),
        (["-c", "pwd", "--token-source", "env:NO_SUCH_NAME"], 4, "NO_SUCH_NAME"),
        (["-c", "pwd", "--json"], 2, "no JSON"),
    ):
        done = shell(*arguments)
        assert (done.exit_code, done.stdout) == (code, "")
        assert message in done.stderr


def test_a_classic_gateway_has_nothing_to_show(shell: Shell, tmp_path: Path) -> None:
    fake = FakeGateway(tmp_path / "classic")
    try:
        fake.classic = True
        done = shell("-c", "ls", "--url", fake.url, MP_ACCESS_TOKEN="good")
    finally:
        fake.close()
    assert done.exit_code == 1
    assert "classic gateway" in done.stderr


def test_a_reader_that_leaves_ends_it(served: ServedGateway, home: Path) -> None:
    (home / "big").write_bytes(b"x" * 5_000_000)
    done = process(served, "-c", "cat big; mkdir after", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout is not None
    assert done.stderr is not None
    with done.stdout, done.stderr:
        done.stdout.read(10)
        done.stdout.close()
        assert done.wait(30) == 1
        assert done.stderr.read() == b""
    assert not (home / "after").exists()


def test_ctrl_c_ends_a_script(served: ServedGateway, home: Path) -> None:
    (home / "log").write_text("begun\n")
    done = process(served, "-c", "tail -f log; mkdir after", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout is not None
    assert done.stderr is not None
    with done.stdout, done.stderr:
        assert done.stdout.readline() == b"begun\n"
        done.send_signal(signal.SIGINT)
        assert done.wait(30) == 130
        assert done.stderr.read() == b""
    assert not (home / "after").exists()


def test_a_script_imports_no_prompt(served: ServedGateway, home: Path) -> None:
    code = (
        "import sys\nfrom aiida_marketplace_hpc.cli import main\n"
        "try:\n    main(['shell', '-c', 'pwd; ls'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('prompt_toolkit', 'aiida', 'tqdm', 'fastapi') if name in sys.modules])"
    )
    environment = {**os.environ, "MP_HOST": served.url, "MP_ACCESS_TOKEN": TOKENS[ALICE]}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
