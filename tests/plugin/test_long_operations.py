"""Operations that take long, and answers that are lost, over real HTTP: one effect, no error, and an end in any case."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.files import RemoteDisk
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import DeadlineExceeded, Unavailable
from aiida_marketplace_hpc.gateway import files as files_module
from aiida_marketplace_hpc.gateway import trees
from aiida_marketplace_hpc.gateway.operations import Operations, Running
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway


class Lossy:
    """A proxy in front of a gateway that passes requests on and, where it is told to, hangs up instead of answering."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.faults: deque[str] = deque()
        self.requests = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self._listener.getsockname())

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        # One request for each connection: enough for what is tested here.
        request = b""
        while b"\r\n\r\n" not in request:
            piece = client.recv(65536)
            if not piece:
                return
            request += piece
        head, _, body = request.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        length = next((int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")), 0)
        while len(body) < length:
            body += client.recv(65536)
        lines = [line for line in lines if not line.lower().startswith(b"connection:")]
        whole = b"\r\n".join([*lines, b"Connection: close", b"", body])
        fault = self.faults.popleft() if self.faults and b"/query" in lines[0] else ""
        self.requests += 1
        for _ in range(2 if fault == "twice" else 1):
            answer = self._pass_on(whole)
        if fault != "lost":
            client.sendall(answer)

    def _pass_on(self, whole: bytes) -> bytes:
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port)) as server:
            server.sendall(whole)
            while piece := server.recv(65536):
                answer += piece
        return answer


class Gate:
    """A place in the gateway's work at which it stands until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.open.wait(20)


def gateway_of(url: str, clock: Callable[[], float] = time.monotonic) -> HpcGateway:
    return HpcGateway(url, token_source=StaticToken(TOKENS[ALICE]), sleep=lambda _: None, clock=clock)


@pytest.fixture
def lossy(served: ServedGateway) -> Iterator[Lossy]:
    served.gateway.operations = Operations()
    # As if it had been up for long.
    served.gateway.operations._began -= 1000.0
    proxy = Lossy(int(served.url.rpartition(":")[2]))
    yield proxy
    proxy.close()


@pytest.fixture
def disk(lossy: Lossy) -> Iterator[RemoteDisk]:
    with gateway_of(lossy.url) as gateway:
        gateway.info()
        yield RemoteDisk(gateway)


@pytest.fixture
def home(disk: RemoteDisk) -> Path:
    return Path(disk.normalize("."))


OPERATIONS: dict[str, Callable[[RemoteDisk, Path], Any]] = {
    "mkdir": lambda disk, home: disk.mkdir(home / "new"),
    "makedirs": lambda disk, home: disk.makedirs(home / "new" / "er"),
    "rename": lambda disk, home: disk.rename(home / "f", home / "new"),
    "copy": lambda disk, home: disk.copy(home / "d", home / "into"),
    "copytree": lambda disk, home: disk.copytree(home / "d", home / "new"),
    "symlink": lambda disk, home: disk.symlink("f", home / "new"),
    "remove": lambda disk, home: disk.remove(home / "f"),
    "rmdir": lambda disk, home: disk.rmdir(home / "into"),
    "rmtree": lambda disk, home: disk.rmtree(home / "d"),
    "compress": lambda disk, home: disk.compress("tar", home / "d", home / "x.tar", home, overwrite=False),
}


def seed(home: Path) -> None:
    (home / "d" / "sub").mkdir(parents=True)
    (home / "d" / "a").write_text("a")
    (home / "f").write_text("f")
    (home / "into").mkdir()


def names(home: Path) -> list[str]:
    found = sorted(str(path.relative_to(home)) for path in home.rglob("*"))
    return [name for name in found if not name.startswith(".marketplace-hpc")]


@pytest.mark.parametrize("fault", ["lost", "twice"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_sent_twice_is_done_once(name: str, fault: str, disk: RemoteDisk, home: Path, lossy: Lossy) -> None:
    seed(home)
    OPERATIONS[name](disk, home)
    once = names(home)
    for path in sorted(home.iterdir()):
        if not path.name.startswith("."):
            disk.rmtree(path)
    seed(home)
    before = lossy.requests
    lossy.faults.extend([fault, fault])
    OPERATIONS[name](disk, home)
    assert names(home) == once
    assert lossy.requests == before + (3 if fault == "lost" else 1)


def test_through_the_lossy_proxy_errors_are_what_they_are(disk: RemoteDisk, home: Path, lossy: Lossy) -> None:
    seed(home)
    lossy.faults.append("lost")
    with pytest.raises(FileExistsError):
        disk.mkdir(home / "d")


# What takes long


@pytest.fixture
def impatient(tmp_path: Path, backend: FakeBackend) -> Iterator[ServedGateway]:
    """A gateway that answers `pending` almost at once."""
    served = ServedGateway(tmp_path, backend)
    served.gateway.operations = Operations(patience=0.05)
    with served:
        yield served


class NotYet:
    """Counts how often the gateway has answered `pending`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._changed = threading.Condition()
        real = Running.meanwhile

        def meanwhile(running: Running) -> dict[str, Any]:
            answer = real(running)
            with self._changed:
                self.count += 1
                self._changed.notify_all()
            return answer

        monkeypatch.setattr(Running, "meanwhile", meanwhile)

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, 20)


@pytest.fixture
def not_yet(monkeypatch: pytest.MonkeyPatch) -> NotYet:
    return NotYet(monkeypatch)


def test_a_long_copy_is_asked_for_until_it_is_done(
    impatient: ServedGateway, not_yet: NotYet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "_PIECE", 1024)
    real = trees._copy_in_kernel
    pieces = 0

    def slowly(source: int, goal: int) -> int | None:
        nonlocal pieces
        pieces += 1
        not_yet.wait_for(pieces)
        return real(source, goal)

    monkeypatch.setattr(trees, "_copy_in_kernel", slowly)
    # Between two answers six seconds pass: ten times as long as any call may take.
    with gateway_of(impatient.url, clock=lambda: 6.0 * not_yet.count) as gateway:
        disk = RemoteDisk(gateway)
        home = Path(disk.normalize("."))
        content = os.urandom(40 * 1024)
        (home / "large").write_bytes(content)
        disk.copy(home / "large", home / "copied")
        assert (home / "copied").read_bytes() == content
    assert not_yet.count >= 40


def test_what_stands_still_ends_in_time_and_does_not_go_on_later(
    impatient: ServedGateway, not_yet: NotYet, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    real = files_module.remove_tree

    def hangs(folder: int, name: str, advance: Callable[[int], None]) -> None:
        gate()
        real(folder, name, advance)

    monkeypatch.setattr(files_module, "remove_tree", hangs)
    with gateway_of(impatient.url, clock=lambda: 1.0 * not_yet.count) as gateway:
        disk = RemoteDisk(gateway)
        home = Path(disk.normalize("."))
        (home / "d").mkdir()
        for number in range(5):
            (home / "d" / str(number)).touch()
        with pytest.raises(DeadlineExceeded, match="made no progress"):
            disk.rmtree(home / "d")
        assert gate.reached.is_set()
        # The file system is back: what nobody waits for any more ends at its next step.
        gate.open.set()
        impatient.gateway.operations.close()
        assert len(os.listdir(home / "d")) >= 4


def test_a_gateway_that_stops_ends_long_operations_and_leaves_no_half_file(
    impatient: ServedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "_PIECE", 1024)
    gate = Gate()
    real = trees._copy_in_kernel
    pieces = 0

    def slowly(source: int, goal: int) -> int | None:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            gate()
        return real(source, goal)

    monkeypatch.setattr(trees, "_copy_in_kernel", slowly)
    errors: list[Exception] = []
    with gateway_of(impatient.url) as gateway:
        disk = RemoteDisk(gateway)
        home = Path(disk.normalize("."))
        (home / "large").write_bytes(os.urandom(100 * 1024))

        def copy() -> None:
            try:
                disk.copy(home / "large", home / "copied")
            except Exception as exc:  # noqa: BLE001 - what it is, is looked at below.
                errors.append(exc)

        copying = threading.Thread(target=copy)
        copying.start()
        assert gate.reached.wait(10)
        impatient.gateway.operations.stop()
        gate.open.set()
        copying.join(timeout=20)
    assert isinstance(errors[0], Unavailable)
    assert not (home / "copied").exists()
    assert os.listdir(home / ".marketplace-hpc" / "unfinished") == []


def test_a_gateway_that_was_started_anew_says_that_it_does_not_know(
    impatient: ServedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    real = files_module.remove_tree

    def hangs(folder: int, name: str, advance: Callable[[int], None]) -> None:
        gate()
        real(folder, name, advance)

    monkeypatch.setattr(files_module, "remove_tree", hangs)
    with gateway_of(impatient.url) as gateway:
        disk = RemoteDisk(gateway)
        home = Path(disk.normalize("."))
        (home / "d").mkdir()
        before = impatient.gateway.operations
        errors: list[Exception] = []

        def remove() -> None:
            try:
                disk.rmtree(home / "d")
            except Exception as exc:  # noqa: BLE001 - what it is, is looked at below.
                errors.append(exc)

        removing = threading.Thread(target=remove)
        removing.start()
        assert gate.reached.wait(10)
        impatient.gateway.operations = Operations(patience=0.05)
        removing.join(timeout=20)
        gate.open.set()
        before.close()
        assert isinstance(errors[0], Unavailable)
        assert "does not know whether" in str(errors[0])
        # What may be done twice is.
        assert disk.isdir(home)


# On the wire


class Wire:
    def __init__(self, served: ServedGateway, user: str) -> None:
        self.url = f"{served.url}/api/v1/query"
        self.headers = {"Authorization": f"Bearer {TOKENS[user]}"}

    def send(self, **body: Any) -> requests.Response:
        return requests.post(self.url, json=body, headers=self.headers, timeout=20)


def test_keys_belong_to_users(served: ServedGateway) -> None:
    alice, bob = Wire(served, ALICE), Wire(served, BOB)
    home = requests.get(f"{served.url}/api/v1/info", headers=alice.headers, timeout=20).json()["home"]
    operations = [{"op": "mkdir", "path": f"{home}/new"}]
    first = alice.send(operations=operations, key="a" * 32)
    assert first.json()["results"][0]["ok"]
    assert alice.send(operations=operations, key="a" * 32).json() == first.json()
    assert alice.send(key="a" * 32).json() == first.json()
    assert bob.send(key="a" * 32).json() == {"unknown": {"key": "a" * 32}}
    other = bob.send(operations=operations, key="a" * 32).json()
    assert other["results"][0]["error"]["code"] == "forbidden"


def test_what_a_key_is(served: ServedGateway) -> None:
    alice = Wire(served, ALICE)
    for key in ("", "short", "x" * 65, "ä" * 20, 7, None, ["x"] * 20):
        answer = alice.send(operations=[{"op": "jobs.active"}], key=key)
        assert answer.status_code == (200 if key is None else 400), key
    for again in (-1, "1", [1], 1e12):
        assert alice.send(operations=[], key="k" * 20, again=again).status_code == 400, again
    assert alice.send(key="k" * 20, wait="long").json() == {"unknown": {"key": "k" * 20}}
    assert alice.send().status_code == 400


def test_without_a_key_the_answer_is_the_result_however_long_it_takes(
    impatient: ServedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    real = files_module.remove_tree
    monkeypatch.setattr(files_module, "remove_tree", lambda *args: (gate(), real(*args)))
    alice = Wire(impatient, ALICE)
    home = Path(requests.get(f"{impatient.url}/api/v1/info", headers=alice.headers, timeout=20).json()["home"])
    (home / "d").mkdir()
    threading.Timer(0.2, gate.open.set).start()
    answer = alice.send(operations=[{"op": "remove", "path": f"{home}/d", "recursive": True}])
    assert answer.json() == {"results": [{"ok": True, "result": {}}]}
