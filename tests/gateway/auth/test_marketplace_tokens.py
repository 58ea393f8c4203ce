"""Asking the platform: seldom, once for many, and its silence is no refusal."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from aiida_marketplace_hpc.errors import ConfigurationError, Unauthorized, Unavailable
from aiida_marketplace_hpc.gateway.auth import answers as answers_module
from aiida_marketplace_hpc.gateway.auth import marketplace
from aiida_marketplace_hpc.gateway.auth.answers import Answers, Asking
from aiida_marketplace_hpc.gateway.auth.marketplace import (
    DOWN,
    FRESH,
    GRACE,
    REFUSED,
    MarketPlaceTokens,
    default_issuer,
)
from aiida_marketplace_hpc.testing.clock import VirtualClock
from aiida_marketplace_hpc.testing.oidc import OidcProvider

EMAIL = "a.b@example.org"


@pytest.fixture
def tokens(provider: OidcProvider, clock: VirtualClock) -> MarketPlaceTokens:
    return MarketPlaceTokens(provider.issuer, clock=clock.monotonic)


def test_who_somebody_is_is_asked_once_a_minute(
    provider: OidcProvider, tokens: MarketPlaceTokens, clock: VirtualClock
) -> None:
    token = provider.issue("s-1", email=EMAIL, name="A B")
    for asked in (1, 2):
        for _ in range(5):
            identity = tokens.identify(token)
        assert (identity.issuer, identity.subject, identity.email, identity.name) == (
            provider.issuer,
            "s-1",
            EMAIL,
            "A B",
        )
        assert identity.claims["roles"] == []
        assert provider.requests["userinfo"] == asked
        clock.sleep(FRESH)


def test_of_a_hundred_who_come_at_once_one_asks(provider: OidcProvider, tokens: MarketPlaceTokens) -> None:
    token = provider.issue("s", email=EMAIL)
    everybody, wrong = threading.Barrier(100), provider.issue("s", email=EMAIL, lifetime=100)
    provider.revoke(wrong)

    def ask(token: str) -> str:
        everybody.wait(timeout=30)
        try:
            return tokens.identify(token).subject
        except Unauthorized:
            return "refused"

    with ThreadPoolExecutor(100) as threads:
        assert set(threads.map(ask, [token] * 100)) == {"s"}
        assert provider.requests["userinfo"] == 1
        assert set(threads.map(ask, [wrong] * 100)) == {"refused"}
        assert provider.requests["userinfo"] == 2


def test_those_who_wait_share_an_outage_but_no_error(provider: OidcProvider, tokens: MarketPlaceTokens) -> None:
    provider.outage = "unavailable"
    token, everybody = provider.issue("s", email=EMAIL), threading.Barrier(10)

    def ask(_: int) -> Unavailable:
        everybody.wait(timeout=30)
        with pytest.raises(Unavailable) as error:
            tokens.identify(token)
        return error.value

    with ThreadPoolExecutor(10) as threads:
        errors = list(threads.map(ask, range(10)))
    assert len({id(error) for error in errors}) == 10
    assert provider.requests["userinfo"] == 1


def test_a_refusal_holds_for_a_moment(provider: OidcProvider, tokens: MarketPlaceTokens, clock: VirtualClock) -> None:
    token = provider.issue("s", email=EMAIL)
    provider.revoke(token)
    for _ in range(5):
        with pytest.raises(Unauthorized, match="log in again"):
            tokens.identify(token)
    assert provider.requests["userinfo"] == 1
    clock.sleep(REFUSED)
    with pytest.raises(Unauthorized):
        tokens.identify(token)
    assert provider.requests["userinfo"] == 2


def test_a_revoked_token_is_good_for_a_minute_at_most(
    provider: OidcProvider, tokens: MarketPlaceTokens, clock: VirtualClock
) -> None:
    token = provider.issue("s", email=EMAIL)
    tokens.identify(token)
    provider.revoke(token)
    clock.sleep(FRESH)
    with pytest.raises(Unauthorized):
        tokens.identify(token)
    # Nor is it good again when nobody can be asked any more.
    provider.outage = "unavailable"
    clock.sleep(REFUSED)
    with pytest.raises(Unavailable):
        tokens.identify(token)


def test_an_identity_never_outlives_its_token(
    provider: OidcProvider, tokens: MarketPlaceTokens, clock: VirtualClock
) -> None:
    token = provider.issue("s", email=EMAIL, lifetime=30)
    identity = tokens.identify(token)
    assert identity.expires_at == pytest.approx(time.time() + 30, abs=5)
    provider.outage = "unavailable"
    clock.sleep(31)
    with pytest.raises(Unavailable):
        tokens.identify(token)


def test_a_token_that_has_expired_is_not_asked_about(provider: OidcProvider, tokens: MarketPlaceTokens) -> None:
    with pytest.raises(Unauthorized, match="expired"):
        tokens.identify(provider.issue("s", email=EMAIL, lifetime=-60))
    assert provider.requests["userinfo"] == 0


def test_an_outage_throws_nobody_out_who_was_here(
    provider: OidcProvider, tokens: MarketPlaceTokens, clock: VirtualClock
) -> None:
    known = provider.issue("known", email=EMAIL, lifetime=30 * 86400)
    new = provider.issue("new", email=EMAIL)
    tokens.identify(known)
    provider.outage = "drop"
    for passed in (FRESH, GRACE - FRESH - 1):
        clock.sleep(passed)
        assert tokens.identify(known).subject == "known"
        with pytest.raises(Unavailable):
            tokens.identify(new)
    clock.sleep(1)
    with pytest.raises(Unavailable):
        tokens.identify(known)
    provider.outage = None
    clock.sleep(DOWN)
    assert tokens.identify(known).subject == "known"
    assert tokens.identify(new).subject == "new"


def test_a_platform_that_is_down_is_left_alone_for_a_moment(
    provider: OidcProvider, tokens: MarketPlaceTokens, clock: VirtualClock
) -> None:
    provider.outage = "unavailable"
    for number in range(20):
        with pytest.raises(Unavailable):
            tokens.identify(provider.issue(f"s{number}", email=EMAIL))
    assert provider.requests["userinfo"] == 1
    clock.sleep(DOWN)
    provider.outage = None
    tokens.identify(provider.issue("s", email=EMAIL))


def test_wrong_tokens_drive_out_no_right_one(
    provider: OidcProvider, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marketplace, "_SIZE", 3)
    tokens = MarketPlaceTokens(provider.issuer, clock=clock.monotonic)
    token = provider.issue("s", email=EMAIL)
    tokens.identify(token)
    for number in range(10):
        with pytest.raises(Unauthorized):
            tokens.identify(f"wrong-{number}")
    asked = provider.requests["userinfo"]
    tokens.identify(token)
    assert provider.requests["userinfo"] == asked == 11


def test_of_too_many_answers_the_oldest_go() -> None:
    answers: Answers[int] = Answers(3)
    for number in range(5):
        answers.put(str(number), number, 60)
    assert [answers.get(str(number)) is not None for number in range(5)] == [False, False, True, True, True]
    answers.put("2", 2, 60)
    answers.put("5", 5, 60)
    assert answers.get("2") is not None


def test_only_so_many_are_asked_about_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "_PATIENCE", 0.1)
    asking: Asking[int] = Asking(1)
    begun, end = threading.Event(), threading.Event()

    def slow() -> int:
        begun.set()
        end.wait(timeout=30)
        return 1

    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(asking.once, "first", slow)
        assert begun.wait(timeout=30)
        for key in ("first", "second"):
            with pytest.raises(Unavailable, match="in time"):
                asking.once(key, lambda: 2)
        end.set()
        assert first.result(timeout=30) == 1
    assert [asking.once(key, lambda: 2) for key in ("first", "second")] == [2, 2]


@pytest.mark.parametrize("token", ["x" * 16_385, "a b", "ü", "a\nb", "\udcff", "a:b", ""])
def test_what_cannot_be_a_token_is_not_sent_anywhere(token: str) -> None:
    with pytest.raises(Unauthorized):  # Sent, it would be an outage.
        MarketPlaceTokens("https://nowhere.invalid").identify(token)


def test_nothing_that_is_kept_has_the_token_in_it(provider: OidcProvider, tokens: MarketPlaceTokens) -> None:
    token = provider.issue("s", email=EMAIL)
    tokens.identify(token)
    assert tokens._known._kept
    assert token not in repr(vars(tokens)) + repr(tokens._known._kept)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<ht>", Unavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", Unavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Unavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", Unavailable),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"sub":"x"}', Unauthorized),
        (b"HTTP/1.1 302 Found\r\nLocation: https://example.org/login\r\nContent-Length: 0\r\n\r\n", Unavailable),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", Unavailable),
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n", Unavailable),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", Unavailable),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", Unauthorized),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * (2 * 1024 * 1024), Unavailable),
        (b"nonsense\r\n\r\n", Unavailable),
    ],
)
def test_what_makes_no_sense_is_an_outage(answer: bytes, error: type[Exception]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(answer)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None: ...

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with pytest.raises(error):
                MarketPlaceTokens(f"http://127.0.0.1:{server.server_port}/realm").identify("opaque-token")
        finally:
            server.shutdown()
            thread.join()


def test_a_netrc_does_not_get_in_the_way(
    provider: OidcProvider, tokens: MarketPlaceTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login x password y\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tokens.identify(provider.issue("s", email=EMAIL)).subject == "s"


@pytest.mark.parametrize(
    ("environment", "issuer"),
    [
        ({"MP_HOST": "https://mp.example.org/"}, "https://mp.example.org/auth/realms/marketplace"),
        ({"MP_HOST_URL": "mp.example.org", "MP_HOST": "https://x"}, "https://mp.example.org/auth/realms/marketplace"),
    ],
)
def test_the_platform_is_named_by_the_environment(
    environment: dict[str, str], issuer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MP_HOST", "MP_HOST_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match="MP_HOST"):
        default_issuer()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_issuer() == issuer
