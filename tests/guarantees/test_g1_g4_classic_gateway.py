"""One execution and whole files on a classic gateway, whatever a proxy on the way does to requests and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiida.schedulers.datastructures import JobState

from aiida_marketplace_hpc.client.classic import jobs as classic_jobs
from aiida_marketplace_hpc.errors import IntegrityError, MarketplaceHpcError
from aiida_marketplace_hpc.gateway.backends.local import LocalBackend
from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler
from aiida_marketplace_hpc.testing.faults import (
    CutAnswer,
    CutRequest,
    Duplicate,
    Fault,
    FlipInAnswer,
    FlipInRequest,
    LoseAnswer,
    ProxiedRequest,
)
from aiida_marketplace_hpc.testing.proxy import FaultyProxy
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport
from tests.plugin.classic_calculation import Calculation

LARGE = bytes(range(256)) * 1200
"""More than what travels in the script."""


@pytest.fixture(scope="module")
def classic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    folder = tmp_path_factory.mktemp("classic")
    with (
        pytest.MonkeyPatch.context() as patch,
        ServedGateway(folder, LocalBackend(folder / "spool", slots=4, kill_wait=5.0), classic=True) as served,
    ):
        patch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])
        patch.setenv("XDG_STATE_HOME", str(folder / "client"))
        patch.setenv(classic_jobs.BEAT, "0.2")
        yield served


@pytest.fixture
def proxy(classic: ServedGateway) -> Iterator[FaultyProxy]:
    with FaultyProxy(classic.url) as proxy:
        yield proxy


@pytest.fixture
def calculation(proxy: FaultyProxy, tmp_path: Path) -> Iterator[Calculation]:
    with MarketplaceHpcTransport(machine="cluster", url=proxy.url) as transport:
        scheduler = MarketplaceHpcScheduler()
        scheduler.set_transport(transport)
        yield Calculation(transport, scheduler, tmp_path / "local")


def to(part: str, name: str = "") -> Callable[[ProxiedRequest], bool]:
    """Says whether a request goes to a capability, about a file of this name if one is given."""
    return lambda request: part in request.path and name in request.query


@pytest.mark.parametrize("fault", [Duplicate(), LoseAnswer(), LoseAnswer(500), CutAnswer(0), CutAnswer(3)], ids=repr)
def test_a_launch_is_one_execution(calculation: Calculation, proxy: FaultyProxy, fault: Fault) -> None:
    injected = proxy.inject(fault, only=to("/job/launch/"))
    first = calculation.submit("echo ran >> ran; sleep 0.5", ["ran", "_scheduler-stderr.txt"])
    assert calculation.scheduler.submit_job(calculation.work, "_aiidasubmit.sh") == first
    calculation.wait()
    assert injected.hit == 1
    assert calculation.get("ran") == b"ran\n"
    launches = [request for request in proxy.requests if "/job/launch/" in request.path]
    assert len(launches) == 1
    if fault == Duplicate():
        assert b"second copy" in calculation.get("_scheduler-stderr.txt")


@pytest.mark.parametrize("fault", [FlipInRequest(150_000), CutRequest(100_000), LoseAnswer()], ids=repr)
def test_an_upload_arrives_whole_or_keeps_the_script_from_running(
    calculation: Calculation, proxy: FaultyProxy, fault: Fault
) -> None:
    injected = proxy.inject(fault, only=to("/file/upload/", "mphpc-piece-"))
    calculation.put("large", LARGE)
    calculation.submit("sha256sum < large > sum; cp large back; touch ran", ["back", "ran"])
    job = calculation.wait()
    assert injected.hit == 1
    if isinstance(fault, FlipInRequest):
        assert job["unprepared"]
        assert not calculation.transport.path_exists(f"{calculation.work}/ran")
    else:
        assert calculation.get("back") == LARGE


def test_a_script_that_arrives_wrong_is_sent_again(calculation: Calculation, proxy: FaultyProxy) -> None:
    injected = proxy.inject(FlipInRequest(3000), only=to("/file/upload/", "job.sh"))
    calculation.submit("touch ran", ["ran"])
    assert calculation.wait()["state"] == "COMPLETED"
    assert injected.hit == 1
    assert calculation.get("ran") == b""


@pytest.mark.parametrize(
    "fault", [FlipInAnswer(100_000), CutAnswer(100_000), CutAnswer(100_000, how="whole")], ids=repr
)
def test_a_download_is_whole_or_an_error(
    calculation: Calculation, proxy: FaultyProxy, fault: Fault, tmp_path: Path
) -> None:
    calculation.put("large", LARGE)
    calculation.submit("cp large back", ["back"])
    calculation.wait()
    injected = proxy.inject(fault, only=to("/file/download/", "back"))
    place = tmp_path / "back"
    if fault == CutAnswer(100_000):  # The connection says so itself, and the session asks again.
        calculation.transport.getfile(f"{calculation.work}/back", place)
    else:
        with pytest.raises(IntegrityError):
            calculation.transport.getfile(f"{calculation.work}/back", place)
        assert not place.exists()
        calculation.transport.getfile(f"{calculation.work}/back", place)
    assert injected.hit == 1
    assert place.read_bytes() == LARGE


def test_a_list_of_files_that_arrives_wrong_is_asked_for_again(calculation: Calculation, proxy: FaultyProxy) -> None:
    calculation.submit("echo one > one", ["one"])
    calculation.wait()
    proxy.inject(CutAnswer(100, how="whole"), only=to("/file/download/", "mphpc-manifest"))
    with pytest.raises(MarketplaceHpcError, match="did not arrive whole"):
        calculation.get("one")
    assert calculation.get("one") == b"one\n"
    assert calculation.state is JobState.DONE
