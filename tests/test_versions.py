"""Client and gateway of different versions: a little apart they work together, further apart they say which to upgrade."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from aiida.schedulers.datastructures import JobState

from aiida_marketplace_hpc import __version__, versions
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import InvalidRequest, VersionMismatch
from aiida_marketplace_hpc.gateway import app, jobs
from aiida_marketplace_hpc.gateway.routes import query
from aiida_marketplace_hpc.gateway.routes.call import Answer, Call
from aiida_marketplace_hpc.protocol import API_VERSION, JOB_FIELDS, OLDEST_API, OLDEST_CLIENT
from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

FIRST_INFO = (
    "name",
    "version",
    "api_version",
    "oldest_client",
    "extensions",
    "machines",
    "username",
    "home",
    "roots",
    "limits",
)
"""What `getInfo` said when it was made."""
FIRST_JOB = tuple(name for name in JOB_FIELDS if name != "cancel_requested")
ADDED_EXTENSIONS = ("operation-keys", "base64")
ADDED_OPERATIONS = ("checksum", "usage", "compress", "extract")
Change = Callable[[dict[str, Any]], dict[str, Any]]


def only(*names: str) -> Change:
    return lambda document: {name: document[name] for name in names}


def and_more(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "of_the_future": {"a": [1, None]}, "draining_since": 5}


@pytest.fixture(params=["older", "newer"])
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateways of this process say less than they do, or more."""
    older = request.param == "older"
    handlers = dict(app.HANDLERS)
    as_wire = jobs.Jobs.as_wire

    def info(call: Call) -> Answer:
        answer = handlers["getInfo"](call)
        assert isinstance(answer, dict)
        if older:
            kept = [name for name in answer["extensions"] if name not in ADDED_EXTENSIONS]
            return {**only(*FIRST_INFO)(answer), "extensions": kept}
        return {**and_more(answer), "api_version": "3.9", "extensions": [*answer["extensions"], "of-the-future"]}

    def job(self: jobs.Jobs, *arguments: Any, **options: Any) -> dict[str, Any]:
        document = as_wire(self, *arguments, **options)
        keep = only(*FIRST_JOB, *(["accounting"] if "accounting" in document else []))
        return keep(document) if older else and_more(document)

    monkeypatch.setitem(app.HANDLERS, "getInfo", info)
    monkeypatch.setattr(jobs.Jobs, "as_wire", job)
    if older:
        known = {name: operation for name, operation in query.OPERATIONS.items() if name not in ADDED_OPERATIONS}
        monkeypatch.setattr(query, "OPERATIONS", known)


@pytest.fixture
def changed(
    other: None, tmp_path: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServedGateway]:
    monkeypatch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])
    with ServedGateway(tmp_path, backend) as served:
        yield served


def test_a_calculation_runs_on_a_gateway_that_says_less_or_more(
    changed: ServedGateway, backend: FakeBackend, tmp_path: Path
) -> None:
    with MarketplaceHpcTransport(machine="cluster", url=changed.url) as transport:
        scheduler = MarketplaceHpcScheduler()
        scheduler.set_transport(transport)
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "run.sh").write_text("#!/bin/bash\n")
        (tmp_path / "in" / "large").write_bytes(b"x" * 3_000_000)
        folder = f"{transport.normalize('.')}/work"
        transport.puttree(tmp_path / "in", folder)
        assert sorted(transport.listdir(folder)) == ["large", "run.sh"]
        jobid = str(scheduler.submit_job(folder, "run.sh"))
        assert scheduler.get_jobs([jobid], as_dict=True)[jobid].job_state is JobState.QUEUED
        backend.run("101")
        backend.end("101", exit_code=0)

        def state() -> JobState:
            found: JobState = scheduler.get_jobs([jobid], as_dict=True)[jobid].job_state
            return found

        wait_until(lambda: state() is JobState.DONE, within=20, failure=lambda: str(state()))
        assert "retval" in scheduler.get_detailed_job_info(jobid)
        transport.gettree(folder, tmp_path / "out")
        assert (tmp_path / "out" / "large").read_bytes() == b"x" * 3_000_000
        transport.rmtree(folder)


@pytest.mark.parametrize("other", ["newer"], indirect=True)
def test_a_state_that_only_a_newer_gateway_knows_is_no_end(
    changed: ServedGateway, backend: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MarketplaceHpcTransport(machine="cluster", url=changed.url) as transport:
        scheduler = MarketplaceHpcScheduler()
        scheduler.set_transport(transport)
        (tmp_path / "run.sh").write_text("#!/bin/bash\n")
        folder = f"{transport.normalize('.')}/work"
        transport.makedirs(folder)
        transport.putfile(tmp_path / "run.sh", f"{folder}/run.sh")
        jobid = str(scheduler.submit_job(folder, "run.sh"))
        as_wire = jobs.Jobs.as_wire
        monkeypatch.setattr(jobs.Jobs, "as_wire", lambda *a, **b: {**as_wire(*a, **b), "state": "HIBERNATING"})
        assert scheduler.get_jobs([jobid], as_dict=True)[jobid].job_state is JobState.UNDETERMINED


def test_what_an_older_gateway_has_not_is_an_error_that_says_so(
    changed: ServedGateway, request: pytest.FixtureRequest
) -> None:
    with HpcGateway(changed.url) as client:
        path = f"{client.info()['home']}/file"
        client.ask("mkdir", path=path)
        if request.node.callspec.params["other"] == "older":
            with pytest.raises(InvalidRequest, match="usage"):
                client.ask("usage", path=path)
        else:
            client.ask("usage", path=path)


@pytest.mark.parametrize(
    ("said", "upgrade"),
    [
        ({"oldest_client": "99.0"}, "upgrade aiida-marketplace-hpc here"),
        ({"api_version": "4.0"}, "upgrade aiida-marketplace-hpc here"),
        ({"api_version": "2.9"}, "ask its operator to upgrade it"),
    ],
)
def test_a_client_says_what_to_upgrade(
    served: ServedGateway, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], upgrade: str
) -> None:
    get_info = app.HANDLERS["getInfo"]

    def info(call: Call) -> Answer:
        answer = get_info(call)
        assert isinstance(answer, dict)
        return {**answer, **said}

    served.stop()
    monkeypatch.setitem(app.HANDLERS, "getInfo", info)
    folder = Path(served.gateway.settings.state).parent
    with ServedGateway(folder, FakeBackend()) as other, HpcGateway(other.url) as client:
        with pytest.raises(VersionMismatch, match=upgrade) as raised:
            client.info()
        assert other.url in raised.value.message
        assert not raised.value.retryable
        with (
            pytest.raises(VersionMismatch, match=upgrade),
            MarketplaceHpcTransport(machine="cluster", url=other.url) as transport,
        ):
            transport.listdir(".")


@pytest.mark.parametrize(
    ("agent", "status"),
    [
        ("aiida-marketplace-hpc/0.0.9", 400),
        ("aiida-marketplace-hpc/0.0.9rc1 requests/2", 400),
        (f"aiida-marketplace-hpc/{OLDEST_CLIENT}", 200),
        (f"aiida-marketplace-hpc/{__version__}", 200),
        ("aiida-marketplace-hpc/99.1.dev3", 200),
        ("MarketPlace Python SDK v0.3.2", 200),
        ("aiida-marketplace-hpc/nonsense", 400),
        ("", 200),
    ],
)
def test_a_gateway_says_to_an_old_client_what_to_upgrade(served: ServedGateway, agent: str, status: int) -> None:
    headers = {"Authorization": f"Bearer {TOKENS[ALICE]}", "User-Agent": agent}
    answer = requests.get(f"{served.url}/api/v1/info", headers=headers, timeout=20)
    assert answer.status_code == status, answer.text
    if status == 400:
        assert "upgrade aiida-marketplace-hpc on your side" in answer.json()["error"]
        assert answer.json()["retryable"] is False
    assert requests.get(f"{served.url}/heartbeat", headers=headers, timeout=20).ok


def test_this_version_works_with_itself() -> None:
    versions.check_gateway({"api_version": API_VERSION, "oldest_client": OLDEST_CLIENT, "version": __version__}, "u")
    versions.check_client(versions.USER_AGENT)
    versions.check_gateway({"api_version": OLDEST_API}, "u")
    versions.check_gateway({}, "u")
