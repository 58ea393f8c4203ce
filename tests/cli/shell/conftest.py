"""A session of the shell on a gateway that is served over HTTP, beside the files themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from aiida_marketplace_hpc.cli.shell import commands
from aiida_marketplace_hpc.cli.shell.cluster import Cluster
from aiida_marketplace_hpc.cli.shell.session import Session
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.served import ServedGateway

__all__ = ["commands"]


class Said(NamedTuple):
    out: bytes
    err: str
    status: int

    @property
    def text(self) -> str:
        return os.fsdecode(self.out)

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


Run = Callable[[str], Said]


@pytest.fixture
def gateway(served: ServedGateway) -> Iterator[HpcGateway]:
    with HpcGateway(served.url) as gateway:
        gateway.create_user()
        yield gateway


@pytest.fixture
def session(gateway: HpcGateway) -> Session:
    """Without a person."""
    return Session(Cluster(gateway), clock=lambda: 1_000_000_000.0)


@pytest.fixture
def home(session: Session) -> Path:
    """The home on the cluster, as it lies on this disk."""
    return Path(session.cluster.home)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local folder in which the shell runs."""
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def run(session: Session, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Carry out a line; the status is that of its last command that failed."""

    def run(line: str) -> Said:
        session.failed = 0
        capsysbinary.readouterr()
        session.run(line)
        out, err = capsysbinary.readouterr()
        return Said(out, os.fsdecode(err), session.failed)

    return run


@pytest.fixture
def asked(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A person who answers yes; the questions that were asked."""
    questions: list[str] = []

    def confirm(question: str) -> bool:
        questions.append(question)
        return True

    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    session.interactive, session.confirm = True, confirm
    return questions
