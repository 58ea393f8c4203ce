"""The plugin through a strict platform: what AiiDA asks arrives, and what the platform says of the app ends no job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from aiida.schedulers.datastructures import JobState

from aiida_marketplace_hpc.client.info import INFO_AGE
from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.platform import APP_ID, Platform
from aiida_marketplace_hpc.testing.served import ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport


@pytest.fixture
def platform(served: ServedGateway) -> Iterator[Platform]:
    strict = {"known_headers_only": True, "max_body": 1024 * 1024, "refuse_chunked": True}
    with Platform(served.url, undeclared="refuse", **strict) as platform:  # type: ignore[arg-type]
        yield platform


@pytest.fixture
def transport(platform: Platform) -> Iterator[MarketplaceHpcTransport]:
    with MarketplaceHpcTransport(machine="cluster", url=platform.url, app_id=APP_ID) as transport:
        yield transport


def _submitted(transport: MarketplaceHpcTransport, scheduler: MarketplaceHpcScheduler, local: Path) -> str:
    (local / "tree" / "sub").mkdir(parents=True)
    (local / "tree" / "sub" / "a").write_bytes(b"a" * (2 * 1024 * 1024))
    (local / "tree" / "run.sh").write_text("#!/bin/sh\n")
    work = f"{transport.normalize('.')}/work"
    transport.put(local / "tree", work)
    jobid = scheduler.submit_job(work, "run.sh")
    assert isinstance(jobid, str)
    return jobid


def test_a_job_and_its_files(
    transport: MarketplaceHpcTransport, scheduler: MarketplaceHpcScheduler, backend: FakeBackend, tmp_path: Path
) -> None:
    local = tmp_path / "local"
    jobid = _submitted(transport, scheduler, local)
    assert scheduler.get_jobs([jobid], as_dict=True)[jobid].job_state is JobState.QUEUED
    transport.get(f"{transport.normalize('.')}/work", local / "back")
    assert (local / "back" / "sub" / "a").read_bytes() == (local / "tree" / "sub" / "a").read_bytes()
    assert scheduler.kill_job(jobid)
    assert backend.cancelled == backend.ids


def test_an_app_that_is_withdrawn_meanwhile_ends_no_job(
    transport: MarketplaceHpcTransport,
    scheduler: MarketplaceHpcScheduler,
    platform: Platform,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    jobid = _submitted(transport, scheduler, tmp_path / "local")
    platform.purchased = False
    application = scheduler._connection.gateway._passage.offer
    monkeypatch.setattr(application, "_clock", lambda clock=application._clock: clock() + INFO_AGE + 1)
    info = scheduler.get_jobs([jobid], as_dict=True)[jobid]
    assert info.job_state is JobState.UNDETERMINED
    assert "buy a product" in info.annotation
