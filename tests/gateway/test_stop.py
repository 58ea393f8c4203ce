"""A gateway that is asked to stop: transfers under way go on for a while, then they are cut so that they can be resumed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import requests

from aiida_marketplace_hpc import HpcGateway
from aiida_marketplace_hpc.bundle import PART
from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.body import PartsBody
from aiida_marketplace_hpc.client.files import RemoteDisk
from aiida_marketplace_hpc.client.retry import RetryPolicy
from aiida_marketplace_hpc.testing.machine import free_ports, wait_until

COMMAND = [str(Path(sys.executable).with_name("marketplace-hpc")), "gateway", "serve", "--host", "127.0.0.1"]
ME, TOKEN = "me@example.org", "a-token-of-mine"
MIB = 1024 * 1024
SIZE = 24 * MIB


class Running:
    """A gateway in a process of its own, on a port that stays the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home" / "me"
        self.port = free_ports(1)[0]
        self.process: subprocess.Popen[str] | None = None

    @contextmanager
    def started(self, stop_timeout: int) -> Iterator[subprocess.Popen[str]]:
        options = ["--port", str(self.port), "--state", str(self.folder / "state"), "--slots", "1"]
        options += ["--home", str(self.folder / "home" / "{username}"), "--access-log", str(self.folder / "access")]
        env = {**os.environ, "MARKETPLACE_HPC_DEV_TOKEN": json.dumps({ME: TOKEN})}
        with (
            (self.folder / "log").open("a") as log,
            subprocess.Popen(
                [*COMMAND, *options, "--stop-timeout", str(stop_timeout)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
            ) as process,
        ):
            try:
                assert process.stdout is not None
                assert "listening" in process.stdout.readline(), (self.folder / "log").read_text()
                yield process
            finally:
                process.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def lines(self) -> list[dict[str, Any]]:
        """The requests that were answered."""
        lines = [json.loads(line) for line in (self.folder / "access").read_text().splitlines()]
        return [line for line in lines if "method" in line]

    def outcomes(self, capability: str) -> list[str]:
        return [line["outcome"] for line in self.lines() if line["capability"] == capability]

    def refuses(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except ConnectionRefusedError:
            return True
        return False

    def held(self) -> int:
        """Bytes of unfinished uploads."""
        folder = self.home / ".marketplace-hpc" / "unfinished"
        return sum(path.stat().st_size for path in folder.iterdir()) if folder.exists() else 0


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    running = Running(tmp_path)
    running.home.mkdir(parents=True)
    return running


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE)


class SlowUpload:
    """An upload by this package's client, in one call; the second half trickles until the test lets it go."""

    def __init__(self, running: Running, content: bytes, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._go = threading.Event()
        source = running.folder / "source"
        source.write_bytes(content)
        parts = PartsBody.__iter__

        def slowly(body: PartsBody) -> Generator[bytes, None, None]:
            sent = 0
            for piece in parts(body):
                yield piece
                sent += len(piece)
                if sent > len(content) // 2:
                    self._go.wait(0.5)

        monkeypatch.setattr(PartsBody, "__iter__", slowly)
        # However long the gateway takes to come back.
        retry = RetryPolicy(attempts=1000, budget=100, longest_delay=0.5)
        self._client = HpcGateway(running.url, token_source=StaticToken(TOKEN), retry=retry)
        self._threads = ThreadPoolExecutor(1)
        self._call = self._threads.submit(RemoteDisk(self._client).putfile, source, running.home / name)

    def finish(self) -> None:
        """Let it go on; it must succeed."""
        self._go.set()
        try:
            self._call.result(120)
        finally:
            self._threads.shutdown()
            self._client.close()


class SlowDownload:
    """A download of which the test takes the first bytes, and the rest when it likes."""

    def __init__(self, running: Running, name: str) -> None:
        self._connection = socket.socket()
        # So that not the whole file lies in buffers at once.
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        self._connection.settimeout(20)
        self._connection.connect(("127.0.0.1", running.port))
        lines = [
            f"GET /api/v1/file/download/home?filename={name} HTTP/1.1",
            "Host: x",
            f"Authorization: Bearer {TOKEN}",
        ]
        self._connection.sendall("\r\n".join([*lines, "", ""]).encode())
        self._received = bytearray()
        while b"\r\n\r\n" not in self._received:
            self._received += self._connection.recv(1024)

    def finish(self) -> bytes:
        """The body, as far as it comes."""
        with closing(self._connection):
            try:
                while piece := self._connection.recv(MIB):
                    self._received += piece
            except ConnectionError:
                pass
        return bytes(self._received.partition(b"\r\n\r\n")[2])


def test_transfers_under_way_come_to_their_end_and_nobody_else_is_served(
    running: Running, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (running.home / "there").write_bytes(content)
    with running.started(stop_timeout=30) as process:
        upload, download = SlowUpload(running, content, "new", monkeypatch), SlowDownload(running, "there")
        with requests.Session() as idle:
            assert idle.get(f"{running.url}/heartbeat", timeout=10).ok
            wait_until(lambda: running.held() > SIZE // 4, within=20, failure=lambda: "nothing arrives")
            process.send_signal(signal.SIGTERM)
            wait_until(running.refuses, within=10, failure=lambda: "it takes connections")
            with pytest.raises(requests.ConnectionError):
                idle.get(f"{running.url}/heartbeat", timeout=10)
        upload.finish()
        assert process.poll() is None
        assert download.finish() == content
        process.wait(timeout=15)  # And not after 30 s.
    assert (running.home / "new").read_bytes() == content
    assert running.outcomes("getDataset") == ["ok"]
    assert set(running.outcomes("createDataset")) == {"ok"}


def test_what_takes_too_long_is_cut_and_goes_on_after_the_restart(
    running: Running, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (running.home / "there").write_bytes(content)
    with running.started(stop_timeout=1) as process:
        upload, download = SlowUpload(running, content, "new", monkeypatch), SlowDownload(running, "there")
        wait_until(lambda: running.held() > SIZE // 4, within=20, failure=lambda: "nothing arrives")
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)
        assert time.monotonic() - asked >= 1
        assert len(download.finish()) < SIZE
    said = (running.folder / "log").read_text()
    assert "2 connections are cut after 1 s" in said
    assert "Traceback" not in said, said
    assert running.outcomes("getDataset") == ["broken off"]
    assert not (running.home / "new").exists()
    held = running.held()
    assert held >= SIZE // 4
    assert held % PART == 0
    with running.started(stop_timeout=1):
        upload.finish()  # The same call.
    assert (running.home / "new").read_bytes() == content
    *_, last = [line for line in running.lines() if line["capability"] == "createDataset"]
    assert int(parse_qs(last["query"])["offset"][0]) >= held
