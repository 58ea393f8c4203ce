"""FirecREST as each user, with the token that they send."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import ConfigurationError, Unavailable
from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.testing.firecrest_v2 import FirecrestDouble
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.oidc import OidcProvider
from aiida_marketplace_hpc.testing.served import ServedGateway
from tests.firecrest.conftest import remote_settings


@pytest.fixture
def settings(double: FirecrestDouble, tmp_path: Path) -> dict[str, Any]:
    settings = {
        **remote_settings(double, tmp_path),
        "account": "delegated",
        "auth": "oidc",
        "dev_token": {},
        "issuer": double.provider.issuer,
        "audience": ("hpc-gateway",),
    }
    return {name: value for name, value in settings.items() if not name.startswith(("firecrest_c", "firecrest_t"))}


@pytest.fixture
def served(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedGateway]:
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.service._RECONCILE_INTERVAL", 0.2)
    with ServedGateway(tmp_path, None, **settings) as served:
        yield served


def client_of(served: ServedGateway, tmp_path: Path, token: str) -> HpcGateway:
    file = tmp_path / f"token-{abs(hash(token))}"
    file.touch(mode=0o600)
    file.write_text(token)
    return HpcGateway(served.url, token_source=f"file:{file}")


def test_each_works_as_themselves(served: ServedGateway, provider: OidcProvider, tmp_path: Path) -> None:
    before = provider.grants["client_credentials"]
    ended = []
    for name in ("carol", "dave"):
        token = provider.issue(name, email=f"{name}@example.org")
        client = client_of(served, tmp_path, token)
        home = str(client.info()["home"])
        folder = Path(home, "work")
        folder.mkdir()
        (folder / "run.sh").write_text(f"#!/bin/sh\nexit {len(name)}\n")
        jobid = client.submit(str(folder), "run.sh")["jobid"]

        def job(client: HpcGateway = client, jobid: str = jobid) -> dict[str, Any]:
            return dict(client.job_states([jobid])["jobs"][jobid])

        wait_until(lambda job=job: job()["final"], within=30, failure=lambda job=job: f"no end: {job()}")  # type: ignore[misc]
        ended.append(job()["exit_code"])
        assert client.info()["account_mode"] == "delegated"
        client.close()
    assert ended == [5, 4]
    assert provider.grants["client_credentials"] == before
    jobs = served.gateway.sites["firecrest"].accounts
    users = {record["user"] for cluster in jobs.usable() for record in cluster.jobs()}
    assert {"carol", "dave"} <= users


def test_without_a_token_that_lives_nothing_is_known_and_nothing_changes(
    served: ServedGateway, double: FirecrestDouble, provider: OidcProvider, tmp_path: Path
) -> None:
    token = provider.issue("erin", email="erin@example.org")
    client = client_of(served, tmp_path, token)
    folder = Path(str(client.info()["home"]), "work")
    folder.mkdir()
    (folder / "run.sh").write_text("#!/bin/sh\nuntil [ -e go ]; do sleep 0.1; done\n")
    jobid = client.submit(str(folder), "run.sh")["jobid"]
    ledger, gateway = served.gateway.ledger, served.gateway

    def state() -> str:
        job = ledger.get(jobid)
        assert job is not None
        return job.state

    wait_until(lambda: state() == "RUNNING", within=20, failure=lambda: f"it does not run: {state()}")
    account = gateway.sites["firecrest"].accounts.of_folder(str(folder))
    assert account is not None
    account._tokens.refused()
    (folder / "go").touch()
    asked = double.calls["jobs"]
    with pytest.raises(Unavailable, match="no token"):
        gateway.files_of(ledger.users()[0]).listing(str(folder))
    for _ in range(5):
        gateway.watch.refresh()
    assert state() == "RUNNING"
    assert double.calls["jobs"] == asked
    newer = client_of(served, tmp_path, provider.issue("erin", email="erin@example.org", lifetime=600))
    wait_until(
        lambda: newer.job_states([jobid])["jobs"][jobid]["final"], within=30, failure=lambda: f"no end: {state()}"
    )
    assert state() == "COMPLETED"
    newer.close()
    client.close()


def test_one_whom_the_cluster_does_not_let_in_keeps_nobody_else_waiting(
    served: ServedGateway, double: FirecrestDouble, provider: OidcProvider, tmp_path: Path
) -> None:
    clients = {}
    for name in ("frank", "grace"):
        clients[name] = client_of(served, tmp_path, provider.issue(name, email=f"{name}@example.org"))
        folder = Path(str(clients[name].info()["home"]), "work")
        folder.mkdir()
        (folder / "run.sh").write_text("#!/bin/sh\nsleep 0.3\n")
    double.locked.add("frank")
    grace = clients["grace"]
    jobid = grace.submit(f"{grace.info()['home']}/work", "run.sh")["jobid"]
    wait_until(lambda: grace.job_states([jobid])["jobs"][jobid]["final"], within=30, failure=lambda: "no end")
    for client in clients.values():
        client.close()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"home": "/srv/all"}, "username"),
        ({"firecrest_url": ""}, "firecrest_url"),
        ({"firecrest_system": ""}, "firecrest_system"),
        ({"account": "shared"}, "firecrest_client_secret"),
        ({"home": ""}, "--home"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], change: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        load({**settings, **change})
