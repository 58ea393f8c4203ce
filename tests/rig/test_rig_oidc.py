"""The OpenID Connect provider of the tests: what it grants, what it refuses, and the faults it is told to have."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jwt
import pytest
import requests

from aiida_marketplace_hpc.testing.clock import VirtualClock
from aiida_marketplace_hpc.testing.oidc import (
    DEVICE_GRANT,
    PUBLIC_CLIENT,
    SERVICE,
    SERVICE_SECRET,
    OidcProvider,
)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def provider(clock: VirtualClock) -> Iterator[OidcProvider]:
    with OidcProvider(lifetime=60, clock=lambda: clock.now().timestamp()) as provider:
        yield provider


def post(provider: OidcProvider, endpoint: str, **form: str) -> tuple[int, dict[str, Any]]:
    url = requests.get(provider.discovery_url, timeout=10).json()[endpoint]
    answer = requests.post(url, data={"client_id": PUBLIC_CLIENT, **form}, timeout=10)
    return answer.status_code, answer.json() if answer.content else {}


def log_in(provider: OidcProvider, scope: str = "openid") -> dict[str, Any]:
    _, device = post(provider, "device_authorization_endpoint", scope=scope)
    provider.approve(device["user_code"], "alice", email="alice@example.org")
    status, tokens = post(provider, "token_endpoint", grant_type=DEVICE_GRANT, device_code=device["device_code"])
    assert status == 200
    return tokens


def refresh(provider: OidcProvider, token: str) -> tuple[int, dict[str, Any]]:
    return post(provider, "token_endpoint", grant_type="refresh_token", refresh_token=token)


def userinfo(provider: OidcProvider, token: str) -> requests.Response:
    return requests.get(provider.userinfo_endpoint, headers={"Authorization": f"Bearer {token}"}, timeout=10)


def verified(provider: OidcProvider, token: str) -> dict[str, Any]:
    """The claims, as a gateway reads them; expiry is the clock's business."""
    key = jwt.PyJWKClient(provider.jwks_uri).get_signing_key_from_jwt(token)
    options: Any = {"verify_exp": False, "verify_iat": False}
    claims: dict[str, Any] = jwt.decode(
        token, key, algorithms=["RS256"], audience="hpc-gateway", issuer=provider.issuer, options=options
    )
    return claims


def test_discovery_lies_below_the_issuer(provider: OidcProvider) -> None:
    document = requests.get(f"{provider.issuer}/.well-known/openid-configuration", timeout=10).json()
    assert document["issuer"] == provider.issuer
    assert provider.issuer.endswith("/realms/marketplace")
    assert {document["jwks_uri"], document["userinfo_endpoint"]} == {provider.jwks_uri, provider.userinfo_endpoint}
    assert requests.get(f"{provider.issuer}/elsewhere", timeout=10).status_code == 404


def test_a_token_is_a_signed_jwt_and_userinfo_knows_it(provider: OidcProvider, clock: VirtualClock) -> None:
    token = provider.issue("alice", email="a.b@example.org", name="Alice", groups=["hpc"], email_verified=None)
    claims = verified(provider, token)
    assert (claims["sub"], claims["email"], claims["groups"]) == ("alice", "a.b@example.org", ["hpc"])
    assert claims["exp"] - claims["iat"] == 60
    assert "email_verified" not in claims
    assert userinfo(provider, token).json() == {
        "sub": "alice",
        "email": "a.b@example.org",
        "name": "Alice",
        "preferred_username": "alice",
        "roles": [],
    }
    clock.sleep(61)
    assert userinfo(provider, token).status_code == 401


def test_userinfo_refuses_what_it_has_not_signed_and_what_was_revoked(provider: OidcProvider) -> None:
    token = provider.issue("alice")
    unsigned = jwt.encode({"sub": "alice", "exp": 2**33}, "", algorithm="none", headers={"kid": provider.key_id})
    for bad in ("nonsense", unsigned, token[:-4] + "AAAA", provider.issue("alice", lifetime=-1)):
        assert userinfo(provider, bad).status_code == 401
    provider.revoke(token)
    assert userinfo(provider, token).status_code == 401


def test_keys_rotate(provider: OidcProvider) -> None:
    old = provider.issue("alice")
    first = provider.key_id
    assert provider.rotate_keys() != first
    assert verified(provider, old)["sub"] == verified(provider, provider.issue("alice"))["sub"]
    provider.rotate_keys(keep=False)
    with pytest.raises(jwt.PyJWKClientError):
        verified(provider, old)


def test_device_flow(provider: OidcProvider, clock: VirtualClock) -> None:
    provider.interval = 5
    _, device = post(provider, "device_authorization_endpoint", scope="openid")
    assert device["interval"] == 5
    assert device["user_code"] in device["verification_uri_complete"]
    ask = {"grant_type": DEVICE_GRANT, "device_code": device["device_code"]}
    assert post(provider, "token_endpoint", **ask)[1]["error"] == "authorization_pending"
    assert post(provider, "token_endpoint", **ask)[1]["error"] == "slow_down"
    assert provider.user_codes() == [device["user_code"]]
    provider.approve(device["user_code"], "alice")
    clock.sleep(5)
    status, tokens = post(provider, "token_endpoint", **ask)
    assert status == 200
    assert userinfo(provider, tokens["access_token"]).json()["email"] == "alice@example.org"
    assert tokens["expires_in"] == 60
    assert post(provider, "token_endpoint", **ask)[1]["error"] == "invalid_grant"


def test_device_flow_that_is_denied_or_late(provider: OidcProvider, clock: VirtualClock) -> None:
    _, denied = post(provider, "device_authorization_endpoint")
    _, late = post(provider, "device_authorization_endpoint")
    provider.deny(denied["user_code"])
    ask = {"grant_type": DEVICE_GRANT}
    assert post(provider, "token_endpoint", **ask, device_code=denied["device_code"])[1]["error"] == "access_denied"
    clock.sleep(601)
    assert post(provider, "token_endpoint", **ask, device_code=late["device_code"])[1]["error"] == "expired_token"


def test_refresh_tokens_are_good_once(provider: OidcProvider) -> None:
    first = log_in(provider)
    status, second = refresh(provider, first["refresh_token"])
    assert status == 200
    assert second["refresh_token"] != first["refresh_token"]
    assert verified(provider, second["access_token"])["email"] == "alice@example.org"
    assert refresh(provider, first["refresh_token"])[1]["error"] == "invalid_grant"
    assert provider.reused == 1
    # The thief and the owner look the same.
    assert refresh(provider, second["refresh_token"])[1]["error"] == "invalid_grant"
    assert provider.grants == {DEVICE_GRANT: 1, "refresh_token": 1}


def test_refresh_tokens_die_of_age_and_by_hand(provider: OidcProvider, clock: VirtualClock) -> None:
    provider.refresh_lifetime = 100
    tokens = log_in(provider)
    assert tokens["refresh_expires_in"] == 100
    clock.sleep(101)
    assert refresh(provider, tokens["refresh_token"])[0] == 400
    for end in (provider.revoke, lambda _: provider.end_logins(), lambda token: _revoked_by_client(provider, token)):
        token = log_in(provider, "openid offline_access")["refresh_token"]
        end(token)
        assert refresh(provider, token)[1]["error"] == "invalid_grant"


def _revoked_by_client(provider: OidcProvider, token: str) -> None:
    assert post(provider, "revocation_endpoint", token=token)[0] == 204


def test_client_credentials(provider: OidcProvider) -> None:
    ask = {"grant_type": "client_credentials"}
    status, tokens = post(provider, "token_endpoint", **ask, client_id=SERVICE, client_secret=SERVICE_SECRET)
    assert status == 200
    assert "refresh_token" not in tokens
    assert verified(provider, tokens["access_token"])["sub"] == "service-account-service"
    basic = requests.post(
        provider.issuer + "/protocol/openid-connect/token", data=ask, auth=(SERVICE, SERVICE_SECRET), timeout=10
    )
    assert basic.status_code == 200
    assert post(provider, "token_endpoint", **ask, client_id=SERVICE, client_secret="wrong")[0] == 401
    assert post(provider, "token_endpoint", **ask)[1]["error"] == "unauthorized_client"


def test_outages_and_counts(provider: OidcProvider) -> None:
    answered: list[str] = []
    provider.before_answer = answered.append
    token = provider.issue("alice")
    assert userinfo(provider, token).status_code == 200
    provider.outage = "unavailable"
    assert userinfo(provider, token).status_code == 503
    provider.outage = "drop"
    with pytest.raises(requests.ConnectionError):
        userinfo(provider, token)
    provider.outage = None
    assert userinfo(provider, token).status_code == 200
    assert provider.requests == {"userinfo": 4}
    assert answered == ["userinfo", "userinfo"]


def test_its_clock_may_be_ahead(provider: OidcProvider, clock: VirtualClock) -> None:
    provider.skew = 3600
    claims = verified(provider, provider.issue("alice"))
    assert claims["iat"] == int(clock.now().timestamp() + 3600)


def browse(provider: OidcProvider, verifier: str = "v" * 43, **changes: str) -> requests.Response:
    """Log in as alice with a browser, and be sent back."""
    digest = hashlib.sha256(verifier.encode()).digest()
    asked = {
        "response_type": "code",
        "client_id": PUBLIC_CLIENT,
        "redirect_uri": "https://client.example/back",
        "scope": "openid email",
        "state": "s",
        "nonce": "n",
        "code_challenge": base64.urlsafe_b64encode(digest).decode().rstrip("="),
        "code_challenge_method": "S256",
        **changes,
    }
    provider.redirect_uris[PUBLIC_CLIENT] = ["https://client.example/back"]
    return requests.post(
        provider.authorization_endpoint, params=asked, data={"subject": "alice"}, allow_redirects=False, timeout=10
    )


def redeem(provider: OidcProvider, code: str, **changes: str) -> tuple[int, dict[str, Any]]:
    form = {"code_verifier": "v" * 43, "redirect_uri": "https://client.example/back", "code": code, **changes}
    return post(provider, "token_endpoint", grant_type="authorization_code", **form)


def code_of(answer: requests.Response) -> str:
    said = dict(parse_qsl(urlsplit(answer.headers["Location"]).query))
    assert said["state"] == "s"
    return said["code"]


def test_a_code_becomes_tokens_once(provider: OidcProvider) -> None:
    code = code_of(browse(provider))
    status, tokens = redeem(provider, code)
    assert status == 200
    assert userinfo(provider, tokens["access_token"]).json()["sub"] == "alice"
    claims = jwt.decode(tokens["id_token"], options={"verify_signature": False})
    assert (claims["aud"], claims["nonce"], claims["sub"]) == (PUBLIC_CLIENT, "n", "alice")
    assert redeem(provider, code)[1]["error"] == "invalid_grant"


def test_a_code_is_for_whom_it_was_made_and_for_a_minute(provider: OidcProvider, clock: VirtualClock) -> None:
    for changes in ({"code_verifier": "w" * 43}, {"redirect_uri": "https://client.example/"}):
        assert redeem(provider, code_of(browse(provider)), **changes)[1]["error"] == "invalid_grant"
    code = code_of(browse(provider))
    clock.sleep(61)
    assert redeem(provider, code)[1]["error"] == "invalid_grant"


def test_a_browser_is_sent_to_registered_addresses_only(provider: OidcProvider) -> None:
    assert browse(provider, redirect_uri="https://evil.example/back").status_code == 400
    for changes in ({"response_type": "token"}, {"code_challenge_method": "plain"}):
        assert "error=invalid_request" in browse(provider, **changes).headers["Location"]
