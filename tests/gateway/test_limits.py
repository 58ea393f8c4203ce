"""Limits on what one user asks for at once, in a second and in one request, and on living jobs; and how clients take it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc import HpcGateway
from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.transfer import put_file
from aiida_marketplace_hpc.errors import Busy
from aiida_marketplace_hpc.gateway import limits as limits_module
from aiida_marketplace_hpc.gateway.limits import BURST, TURNS, Limits
from aiida_marketplace_hpc.gateway.routes import HANDLERS
from aiida_marketplace_hpc.gateway.routes.call import Answer, Call
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway

MIB = 1024 * 1024


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def use(limits: Limits, user: str = "alice") -> None:
    limits.admit(user)
    limits.release(user)


def test_requests_at_once_are_counted_for_each_user() -> None:
    limits = Limits(at_once=2, per_second=0)
    limits.admit("alice")
    limits.admit("alice")
    with pytest.raises(Busy, match="2 requests under way"):
        limits.admit("alice")
    limits.admit("bob")
    limits.release("alice")
    limits.admit("alice")


def test_a_burst_is_taken_and_then_the_rate_holds() -> None:
    clock = Clock()
    limits = Limits(at_once=0, per_second=4, clock=clock)
    for _ in range(int(4 * BURST)):
        use(limits)
    with pytest.raises(Busy, match="4 requests in a second") as refused:
        limits.admit("alice")
    assert refused.value.retry_after == 0.25
    use(limits, "bob")
    clock.now += 0.25
    use(limits)
    with pytest.raises(Busy):
        limits.admit("alice")
    clock.now += 1000
    for _ in range(int(4 * BURST)):
        use(limits)
    with pytest.raises(Busy):
        limits.admit("alice")


def test_a_rate_below_one_in_ten_seconds_lets_a_request_pass_now_and_then() -> None:
    clock = Clock()
    limits = Limits(at_once=0, per_second=0.01, clock=clock)
    use(limits)
    with pytest.raises(Busy) as refused:
        limits.admit("alice")
    assert refused.value.retry_after == 100
    clock.now += 100
    use(limits)


def test_without_limits_there_are_none() -> None:
    limits = Limits(at_once=0, per_second=0)
    for _ in range(1000):
        limits.admit("alice")


def test_users_are_forgotten_when_there_is_nothing_to_remember() -> None:
    clock = Clock()
    limits = Limits(at_once=1, per_second=1, clock=clock)
    limits.admit("still here")
    for number in range(5000):
        use(limits, f"user {number}")
        clock.now += 1
    assert len(limits._users) < 1100
    with pytest.raises(Busy):
        limits.admit("still here")


def test_a_refusal_is_held_back_and_keeps_nobody_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(at_once=1, per_second=0)

    async def come_and_go() -> None:
        await limits.enter("alice")
        monkeypatch.setattr(limits_module, "PAUSE", 3600.0)
        refused = asyncio.ensure_future(limits.enter("alice"))
        done, _ = await asyncio.wait([refused, asyncio.ensure_future(limits.enter("bob"))], timeout=0.1)
        assert len(done) == 1
        assert refused not in done
        refused.cancel()
        monkeypatch.setattr(limits_module, "PAUSE", 0.0)
        with pytest.raises(Busy):
            await limits.enter("alice")

    asyncio.run(come_and_go())


# Over HTTP


@pytest.fixture(autouse=True)
def _refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "PAUSE", 0.0)


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[ServedGateway]:
    with ServedGateway(folder, FakeBackend(), **settings) as served:
        yield served


def ask(served: ServedGateway, method: str, path: str, user: str = ALICE, **options: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {TOKENS[user]}", **options.pop("headers", {})}
    return requests.request(method, served.url + path, headers=headers, timeout=20, **options)


def assert_is_busy(answer: requests.Response) -> None:
    assert answer.status_code == 429, answer.text
    fields = answer.json()
    assert (fields["code"], fields["retryable"]) == ("busy", True)
    assert int(answer.headers["Retry-After"]) >= fields["retry_after"] > 0
    assert fields["request_id"] == answer.headers["X-Request-Id"]


def test_a_few_requests_of_a_user_are_worked_on_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, go_on = [], threading.Event()
    original = HANDLERS["getInfo"]

    def slow(call: Call) -> Answer:
        if call.caller.user.email == ALICE:
            at_work.append(call)
            assert go_on.wait(20)
        return original(call)

    monkeypatch.setitem(HANDLERS, "getInfo", slow)
    with serving(tmp_path) as served, ThreadPoolExecutor(TURNS + 3) as pool:
        asked = [pool.submit(ask, served, "GET", "/api/v1/info") for _ in range(TURNS + 3)]
        try:
            wait_until(lambda: len(at_work) == TURNS, within=10, failure=lambda: f"{len(at_work)} at work")
            assert ask(served, "GET", "/api/v1/info", BOB).status_code == 200
            assert len(at_work) == TURNS
        finally:
            go_on.set()
        assert {one.result().status_code for one in asked} == {200}
        assert len(at_work) == TURNS + 3


def test_one_request_too_many_is_told_to_come_back(tmp_path: Path) -> None:
    with serving(tmp_path, requests_at_once=1) as served:
        host, port = served.url.removeprefix("http://").split(":")
        assert ask(served, "GET", "/api/v1/info").status_code == 200
        with socket.create_connection((host, int(port)), timeout=20) as upload:
            head = f"PUT /api/v1/file/upload/home?filename=f HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKENS[ALICE]}\r\n"
            upload.sendall(f"{head}Content-Length: 4\r\n\r\nhal".encode())
            wait_until(
                lambda: ask(served, "GET", "/api/v1/info").status_code == 429,
                within=10,
                failure=lambda: "the first request is not counted",
            )
            assert_is_busy(ask(served, "GET", "/api/v1/info"))
            assert ask(served, "GET", "/api/v1/info", BOB).status_code == 200
            assert ask(served, "GET", "/heartbeat").status_code == 200
            upload.sendall(b"f")
            assert upload.recv(1000).startswith(b"HTTP/1.1 200")
        wait_until(
            lambda: ask(served, "GET", "/api/v1/info").ok, within=10, failure=lambda: "the request is counted for ever"
        )


def test_a_client_asks_again_when_it_may(tmp_path: Path) -> None:
    """Also for a deletion, which nothing else would make it repeat."""
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        time.sleep(seconds)

    with (
        serving(tmp_path, requests_per_second=0.5) as served,
        closing(HpcGateway(served.url, token_source=StaticToken(TOKENS[ALICE]), sleep=sleep)) as gateway,
    ):
        assert ask(served, "PUT", "/api/v1/file/upload/home", params={"filename": "a"}, data=b"x").ok
        while (answer := ask(served, "GET", "/api/v1/info")).ok:
            pass
        assert_is_busy(answer)
        gateway.delete_file("home", "a")
        assert naps
        assert not Path(served.gateway.settings.roots[0].path_for("alice_a"), "a").exists()


def test_living_jobs_are_counted(tmp_path: Path) -> None:
    with serving(tmp_path, jobs_per_user=2) as served:
        home = Path(ask(served, "GET", "/api/v1/info").json()["home"])
        bodies = []
        for number in range(3):
            folder = home / str(number)
            folder.mkdir()
            (folder / "run.sh").write_text("#!/bin/sh\n")
            bodies.append({"folder": str(folder), "script": "run.sh", "launch": number == 0})
        first = ask(served, "POST", "/api/v1/job/create", json=bodies[0]).json()["jobid"]
        second = ask(served, "POST", "/api/v1/job/create", json=bodies[1]).json()["jobid"]
        refused = ask(served, "POST", "/api/v1/job/create", json=bodies[2])
        assert_is_busy(refused)
        assert "2 jobs" in refused.json()["error"]
        published = {"job_name": "j", "ntasks_per_node": 1, "partition": "p", "image": "i", "executable_cmd": "c"}
        assert_is_busy(ask(served, "POST", "/api/v1/job/create", json=published))
        assert sorted(path.name for path in home.iterdir()) == [".marketplace-hpc", "0", "1", "2"]
        # What is there already is no job more.
        assert ask(served, "POST", "/api/v1/job/create", json=bodies[0]).json()["jobid"] == first
        assert ask(served, "POST", "/api/v1/job/create", json={**bodies[1], "launch": True}).json()["jobid"] == second
        assert ask(served, "DELETE", f"/api/v1/job/cancel/{second}").ok
        wait_until(
            lambda: ask(served, "GET", f"/api/v1/job/state/{second}").json()["job"]["final"],
            within=10,
            failure=lambda: "the job does not end",
        )
        assert ask(served, "POST", "/api/v1/job/create", json=bodies[2]).ok


def test_a_body_is_as_large_as_is_allowed_and_no_larger(tmp_path: Path) -> None:
    with serving(tmp_path, request_limit=1) as served:
        home = Path(ask(served, "GET", "/api/v1/info").json()["home"])
        assert ask(served, "GET", "/api/v1/info").json()["limits"]["request"] == MIB
        upload = "/api/v1/file/upload/home?filename="
        assert ask(served, "PUT", f"{upload}fits", data=bytes(MIB)).ok
        sent = [
            ask(served, "PUT", f"{upload}announced", data=bytes(MIB + 1)),
            ask(served, "PUT", f"{upload}not-announced", data=iter([bytes(MIB), b"x"])),
            ask(served, "PUT", f"{upload}form", files={"file": bytes(MIB)}),
            ask(served, "POST", "/api/v1/query", data=b" " * (16 * MIB + 1)),
            ask(served, "POST", "/api/v1/query", data=iter([b" " * (16 * MIB), b" "])),
        ]
        for answer in sent:
            assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert sorted(path.name for path in home.iterdir()) == [".marketplace-hpc", "fits"]


def test_a_form_may_be_kept_smaller(tmp_path: Path) -> None:
    with serving(tmp_path, form_limit=1) as served:
        upload = "/api/v1/file/upload/home?filename=f"
        refused = ask(served, "PUT", upload, files={"file": bytes(MIB)})
        assert (refused.status_code, refused.json()["code"]) == (413, "too_large")
        assert ask(served, "PUT", upload, files={"file": bytes(MIB - 1000)}).ok
        assert ask(served, "PUT", upload, data=bytes(2 * MIB)).ok


def test_a_transfer_keeps_within_a_small_limit(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * (12 * 4096))
    with (
        serving(tmp_path, request_limit=1) as served,
        closing(HpcGateway(served.url, token_source=StaticToken(TOKENS[ALICE]))) as gateway,
    ):
        there = f"{gateway.info()['home']}/there"
        put_file(gateway, source, there)
        assert Path(there).read_bytes() == source.read_bytes()
