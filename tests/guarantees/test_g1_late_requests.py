"""G1: requests that a network delivers late, twice, or in another order than they were sent."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import FileError
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.faults import Delay, DeliverAgain
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.proxy import FaultyProxy
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway


@pytest.fixture
def proxy(served: ServedGateway) -> Iterator[FaultyProxy]:
    with FaultyProxy(served.url) as proxy:
        yield proxy


@pytest.fixture
def gateway(proxy: FaultyProxy) -> Iterator[HpcGateway]:
    with HpcGateway(proxy.url, token_source=StaticToken(TOKENS[ALICE])) as gateway:
        yield gateway


@pytest.fixture
def folder(gateway: HpcGateway, tmp_path: Path) -> Path:
    """A folder on the cluster, which is this machine, with a script."""
    (tmp_path / "script").write_text("#!/bin/sh\n")
    folder = Path(gateway.info()["home"], "work")
    gateway.put_file(tmp_path / "script", f"{folder}/run.sh", parents=True)
    return folder


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    return thread, answers


def delivered(again: DeliverAgain) -> int:
    again.release()
    wait_until(lambda: bool(again.statuses), within=10, failure=lambda: "the request was not delivered again")
    return again.statuses[0]


def test_a_launch_that_comes_again_after_the_end_of_the_job_runs_nothing(
    gateway: HpcGateway, proxy: FaultyProxy, backend: FakeBackend, folder: Path
) -> None:
    proxy.inject(again := DeliverAgain(), only=lambda request: request.path.endswith("/job/create"))
    jobid = gateway.submit(str(folder), "run.sh")["jobid"]
    backend.run("101")
    backend.end("101")
    assert gateway.show_job(jobid, wait=10)["state"] == "COMPLETED"
    assert delivered(again) == 200
    assert len(backend.submissions) == 1
    assert gateway.show_job(jobid)["state"] == "COMPLETED"


def test_a_launch_that_comes_again_after_its_folder_was_removed_runs_nothing(
    gateway: HpcGateway, proxy: FaultyProxy, backend: FakeBackend, folder: Path
) -> None:
    proxy.inject(again := DeliverAgain(), only=lambda request: request.path.endswith("/job/create"))
    jobid = gateway.submit(str(folder), "run.sh")["jobid"]
    backend.run("101")
    backend.end("101")
    gateway.show_job(jobid, wait=10)
    shutil.rmtree(folder)
    assert delivered(again) == FileError.status
    assert len(backend.submissions) == 1


def test_a_launch_that_its_cancellation_overtook_runs_nothing(
    gateway: HpcGateway, proxy: FaultyProxy, backend: FakeBackend, folder: Path
) -> None:
    jobid = gateway.create_job({"folder": str(folder), "script": "run.sh"})
    delayed = proxy.inject(delay := Delay(), only=lambda request: "/job/launch/" in request.path)
    thread, answers = in_background(lambda: gateway.launch_job(jobid))
    wait_until(lambda: delayed.hit == 1, within=10, failure=lambda: "no launch came")
    assert gateway.cancel_job(jobid, unlaunched=True)["state"] == "CANCELLED"
    delay.release()
    thread.join()
    assert answers[0]["state"] == "CANCELLED"
    assert backend.submissions == []


def test_a_creation_with_launch_that_the_cancellation_of_the_same_overtook_runs_nothing(
    gateway: HpcGateway, proxy: FaultyProxy, backend: FakeBackend, folder: Path
) -> None:
    delayed = proxy.inject(delay := Delay(), only=lambda request: request.path.endswith("/job/create"))
    thread, answers = in_background(lambda: gateway.submit(str(folder), "run.sh"))
    wait_until(lambda: delayed.hit == 1, within=10, failure=lambda: "no creation came")
    # Whoever gives up does not know whether it arrived: the same without a launch tells the job's id, or makes it.
    jobid = gateway.create_job({"folder": str(folder), "script": "run.sh"})
    gateway.cancel_job(jobid, unlaunched=True)
    delay.release()
    thread.join()
    assert (answers[0]["jobid"], answers[0]["state"]) == (jobid, "CANCELLED")
    assert backend.submissions == []


def test_answers_in_another_order_are_those_of_their_requests(
    gateway: HpcGateway, proxy: FaultyProxy, backend: FakeBackend, folder: Path
) -> None:
    delayed = proxy.inject(delay := Delay("answer"), only=lambda request: request.path.endswith("/job/create"))
    thread, answers = in_background(lambda: gateway.submit(str(folder), "run.sh"))
    wait_until(lambda: delayed.hit == 1 and bool(backend.submissions), within=10, failure=lambda: "no creation came")
    second = gateway.submit(str(folder), "run.sh")
    delay.release()
    thread.join()
    assert answers[0]["jobid"] == second["jobid"]
    assert len(backend.submissions) == 1
