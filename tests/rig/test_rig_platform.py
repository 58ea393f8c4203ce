"""The stand-in for the platform, in front of a gateway."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from aiida_marketplace_hpc import HpcGateway, get_app
from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.errors import NotSupported, Unauthorized
from aiida_marketplace_hpc.gateway.document import document
from aiida_marketplace_hpc.gateway.registration import registration
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.oidc import OidcProvider
from aiida_marketplace_hpc.testing.platform import APP_ID, USERINFO, Platform, offers_of_document, offers_of_table
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway


@pytest.fixture
def platform(served: ServedGateway) -> Iterator[Platform]:
    with Platform(served.url, undeclared="refuse", known_headers_only=True, refuse_chunked=True) as platform:
        yield platform


@pytest.fixture
def gateway(platform: Platform) -> Iterator[HpcGateway]:
    with HpcGateway(platform.url, app_id=APP_ID, token_source=StaticToken(TOKENS[ALICE])) as gateway:
        gateway.create_user()
        yield gateway


def test_the_client_works_through_it(
    gateway: HpcGateway, platform: Platform, served: ServedGateway, backend: FakeBackend, tmp_path: Path
) -> None:
    home = gateway.info()["home"]
    source = tmp_path / "a b&ü.txt"
    source.write_bytes(b"\0\xff" * 1000)
    gateway.upload_file("home", source.name, source)
    assert gateway.download_file("home", source.name) == source.read_bytes()
    (tmp_path / "run.sh").write_text("#!/bin/sh\n")
    gateway.upload_file("home", "run.sh", tmp_path / "run.sh")
    jobid = gateway.submit(home, "run.sh")["jobid"]
    assert len(backend.submissions) == 1
    assert gateway.check_job_state(jobid)["job"]["jobid"] == jobid
    assert gateway.cancel_job(jobid)["cancel_requested"]
    assert gateway.query([{"op": "stat", "path": home}])[0]["type"] == "directory"  # type: ignore[index]
    # Everything but the question for the app came to the gateway.
    assert len(served.requests()) == len(platform.proxy.requests) - 1


def test_a_document_says_what_is_forwarded(served: ServedGateway) -> None:
    uploaded = document(served.gateway.settings)
    described = offers_of_document(uploaded)
    offered = offers_of_table()
    assert {name: described[name] for name in offered} == offered
    uploaded["info"] |= {"x-application-name": "hpc", "x-api-version": "0.4.0"}
    with Platform(served.url, uploaded, app_id="app-1", undeclared="refuse") as platform:
        gateway = get_app("app-1", TOKENS[ALICE], url=platform.url)
        assert gateway.application().api_version == "0.4.0"
        assert gateway.create_user()["email"] == ALICE


def test_an_operation_without_a_name_of_its_own_is_refused() -> None:
    heartbeat = {"get": {"operationId": "heartbeat"}}
    for paths in ({"/a": {"get": {}}}, {"/a": heartbeat, "/b": heartbeat}):
        with pytest.raises(ValueError, match="operationId of its own"):
            offers_of_document({"paths": paths})


def test_large_files_pass_a_strict_platform(served: ServedGateway, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(3 * 1024 * 1024))
    strict = {"known_headers_only": True, "max_body": 1024 * 1024, "refuse_chunked": True}
    with Platform(served.url, undeclared="refuse", **strict) as platform:  # type: ignore[arg-type]
        gateway = get_app(APP_ID, TOKENS[ALICE], url=platform.url)
        home = gateway.create_user()["home"]
        gateway.put_file(source, f"{home}/large")
        gateway.get(f"{home}/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_only_what_was_published_is_forwarded(served: ServedGateway) -> None:
    with Platform(served.url, only_published=True) as platform:
        assert len(platform.offers) == 9
        gateway = HpcGateway(platform.url, app_id=APP_ID, token_source=StaticToken(TOKENS[ALICE]))
        gateway.create_user()
        headers = {"Authorization": f"Bearer {TOKENS[ALICE]}"}
        asked = f"{platform.url}/api/applications/proxy/{APP_ID}/getDataset"
        known = {"jobid": "home", "filename": "nothing", "bundle": "true"}
        requests.get(asked, params=known, headers=headers, timeout=10)
        assert "bundle" not in served.requests()[-1]["query"]
        platform.undeclared = "refuse"
        assert requests.get(asked, params=known, headers=headers, timeout=10).status_code == 400


def test_a_broker_in_the_document_needs_a_broker(served: ServedGateway) -> None:
    settings = served.gateway.settings
    told = settings.registration.model_copy(update={"broker": "https://platform.example.org"})
    uploaded = registration(settings.model_copy(update={"registration": told}))
    with pytest.raises(ValueError, match="give the platform a broker"):
        Platform(served.url, uploaded)


def test_bodies_are_limited(served: ServedGateway) -> None:
    with Platform(served.url, max_body=1024 * 1024) as platform:
        asked = f"{platform.url}/api/applications/proxy/{APP_ID}/newTransformation"
        headers = {"Authorization": f"Bearer {TOKENS[ALICE]}"}
        assert requests.post(asked, data=b" " * (1024 * 1024 + 1), headers=headers, timeout=10).status_code == 413


def test_nothing_without_a_product(platform: Platform) -> None:
    platform.purchased = False
    gateway = HpcGateway(platform.url, app_id=APP_ID, token_source=StaticToken(TOKENS[ALICE]))
    with pytest.raises(NotSupported, match="buy a product"):
        gateway.heartbeat()


def test_a_gateway_that_is_gone_is_a_bad_gateway(platform: Platform, served: ServedGateway) -> None:
    served.stop()
    asked = f"{platform.url}/api/applications/proxy/{APP_ID}/heartbeat"
    assert requests.get(asked, headers={"Authorization": "Bearer x"}, timeout=10).status_code == 502


def test_it_knows_whose_token_it_is(served: ServedGateway) -> None:
    with OidcProvider() as provider, Platform(served.url, provider=provider) as platform:
        token = provider.issue("dora", email="dora@example.org")
        answer = requests.get(platform.url + USERINFO, headers={"Authorization": f"Bearer {token}"}, timeout=10)
        assert answer.json()["email"] == "dora@example.org"
        with pytest.raises(Unauthorized):
            HpcGateway(platform.url, app_id=APP_ID, token_source=StaticToken("wrong")).heartbeat()
