"""Liveness needs nothing, readiness knows database and scheduler; neither needs a token or tells a secret."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc.gateway import app, readiness
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.gateway.watch import Watch
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway


def ready(served: ServedGateway, query: str = "") -> tuple[int, dict[str, Any]]:
    answer = requests.get(f"{served.url}/ready{query}", timeout=10)
    return answer.status_code, answer.json()


def becomes(served: ServedGateway, status: int, *, ask: bool = True) -> dict[str, Any]:
    said: list[tuple[int, dict[str, Any]]] = []

    def is_so() -> bool:
        if ask:
            served.gateway.watch.refresh()  # Which the background does every two seconds.
        said.append(ready(served))
        return said[-1][0] == status

    wait_until(is_so, within=10, poll=0.05, failure=lambda: str(said[-1]))
    return said[-1][1]


def test_it_is_ready_as_long_as_the_scheduler_answers(served: ServedGateway, backend: FakeBackend) -> None:
    said = becomes(served, 200)
    assert said.pop("scheduler_age") >= 0
    assert said == {"ready": True, "database": "ok", "scheduler": "ok", "stopping": False}
    backend.down = True
    said = becomes(served, 503)
    assert (said["database"], said["scheduler"]) == ("ok", "failing")
    assert "fake scheduler" not in str(said)
    assert ready(served, "?of=database")[0] == 200
    backend.down = False
    becomes(served, 200)


def test_it_is_not_ready_without_its_database(
    served: ServedGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(readiness, "_AGE", 0.0)
    becomes(served, 200)
    engine = served.gateway.ledger.engine.execution_options(writes=True)

    def rename(table: str, name: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO {name}")

    rename("jobs", "gone")
    try:
        assert becomes(served, 503, ask=False)["database"] == "failing"
        assert ready(served, "?of=database")[0] == 503
        assert "the database cannot be used" in caplog.text
        assert requests.get(f"{served.url}/heartbeat", timeout=10).status_code == 200
    finally:
        rename("gone", "jobs")
    becomes(served, 200)


def test_a_database_that_hangs_is_asked_once_and_not_waited_for(
    served: ServedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "_PATIENCE", 0.2)
    monkeypatch.setattr(readiness, "_AGE", 0.0)
    released, asked = threading.Event(), []

    def hang() -> None:
        asked.append(1)
        released.wait(20)

    monkeypatch.setattr(served.gateway.ledger, "look", hang)
    try:
        with ThreadPoolExecutor(8) as threads:
            said = list(threads.map(lambda _: ready(served), range(16)))
    finally:
        released.set()
    assert {(status, document["database"]) for status, document in said} == {(503, "failing")}
    assert len(asked) == 1


def test_a_flood_of_questions_is_one_look(served: ServedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_AGE", 60.0)
    looks = []
    monkeypatch.setattr(served.gateway.ledger, "look", lambda: looks.append(1))
    with requests.Session() as session:
        assert {session.get(f"{served.url}/ready", timeout=10).json()["database"] for _ in range(20)} == {"ok"}
    assert len(looks) == 1


def test_a_scheduler_that_nobody_asks_any_more_is_no_knowledge(gateway: Gateway, backend: FakeBackend) -> None:
    now = [0.0]
    watch = Watch(gateway.ledger, backend, 2.0, clock=lambda: now[0])
    assert watch.answer_age is None
    watch.refresh()
    now[0] = 90.0
    assert watch.answer_age == 90.0
    assert not watch.is_overdue
    now[0] = 91.0
    assert watch.is_overdue


def test_the_heartbeat_answers_when_every_thread_hangs(
    tmp_path: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, hanging = threading.Event(), threading.Event()
    monkeypatch.setattr(app, "_THREADS", 1)

    def hang() -> dict[str, object]:
        hanging.set()
        released.wait(20)
        return {"name": "fake", "backend": "fake"}

    monkeypatch.setattr(backend, "describe", hang)
    with ServedGateway(tmp_path, backend) as served, ThreadPoolExecutor(1) as threads:
        headers = {"Authorization": f"Bearer {TOKENS[ALICE]}"}
        info = threads.submit(requests.get, f"{served.url}/api/v1/info", headers=headers, timeout=30)
        try:
            assert hanging.wait(10)
            assert requests.get(f"{served.url}/heartbeat", timeout=5).status_code == 200
            assert ready(served)[1]["database"] == "ok"
        finally:
            released.set()
        assert info.result().status_code == 200
