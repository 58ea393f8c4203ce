"""The tokens for FirecREST: never one that it would refuse, and no secret in what is said."""

from __future__ import annotations

import time

import pytest

from aiida_marketplace_hpc.gateway.firecrest.client import Cluster, TokenRefused
from aiida_marketplace_hpc.gateway.firecrest.tokens import NoToken, PassedOn, ServiceTokens
from aiida_marketplace_hpc.testing.firecrest_v2 import FirecrestDouble
from aiida_marketplace_hpc.testing.oidc import SERVICE, SERVICE_SECRET, OidcProvider


def url_of(provider: OidcProvider) -> str:
    return f"{provider.issuer}/protocol/openid-connect/token"


def test_a_token_is_used_again_while_it_lives_long_enough(provider: OidcProvider, cluster: Cluster) -> None:
    before = provider.grants["client_credentials"]
    for _ in range(3):
        cluster.jobs()
    assert provider.grants["client_credentials"] == before + 1


def test_a_token_that_firecrest_would_refuse_is_given_up_before(
    provider: OidcProvider, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider, "lifetime", 40.0)  # Ten seconds more than FirecREST asks for.
    before = provider.grants["client_credentials"]
    for _ in range(3):
        cluster.jobs()
    assert provider.grants["client_credentials"] == before + 3


def test_a_token_that_is_refused_is_renewed_once(
    provider: OidcProvider, cluster: Cluster, double: FirecrestDouble
) -> None:
    cluster.jobs()
    before = provider.grants["client_credentials"]
    double.fail("jobs", status=401, message="Token's public key not found.")
    assert cluster.jobs() is not None
    assert provider.grants["client_credentials"] == before + 1
    double.fail("jobs", status=401, times=2)
    with pytest.raises(TokenRefused):
        cluster.jobs()


def test_no_token_is_no_call_and_no_secret_is_said(provider: OidcProvider, double: FirecrestDouble) -> None:
    tokens = ServiceTokens(SERVICE, f"wrong-{SERVICE_SECRET}", url_of(provider))
    cluster = Cluster(double.url, double.system, tokens)
    with pytest.raises(TokenRefused) as raised:
        cluster.jobs()
    cluster.close()
    assert SERVICE_SECRET not in str(raised.value)
    assert double.calls.total() == 0


def test_the_newest_token_that_a_user_has_sent_counts() -> None:
    passed = PassedOn()
    with pytest.raises(NoToken):
        passed.get_access_token()
    passed.offer("old", time.time() + 100)
    passed.offer("new", time.time() + 300)
    passed.offer("older", time.time() + 60)
    assert passed.get_access_token() == "new"
    passed.refused()
    assert not passed.alive
    passed.offer("short", time.time() + 40)
    assert not passed.alive
