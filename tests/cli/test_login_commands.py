"""``login``, ``logout`` and ``logins``: how a person and a service get in, and what stays behind."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import keyring
import keyring.backend
import keyring.backends.null
import pytest
from click.testing import CliRunner, Result

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.client import logins
from aiida_marketplace_hpc.client.auth import TokenSource
from aiida_marketplace_hpc.errors import TokenUnavailable
from aiida_marketplace_hpc.testing.oidc import SERVICE, SERVICE_SECRET, OidcProvider
from tests.client.fake_gateway import FakeGateway

Run = Callable[..., Result]


class MemoryKeyring(keyring.backend.KeyringBackend):
    """A keyring that works, as a desktop has one."""

    priority = 5  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[str, str], str] = {}
        self.locked = threading.Event()

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked.is_set():
            raise keyring.errors.KeyringLocked("s3cret detail")
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.kept[service, username]


@pytest.fixture
def provider() -> Iterator[OidcProvider]:
    with OidcProvider() as provider:
        yield provider


@pytest.fixture(autouse=True)
def no_keyring() -> Iterator[None]:
    before = keyring.get_keyring()
    keyring.set_keyring(keyring.backends.null.Keyring())
    yield
    keyring.set_keyring(before)


@pytest.fixture
def ring(no_keyring: None) -> MemoryKeyring:
    ring = MemoryKeyring()
    keyring.set_keyring(ring)
    return ring


@pytest.fixture
def run(provider: OidcProvider, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command; a person approves whatever is shown."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("MP_HOST", "MP_ACCESS_TOKEN", "MP_APP_ID"):
        monkeypatch.delenv(name, raising=False)

    def approve(endpoint: str) -> None:
        if endpoint == "device":
            for code in provider.user_codes():
                provider.approve(code, "alice")

    provider.before_answer = approve

    def run(*arguments: str, **options: object) -> Result:
        return CliRunner().invoke(main, list(arguments), **options)  # type: ignore[arg-type]

    return run


def good(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_person_logs_in_and_out(run: Run, provider: OidcProvider, tmp_path: Path) -> None:
    result = run("login", "here", "--issuer", provider.issuer)
    assert "alice@example.org" in good(result)
    assert f"{provider.issuer}/device?user_code=" in result.stderr
    path = tmp_path / "state" / "marketplace-hpc" / "logins" / "here.json"
    assert str(path) in result.stdout
    kept = json.loads(path.read_text())
    assert kept["scope"] == "openid email profile offline_access"
    source = TokenSource.parse("login:here")
    assert source.token() == kept["access_token"]
    listed = json.loads(good(run("logins", "--json")))["logins"]
    assert [(one["name"], one["state"], one["holder"], one["store"]) for one in listed] == [
        ("here", "good", "alice@example.org", "file")
    ]
    assert "alice@example.org" in good(run("logins"))
    assert json.loads(good(run("logout", "here", "--json"))) == {"name": "here", "revoked": True}
    assert not path.exists()
    assert provider.requests["revoke"] == 1
    with pytest.raises(TokenUnavailable):
        source.token()
    assert "There are none" in good(run("logins"))
    assert run("logout", "here").exit_code == 2


def test_nothing_that_is_printed_contains_a_token(run: Run, provider: OidcProvider, tmp_path: Path) -> None:
    said = [run("login", "here", "--issuer", provider.issuer, "--json"), run("logins", "--json"), run("logins")]
    kept = json.loads((tmp_path / "state" / "marketplace-hpc" / "logins" / "here.json").read_text())
    said.append(run("logout", "here"))
    for result in said:
        good(result)
        assert kept["access_token"] not in result.output
        assert kept["refresh_token"] not in result.output


def test_the_login_is_used_by_the_other_commands(run: Run, provider: OidcProvider, tmp_path: Path) -> None:
    good(run("login", "here", "--issuer", provider.issuer))
    fake = FakeGateway(tmp_path / "cluster")
    try:
        fake.tokens = {TokenSource.parse("login:here").token()}
        assert "Ada" in good(run("user", "create", "--url", fake.url, "--token-source", "login:here"))
    finally:
        fake.close()


def test_the_marketplace_is_the_preset(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with OidcProvider() as provider:
        # The platform's realm lies below /auth.
        monkeypatch.setattr(provider, "issuer", f"{provider.url}/auth/realms/marketplace")
        provider.before_answer = lambda _: [provider.approve(code) for code in provider.user_codes()][:0] and None
        good(run("login", "platform", env={"MP_HOST": provider.url}))
        assert json.loads(good(run("logins", "--json")))["logins"][0]["issuer"] == provider.issuer


def test_an_address_that_is_no_provider_names_the_option(run: Run, tmp_path: Path) -> None:
    fake = FakeGateway(tmp_path / "cluster")
    try:
        result = run("login", "here", env={"MP_HOST": fake.url})
    finally:
        fake.close()
    assert result.exit_code == 2
    assert "--issuer" in result.stderr


def test_a_provider_that_cannot_be_reached_has_its_exit_code(run: Run, provider: OidcProvider) -> None:
    provider.outage = "unavailable"
    result = run("login", "here", "--issuer", provider.issuer)
    assert result.exit_code == 3
    assert "identity provider" in result.stderr


@pytest.mark.parametrize("given", ["env", "file", "stdin", "prompt"])
def test_a_service_logs_in_with_a_secret_that_is_no_argument(
    given: str, run: Run, provider: OidcProvider, tmp_path: Path
) -> None:
    arguments = ["login", "robot", "--issuer", provider.issuer, "--client-id", SERVICE, "--client-credentials"]
    (tmp_path / "secret").write_text(f"{SERVICE_SECRET}\n")
    result = {
        "env": lambda: run(*arguments, "--client-secret-env", "ROBOT", env={"ROBOT": SERVICE_SECRET}),
        "file": lambda: run(*arguments, "--client-secret-file", str(tmp_path / "secret")),
        "stdin": lambda: run(*arguments, "--client-secret-file", "-", input=SERVICE_SECRET),
        "prompt": lambda: run(*arguments, input=f"{SERVICE_SECRET}\n"),
    }[given]()
    assert "service-account-service" in good(result)
    assert SERVICE_SECRET not in result.output
    assert TokenSource.parse("login:robot").token()
    assert good(run("logout", "robot"))


def test_a_wrong_secret_keeps_nothing(run: Run, provider: OidcProvider) -> None:
    arguments = ("login", "robot", "--issuer", provider.issuer, "--client-id", SERVICE, "--client-credentials")
    result = run(*arguments, "--client-secret-env", "ROBOT", env={"ROBOT": "s3cret-wrong"})
    assert result.exit_code == 4
    assert "invalid_client" in result.stderr
    assert "s3cret" not in result.output
    assert run(*arguments, "--client-secret-env", "NOTHING").exit_code == 2
    result = run(*arguments, "--client-secret-env", "s3cret-itself")
    assert (result.exit_code, "s3cret" in result.output) == (2, False)
    assert json.loads(good(run("logins", "--json"))) == {"logins": []}


def test_logging_out_while_the_provider_is_away_forgets_the_login_here(run: Run, provider: OidcProvider) -> None:
    good(run("login", "here", "--issuer", provider.issuer))
    provider.outage = "drop"
    result = run("logout", "here")
    assert "could not be told" in result.stderr
    assert good(result)
    assert json.loads(good(run("logins", "--json"))) == {"logins": []}


def test_a_keyring_keeps_what_a_file_would(
    run: Run, provider: OidcProvider, ring: MemoryKeyring, tmp_path: Path
) -> None:
    provider.lifetime = 0.2
    assert "the system's keyring" in good(run("login", "here", "--issuer", provider.issuer))
    source = TokenSource.parse("login:here")
    tokens = {source.token()}
    while len(tokens) < 3:
        tokens.add(source.token())
    assert provider.reused == 0
    folder = tmp_path / "state" / "marketplace-hpc" / "logins"
    text = "".join(path.read_text() for path in folder.iterdir())
    assert not any(token in text for token in tokens)
    assert list(ring.kept) == [("aiida-marketplace-hpc", "here")]
    assert json.loads(good(run("logins", "--json")))["logins"][0]["store"] == "keyring"
    good(run("logout", "here"))
    assert not ring.kept


def test_a_keyring_that_is_locked_says_what_to_do(run: Run, provider: OidcProvider, ring: MemoryKeyring) -> None:
    good(run("login", "here", "--issuer", provider.issuer))
    ring.locked.set()
    with pytest.raises(TokenUnavailable, match=r"KeyringLocked\): unlock it, or .* --store file") as raised:
        TokenSource.parse("login:here").token()
    assert "s3cret" not in str(raised.value)
    # In the place of one that cannot be read.
    good(run("login", "here", "--issuer", provider.issuer, "--store", "file"))
    assert TokenSource.parse("login:here").token()


def test_a_keyring_that_waits_for_a_person_does_not_stop_a_daemon(
    run: Run, provider: OidcProvider, ring: MemoryKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    good(run("login", "here", "--issuer", provider.issuer))
    go_on = threading.Event()
    monkeypatch.setattr(logins, "_KEYRING_PATIENCE", 0.05)
    monkeypatch.setattr(ring, "get_password", lambda *_: go_on.wait(10) and None)
    with pytest.raises(TokenUnavailable, match=r"no answer\): unlock it"):
        TokenSource.parse("login:here").token()
    go_on.set()


def test_without_a_keyring_one_that_was_asked_for_is_an_error(run: Run, provider: OidcProvider) -> None:
    result = run("login", "here", "--issuer", provider.issuer, "--store", "keyring")
    assert result.exit_code == 2
    assert "--store file" in result.stderr
    assert provider.requests == {}


def test_a_file_is_made_for_its_owner_alone_whatever_the_umask(
    run: Run, provider: OidcProvider, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        good(run("login", "here", "--issuer", provider.issuer))
    finally:
        os.umask(before)
    folder = tmp_path / "state" / "marketplace-hpc" / "logins"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
