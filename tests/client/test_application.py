"""What the platform says of an app, and what the client makes of it before it asks the proxy for anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import aiida_marketplace_hpc
from aiida_marketplace_hpc import get_app
from aiida_marketplace_hpc.client.application import PUBLISHED_APPS
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.client.info import INFO_AGE
from aiida_marketplace_hpc.errors import NotSupported, Phase, Unauthorized, Unavailable
from tests.client.fake_gateway import APP_ID, FakeGateway

Make = Callable[..., HpcGateway]


def test_the_platform_is_asked_once(fake: FakeGateway, client_of: Make) -> None:
    now = [0.0]
    gateway = client_of(fake.url, app_id=APP_ID, clock=lambda: now[0])
    assert gateway.application().api_version == "0.3.0"
    gateway.heartbeat()
    gateway.create_user()
    assert fake.application_asked == 1
    now[0] = INFO_AGE + 1
    gateway.heartbeat()
    assert fake.application_asked == 2


def test_without_an_app_the_platform_is_not_asked(fake: FakeGateway, gateway: HpcGateway) -> None:
    gateway.heartbeat()
    with pytest.raises(NotSupported, match="directly"):
        gateway.application()
    assert fake.application_asked == 0


def test_a_missing_capability_is_named_and_not_asked_for(fake: FakeGateway, client_of: Make) -> None:
    fake.application = {"api_version": "0.3.0", "capabilities": [{"name": "heartbeat"}, {"name": "getDataset"}]}
    gateway = client_of(fake.url, app_id=APP_ID)
    gateway.heartbeat()
    with pytest.raises(NotSupported, match=f"{APP_ID} does not offer createOrUpdateCollection"):
        gateway.create_user()
    assert fake.capabilities() == ["heartbeat"]


def test_an_app_without_getinfo_is_a_classic_gateway(fake: FakeGateway, client_of: Make) -> None:
    fake.application = {"capabilities": [{"name": "updateTransformation"}, {"name": "createDataset"}]}
    gateway = client_of(fake.url, app_id=APP_ID)
    assert gateway.extensions() == frozenset()
    assert fake.seen == []


@pytest.mark.parametrize("said", [{"name": "an app"}, {"api_version": None, "capabilities": "all"}])
def test_what_is_not_said_is_no_refusal(fake: FakeGateway, client_of: Make, said: dict[str, object]) -> None:
    fake.application = said
    client_of(fake.url, app_id=APP_ID).heartbeat()


def test_an_api_that_is_not_known_is_refused(fake: FakeGateway, client_of: Make) -> None:
    fake.application = {"api_version": "1.0.0", "capabilities": [{"name": "heartbeat"}]}
    with pytest.raises(NotSupported, match=r"version 1\.0\.0"):
        client_of(fake.url, app_id=APP_ID).heartbeat()


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (404, NotSupported, "knows no app"),
        (403, NotSupported, "buy a product"),
        (401, Unauthorized, "no"),
        (503, Unavailable, "no"),
    ],
)
def test_what_the_platform_refuses(
    fake: FakeGateway, client_of: Make, status: int, error: type[Exception], words: str
) -> None:
    fake.application_status = status
    with pytest.raises(error, match=words) as caught:
        client_of(fake.url, app_id=APP_ID).launch_job("1")
    # Nothing reached the gateway, which must not be taken for its own word.
    assert caught.value.phase is Phase.NOT_SENT  # type: ignore[attr-defined]
    assert fake.seen == []


def test_get_app_takes_any_app(fake: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_app(APP_ID, "good", url=fake.url).create_user()["username"] == "ada"
    monkeypatch.setenv("MP_HOST", fake.url)
    monkeypatch.setenv("MP_ACCESS_TOKEN", "good")
    with get_app(APP_ID) as gateway:
        assert gateway.create_user()["username"] == "ada"
    assert aiida_marketplace_hpc.get_app is get_app


def test_get_app_knows_the_published_names(fake: FakeGateway) -> None:
    with pytest.raises(NotSupported, match=PUBLISHED_APPS["mc"]):
        get_app("mc", "good", url=fake.url)


def test_get_app_shows_no_token(fake: FakeGateway) -> None:
    assert "good" not in repr(get_app(APP_ID, "good", url=fake.url))


def test_an_upload_without_a_name_gets_that_of_the_file(fake: FakeGateway, gateway: HpcGateway) -> None:
    source = fake.home.parent / "in.txt"
    source.write_text("x")
    gateway.upload_file("home", "", source)
    assert (fake.home / "in.txt").read_text() == "x"
