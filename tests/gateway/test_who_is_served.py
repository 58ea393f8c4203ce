"""Over HTTP: whose token opens what, for each way to find out whose it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import Forbidden
from aiida_marketplace_hpc.gateway import service
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.protocol import INFO_FIELDS
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.oidc import OidcProvider
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway

METHODS = ("dev", "oidc", "marketplace")


@pytest.fixture(scope="module")
def provider() -> Iterator[OidcProvider]:
    with OidcProvider() as provider:
        yield provider


@pytest.fixture(autouse=True)
def no_outage(provider: OidcProvider) -> Iterator[None]:
    yield
    provider.outage = None


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def served(tmp_path: Path, backend: FakeBackend, provider: OidcProvider, method: str) -> Iterator[ServedGateway]:
    with ServedGateway(tmp_path, backend, **flags_of(method, provider)) as served:
        yield served


def flags_of(method: str, provider: OidcProvider) -> dict[str, Any]:
    if method == "dev":
        return {}
    audience = ["hpc-gateway"] if method == "oidc" else []
    return {"auth": method, "issuer": provider.issuer, "audience": audience, "dev_token": {}}


def token_of(user: str, method: str, provider: OidcProvider, **options: Any) -> str:
    return TOKENS[user] if method == "dev" else provider.issue(f"subject-of-{user}", email=user, **options)


def ask(served: ServedGateway, path: str, token: str | None, verb: str = "GET", **options: Any) -> requests.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return requests.request(verb, served.url + path, headers=headers, timeout=20, **options)


def test_whose_token_opens_what(served: ServedGateway, method: str, provider: OidcProvider) -> None:
    alice, bob = token_of(ALICE, method, provider), token_of(BOB, method, provider)
    info = ask(served, "/api/v1/info", alice).json()
    assert (info["username"], info["email"]) == ("alice_a", ALICE)
    fields = {"job_name": "j", "ntasks_per_node": 1, "partition": "p", "image": "i", "executable_cmd": "c"}
    jobid = ask(served, "/api/v1/job/create", alice, "POST", json=fields).json()["jobid"]
    ways = [
        f"/api/v1/job/state/{jobid}",
        f"/api/v1/file/download/{jobid}?filename=job.sh",
        f"/api/v1/file/list/{jobid}",
    ]
    wrong = [None, "wrong", "a.b.c", alice[:-4], "x" * 20_000, "\xff\xfe"]
    if method != "dev":
        wrong.append(token_of(ALICE, method, provider, lifetime=-3600))
        with OidcProvider() as another:
            wrong.append(token_of(ALICE, method, another))
        changed = alice.split(".")
        changed[1] = token_of(BOB, method, provider).split(".")[1]
        wrong.append(".".join(changed))
    if method == "oidc":
        wrong.append(token_of(ALICE, method, provider, audience="elsewhere"))
    for way in ways:
        for token in wrong:
            answer = ask(served, way, token)
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), token
            assert token is None or token not in answer.text
        stranger = ask(served, way, bob)
        assert (stranger.status_code, stranger.json()["code"]) == (404, "not_found")
        assert ask(served, way, alice).status_code == 200
    assert ask(served, "/heartbeat", None).status_code == 200
    written = served.access_log.read_text()
    assert not any(token in written for token in (alice, bob))


def test_info_says_which_tokens_and_whose_account(served: ServedGateway, method: str, provider: OidcProvider) -> None:
    info = ask(served, "/api/v1/info", token_of(ALICE, method, provider)).json()
    assert set(info) == set(INFO_FIELDS)
    assert info["auth"] == {
        "method": method,
        "issuer": "dev" if method == "dev" else provider.issuer,
        "audience": ["hpc-gateway"] if method == "oidc" else [],
        "refresh_margin": 0 if method == "dev" else 30,
    }
    assert info["account_mode"] == "shared"
    assert "one Unix account" in info["account_note"]
    assert info["account_note"].partition(".")[0] in requests.get(served.url, timeout=20).text


@pytest.mark.parametrize("method", METHODS[1:], indirect=True)
def test_an_outage_of_the_provider_is_no_refusal(served: ServedGateway, method: str, provider: OidcProvider) -> None:
    known = token_of(ALICE, method, provider)
    if method == "marketplace":  # Another gateway may know the keys already; nobody knows this token.
        known = token_of(ALICE, method, provider, jti="of its own")
        assert ask(served, "/api/v1/info", known).status_code == 200
    provider.outage = "unavailable"
    new = token_of(BOB, method, provider)
    answer = ask(served, "/api/v1/info", new)
    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (503, "unavailable", True)
    if method == "marketplace":
        assert ask(served, "/api/v1/info", known).status_code == 200
    provider.outage = None


@pytest.mark.parametrize("method", ["dev"], indirect=True)
def test_the_client_knows_that_it_is_no_use_to_try_again(
    served: ServedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.gateway.authenticator = says = _Says(Forbidden("you may not use this gateway"))
    monkeypatch.setenv("MP_ACCESS_TOKEN", "some-token")
    with HpcGateway(served.url, token_source="env:MP_ACCESS_TOKEN") as gateway, pytest.raises(Forbidden):
        gateway.create_user()
    assert says.asked == 1


class _Says:
    """Answers one thing about every token."""

    method, issuer, refresh_margin = "test", "test", 0.0

    def __init__(self, said: Identity | Exception) -> None:
        self.said, self.asked = said, 0

    def identify(self, token: str) -> Identity:
        self.asked += 1
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


def test_who_is_known_is_so_until_the_end_of_the_token(gateway: Gateway) -> None:
    gateway.authenticator = _Says(Identity("test", "s", "a@b", "a", expires_at=time.time() - 1))
    gateway.caller("token")
    assert gateway.known_caller("token") is None
    gateway.authenticator = _Says(Identity("test", "s", "a@b", "a", expires_at=time.time() + 60))
    caller = gateway.caller("token")
    assert gateway.known_caller("token") is caller
    assert "token" not in repr(gateway._callers)


@pytest.mark.parametrize("method", ["oidc"], indirect=True)
def test_operators_say_who_may_come(
    tmp_path: Path,
    backend: FakeBackend,
    provider: OidcProvider,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "_CALLER_AGE", 0.0)

    def admin(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["gateway", "admin", "--state", str(tmp_path / "state"), "user", *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    flags = {**flags_of(method, provider), "require_registration": True}
    with ServedGateway(tmp_path, backend, **flags) as served:
        alice, bob = (token_of(user, method, provider) for user in (ALICE, BOB))
        refused = ask(served, "/api/v1/info", alice)
        assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (403, "forbidden", False)
        assert f"subject-of-{ALICE}" in refused.json()["error"]
        admin("add", ALICE)
        assert "invited" in admin("list")
        assert ask(served, "/api/v1/info", alice).status_code == 200
        assert ask(served, "/api/v1/info", bob).status_code == 403
        listed = admin("list")
        assert "registered" in listed
        assert BOB not in listed
        admin("block", ALICE)
        blocked = ask(served, "/api/v1/info", alice)
        assert (blocked.status_code, "blocked" in blocked.json()["error"]) == (403, True)
        assert "blocked" in admin("list")
        admin("unblock", f"subject-of-{ALICE}")
        assert ask(served, "/api/v1/info", alice).status_code == 200
        admin("remove", ALICE)
        assert ask(served, "/api/v1/info", alice).status_code == 403
    assert not any(json.loads(line)["user"] == BOB for line in (tmp_path / "access.jsonl").read_text().splitlines())
