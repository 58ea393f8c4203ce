"""A submission whose calculation ends meanwhile leaves no job, whenever that happens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plumpy.greenback_bridge import ensure_portal

from aiida_marketplace_hpc.errors import ConnectionFailed
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.submission import Submission
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

SCRIPT = "_aiidasubmit.sh"


class Node:
    """What a submission needs of a calculation's node."""

    computer = None

    def __init__(self) -> None:
        self.is_terminated = False
        self.logger = logging.getLogger("node")


class Calculation:
    """What a submission needs of an AiiDA process, which can be killed at any moment."""

    def __init__(self) -> None:
        self.node = Node()
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def future(self) -> asyncio.Future[None]:
        return self._future

    def kill(self) -> None:
        self.node.is_terminated = True
        self._future.set_exception(RuntimeError("killed"))

    def finish(self) -> None:
        self.node.is_terminated = True
        self._future.set_result(None)


@pytest.fixture
def folder(transport: MarketplaceHpcTransport, tmp_path: Path) -> str:
    path = f"{transport.normalize('.')}/work"
    transport.makedirs(path)
    (tmp_path / "script").write_text("#!/bin/bash\necho 1\n")
    transport.put(tmp_path / "script", f"{path}/{SCRIPT}")
    return path


Scenario = Callable[[Calculation, Submission], Any]
Play = Callable[..., None]


@pytest.fixture
def play(transport: MarketplaceHpcTransport, folder: str) -> Play:
    """Play a scenario on an event loop, as AiiDA does, and let the loop run on until a condition holds."""

    def play(scenario: Scenario, until: Callable[[], bool] = lambda: True) -> None:
        async def main() -> None:
            await ensure_portal()
            calculation: Any = Calculation()
            scenario(calculation, Submission(transport.connection, folder, SCRIPT, calculation))
            await asyncio.sleep(0)  # For the callbacks.
            deadline = time.monotonic() + 10
            while not until():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            if calculation.future().done():
                calculation.future().exception()

        asyncio.run(main())

    return play


def states(transport: MarketplaceHpcTransport) -> list[JobState]:
    listed = transport.connection.gateway.list_jobs().values()
    return [JobState(job["job_state"]) for job in listed]


def test_nothing_is_submitted_for_a_calculation_that_has_ended(
    play: Play, transport: MarketplaceHpcTransport, backend: FakeBackend
) -> None:
    def scenario(calculation: Calculation, submission: Submission) -> None:
        calculation.node.is_terminated = True
        with pytest.raises(asyncio.CancelledError):
            submission.carry_out()

    # An earlier attempt that still is on its way would launch nothing.
    play(scenario, until=lambda: states(transport) == [JobState.CANCELLED])
    assert backend.submissions == []


@pytest.mark.parametrize("answered", [True, False])
def test_a_calculation_that_is_killed_meanwhile_loses_its_job(
    play: Play,
    transport: MarketplaceHpcTransport,
    backend: FakeBackend,
    monkeypatch: pytest.MonkeyPatch,
    answered: bool,
) -> None:
    gateway = transport.connection.gateway
    submit = gateway.submit

    def scenario(calculation: Calculation, submission: Submission) -> None:
        loop = asyncio.get_running_loop()

        def send(*args: Any, **kwargs: Any) -> dict[str, Any]:
            answer = submit(*args, **kwargs)
            loop.call_soon_threadsafe(calculation.kill)
            if not answered:
                raise ConnectionFailed("the answer is lost")
            return answer

        monkeypatch.setattr(gateway, "submit", send)
        with pytest.raises(asyncio.CancelledError):
            submission.carry_out()

    play(scenario, until=lambda: states(transport) == [JobState.CANCELLED])
    assert len(backend.submissions) == 1
    assert set(backend.cancelled) == {"101"}


def test_a_calculation_that_is_killed_before_its_job_id_is_noted_loses_its_job(
    play: Play, transport: MarketplaceHpcTransport, backend: FakeBackend
) -> None:
    def scenario(calculation: Calculation, submission: Submission) -> None:
        submission.carry_out()
        calculation.kill()

    play(scenario, until=lambda: backend.cancelled == ["101"])


def test_a_calculation_that_is_killed_between_two_attempts_loses_its_job(
    play: Play, transport: MarketplaceHpcTransport, backend: FakeBackend, served: ServedGateway
) -> None:
    def scenario(calculation: Calculation, submission: Submission) -> None:
        submission.carry_out()
        submission._jobid = None  # As if the answer had been lost.
        calculation.kill()

    play(scenario, until=lambda: backend.cancelled == ["101"])


def test_a_calculation_that_goes_well_keeps_its_job(
    play: Play, transport: MarketplaceHpcTransport, backend: FakeBackend
) -> None:
    def scenario(calculation: Calculation, submission: Submission) -> None:
        assert submission.carry_out()["jobid"] == submission.carry_out()["jobid"]
        calculation.finish()

    play(scenario)
    assert backend.cancelled == []


def test_what_cannot_be_cancelled_is_said(
    play: Play,
    transport: MarketplaceHpcTransport,
    served: ServedGateway,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(transport.connection.gateway._session, "_sleep", lambda _: None)

    def scenario(calculation: Calculation, submission: Submission) -> None:
        submission.carry_out()
        served.stop()
        calculation.kill()

    play(scenario, until=lambda: "marketplace-hpc computer reconcile LABEL" in caplog.text)
