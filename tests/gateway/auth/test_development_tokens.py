"""Development tokens stay on the machine, and settings that do not go together are named."""

from __future__ import annotations

from typing import Any

import pytest

from aiida_marketplace_hpc.errors import ConfigurationError, Unauthorized
from aiida_marketplace_hpc.gateway.account import check_account
from aiida_marketplace_hpc.gateway.auth.chosen import authenticator
from aiida_marketplace_hpc.gateway.auth.development import DevelopmentTokens
from aiida_marketplace_hpc.gateway.config import load

TOKENS = {"alice@example.org": "token-of-alice", "bob@example.org": "token-of-bob"}
ONE = {"alice@example.org": "token-of-alice"}
OIDC = {"auth": "oidc", "issuer": "https://login.example.org/realms/lab", "audience": ["hpc"]}


def test_a_token_is_one_users() -> None:
    tokens = DevelopmentTokens(TOKENS)
    identity = tokens.identify("token-of-alice")
    assert (identity.issuer, identity.subject, identity.email_verified) == ("dev", "alice@example.org", True)
    for wrong in ("token-of", "", "token-of-alice ", "\udcff", "ü" * 1000):
        with pytest.raises(Unauthorized):
            tokens.identify(wrong)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1", "LOCALHOST"])
def test_development_tokens_are_accepted_on_this_machine(host: str) -> None:
    assert authenticator(load({"host": host, "dev_token": TOKENS})).method == "dev"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "hpc.example.org", "localhost.example.org", ""])  # noqa: S104
def test_development_tokens_are_refused_where_others_get(host: str) -> None:
    with pytest.raises(ConfigurationError, match="--allow-dev-tokens"):
        authenticator(load({"host": host, "dev_token": TOKENS}))
    authenticator(load({"host": host, "dev_token": TOKENS, "allow_dev_tokens": True}))
    assert authenticator(load({"host": host, **OIDC})).method == "oidc"


def test_a_trusted_proxy_is_a_way_for_others_to_get_here() -> None:
    flags = {"dev_token": TOKENS, "trusted_proxy": ["127.0.0.1"]}
    with pytest.raises(ConfigurationError, match=r"127\.0\.0\.1.*--allow-dev-tokens"):
        authenticator(load(flags))
    authenticator(load({**flags, "allow_dev_tokens": True}))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "--dev-token"),
        ({"auth": "oidc"}, "--issuer"),
        ({**OIDC, "audience": []}, "--audience"),
        ({**OIDC, "issuer": "http://login.example.org"}, "not encrypted"),
        ({**OIDC, "dev_token": ONE}, "remove them"),
        ({"auth": "marketplace"}, "MP_HOST"),
        ({"auth": "marketplace", "issuer": "http://mp.example.org/x"}, "not encrypted"),
        ({**OIDC, "auth": "marketplace"}, "--audience is for"),
    ],
)
def test_authenticators_that_cannot_be_made(flags: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MP_HOST", "MP_HOST_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match=said):
        authenticator(load(flags))


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        ({"dev_token": ONE}, "own"),
        ({"dev_token": TOKENS}, "shared"),
        ({}, "shared"),
        ({"dev_token": ONE, "account": "shared"}, "shared"),
        (OIDC, "shared"),
        ({**OIDC, "account": "own", "owner": "alice@example.org"}, "own"),
    ],
)
def test_the_account_follows_from_who_is_served_unless_it_is_said(flags: dict[str, Any], mode: str) -> None:
    settings = load(flags)
    check_account(settings)
    assert settings.account_mode == mode


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"dev_token": ONE, "account": "delegated"}, "firecrest"),
        ({"dev_token": TOKENS, "account": "own"}, "tokens of 2"),
        ({**OIDC, "account": "own"}, "--owner"),
        ({**OIDC, "owner": "alice@example.org"}, "--account own"),
        ({**OIDC, "account": "own", "owner": "a@b", "allow": ["c@d"]}, "nobody but the owner"),
    ],
)
def test_accounts_that_cannot_be_had(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        check_account(load(flags))
