"""The authorization code flow with PKCE: who comes back with the right answer is signed in, and nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import requests

from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.oidc import OidcProvider
from aiida_marketplace_hpc.testing.served import ServedGateway
from tests.gateway.people.visitors import Browser

CLIENT, SECRET = "the-page", "secret-of-the-page"
PAGE = "http://127.0.0.1:9/gateway"
"""What the issuer knows as the gateway's address; tests go to where it really is."""
CALLBACK = f"{PAGE}/sign-in/callback"


@pytest.fixture(scope="module")
def shared_provider() -> Iterator[OidcProvider]:
    with OidcProvider() as provider:
        provider.redirect_uris[CLIENT] = [CALLBACK]
        yield provider


@pytest.fixture(scope="module")
def served(shared_provider: OidcProvider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    secret = tmp_path_factory.mktemp("secret") / "client"
    secret.touch(0o600)
    secret.write_text(f"{SECRET}\n")
    with ServedGateway(
        tmp_path_factory.mktemp("gateway"),
        FakeBackend(),
        **settings_for(shared_provider, page_client_secret_file=secret),
    ) as served:
        yield served


@pytest.fixture
def provider(shared_provider: OidcProvider) -> Iterator[OidcProvider]:
    """The provider as it is at first."""
    shared_provider.outage, shared_provider.audience, shared_provider.id_token_changes = None, "hpc-gateway", {}
    shared_provider.clients[CLIENT] = SECRET
    shared_provider.grants.clear()
    yield shared_provider
    shared_provider.outage = None


def settings_for(provider: OidcProvider, **more: Any) -> dict[str, Any]:
    return {
        "dev_token": {},
        "auth": "oidc",
        "issuer": provider.issuer,
        "audience": ("hpc-gateway",),
        "page_url": PAGE,
        "page_client": CLIENT,
        **more,
    }


class Person(Browser):
    """Somebody who signs in at the issuer, step by step."""

    def ask(self) -> str:
        """Go to sign in; where that leads."""
        answer = self.get("/sign-in")
        assert answer.status_code == 303, answer.text
        return str(answer.headers["Location"])

    def log_in(self, address: str, subject: str = "alice") -> str:
        """Log in at the issuer, and be sent back; the way back, on this gateway."""
        assert "Log in" in self.get(address).text
        answer = self.session.post(address, data={"subject": subject}, allow_redirects=False, timeout=20)
        back = str(answer.headers["Location"])
        assert back.startswith(f"{CALLBACK}?")
        return back.removeprefix(PAGE)

    @property
    def is_signed_in(self) -> bool:
        return "Signed in as" in self.get("/").text


@pytest.fixture
def person(served: ServedGateway, provider: OidcProvider) -> Person:
    return Person(served)


def test_somebody_signs_in_at_the_issuer(person: Person, provider: OidcProvider) -> None:
    address = person.ask()
    asked = dict(parse_qsl(urlsplit(address).query))
    assert address.startswith(provider.authorization_endpoint)
    assert (asked["client_id"], asked["redirect_uri"], asked["response_type"]) == (CLIENT, CALLBACK, "code")
    assert (asked["code_challenge_method"], len(asked["code_challenge"])) == ("S256", 43)
    assert "openid" in asked["scope"].split()
    answer = person.get(person.log_in(address))
    assert (answer.status_code, provider.grants) == (200, {"authorization_code": 1})
    assert 'content="0; url=../"' in answer.text
    assert "alice@example.org" in person.get("/").text


def test_two_attempts_have_nothing_in_common(person: Person) -> None:
    one, other = (dict(parse_qsl(urlsplit(person.ask()).query)) for _ in range(2))
    for name in ("state", "nonce", "code_challenge"):
        assert one[name] != other[name]
    assert person.session.cookies.get("mphpc-sign-in") not in (one | other).values()


def test_a_way_back_is_good_once(person: Person) -> None:
    back = person.log_in(person.ask())
    assert person.get(back).status_code == 200
    person.session.cookies.clear()
    assert person.get(back).status_code == 400
    assert not person.is_signed_in


def test_a_code_is_good_once_also_in_the_browser_that_asked(person: Person) -> None:
    back = person.log_in(person.ask())
    attempt = person.session.cookies.get("mphpc-sign-in")
    assert person.get(back).status_code == 200
    person.session.cookies.clear()
    person.session.cookies.set("mphpc-sign-in", attempt)
    answer = person.get(back)
    assert (answer.status_code, "does not accept this code" in answer.text) == (400, True)


def test_nobody_is_signed_in_by_a_link_of_somebody_else(
    served: ServedGateway, provider: OidcProvider, person: Person
) -> None:
    back = person.log_in(person.ask(), "mallory")
    asked = provider.requests["token"]
    for begun in (False, True):
        victim = Person(served)
        if begun:
            victim.ask()
        answer = victim.get(back)
        assert (answer.status_code, "did not ask to sign in" in answer.text) == (400, True)
        assert not victim.is_signed_in
    assert provider.requests["token"] == asked


def test_a_code_that_was_seen_on_the_way_is_of_no_use(served: ServedGateway, person: Person) -> None:
    """PKCE: whoever has the code, and even a state of their own to go with it, has not the verifier."""
    code = dict(parse_qsl(urlsplit(person.log_in(person.ask())).query))["code"]
    thief = Person(served)
    state = dict(parse_qsl(urlsplit(thief.ask()).query))["state"]
    assert thief.get(f"/sign-in/callback?code={code}&state={state}").status_code == 400
    assert not thief.is_signed_in


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": "of another attempt"},
        {"nonce": None},
        {"aud": "another-client"},
        {"azp": "another-client"},
        {"iss": "https://elsewhere.example"},
        {"sub": "bob"},
        {"exp": 1_700_000_000},  # Long ago.
    ],
    ids=str,
)
def test_an_answer_that_is_not_to_this_question_signs_nobody_in(
    person: Person, provider: OidcProvider, changes: dict[str, Any]
) -> None:
    provider.id_token_changes = changes
    assert person.get(person.log_in(person.ask())).status_code == 401
    assert not person.is_signed_in


def test_a_token_for_another_service_signs_nobody_in(person: Person, provider: OidcProvider) -> None:
    provider.audience = "another-service"
    answer = person.get(person.log_in(person.ask()))
    assert (answer.status_code, "another service" in answer.text) == (401, True)
    assert not person.is_signed_in


def test_an_answer_of_another_issuer_is_none(person: Person) -> None:
    back = person.log_in(person.ask())
    assert person.get(f"{back}&iss=https://elsewhere.example").status_code == 400


def test_a_person_who_refuses_is_told_so_without_a_word_of_what_came_along(person: Person) -> None:
    address = person.ask()
    refused = person.session.post(address, data={}, allow_redirects=False, timeout=20)
    back = str(refused.headers["Location"]).removeprefix(PAGE)
    answer = person.get(back)
    assert (answer.status_code, "access_denied" in answer.text) == (403, True)
    state = dict(parse_qsl(urlsplit(address).query))["state"]
    answer = person.get(f"/sign-in/callback?state={state}&error=<script>alert(1)</script>")
    assert (answer.status_code, "<script>" in answer.text) == (403, False)


def test_a_wrong_secret_of_the_client_is_said_to_the_operator_alone(
    person: Person, provider: OidcProvider, caplog: pytest.LogCaptureFixture
) -> None:
    provider.clients[CLIENT] = "changed meanwhile"
    answer = person.get(person.log_in(person.ask()))
    assert (answer.status_code, "credentials" in answer.text) == (400, False)
    assert "invalid_client" in caplog.text
    assert SECRET not in caplog.text + answer.text


def test_an_outage_of_the_issuer_is_said_to_be_one(person: Person, provider: OidcProvider) -> None:
    back = person.log_in(person.ask())
    provider.outage = "unavailable"
    answer = person.get(back)
    assert (answer.status_code, "try again" in answer.text) == (503, True)
    provider.outage = None
    assert person.get(person.log_in(person.ask())).status_code == 200


def test_no_token_code_or_secret_is_in_the_log(served: ServedGateway, person: Person) -> None:
    back = person.log_in(person.ask())
    code = dict(parse_qsl(urlsplit(back).query))["code"]
    page = person.get(back)
    log = served.access_log.read_text()
    for secret in (code, person.secret, SECRET, str(person.session.cookies.get("mphpc-sign-in")), "eyJ"):
        assert secret not in log
        assert secret not in page.text


def test_the_marketplace_signs_people_in_too(provider: OidcProvider, tmp_path: Path) -> None:
    settings = settings_for(provider, auth="marketplace", audience=(), page_client_secret=SECRET)
    with ServedGateway(tmp_path, FakeBackend(), **settings) as served:
        person = Person(served)
        assert person.get(person.log_in(person.ask())).status_code == 200
        assert "alice@example.org" in person.get("/").text


def test_an_issuer_that_cannot_be_reached_is_said_to_be_so(provider: OidcProvider, tmp_path: Path) -> None:
    settings = {**settings_for(provider), "issuer": "http://127.0.0.1:9/realms/x"}
    with ServedGateway(tmp_path, FakeBackend(), **settings) as served:
        answer = requests.get(f"{served.url}/sign-in", allow_redirects=False, timeout=20)
    assert (answer.status_code, answer.headers["Content-Type"]) == (503, "text/html; charset=utf-8")


def test_without_a_client_there_is_no_page(provider: OidcProvider, tmp_path: Path) -> None:
    with ServedGateway(tmp_path, FakeBackend(), **settings_for(provider, page_client="", page_url="")) as served:
        assert requests.get(f"{served.url}/sign-in", timeout=20).status_code == 404
        assert "This is an HPC gateway" in requests.get(f"{served.url}/", timeout=20).text


@pytest.mark.parametrize(("mode", "reason"), [(0o644, "chmod 600"), (None, "cannot be read")])
def test_a_secret_that_everybody_reads_or_nobody_is_refused(
    provider: OidcProvider, tmp_path: Path, mode: int | None, reason: str
) -> None:
    path = tmp_path / "client"
    if mode is not None:
        path.touch()
        path.chmod(mode)
    with pytest.raises(ConfigurationError, match=reason):
        ServedGateway(tmp_path, FakeBackend(), **settings_for(provider, page_client_secret_file=path))
