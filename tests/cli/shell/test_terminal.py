"""The shell as a person has it: on a terminal, in a process of its own."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway

PROMPT = r"alice_a@127\.0\.0\.1:[^>\r\n]*>\x1b"
SHOWN = r"\x1b\[\?25h"
"""A terminal is told to show its cursor when everything else is drawn."""

Terminal = Callable[..., "pexpect.spawn[str]"]


@pytest.fixture
def person(tmp_path: Path) -> Path:
    """The home of the person at the terminal."""
    path = tmp_path / "person"
    path.mkdir()
    return path


@pytest.fixture
def terminal(served: ServedGateway, home: Path, person: Path) -> Iterator[Terminal]:
    started: list[pexpect.spawn[str]] = []

    def terminal(*arguments: str, **environment: str) -> pexpect.spawn[str]:
        settings = {
            "PATH": os.environ["PATH"],
            "HOME": str(person),
            "LANG": "C.UTF-8",
            "TERM": "xterm",
            "NO_COLOR": "1",
            "PROMPT_TOOLKIT_NO_CPR": "1",  # This terminal does not say where its cursor is.
            "MP_HOST": served.url,
            "MP_ACCESS_TOKEN": TOKENS[ALICE],
            **environment,
        }
        process = pexpect.spawn(
            sys.executable,
            ["-m", "aiida_marketplace_hpc", "shell", *arguments],
            env=settings,  # type: ignore[arg-type]
            cwd=str(person),
            dimensions=(24, 120),
            timeout=30,
            encoding="utf-8",
        )
        started.append(process)
        process.expect(PROMPT)
        return process

    yield terminal
    for process in started:
        process.close(force=True)


def test_a_session(terminal: Terminal, home: Path, person: Path) -> None:
    (home / "run 1" / "out").mkdir(parents=True)
    (home / "run 1" / "aiida.out").write_text("the energy is -7.5\n")
    shell = terminal("run 1")
    shell.sendline("ls")
    shell.expect(r"aiida\.out  out\r\n")
    shell.expect(PROMPT)
    shell.sendline("cat gone")
    shell.expect("cat: No such file or directory: .*gone")
    shell.expect(PROMPT)
    shell.sendline("get aiida.out")
    shell.expect(PROMPT)
    shell.sendline("cd out")
    shell.expect(PROMPT)
    shell.sendline("put aiida.out")
    shell.expect(PROMPT)
    shell.sendline("exit 3")
    shell.expect(pexpect.EOF)
    shell.wait()
    assert shell.exitstatus == 3
    assert (person / "aiida.out").read_text() == "the energy is -7.5\n"
    assert (home / "run 1" / "out" / "aiida.out").exists()


def test_tab_completes_commands_and_names(terminal: Terminal, home: Path) -> None:
    (home / "a folder").mkdir()
    (home / "a folder" / "the output.txt").write_text("found it\n")
    shell = terminal()
    shell.send("ca\t")
    shell.expect("t" + ".*" + SHOWN)
    shell.send("a\t")
    shell.expect(r"\\ folder/")
    shell.send("the\t")
    shell.expect(r"\\ output\.txt")
    shell.send("\r")
    shell.expect("found it")
    shell.expect(PROMPT)
    shell.send("\t")
    shell.expect(r"du .*head .*less .*mkdir")


def test_ctrl_c_ends_a_command_and_ctrl_d_the_shell(terminal: Terminal, home: Path) -> None:
    log = home / "log"
    log.write_text("step 1\n")
    shell = terminal()
    shell.sendline("tail -f log")
    shell.expect("step 1\r\n")
    with log.open("a") as file:
        file.write("step 2\n")
    shell.expect("step 2\r\n")
    shell.sendintr()
    shell.expect(PROMPT)
    shell.send("half a line")
    shell.expect("half a line")
    shell.sendintr()
    shell.expect(PROMPT)
    shell.sendline("pwd")
    shell.expect(str(home))
    shell.expect(PROMPT)
    shell.sendeof()
    shell.expect(pexpect.EOF)
    shell.wait()
    assert shell.exitstatus == 0


def test_a_person_is_asked_before_a_folder_goes(terminal: Terminal, home: Path) -> None:
    (home / "folder" / "sub").mkdir(parents=True)
    shell = terminal()
    for answer, there in (("n", True), ("", True), ("\x03", True), ("y", False)):
        shell.sendline("rm -r folder")
        shell.expect(r"remove folder and all that is in it\? \[y/N\]: ")
        shell.send(answer if answer == "\x03" else f"{answer}\r")
        shell.expect(PROMPT)
        assert (home / "folder").exists() is there


def test_history_is_kept_for_the_next_session_and_for_nobody_else(terminal: Terminal, home: Path, person: Path) -> None:
    shell = terminal()
    shell.sendline("mkdir one")
    shell.expect(PROMPT)
    shell.sendeof()
    shell.expect(pexpect.EOF)
    assert sorted(path.name for path in person.rglob("*") if path.is_file()) == ["shell_history"]
    (kept,) = person.rglob("shell_history")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert TOKENS[ALICE] not in kept.read_text()
    again = terminal()
    again.send("\x1b[A")
    again.expect("mkdir one")


def test_history_that_cannot_be_kept_is_no_reason_not_to_begin(terminal: Terminal, person: Path) -> None:
    (person / "file").write_text("")
    terminal(XDG_STATE_HOME=str(person / "file"))


PAGER = """\
import os, signal, sys

def interrupted(*_):
    os.write(2, b"interrupted\\n")
    sys.exit()

signal.signal(signal.SIGINT, interrupted)
os.write(2, b"page: " + os.read(0, 6) + b"\\n")
signal.pause()
"""


def test_less_fetches_what_is_looked_at_and_has_ctrl_c_to_itself(
    terminal: Terminal, home: Path, person: Path, served: ServedGateway
) -> None:
    with (home / "large").open("wb") as file:
        file.write(b"begin\n")
        file.truncate(2 * 1024**3)
    (person / "pager.py").write_text(PAGER)
    shell = terminal(PAGER=f"{sys.executable} {person}/pager.py")
    shell.sendline("less large")
    shell.expect("page: begin")
    shell.sendintr()
    shell.expect("interrupted")
    shell.expect(PROMPT)
    shell.sendline("less gone")
    shell.expect("less: No such file")
    shell.expect(PROMPT)
    shell.sendeof()
    shell.expect(pexpect.EOF)
    served.stop()
    assert [line["capability"] for line in served.requests()].count("getDataset") <= 4


def test_it_goes_when_the_terminal_goes(terminal: Terminal) -> None:
    shell = terminal()
    shell.kill(signal.SIGHUP)
    deadline = time.monotonic() + 30
    while shell.isalive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
