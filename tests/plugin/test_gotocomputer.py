"""The command behind ``verdi calcjob gotocomputer``, as AiiDA runs it: by a shell."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

ODD = os.fsdecode(b"/-x 'y' \"z\" $HOME `id` ; \\ * \xff\n!")


def opened(command: str, **environment: str) -> bytes:
    """Let a shell run the command, and say what the shell that it opens says to ``pwd``."""
    settings = {"PATH": "/usr/bin:/bin", "MP_ACCESS_TOKEN": TOKENS[ALICE], **environment}
    done = subprocess.run(
        ["/bin/sh", "-c", command], env=settings, input=b"pwd\n", capture_output=True, check=False, timeout=60
    )
    assert done.stderr == b""
    assert done.returncode == 0
    return done.stdout


def test_it_opens_the_shell_in_the_folder(transport: MarketplaceHpcTransport) -> None:
    home = transport.normalize(".")
    folder = home + ODD
    transport.mkdir(folder)
    assert opened(transport.gotocomputer_command(folder)) == os.fsencode(folder) + b"\n"
    assert opened(transport.gotocomputer_command()) == os.fsencode(home) + b"\n"


def test_the_environment_does_not_lead_elsewhere(transport: MarketplaceHpcTransport) -> None:
    # The computer's parameters count, also where one of them is empty.
    command = transport.gotocomputer_command(transport.normalize("."))
    assert opened(command, MP_HOST="http://127.0.0.1:1", MP_APP_ID="another-one")


def test_all_parameters_and_no_token_are_in_it(served: ServedGateway, tmp_path: Path) -> None:
    token = tmp_path / "the token"
    token.write_text(TOKENS[ALICE])
    token.chmod(0o600)
    source = f"command:cat '{token}'"
    with MarketplaceHpcTransport(machine="cluster", url=served.url, token_source=source) as transport:
        command = transport.gotocomputer_command(transport.normalize("."))
    assert TOKENS[ALICE] not in command
    assert opened(command, MP_ACCESS_TOKEN="wrong")
    transport = MarketplaceHpcTransport(machine="cluster", url="https://platform.example", app_id="app-1")
    words = shlex.split(transport.gotocomputer_command("/scratch/x"))
    assert words[1:] == [
        "--url=https://platform.example",
        "--app-id=app-1",
        "--token-source=env:MP_ACCESS_TOKEN",
        "shell",
        "--",
        "/scratch/x",
    ]


def test_without_the_program_python_itself_is_used(
    transport: MarketplaceHpcTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = transport.normalize(".")
    assert shlex.split(transport.gotocomputer_command(home))[0] == shutil.which(
        "marketplace-hpc", path=str(Path(sys.executable).parent)
    )
    python = tmp_path / "bin of it" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    command = transport.gotocomputer_command(home)
    assert shlex.split(command)[:3] == [str(python), "-m", "aiida_marketplace_hpc"]
    assert opened(command) == os.fsencode(home) + b"\n"


def test_nothing_is_left_behind(served: ServedGateway, transport: MarketplaceHpcTransport, tmp_path: Path) -> None:
    home = transport.normalize(".")
    person = tmp_path / "person"
    person.mkdir()
    before = transport.listdir(home)
    opened(transport.gotocomputer_command(home), HOME=str(person), TMPDIR=str(person))
    assert transport.listdir(home) == before
    assert os.listdir(person) == []
