"""The plugin through platforms that pass only the nine as published, with all that strict proxies do beside."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiida.schedulers.datastructures import JobState

from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.platform import APP_ID, Platform
from aiida_marketplace_hpc.testing.relay import RelayInProcess
from aiida_marketplace_hpc.testing.served import ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport
from tests.plugin.comparison import assert_same, outcome
from tests.plugin.conftest import NewPair, new_pairs
from tests.plugin.test_differential import ACTIONS

MIB = 1024 * 1024
MODES: list[dict[str, Any]] = [
    {"undeclared": undeclared, "known_headers_only": known, "max_body": most, "refuse_chunked": chunked}
    for undeclared, known, most, chunked in itertools.product(
        ("refuse", "drop", "pass"), (True, False), (MIB, None), (True, False)
    )
]
"""The strictest first."""
WHOLE = bool(os.environ.get("MARKETPLACE_HPC_EVERY_MODE"))
"""Every operation in every mode, which takes minutes; else each in the strictest mode, and some in the others, in turn."""


def said(mode: dict[str, Any]) -> str:
    return "-".join(
        [str(mode["undeclared"]), *(name for name, value in mode.items() if value and name != "undeclared")]
    )


@pytest.fixture(scope="module")
def strict_platform(lasting: ServedGateway) -> Iterator[Platform]:
    with Platform(lasting.url, only_published=True, **MODES[0]) as platform:
        yield platform


@pytest.fixture(scope="module")
def strict_pair(
    strict_platform: Platform, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NewPair]:
    where = {"url": strict_platform.url, "app_id": APP_ID}
    with new_pairs(tmp_path_factory.mktemp("strict"), elsewhere, **where) as make:
        yield make


@pytest.fixture(scope="module")
def text_pair(lasting: ServedGateway, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewPair]:
    """Over messages that carry only text."""
    with Platform(lasting.url, undeclared="refuse") as platform:
        platform.messages = RelayInProcess(lasting.url, 16 * MIB)
        where = {"url": platform.url, "app_id": APP_ID}
        with new_pairs(tmp_path_factory.mktemp("text"), elsewhere, "text", **where) as make:
            yield make


def set_mode(platform: Platform, mode: dict[str, Any]) -> None:
    platform.undeclared = mode["undeclared"]
    platform.proxy.known_headers_only = mode["known_headers_only"]
    platform.proxy.max_body = mode["max_body"]
    platform.proxy.refuse_chunked = mode["refuse_chunked"]


def _cases() -> Iterator[Any]:
    others = itertools.cycle(MODES[1:])
    for number, name in enumerate(ACTIONS):
        for mode in MODES if WHOLE else [MODES[0], *([] if number % 8 else [next(others)])]:
            # All of them in the strictest mode take some time.
            marks = [pytest.mark.services] if number % 4 and not WHOLE else []
            yield pytest.param(name, mode, id=f"{name}-{said(mode)}", marks=marks)


@pytest.mark.parametrize(("name", "mode"), list(_cases()))
def test_every_operation_is_the_same(
    name: str, mode: dict[str, Any], strict_pair: NewPair, strict_platform: Platform
) -> None:
    set_mode(strict_platform, mode)
    pair = strict_pair()
    assert_same(outcome(ACTIONS[name], pair.ours), outcome(ACTIONS[name], pair.reference))


@pytest.mark.services
@pytest.mark.parametrize("name", list(ACTIONS)[:: 1 if WHOLE else 3])
def test_every_operation_is_the_same_where_only_text_survives(name: str, text_pair: NewPair) -> None:
    pair = text_pair()
    assert_same(outcome(ACTIONS[name], pair.ours), outcome(ACTIONS[name], pair.reference))


@pytest.mark.parametrize("mode", MODES, ids=said)
def test_a_job_with_its_files(
    mode: dict[str, Any], served: ServedGateway, backend: FakeBackend, tmp_path: Path
) -> None:
    local = tmp_path / "local"
    (local / "tree" / "sub").mkdir(parents=True)
    large = os.urandom(MIB + 1)
    (local / "tree" / "sub" / "large").write_bytes(large)
    (local / "tree" / "run.sh").write_text("#!/bin/sh\n")
    with (
        Platform(served.url, only_published=True, **mode) as platform,
        MarketplaceHpcTransport(machine="cluster", url=platform.url, app_id=APP_ID) as transport,
    ):
        scheduler = MarketplaceHpcScheduler()
        scheduler.set_transport(transport)
        work = f"{transport.normalize('.')}/work"
        transport.put(local / "tree", work)
        jobid = scheduler.submit_job(work, "run.sh")
        assert scheduler.submit_job(work, "run.sh") == jobid
        assert len(backend.submissions) == 1
        assert isinstance(jobid, str)
        before = len(platform.proxy.requests)
        assert scheduler.get_jobs([jobid], as_dict=True)[jobid].job_state is JobState.QUEUED
        assert len(platform.proxy.requests) == before + 1  # G7
        transport.get(work, local / "back")
        assert scheduler.kill_job(jobid)
        refused = [request.status for request in platform.proxy.requests if (request.status or 500) >= 400]
    assert (local / "back" / "sub" / "large").read_bytes() == large
    assert backend.cancelled == backend.ids
    # Once too large, and once known never again.
    assert refused == ([413] if mode["max_body"] else [])
    if mode["max_body"]:
        assert max(request.body for request in platform.proxy.requests if request.status == 200) <= MIB
