"""Signed tokens: every way to make a wrong one is refused, and the keys come from the issuer, whatever tokens say."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from aiida_marketplace_hpc.errors import ConfigurationError, Unauthorized, Unavailable
from aiida_marketplace_hpc.gateway.auth import keys as keys_module
from aiida_marketplace_hpc.gateway.auth.keys import FRESH, KEPT, PAUSE, Keys
from aiida_marketplace_hpc.gateway.auth.oidc import LEEWAY, OidcTokens
from aiida_marketplace_hpc.testing.clock import VirtualClock
from aiida_marketplace_hpc.testing.oidc import OidcProvider

EMAIL = "a.b@example.org"
GARBAGE = [
    "x",
    "a.b.c",
    "..",
    "e30.e30.",
    "A" * 16_000,
    "A" * 100_000,
    ".".join(["A" * 40_000] * 3),
    "\udcff.\udcff.\udcff",
    "ü.ü.ü",
    base64.urlsafe_b64encode(b"[" * 9000).decode() + ".e30.AAAA",
    base64.urlsafe_b64encode(b'{"alg":"RS256"}').decode().rstrip("=") + "." + "[" * 10,
    base64.urlsafe_b64encode(b'{"alg":"RS256"}').decode()
    + "."
    + base64.urlsafe_b64encode(b"[" * 9000).decode()
    + ".AAAA",
]


@pytest.fixture
def tokens(provider: OidcProvider, clock: VirtualClock) -> OidcTokens:
    return OidcTokens(provider.issuer, ["hpc-gateway"], clock=clock.monotonic)


@pytest.fixture(scope="module")
def steady() -> Iterator[OidcProvider]:
    """One for tests that change nothing of it."""
    with OidcProvider() as provider:
        yield provider


@pytest.fixture(scope="module")
def known(steady: OidcProvider) -> OidcTokens:
    """Tokens of it."""
    return OidcTokens(steady.issuer, ["hpc-gateway"], clock=VirtualClock().monotonic)


def encoded(part: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")


def claims_of(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


def test_a_good_token_is_somebody(provider: OidcProvider, tokens: OidcTokens) -> None:
    token = provider.issue("s-1", email=EMAIL, name="A B", groups=["hpc"], lifetime=100)
    identity = tokens.identify(token)
    assert (identity.issuer, identity.subject, identity.email, identity.name) == (provider.issuer, "s-1", EMAIL, "A B")
    assert identity.email_verified
    assert identity.claims["groups"] == ["hpc"]
    assert identity.expires_at is not None
    assert identity.expires_at == pytest.approx(time.time() + 100 + LEEWAY, abs=30)
    for _ in range(20):
        tokens.identify(token)
    assert (provider.requests["discovery"], provider.requests["jwks"]) == (1, 1)


def test_several_audiences(provider: OidcProvider) -> None:
    tokens = OidcTokens(provider.issuer, ["one", "two"])
    assert tokens.identify(provider.issue("s", email=EMAIL, audience=["two", "account"])).subject == "s"


def test_the_address_may_stand_in_another_claim(provider: OidcProvider) -> None:
    tokens = OidcTokens(provider.issuer, ["hpc-gateway"], email_claim="user.mail")
    assert tokens.identify(provider.issue("s", user={"mail": "x@y.org"})).email == "x@y.org"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"audience": "another-service"}, "for another service"),
        ({"aud": None}, "for another service|says nothing about aud"),
        ({"iss": "https://elsewhere.example.org"}, "not one of"),
        ({"iss": None}, "says nothing about iss"),
        ({"exp": None}, "says nothing about exp"),
        ({"exp": "soon"}, "not signed by|expired"),
        ({"lifetime": -LEEWAY - 20}, "expired"),
        ({"nbf": int(time.time() + LEEWAY + 3600)}, "not valid yet"),
        ({"iat": int(time.time() + LEEWAY + 3600)}, "not valid yet"),
        ({"sub": None}, "says nothing about sub"),
        ({"sub": ""}, "about sub"),
        ({"sub": 7}, "not signed by|about sub"),
        ({"sub": "x" * 256}, "about sub"),
        ({"email": None}, "about email"),
        ({"email": ["a@b"], "name": "x"}, "about email"),
        ({"email": "a\0b"}, "about email"),
    ],
)
def test_what_a_token_must_say(steady: OidcProvider, known: OidcTokens, change: dict[str, Any], said: str) -> None:
    token = steady.issue("s", **{"email": EMAIL, **change})
    with pytest.raises(Unauthorized, match=said) as refusal:
        known.identify(token)
    assert token not in refusal.value.message


def test_clocks_may_differ_a_little(provider: OidcProvider, tokens: OidcTokens) -> None:
    tokens.identify(provider.issue("s", email=EMAIL, lifetime=-LEEWAY + 15))
    tokens.identify(provider.issue("s", email=EMAIL, nbf=int(time.time() + LEEWAY - 5)))


def test_algorithm_none(provider: OidcProvider, tokens: OidcTokens) -> None:
    claims = claims_of(provider.issue("s", email=EMAIL))
    for name in ("none", "None", "NONE"):
        token = f"{encoded({'alg': name, 'typ': 'JWT', 'kid': provider.key_id})}.{encoded(claims)}."
        with pytest.raises(Unauthorized):
            tokens.identify(token)


@pytest.mark.parametrize("form", ["pem", "der", "jwk"])
def test_the_public_key_as_a_shared_secret(steady: OidcProvider, known: OidcTokens, form: str) -> None:
    public = steady.private_key.public_key()
    secret = {
        "pem": public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        "der": public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        "jwk": json.dumps(steady._jwks()["keys"][0]).encode(),
    }[form]
    claims = claims_of(steady.issue("s", email=EMAIL))
    signed = f"{encoded({'alg': 'HS256', 'typ': 'JWT', 'kid': steady.key_id})}.{encoded(claims)}"
    signature = (
        base64.urlsafe_b64encode(hmac.new(secret, signed.encode(), hashlib.sha256).digest()).decode().rstrip("=")
    )
    with pytest.raises(Unauthorized):
        known.identify(f"{signed}.{signature}")


def test_a_wrong_key_of_the_right_name(provider: OidcProvider, tokens: OidcTokens) -> None:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    claims = claims_of(provider.issue("s", email=EMAIL))
    token = jwt.encode(claims, other, algorithm="RS256", headers={"kid": provider.key_id})
    with pytest.raises(Unauthorized, match="not signed by"):
        tokens.identify(token)
    # A key that comes with the token is nothing but the token's word.
    carried = jwt.encode(
        claims,
        other,
        algorithm="RS256",
        headers={"kid": provider.key_id, "jwk": {"kty": "RSA"}, "jku": f"{provider.url}/mine", "x5u": "https://x"},
    )
    with pytest.raises(Unauthorized):
        tokens.identify(carried)
    assert provider.requests["unknown"] == 0


def test_a_changed_token(provider: OidcProvider, tokens: OidcTokens) -> None:
    header, _, signature = provider.issue("s", email=EMAIL).split(".")
    claims = claims_of(provider.issue("somebody-else", email=EMAIL))
    with pytest.raises(Unauthorized, match="not signed by"):
        tokens.identify(f"{header}.{encoded(claims)}.{signature}")


@pytest.mark.parametrize("token", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage(steady: OidcProvider, known: OidcTokens, token: str) -> None:
    with pytest.raises(Unauthorized):
        known.identify(token)
    assert steady.requests["jwks"] <= 1


@pytest.mark.parametrize("iat", [10**400, float("inf"), float("nan"), "x", [1], None, True])
def test_a_time_of_issue_that_makes_no_sense(steady: OidcProvider, known: OidcTokens, iat: Any) -> None:
    claims = {**claims_of(steady.issue("s", email=EMAIL)), "iat": iat}
    token = f"{encoded({'alg': 'RS256', 'kid': 'unknown'})}.{encoded(claims)}.AAAA"
    for _ in range(2):
        with pytest.raises((Unauthorized, Unavailable)):
            known.identify(token)


def test_a_token_that_says_something_wrong_is_not_worth_a_question(provider: OidcProvider, tokens: OidcTokens) -> None:
    with OidcProvider() as another:
        wrong = [
            another.issue("s", email=EMAIL),
            provider.issue("s", email=EMAIL, audience="elsewhere"),
            provider.issue("s", email=EMAIL, lifetime=-3600),
        ]
    for token in wrong:
        with pytest.raises(Unauthorized):
            tokens.identify(token)
    assert provider.requests["discovery"] == 0


def test_a_new_key_is_found_and_an_old_one_is_forgotten(
    provider: OidcProvider, tokens: OidcTokens, clock: VirtualClock
) -> None:
    old = provider.issue("s", email=EMAIL)
    tokens.identify(old)
    clock.sleep(PAUSE)
    provider.rotate_keys(keep=True)
    tokens.identify(provider.issue("s", email=EMAIL))
    tokens.identify(old)
    assert provider.requests["jwks"] == 2
    provider.rotate_keys(keep=False)
    clock.sleep(FRESH)
    tokens.identify(provider.issue("s", email=EMAIL))
    clock.sleep(PAUSE)
    with pytest.raises(Unauthorized, match="not signed by"):
        tokens.identify(old)


def test_a_withdrawn_key_is_forgotten_without_a_new_one(
    provider: OidcProvider, tokens: OidcTokens, clock: VirtualClock
) -> None:
    old = provider.issue("s", email=EMAIL)
    tokens.identify(old)
    provider.rotate_keys(keep=False)
    clock.sleep(FRESH - 1)
    tokens.identify(old)
    clock.sleep(1)
    with pytest.raises(Unauthorized, match="not signed by"):
        tokens.identify(old)


def test_unknown_keys_do_not_hammer_the_provider(
    provider: OidcProvider, tokens: OidcTokens, clock: VirtualClock
) -> None:
    claims = claims_of(provider.issue("s", email=EMAIL, iat=1))
    for number in range(50):
        with pytest.raises(Unauthorized):
            tokens.identify(f"{encoded({'alg': 'RS256', 'kid': f'k{number}'})}.{encoded(claims)}.AAAA")
    assert provider.requests["jwks"] == 1
    # A key that is really new is one that may not be out yet: not now, which is no refusal, and later it works.
    provider.rotate_keys()
    token = provider.issue("s", email=EMAIL)
    with pytest.raises(Unavailable, match="try again"):
        tokens.identify(token)
    clock.sleep(PAUSE)
    tokens.identify(token)


@pytest.mark.parametrize("kind", ["unavailable", "drop"])
def test_an_outage_hurts_nobody_whose_key_is_known(
    provider: OidcProvider, tokens: OidcTokens, clock: VirtualClock, kind: Any
) -> None:
    known = provider.issue("s", email=EMAIL, lifetime=30 * 86400)
    tokens.identify(known)
    provider.rotate_keys()
    new = provider.issue("s", email=EMAIL)
    provider.outage = kind
    for passed in (PAUSE, FRESH, KEPT - FRESH - 3 * PAUSE):
        clock.sleep(passed)
        assert tokens.identify(known).subject == "s"
        for _ in range(2):
            with pytest.raises(Unavailable):
                tokens.identify(new)
    clock.sleep(3 * PAUSE)
    with pytest.raises(Unavailable):
        tokens.identify(known)
    provider.outage = None
    clock.sleep(PAUSE)
    tokens.identify(new)
    tokens.identify(known)


def test_an_outage_from_the_beginning_is_no_refusal(provider: OidcProvider, tokens: OidcTokens) -> None:
    provider.outage = "unavailable"
    with pytest.raises(Unavailable):
        tokens.identify(provider.issue("s", email=EMAIL))


Published = Callable[[list[dict[str, Any]]], Keys]


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Published:
    """Keys that an issuer publishes, as documents."""

    def make(entries: list[dict[str, Any]]) -> Keys:
        url = "https://issuer.example.org"
        documents = {
            f"{url}/.well-known/openid-configuration": {"issuer": url, "jwks_uri": f"{url}/keys"},
            f"{url}/keys": {"keys": entries},
        }
        monkeypatch.setattr(keys_module, "ask", lambda address: (200, documents[address]))
        return Keys(url, url)

    return make


def test_only_public_keys_for_signatures_count(published: Published) -> None:
    good = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()))
    edwards = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(ed25519.Ed25519PrivateKey.generate().public_key()))
    keys = published(
        [
            {"kty": "oct", "k": "c2VjcmV0", "kid": "shared", "alg": "HS256"},
            {**good, "kid": "for-encryption", "use": "enc"},
            {**good, "kid": "odd", "alg": "HS256"},
            {"kty": "RSA", "n": "!", "e": "AQAB", "kid": "broken"},
            {"kty": "none", "kid": "none"},
            {**good, "kid": "good"},
            {**edwards, "kid": "edwards", "use": "sig", "alg": "EdDSA"},
        ]
    )
    found = {
        kid: keys.find(kid, 0.0) for kid in ("shared", "for-encryption", "odd", "broken", "none", "good", "edwards")
    }
    assert {kid for kid, key in found.items() if key is not None} == {"good", "edwards"}
    assert found["edwards"] is not None
    assert found["edwards"].algorithms == ("EdDSA",)
    assert found["good"] is not None
    assert found["good"].algorithms == ("ES256",)
    assert keys.find("", 0.0) is None


def test_only_the_algorithm_of_the_key_counts(published: Published) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    published([{**json.loads(jwt.algorithms.ECAlgorithm.to_jwk(private.public_key())), "kid": "k"}])
    tokens = OidcTokens("https://issuer.example.org", ["hpc"])
    claims = {"iss": tokens.issuer, "aud": "hpc", "sub": "s", "email": EMAIL, "exp": int(time.time()) + 60}
    good = jwt.encode(claims, private, algorithm="ES256", headers={"kid": "k"})
    assert tokens.identify(good).subject == "s"
    _, payload, signature = good.split(".")
    for name in ("ES384", "ES512", "ES256K", "EdDSA", "RS256", "PS256", "HS256", "none", "", None, 7, ["ES256"]):
        with pytest.raises(Unauthorized):
            tokens.identify(f"{encoded({'alg': name, 'kid': 'k'})}.{payload}.{signature}")
    for header in ({"kid": "k"}, {"alg": "ES256", "kid": 7}, {"alg": "ES256", "kid": "k", "crit": ["x"], "x": 1}):
        with pytest.raises(Unauthorized):
            tokens.identify(f"{encoded(header)}.{payload}.{signature}")


def test_a_token_need_not_name_the_only_key(published: Published) -> None:
    only = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()))
    assert published([only]).find("", 0.0) is not None


def test_whose_key_is_known_does_not_wait_for_a_provider_that_hangs(
    published: Published, monkeypatch: pytest.MonkeyPatch, clock: VirtualClock
) -> None:
    entry = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()))
    keys = published([{**entry, "kid": "known"}])
    monkeypatch.setattr(keys, "_clock", clock.monotonic)
    assert keys.find("known", 0.0) is not None
    clock.sleep(FRESH)
    asked, answer = threading.Event(), threading.Event()

    def hang(address: str) -> tuple[int, dict[str, Any]]:
        asked.set()
        answer.wait(timeout=30)
        raise Unavailable("it hangs")

    monkeypatch.setattr(keys_module, "ask", hang)
    monkeypatch.setattr(keys_module, "_PATIENCE", 0.1)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(keys.find, "known", 0.0)
        assert asked.wait(timeout=30)
        assert keys.find("known", 0.0) is not None
        with pytest.raises(Unavailable):
            keys.find("unknown", 0.0)
        answer.set()
        assert first.result(timeout=30) is not None


@pytest.mark.parametrize(
    "said",
    [{}, {"issuer": "https://elsewhere"}, {"jwks_uri": "http://example.org/keys"}, {"jwks_uri": None}, {"keys": 7}],
)
def test_a_provider_that_makes_no_sense_is_an_outage(said: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://issuer.example.org"
    document = {"issuer": url, "jwks_uri": f"{url}/keys", "keys": [], **said} if said else {}
    monkeypatch.setattr(keys_module, "ask", lambda address: (200, document))
    with pytest.raises(Unavailable):
        Keys(url, url).find("k", 0.0)


@pytest.mark.parametrize(
    ("issuer", "audience", "said"),
    [
        ("http://login.example.org", ["a"], "not encrypted"),
        ("login.example.org", ["a"], "is a URL"),
        ("https://user:password@login.example.org", ["a"], "is a URL"),
        ("https://login.example.org", [], "--audience"),
        ("https://login.example.org", [""], "--audience"),
    ],
)
def test_settings_that_would_be_dangerous(issuer: str, audience: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        OidcTokens(issuer, audience)
