"""The gateway as a process of its own: what it served, and that it comes back as the same one."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import requests

from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import RigError
from aiida_marketplace_hpc.testing.oidc import OidcProvider

pytestmark = pytest.mark.services


def _info(gateway: GatewayProcess, token: str) -> requests.Response:
    return requests.get(f"{gateway.url}/api/v1/info", headers={"Authorization": f"Bearer {token}"}, timeout=10)


def test_it_says_what_it_served(gateway_factory: Callable[..., GatewayProcess]) -> None:
    gateway = gateway_factory(users=("carol",))
    assert _info(gateway, gateway.tokens["carol"]).status_code == 200
    assert _info(gateway, "wrong").status_code == 401

    first, second = gateway.requests()
    assert (first.capability, first.method, first.status, first.user) == ("getInfo", "GET", 200, "carol")
    assert (second.path, second.status, second.user) == ("/api/v1/info", 401, None)
    assert first.duration > 0


@pytest.mark.parametrize("auth", ["oidc", "marketplace"])
def test_it_accepts_the_tokens_of_a_provider(gateway_factory: Callable[..., GatewayProcess], auth: str) -> None:
    with OidcProvider() as provider:
        gateway = gateway_factory(provider=provider, auth=auth)
        token = provider.issue("d", email=f"dora.{auth}@example.org")
        answer = _info(gateway, token).json()
        assert answer["username"] == f"dora_{auth}"
        assert answer["auth"]["issuer"] == provider.issuer
        assert _info(gateway, provider.issue("d", email=f"dora.{auth}@example.org", lifetime=-60)).status_code == 401
        assert token not in gateway.log
        assert gateway.tokens == {}


def test_it_runs_as_the_clusters_user(local_gateway: GatewayProcess) -> None:
    owner = local_gateway.machine.run(["stat", "--format=%U", f"/proc/{local_gateway.pid}"]).stdout.strip()
    assert owner == local_gateway.machine.user


def test_it_comes_back_on_the_same_port_with_the_same_state(gateway_factory: Callable[..., GatewayProcess]) -> None:
    gateway = gateway_factory()
    url = gateway.url
    assert _info(gateway, gateway.token).ok
    gateway.kill()
    assert not gateway.running
    with pytest.raises(requests.ConnectionError):
        _info(gateway, gateway.token)
    gateway.restart()
    assert gateway.url == url
    assert _info(gateway, gateway.token).ok
    assert len(gateway.requests()) == 2
    gateway.stop()
    assert not gateway.running


def test_it_hangs_when_told_to(gateway_factory: Callable[..., GatewayProcess]) -> None:
    gateway = gateway_factory()
    gateway.pause()
    with pytest.raises(requests.Timeout):
        requests.get(f"{gateway.url}/heartbeat", timeout=0.2)
    gateway.resume()
    assert _info(gateway, gateway.token).ok


def test_a_failed_start_says_why(gateway_factory: Callable[..., GatewayProcess]) -> None:
    with pytest.raises(RigError, match=r"ended while it started(.|\n)*--nonsense"):
        gateway_factory(options=["--nonsense"])


def test_stop_is_a_request_to_end(gateway_factory: Callable[..., GatewayProcess]) -> None:
    gateway = gateway_factory()
    process = gateway._process
    assert process is not None
    gateway.stop()
    assert process.returncode != -signal.SIGKILL


def test_it_publishes_slurm(slurm_gateway: GatewayProcess) -> None:
    info = _info(slurm_gateway, slurm_gateway.token)
    assert info.ok
    assert "slurm" in info.text
