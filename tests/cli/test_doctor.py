"""``marketplace-hpc doctor``: each fault is named, with what to do about it, and nothing else is."""

from __future__ import annotations

import datetime
import email.utils
import ipaddress
import json
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.protocol import CAPABILITIES
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.oidc import OidcProvider
from aiida_marketplace_hpc.testing.served import ServedGateway
from tests.client.fake_gateway import APP_ID, FakeGateway

Run = Callable[..., Result]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeGateway]:
    server = FakeGateway(tmp_path / "cluster")
    yield server
    server.close()


@pytest.fixture
def run(fake: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("http_proxy", "https_proxy", "all_proxy", "requests_ca_bundle", "curl_ca_bundle"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def run(*arguments: str, **environment: str) -> Result:
        settings = {"MP_HOST": fake.url, "MP_ACCESS_TOKEN": "good", "MP_APP_ID": "", **environment}
        return CliRunner().invoke(main, ["doctor", *arguments], env=settings)

    return run


def fault(result: Result, check: str) -> str:
    """What is said about the only check that failed."""
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("✗")]
    name, _, text = line.removeprefix("✗ ").partition(": ")
    assert name == check, result.stdout
    return text


def check(result: Result, name: str) -> str:
    """What is said about a check that passed."""
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"✓ {name}: ")]
    return line.partition(": ")[2]


# ---- TLS ------------------------------------------------------------------------------------------------------------


def certificate(
    path: Path, *, days: float = 90, begun: float = 1, name: str = "127.0.0.1", authority: bool = False
) -> Path:
    """A certificate with its key, signed by itself or by an authority whose own is in ``authority.pem`` beside it."""
    now = datetime.datetime.now(datetime.timezone.utc)

    def builder(common: str, issuer: str, key: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=begun))
            .not_valid_after(now + datetime.timedelta(days=days))
        )

    key, signing = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    try:
        names: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        names = x509.DNSName(name)
    made = builder("gateway", "authority" if authority else "gateway", key).add_extension(
        x509.SubjectAlternativeName([names]), critical=False
    )
    signed = made.sign(signing if authority else key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    path.write_bytes(signed.public_bytes(pem) + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    if authority:
        own = builder("authority", "authority", signing).add_extension(x509.BasicConstraints(True, None), critical=True)
        path.with_name("authority.pem").write_bytes(own.sign(signing, hashes.SHA256()).public_bytes(pem))
    return path


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Callable[..., FakeGateway]]:
    servers: list[FakeGateway] = []

    def serve(**options: Any) -> FakeGateway:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate(tmp_path / "server.pem", **options))
        servers.append(FakeGateway(tmp_path / "tls", tls=context))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "signed by nobody but itself.*REQUESTS_CA_BUNDLE"),
        ({"authority": True}, r"not trusted \(unable to get local issuer.*private authority.*REQUESTS_CA_BUNDLE"),
    ],
)
def test_a_certificate_that_nobody_vouches_for(
    secure: Callable[..., FakeGateway], run: Run, options: dict[str, Any], says: str
) -> None:
    result = run(MP_HOST=secure(**options).url)
    assert result.exit_code == 2
    _matches(says, fault(result, "TLS"))
    assert "– connection: not checked" in result.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"days": -0.5}, "has expired: tell the operator; or is this machine's clock wrong"),
        ({"begun": -0.5}, "not valid yet: is this machine's clock right"),
        ({"name": "hpc.example.org"}, "for a name, not for this IP address: use the address that the operator"),
        ({"name": "127.0.0.9"}, "for a name, not for this IP address"),
    ],
)
def test_a_certificate_of_the_right_authority_with_a_fault(
    secure: Callable[..., FakeGateway], run: Run, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    url = secure(**options, authority=True).url
    result = run(MP_HOST=url, REQUESTS_CA_BUNDLE=str(tmp_path / "authority.pem"))
    assert result.exit_code == 2
    _matches(says, fault(result, "TLS"))


def test_a_certificate_for_another_name(secure: Callable[..., FakeGateway], run: Run, tmp_path: Path) -> None:
    url = secure(authority=True).url.replace("127.0.0.1", "localhost")
    result = run(MP_HOST=url, REQUESTS_CA_BUNDLE=str(tmp_path / "authority.pem"))
    _matches("for another name: use the address that the operator has published", fault(result, "TLS"))


@pytest.mark.parametrize(("days", "soon"), [(90, False), (5, True)])
def test_a_good_certificate(
    secure: Callable[..., FakeGateway], run: Run, tmp_path: Path, days: int, soon: bool
) -> None:
    result = run(MP_HOST=secure(authority=True, days=days).url, REQUESTS_CA_BUNDLE=str(tmp_path / "authority.pem"))
    assert result.exit_code == 0, result.output
    text = check(result, "TLS")
    assert f"good for {days - 1} days" in text
    assert ("expires soon" in text) == soon


def test_tls_faults_of_the_set_up(fake: FakeGateway, run: Run) -> None:
    url = fake.url.replace("http:", "https:")
    _matches("does not speak TLS: should the url begin with http://", fault(run(MP_HOST=url), "TLS"))
    _matches("check REQUESTS_CA_BUNDLE", fault(run(MP_HOST=url, REQUESTS_CA_BUNDLE="/nonexistent.pem"), "TLS"))
    assert run(MP_HOST="https://127.0.0.1:1").exit_code == 3


# ---- clock, token, scheduler ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ahead", "says"), [(3600, "3600 s behind"), (-300, "300 s ahead of")])
def test_clocks_that_differ(run: Run, monkeypatch: pytest.MonkeyPatch, ahead: int, says: str) -> None:
    theirs = email.utils.formatdate(time.time() + ahead, usegmt=True)
    monkeypatch.setattr(BaseHTTPRequestHandler, "date_time_string", lambda _: theirs)
    result = run()
    assert result.exit_code == 2
    text = re.sub("3599|3601", "3600", re.sub("299|301", "300", fault(result, "clock")))
    _matches(f"this machine's clock is {says} the gateway's: set the one that is wrong", text)
    assert "✓ scheduler" in result.stdout


def test_what_a_token_says_about_itself(fake: FakeGateway, run: Run) -> None:
    with OidcProvider() as provider:
        token = provider.issue("alice", email="alice@example.org", lifetime=3600)
        fake.tokens = {token}
        result = run(MP_ACCESS_TOKEN=token)
        assert result.exit_code == 0, result.output
        text = check(result, "token")
        assert text.startswith(
            f"env:MP_ACCESS_TOKEN gives one, of alice@example.org, from {provider.issuer}, for hpc-gateway"
        )
        assert "in 60 min; nobody renews env:MP_ACCESS_TOKEN but you" in check(result, "expiry")
        assert token not in result.output


def test_an_expired_token_says_what_to_do(fake: FakeGateway, run: Run) -> None:
    with OidcProvider() as provider:
        fake.tokens = set()
        result = run(MP_ACCESS_TOKEN=provider.issue("alice", lifetime=-600))
    assert result.exit_code == 4
    assert (
        "✗ expiry: the token of env:MP_ACCESS_TOKEN expired 10 min ago: get a new one, or log in once" in result.stdout
    )


def test_a_login_that_is_missing_says_what_to_do(run: Run, tmp_path: Path) -> None:
    result = run("--token-source", "login:here", XDG_STATE_HOME=str(tmp_path))
    assert result.exit_code == 4
    _matches("run `marketplace-hpc login here`", fault(result, "token"))


def test_what_the_gateway_takes_is_shown(fake: FakeGateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    info = fake.getInfo
    auth = {"method": "oidc", "issuer": "https://login.example.org", "audience": ["hpc"], "refresh_margin": 30}
    monkeypatch.setattr(fake, "getInfo", lambda seen: {**info(seen), "auth": auth})
    with OidcProvider() as provider:
        token = provider.issue("alice")
    fake.tokens = {token}
    text = check(run(MP_ACCESS_TOKEN=token), "scopes")
    signed = "the gateway accepts tokens that https://login.example.org has signed, yours too"
    assert text == f"{signed}; scopes: openid email profile"


def test_through_the_marketplace_the_token_comes_first(fake: FakeGateway, run: Run) -> None:
    result = run(MP_APP_ID=APP_ID, MP_ACCESS_TOKEN="")
    assert fault(result, "token")
    assert "– connection: not checked" in result.stdout
    assert fake.seen == []


def test_through_the_marketplace_the_app_is_looked_at(fake: FakeGateway, run: Run) -> None:
    offered = sum(row.registered for row in CAPABILITIES)
    assert check(run(MP_APP_ID=APP_ID), "app") == f"{APP_ID} offers {offered} capabilities"
    fake.application = {"capabilities": [{"name": row.name} for row in CAPABILITIES if row.published]}
    assert check(run(MP_APP_ID=APP_ID), "app").endswith(", without getInfo, query")
    fake.application_status = 403
    result = run(MP_APP_ID=APP_ID)
    assert "buy a product of this app" in fault(result, "app")
    assert "– connection: not checked" in result.stdout


def test_a_scheduler_that_does_not_answer(served: ServedGateway, backend: FakeBackend, run: Run) -> None:
    backend.down = True
    # Without jobs the gateway asks now and then only.
    wait_until(lambda: served.gateway.watch.refresh() or bool(served.gateway.watch.problem), within=20, failure=str)
    result = run(MP_HOST=served.url, MP_ACCESS_TOKEN="token-of-bob")
    assert result.exit_code == 1
    _matches(
        r"does not answer the gateway \(the fake scheduler is down\).*tell the gateway's operator",
        fault(result, "scheduler"),
    )


def test_a_real_gateway_is_well(served: ServedGateway, run: Run) -> None:
    result = run(MP_HOST=served.url, MP_ACCESS_TOKEN="token-of-bob")
    assert result.exit_code == 0, result.output
    assert check(result, "clock") == "as the gateway's"


# ---- a computer in AiiDA --------------------------------------------------------------------------------------------

_IN_AIIDA = """
import json, sys
from aiida import load_profile
from aiida.orm import load_computer
from aiida.storage.sqlite_temp import SqliteTempBackend
from click.testing import CliRunner
from aiida_marketplace_hpc.cli import main

load_profile(SqliteTempBackend.create_profile("temporary", debug=False), allow_switch=True)
said = []

def run(*arguments):
    result = CliRunner().invoke(main, arguments)
    said.append({"code": result.exit_code, "out": result.stdout, "err": result.stderr})

run("computer", "create", "cluster")
run("computer", "create", "cluster")
run("computer", "create", "other", "--json", "--work-dir", "/nowhere/{username}", "--machine", "local")
run("computer", "create", "third", "--machine", "nothing")
run("computer", "reconcile", "cluster", "--json")
cluster = load_computer("cluster")
said.append({"work_dir": cluster.get_workdir(), "mpirun": cluster.get_mpirun_command(), "hostname": cluster.hostname,
    "interval": cluster.get_minimum_job_poll_interval(), "parameters": cluster.get_configuration(),
    "transport": cluster.transport_type, "scheduler": cluster.scheduler_type})
run("doctor", "--computer", "cluster")
run("doctor", "--computer", "other")
run("doctor", "--computer", "nothing")
other = load_computer("other")
other.scheduler_type = "core.direct"
run("doctor", "--computer", "other", "--json")
print(json.dumps(said))
"""


def test_a_computer_is_made_from_an_address_and_a_login(served: ServedGateway, tmp_path: Path) -> None:
    environment = {
        "AIIDA_PATH": str(tmp_path),
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "MP_HOST": served.url,
        "MP_ACCESS_TOKEN": "token-of-bob",
        "LANG": "C.UTF-8",
    }
    (tmp_path / ".aiida").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _IN_AIIDA], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    made, again, other, wrong, reconciled, cluster, well, ill, nothing, worse = json.loads(done.stdout.splitlines()[-1])
    assert made["code"] == 0, made
    assert "verdi computer test cluster" in made["out"]
    assert (again["code"], "has a computer cluster: choose another label" in again["err"]) == (2, True)
    assert json.loads(other["out"])["work_dir"] == "/nowhere/{username}"
    assert (wrong["code"], "no machine nothing: it has the machine local" in wrong["err"]) == (2, True)
    assert reconciled["code"] == 0
    assert cluster["work_dir"] == str(tmp_path / "home" / "{username}" / "aiida")
    assert (cluster["transport"], cluster["scheduler"], cluster["hostname"]) == (
        "marketplace_hpc",
        "marketplace_hpc",
        "127.0.0.1",
    )
    assert cluster["mpirun"] == ["mpirun", "-np", "{tot_num_mpiprocs}"]
    assert cluster["interval"] == 5.0
    assert cluster["parameters"]["token_source"] == "env:MP_ACCESS_TOKEN"
    assert "token-of-bob" not in done.stdout
    assert well["code"] == 0, well
    for name in ("computer", "computer's scheduler", "computer's work directory", "computer's token", "scheduler"):
        assert f"✓ {name}: " in well["out"]
    assert ill["code"] == 2
    assert "✗ computer's work directory: /nowhere/bob lies below none of the roots" in ill["out"]
    assert nothing["code"] == 2
    assert "no computer nothing" in nothing["out"]
    failed = [one["name"] for one in json.loads(worse["out"])["checks"] if one["good"] is False]
    assert failed == ["computer's scheduler", "computer's work directory"]


def _matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text
