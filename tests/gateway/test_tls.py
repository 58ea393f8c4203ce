"""TLS of the gateway's own, and what is believed of a reverse proxy that has it."""

from __future__ import annotations

import socket
import subprocess
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from aiida_marketplace_hpc import HpcGateway
from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.transfer import get, put_file
from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.gateway.server import _welcome, check_tls
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.machine import NotPossibleHere, free_ports, wait_until
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from benchmarks.servers import program

HSTS = "Strict-Transport-Security"


def test_a_client_works_over_tls(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 20_000)
    with ServedGateway(tmp_path, FakeBackend(), certfile=certificate) as served:
        assert served.url.startswith("https://")
        with (
            closing(HpcGateway(served.url, token_source=StaticToken(TOKENS[ALICE]))) as distrustful,
            pytest.raises(ConfigurationError, match="REQUESTS_CA_BUNDLE"),
        ):
            distrustful.heartbeat()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        with closing(HpcGateway(served.url, token_source=StaticToken(TOKENS[ALICE]))) as gateway:
            there = f"{gateway.info()['home']}/there"
            put_file(gateway, source, there)
            assert Path(there).read_bytes() == source.read_bytes()
        answer = requests.get(f"{served.url}/nowhere", timeout=20)
        assert answer.status_code == 404
        assert answer.headers[HSTS].startswith("max-age=")
        with pytest.raises(requests.ConnectionError):
            requests.get(served.url.replace("https://", "http://") + "/heartbeat", timeout=20)
        assert {line["client"] for line in served.requests()} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("trusted", "forwarded", "client", "is_tls"),
    [
        (("127.0.0.1",), {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}, "203.0.113.7", True),
        (("127.0.0.0/8",), {"X-Forwarded-For": "203.0.113.7"}, "203.0.113.7", False),
        # What the client itself had put there comes first, and is not believed.
        (("127.0.0.1",), {"X-Forwarded-For": "10.1.1.1, 203.0.113.7"}, "203.0.113.7", False),
        (("127.0.0.1", "10.0.0.0/8"), {"X-Forwarded-For": "6.6.6.6, 203.0.113.7, 10.1.1.1"}, "203.0.113.7", False),
        (("127.0.0.1",), {}, "127.0.0.1", False),
        (("10.0.0.1",), {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}, "127.0.0.1", False),
        ((), {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}, "127.0.0.1", False),
    ],
)
def test_forwarded_headers_are_believed_of_trusted_proxies_only(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trusted: tuple[str, ...],
    forwarded: dict[str, str],
    client: str,
    is_tls: bool,
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # uvicorn's own; it changes nothing here.
    with ServedGateway(tmp_path, FakeBackend(), trusted_proxy=trusted, allow_dev_tokens=True) as served:
        answer = requests.get(f"{served.url}/heartbeat", headers=forwarded, timeout=20)
        assert (HSTS in answer.headers) is is_tls
        assert served.requests()[0]["client"] == client


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"trusted_proxy": ("proxy.example.org",)}, "address or network"),
        ({"trusted_proxy": ("10.0.0.1/8",)}, "address or network"),
        ({"keyfile": "key.pem"}, "--certfile"),
    ],
)
def test_what_makes_no_sense_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        load({"dev_token": TOKENS, **settings})


def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path, certificate: Path) -> None:
    def refused(certfile: Path, keyfile: Path | None = None) -> str:
        with pytest.raises(ConfigurationError) as raised:
            check_tls(load({"dev_token": TOKENS, "certfile": certfile, "keyfile": keyfile}))
        return raised.value.message

    certificate.chmod(0o644)
    assert refused(certificate).endswith(f"chmod 600 {certificate}")
    certificate.chmod(0o640)  # A group that may read keys is the operator's choice.
    check_tls(load({"dev_token": TOKENS, "certfile": certificate}))
    assert "/no/such.pem cannot be used: No such file" in refused(Path("/no/such.pem"))
    key = tmp_path / "key.pem"
    key.touch(0o600)
    key.write_text("no key")
    assert "cannot be used" in refused(certificate, key)
    key.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    assert "needs a password" in refused(certificate, key)


def test_a_warning_is_given_where_tokens_would_travel_in_the_clear(certificate: Path) -> None:
    def warns(**settings: Any) -> bool:
        return any("without TLS" in line for line in _welcome(load({"dev_token": TOKENS, **settings}), "dev"))

    assert not warns()
    assert warns(host="0.0.0.0")  # noqa: S104
    assert not warns(host="0.0.0.0", certfile=certificate)  # noqa: S104
    assert not warns(host="0.0.0.0", trusted_proxy=("10.0.0.1",))  # noqa: S104


@pytest.mark.services
def test_a_client_works_through_nginx_as_the_pages_set_it_up(
    tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        nginx = program("nginx", "nginx-light")
    except NotPossibleHere as exc:
        pytest.skip(str(exc))
    page = Path(__file__).parents[2] / "docs" / "howto" / "run-a-gateway.md"
    locations = page.read_text().partition("```nginx\n")[2].partition("```")[0]
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 80_000)
    port = free_ports(1)[0]
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with ServedGateway(
        tmp_path, FakeBackend(), trusted_proxy=("127.0.0.1",), allow_dev_tokens=True, metrics=True
    ) as served:
        folders = "".join(
            f"{name}_temp_path {tmp_path}/{name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        configuration = tmp_path / "nginx.conf"
        configuration.write_text(
            f"daemon off; master_process off; pid {tmp_path}/pid; events {{}} http {{ access_log off; {folders} server {{ "
            f"listen 127.0.0.1:{port} ssl; ssl_certificate {certificate}; ssl_certificate_key {certificate}; "
            f"{locations.replace('http://127.0.0.1:5005', served.url)} }} }}"
        )
        log = tmp_path / "error.log"
        with subprocess.Popen([nginx, "-e", str(log), "-c", str(configuration)]) as process:
            try:
                url = f"https://127.0.0.1:{port}"
                wait_until(lambda: answers(port), within=20, failure=lambda: log.read_text())
                with closing(HpcGateway(url, token_source=StaticToken(TOKENS[ALICE]))) as gateway:
                    home = gateway.info()["home"]
                    put_file(gateway, source, f"{home}/there")
                    get(gateway, f"{home}/there", tmp_path / "back")
                assert (tmp_path / "back").read_bytes() == source.read_bytes()
                assert requests.get(f"{url}/metrics", timeout=20).status_code == 403
                # From another address than the proxy's; what somebody says of themselves is not believed.
                with requests.Session() as elsewhere:
                    elsewhere.mount("https://", _FromElsewhere())
                    answer = elsewhere.get(f"{url}/heartbeat", headers={"X-Forwarded-For": "203.0.113.7"}, timeout=20)
                assert HSTS in answer.headers
                assert served.requests()[-1]["client"] == "127.0.0.2"
            finally:
                process.terminate()


class _FromElsewhere(requests.adapters.HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, source_address=("127.0.0.2", 0), **kwargs)


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
