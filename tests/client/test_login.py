"""Logins: tokens are renewed ahead of their end, once for all who share a login, and nothing of a renewal is lost."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aiida_marketplace_hpc.client import logins
from aiida_marketplace_hpc.client.auth import TokenSource
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.client.login import LoginToken, with_tokens
from aiida_marketplace_hpc.client.logins import Login, LoginStore
from aiida_marketplace_hpc.client.oidc import OidcClient, Provider, marketplace_issuer
from aiida_marketplace_hpc.errors import ConfigurationError, ProviderUnavailable, TokenUnavailable, Unauthorized
from aiida_marketplace_hpc.testing.clock import Clock, RealClock, VirtualClock
from aiida_marketplace_hpc.testing.oidc import PUBLIC_CLIENT, SERVICE, SERVICE_SECRET, OidcProvider
from tests.client.fake_gateway import FakeGateway


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def provider(clock: VirtualClock) -> Iterator[OidcProvider]:
    with OidcProvider(lifetime=600, clock=lambda: clock.now().timestamp()) as provider:
        yield provider


@pytest.fixture
def store(tmp_path: Path) -> LoginStore:
    return LoginStore(tmp_path / "state" / "logins")


@pytest.fixture
def source(provider: OidcProvider, store: LoginStore, clock: VirtualClock) -> LoginToken:
    """A person's login, and the source that uses it."""
    keep(provider, store, clock)
    return another(store, clock)


def keep(provider: OidcProvider, store: LoginStore, clock: Clock, **changes: object) -> Login:
    """Log a person in and keep the login as ``here``."""
    found = Provider.discover(provider.issuer)
    client = OidcClient(found, PUBLIC_CLIENT, clock=lambda: clock.now().timestamp())
    device = client.start_device_flow("openid offline_access")
    provider.approve(device.code, "alice")
    tokens = client.await_approval(device, sleep=lambda _: None)
    login = Login("here", found.issuer, PUBLIC_CLIENT, "device", found.token_endpoint)
    login = dataclasses.replace(with_tokens(login, tokens), **changes)  # type: ignore[arg-type]
    with store.lock("here", 1):
        store.write(login)
    return login


def another(store: LoginStore, clock: VirtualClock) -> LoginToken:
    """A source as another process would have it."""
    return LoginToken("here", store=store, clock=lambda: clock.now().timestamp())


def renewed(source: LoginToken, before: str) -> str:
    """The token after the renewal in the background."""
    deadline = time.monotonic() + 10
    while (token := source.token()) == before:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return token


def test_a_token_is_used_until_it_is_due(source: LoginToken, provider: OidcProvider, clock: VirtualClock) -> None:
    first = source.token()
    clock.sleep(500)
    assert source.token() == first
    assert provider.grants["refresh_token"] == 0


def test_a_token_is_renewed_ahead_of_its_end_and_nobody_waits(
    source: LoginToken, provider: OidcProvider, clock: VirtualClock
) -> None:
    first = source.token()
    asked, go_on = threading.Event(), threading.Event()
    provider.before_answer = lambda _: (asked.set(), go_on.wait(10))[0]
    clock.sleep(541)
    assert [source.token() for _ in range(3)] == [first] * 3
    assert asked.wait(10)
    go_on.set()
    second = renewed(source, first)
    assert source.token() == second
    assert (provider.grants["refresh_token"], provider.reused) == (1, 0)


def test_the_margin_is_what_the_gateway_states(
    fake: FakeGateway, source: LoginToken, provider: OidcProvider, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = fake.getInfo
    monkeypatch.setattr(fake, "getInfo", lambda seen: {**info(seen), "auth": {"refresh_margin": 150}})
    first = source.token()
    fake.tokens = AllBut()
    with HpcGateway(fake.url, token_source=source) as gateway:
        gateway.info()
    clock.sleep(451)
    assert renewed(source, first)


def test_a_margin_that_is_longer_than_the_lifetime_does_not_renew_without_end(
    source: LoginToken, provider: OidcProvider, clock: VirtualClock
) -> None:
    source.margin = 3600
    first = source.token()
    clock.sleep(399)
    assert source.token() == first
    eventually(lambda: source._renewal is None)
    assert provider.grants["refresh_token"] == 0
    clock.sleep(2)
    assert renewed(source, first)


def test_a_token_that_may_end_on_its_way_is_not_given_where_there_is_another(
    source: LoginToken, store: LoginStore, provider: OidcProvider, clock: VirtualClock
) -> None:
    first = source.token()
    clock.sleep(597)
    provider.outage = "unavailable"
    assert source.token() == first
    provider.outage = None
    assert another(store, clock).token() != first


def test_a_token_that_has_ended_is_never_given(source: LoginToken, clock: VirtualClock) -> None:
    first = source.token()
    clock.sleep(601)
    assert source.token() != first


@pytest.mark.parametrize("skew", [-7200, 7200])
def test_the_clock_of_the_provider_does_not_matter(
    provider: OidcProvider, store: LoginStore, clock: VirtualClock, skew: float
) -> None:
    provider.skew = skew
    keep(provider, store, clock)
    source = another(store, clock)
    first = source.token()
    clock.sleep(500)
    assert source.token() == first
    clock.sleep(101)
    assert source.token() != first
    assert provider.grants["refresh_token"] == 1


def test_a_clock_that_was_set_back_costs_a_renewal_and_nothing_else(
    source: LoginToken, provider: OidcProvider, clock: VirtualClock, store: LoginStore
) -> None:
    first = source.token()
    behind = LoginToken("here", store=store, clock=lambda: clock.now().timestamp() - 86400)
    assert behind.token() != first


def test_all_threads_and_sources_share_one_renewal(
    provider: OidcProvider, store: LoginStore, clock: VirtualClock, source: LoginToken
) -> None:
    sources = [another(store, clock) for _ in range(5)]
    before = {one.token() for one in sources}
    for count in range(1, 4):
        clock.sleep(601)
        with ThreadPoolExecutor(20) as pool:
            tokens = set(pool.map(lambda number: sources[number % 5].token(), range(40)))
        assert len(tokens) == 1
        assert not tokens & before
        before |= tokens
        assert (provider.grants["refresh_token"], provider.reused) == (count, 0)


def test_what_another_process_renewed_is_used_at_once(
    source: LoginToken, store: LoginStore, clock: VirtualClock, provider: OidcProvider
) -> None:
    source.token()
    clock.sleep(601)
    token = another(store, clock).token()
    assert source.token() == token
    assert provider.grants["refresh_token"] == 1


def test_a_new_login_is_used_at_once(
    source: LoginToken, store: LoginStore, clock: VirtualClock, provider: OidcProvider
) -> None:
    source.token()
    login = keep(provider, store, clock)
    assert source.token() == login.access_token


# ---- when it is refused ---------------------------------------------------------------------------------------------


class AllBut(set[str]):
    """The tokens that a gateway accepts: all but these."""

    def __contains__(self, token: object) -> bool:
        return not super().__contains__(token)


@pytest.fixture
def gateway(fake: FakeGateway, source: LoginToken) -> Iterator[HpcGateway]:
    fake.tokens = AllBut()
    with HpcGateway(fake.url, token_source=source, sleep=lambda _: None) as gateway:
        yield gateway


def test_a_refused_token_is_renewed_once_and_the_request_sent_again(
    gateway: HpcGateway, fake: FakeGateway, source: LoginToken, provider: OidcProvider
) -> None:
    first = source.token()
    fake.tokens = AllBut({first})
    assert gateway.create_user()["username"] == "ada"
    assert gateway.create_job(
        {"job_name": "a", "ntasks_per_node": 1, "partition": "p", "image": "i", "executable_cmd": "c"}
    )
    assert fake.capabilities() == ["createOrUpdateCollection", "createOrUpdateCollection", "newTransformation"]
    assert provider.grants["refresh_token"] == 1
    assert source.token() != first


def test_a_job_is_created_once_though_its_token_was_refused(
    gateway: HpcGateway, fake: FakeGateway, source: LoginToken
) -> None:
    fake.tokens = AllBut({source.token()})
    gateway.create_job({"job_name": "a", "ntasks_per_node": 1, "partition": "p", "image": "i", "executable_cmd": "c"})
    assert len(fake.jobs) == 1


def test_a_gateway_that_refuses_every_token_does_not_use_up_the_login(
    gateway: HpcGateway, fake: FakeGateway, source: LoginToken, provider: OidcProvider, clock: VirtualClock
) -> None:
    fake.tokens = set()
    for _ in range(5):
        with pytest.raises(Unauthorized):
            gateway.create_user()
    assert provider.grants["refresh_token"] == 1
    clock.sleep(31)
    with pytest.raises(Unauthorized):
        gateway.create_user()
    assert provider.grants["refresh_token"] == 2


# ---- when it cannot be renewed --------------------------------------------------------------------------------------


def test_a_dead_login_says_which_command_to_run_and_asks_no_more(
    source: LoginToken, store: LoginStore, provider: OidcProvider, clock: VirtualClock
) -> None:
    provider.end_logins()
    clock.sleep(601)
    for one in (source, source, another(store, clock)):
        with pytest.raises(TokenUnavailable, match=r"login here is over.*run `marketplace-hpc login here`") as raised:
            one.token()
        assert not raised.value.retryable
        clock.sleep(60)
    assert provider.requests["token"] == 2  # The first of them was the login.


def test_a_dead_login_is_good_until_its_token_ends(
    source: LoginToken, store: LoginStore, provider: OidcProvider, clock: VirtualClock
) -> None:
    first = source.token()
    provider.end_logins()
    clock.sleep(590)
    assert source.token() == first
    eventually(lambda: bool(store.read("here").ended))
    assert source.token() == first
    clock.sleep(11)
    with pytest.raises(TokenUnavailable):
        source.token()


def test_a_new_login_takes_the_place_of_a_dead_one(
    source: LoginToken, store: LoginStore, provider: OidcProvider, clock: VirtualClock
) -> None:
    provider.end_logins()
    clock.sleep(601)
    with pytest.raises(TokenUnavailable):
        source.token()
    login = keep(provider, store, clock)
    assert source.token() == login.access_token


@pytest.mark.parametrize("outage", ["unavailable", "drop"])
def test_an_outage_of_the_provider_is_no_dead_login(
    outage: str, source: LoginToken, store: LoginStore, provider: OidcProvider, clock: VirtualClock
) -> None:
    first = source.token()
    provider.outage = outage  # type: ignore[assignment]
    clock.sleep(590)
    assert source.token() == first
    eventually(lambda: provider.requests["token"] == 2)
    clock.sleep(20)
    with pytest.raises(ProviderUnavailable, match="identity provider") as raised:
        source.token()
    assert raised.value.retryable
    asked = provider.requests["token"]
    with pytest.raises(ProviderUnavailable):
        source.token()
    assert provider.requests["token"] == asked  # Not by everybody who waited.
    assert not store.read("here").ended
    provider.outage = None
    clock.sleep(6)
    assert source.token() != first


def test_a_public_question_is_asked_without_a_token_in_an_outage(
    fake: FakeGateway, source: LoginToken, provider: OidcProvider, clock: VirtualClock
) -> None:
    provider.outage = "unavailable"
    clock.sleep(601)
    with HpcGateway(fake.url, token_source=source, sleep=lambda _: None) as gateway:
        assert gateway.heartbeat()
        with pytest.raises(ProviderUnavailable):
            gateway.create_user()
    assert fake.capabilities() == ["heartbeat"]


def test_a_good_token_is_given_while_another_process_renews_it(
    source: LoginToken, store: LoginStore, provider: OidcProvider, clock: VirtualClock
) -> None:
    first = source.token()
    clock.sleep(598)
    with store.lock("here", 1):
        assert source.token() == first
        clock.sleep(3)
        with pytest.raises(ProviderUnavailable):
            source.token(within=0.05)
    assert source.token() != first
    assert provider.reused == 0


def test_a_folder_without_locks_is_said(
    source: LoginToken, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    clock.sleep(601)
    with pytest.raises(TokenUnavailable, match=r"login here cannot be locked in .*No locks available"):
        source.token()


@pytest.mark.parametrize("stated", [None, 0, "soon"])
def test_a_lifetime_that_is_not_stated_is_read_from_the_token(
    provider: OidcProvider, store: LoginStore, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch, stated: object
) -> None:
    answer = provider._token
    monkeypatch.setattr(provider, "_token", lambda *given: {**answer(*given), "expires_in": stated})
    lifetime = keep(provider, store, clock).lifetime
    assert lifetime == (60 if stated == 0 else 600)


def test_whoever_cannot_wait_goes_and_the_answer_is_kept(
    source: LoginToken, store: LoginStore, provider: OidcProvider, clock: VirtualClock
) -> None:
    first = source.token()
    go_on = threading.Event()
    provider.before_answer = lambda _: (go_on.wait(10), None)[1]
    clock.sleep(601)
    with pytest.raises(ProviderUnavailable, match="within 0 s"):
        source.token(within=0.01)
    go_on.set()
    eventually(lambda: store.read("here").access_token != first)
    assert source.token() == store.read("here").access_token
    assert (provider.grants["refresh_token"], provider.reused) == (1, 0)


def test_the_new_refresh_token_is_on_disk_before_the_access_token_is_given(
    source: LoginToken, store: LoginStore, clock: VirtualClock, provider: OidcProvider
) -> None:
    clock.sleep(601)
    token = source.token()
    document = json.loads((store.folder / "here.json").read_text())
    assert document["access_token"] == token
    clock.sleep(601)
    assert another(store, clock).token() != token
    assert provider.reused == 0


def test_a_refresh_token_is_not_used_up_where_the_next_one_cannot_be_kept(
    source: LoginToken, provider: OidcProvider, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.sleep(601)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TokenUnavailable, match=r"cannot be kept in .*No space left"):
            source.token()
    assert provider.grants["refresh_token"] == 0
    clock.sleep(6)
    assert source.token()


def test_a_provider_that_keeps_refresh_tokens_is_fine(
    source: LoginToken, provider: OidcProvider, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = provider._token

    def same(form: dict[str, str], authorization: str) -> dict[str, object]:
        document = answer(form, authorization)
        provider._refresh[form["refresh_token"]][0].used.clear()
        document.pop("refresh_token")
        return document

    monkeypatch.setattr(provider, "_token", same)
    tokens = set()
    for _ in range(3):
        clock.sleep(601)
        tokens.add(source.token())
    assert len(tokens) == 3


def test_a_login_without_a_refresh_token_ends_with_its_token(
    provider: OidcProvider, store: LoginStore, clock: VirtualClock
) -> None:
    keep(provider, store, clock, refresh_token="")
    source = another(store, clock)
    assert source.token()
    clock.sleep(601)
    with pytest.raises(TokenUnavailable, match=r"nothing to renew it with.*marketplace-hpc login here"):
        source.token()


def test_a_service_logs_in_again_with_its_secret(
    provider: OidcProvider, store: LoginStore, clock: VirtualClock
) -> None:
    found = Provider.discover(provider.issuer)
    login = Login(
        "robot", found.issuer, SERVICE, "client_credentials", found.token_endpoint, client_secret=SERVICE_SECRET
    )
    with store.lock("robot", 1):
        store.write(login)
    source = LoginToken("robot", store=store, clock=lambda: clock.now().timestamp())
    tokens = {source.token()}
    for _ in range(2):
        clock.sleep(601)
        tokens.add(source.token())
    assert len(tokens) == 3
    provider.clients[SERVICE] = "changed"
    clock.sleep(601)
    with pytest.raises(TokenUnavailable, match=r"invalid_client.*marketplace-hpc login robot --client-credentials"):
        source.token()
    provider.clients[SERVICE] = SERVICE_SECRET
    clock.sleep(6)
    assert source.token() not in tokens


# ---- many processes, and the death of one ---------------------------------------------------------------------------

_WORKER = r"""
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from aiida_marketplace_hpc.client.login import LoginToken
from aiida_marketplace_hpc.client.logins import LoginStore

source = LoginToken("here", store=LoginStore(Path(sys.argv[1])))
seen, until = [], time.monotonic() + float(sys.argv[2])

def use():
    mine = set()
    while time.monotonic() < until:
        mine.add(source.token())
        time.sleep(0.02)
    return mine

with ThreadPoolExecutor(4) as pool:
    for mine in [pool.submit(use) for _ in range(4)]:
        seen += mine.result()
print("\n".join(set(seen)))
"""


def worker(store: LoginStore, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WORKER, str(store.folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.alone
def test_processes_that_share_a_login_renew_it_once_per_expiry(store: LoginStore) -> None:
    with OidcProvider(lifetime=1.5) as provider:
        keep(provider, store, RealClock())
        workers = [worker(store, 4.0) for _ in range(3)]
        seen: set[str] = set()
        for one in workers:
            out, err = one.communicate(timeout=60)
            assert one.returncode == 0, err
            seen |= set(out.split())
        assert provider.reused == 0
        # A token that was renewed just before the end may have been used by nobody.
        assert len(seen) - 1 <= provider.grants["refresh_token"] <= len(seen)
        assert provider.grants["refresh_token"] >= 3


def test_a_process_that_is_killed_before_it_asked_leaves_a_good_login(store: LoginStore) -> None:
    with OidcProvider(lifetime=0.5) as provider:
        keep(provider, store, RealClock())
        provider.outage = "unavailable"
        one = worker(store, 60)
        eventually(lambda: provider.requests["token"] >= 2)
        kill(one)
        provider.outage = None
        assert LoginToken("here", store=store).token()
        assert provider.reused == 0


def test_a_process_that_is_killed_while_the_answer_is_on_its_way_leaves_a_clear_error(store: LoginStore) -> None:
    with OidcProvider(lifetime=0.5) as provider:
        keep(provider, store, RealClock())
        reached, go_on = threading.Event(), threading.Event()
        provider.before_answer = lambda _: (reached.set(), go_on.wait(10), None)[2]
        one = worker(store, 60)
        assert reached.wait(30)
        kill(one)
        go_on.set()
        provider.before_answer = None
        source = LoginToken("here", store=store)
        eventually(lambda: store.read("here").lasts(time.time()) <= 0)
        with pytest.raises(TokenUnavailable, match=r"earlier renewal was lost.*marketplace-hpc login here"):
            source.token()
        assert keep(provider, store, RealClock()).access_token == source.token()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- where it is kept -----------------------------------------------------------------------------------------------


def test_nobody_else_can_read_a_login(source: LoginToken, store: LoginStore, clock: VirtualClock) -> None:
    clock.sleep(601)
    source.token()
    assert {path.stat().st_mode & 0o777 for path in store.folder.iterdir()} == {0o600}
    assert store.folder.stat().st_mode & 0o777 == 0o700
    store.folder.chmod(0o755)
    (store.folder / "here.json").chmod(0o640)
    with pytest.raises(TokenUnavailable, match=r"others can read the login here: run `chmod 600 .*here.json`"):
        store.read("here")


def test_no_text_shows_a_secret(source: LoginToken, store: LoginStore) -> None:
    login = dataclasses.replace(store.read("here"), client_secret="s3cret")
    secrets = (login.access_token, login.refresh_token, login.client_secret)
    for text in (repr(login), repr(source)):
        assert not any(secret in text for secret in secrets)
    assert repr(source) == "<LoginToken login:here>"


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a.b", "x" * 65])
def test_a_name_that_is_none_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        TokenSource.parse(f"login:{name}")
    assert not name or name not in str(raised.value)


def test_a_login_that_does_not_exist_says_how_to_make_it(store: LoginStore) -> None:
    with pytest.raises(TokenUnavailable, match=r"no login here .*run `marketplace-hpc login here`"):
        LoginToken("here", store=store).token()


def test_a_damaged_login_says_what_to_do(source: LoginToken, store: LoginStore) -> None:
    (store.folder / "here.json").write_text("{")
    with pytest.raises(TokenUnavailable, match="damaged: run `marketplace-hpc login here`"):
        source.token()


def test_the_daemon_finds_it_where_the_command_line_has_kept_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert logins.default_folder() == tmp_path / "marketplace-hpc" / "logins"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert logins.default_folder() == tmp_path / ".local" / "state" / "marketplace-hpc" / "logins"


# ---- the provider ---------------------------------------------------------------------------------------------------


def test_the_preset_is_the_realm_of_the_marketplace() -> None:
    assert marketplace_issuer("") == "https://materials-marketplace.eu/auth/realms/marketplace"
    assert marketplace_issuer("https://x.eu/") == "https://x.eu/auth/realms/marketplace"


def test_what_is_no_provider_is_said(provider: OidcProvider, fake: FakeGateway) -> None:
    with pytest.raises(ConfigurationError, match="is no OpenID Connect provider"):
        Provider.discover(f"{provider.url}/elsewhere")
    with pytest.raises(ConfigurationError, match="begins with https://"):
        Provider.discover("http://idp.example.org/realms/x")
    with pytest.raises(ConfigurationError, match="begins with https://"):
        Provider.discover("http://127.idp.example.org/realms/x")
    with pytest.raises(ConfigurationError, match="calls itself"):
        Provider.discover(provider.issuer.replace("127.0.0.1", "localhost"))


def test_the_person_at_the_other_device_may_refuse_or_sleep(provider: OidcProvider, clock: VirtualClock) -> None:
    client = OidcClient(Provider.discover(provider.issuer), PUBLIC_CLIENT)
    device = client.start_device_flow("openid")
    provider.deny(device.code)
    with pytest.raises(TokenUnavailable, match="refused on the provider's page"):
        client.await_approval(device, sleep=lambda _: None)
    device = client.start_device_flow("openid")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        clock.sleep(seconds + 50)

    provider.interval = 1
    provider.outage = "unavailable"
    with pytest.raises(TokenUnavailable, match="nobody approved the login in time"):
        client.await_approval(device, sleep=nap, clock=clock.monotonic)
    assert naps[:4] == [0.0, 1.0, 2.0, 4.0]
