"""One call against a network that fails in every way: what is repeated, and what is said."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.client import answer as answer_module
from aiida_marketplace_hpc.client.auth import FileToken, StaticToken, TokenSource
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.client.session import Timeouts
from aiida_marketplace_hpc.client.transfer import put_file
from aiida_marketplace_hpc.errors import (
    Busy,
    ConfigurationError,
    ConnectionFailed,
    DeadlineExceeded,
    NotFound,
    Phase,
    ServerFault,
    TokenUnavailable,
    Unauthorized,
    Unavailable,
)
from tests.client.fake_gateway import (
    FakeGateway,
    deaf,
    drop,
    drop_after,
    refuse,
    refuse_early,
    reply,
    stall,
    trickle,
    truncated,
)

Make = Callable[..., HpcGateway]
HTML = "<html><body>Bad gateway</body></html>"


def test_a_request_says_who_and_what(fake: FakeGateway, gateway: HpcGateway) -> None:
    gateway.create_user()
    (seen,) = fake.seen
    assert seen.headers["Authorization"] == "Bearer good"
    assert seen.headers["User-Agent"] == f"aiida-marketplace-hpc/{__version__}"
    assert len(seen.headers["X-Request-Id"]) == 32
    assert seen.headers["Content-Length"] == "0"


def test_connections_are_used_again(fake: FakeGateway, gateway: HpcGateway) -> None:
    for _ in range(3):
        gateway.heartbeat()
        gateway.ask("stat", path=str(fake.home))
        with pytest.raises(NotFound):
            gateway.check_job_state("nothing")
    assert fake.connections == 1


def test_what_cannot_be_repeated_does_not_go_over_a_connection_that_was_idle(
    fake: FakeGateway, client_of: Make
) -> None:
    for name in ("a", "b"):
        (fake.home / name).touch()
    now = 0.0
    client = client_of(fake.url, clock=lambda: now)
    client.create_user()
    now += 4
    client.create_user()
    assert fake.connections == 1
    now += 4
    client.delete_file("home", "a")
    assert fake.connections == 2
    client.delete_file("home", "b")
    assert fake.connections == 2


def test_each_thread_has_its_own_connection(fake: FakeGateway, gateway: HpcGateway) -> None:
    threads = [threading.Thread(target=gateway.heartbeat) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.seen) == fake.connections == 3


def test_a_netrc_does_not_replace_the_token(
    fake: FakeGateway, gateway: HpcGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password s3cret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    gateway.create_user()
    assert fake.seen[0].headers["Authorization"] == "Bearer good"


# What is repeated


@pytest.mark.parametrize("fault", [drop, drop_after, reply(HTML, 502), reply(HTML, 504), reply(HTML), truncated(10)])
def test_what_can_be_repeated_is(fake: FakeGateway, gateway: HpcGateway, naps: list[float], fault: object) -> None:
    fake.faults.extend([fault, fault])  # type: ignore[list-item]
    assert gateway.create_user()["username"] == "ada"
    assert fake.capabilities() == ["createOrUpdateCollection"] * 3
    assert len(naps) == 2
    assert len({seen.headers["X-Request-Id"] for seen in fake.seen}) == 1


@pytest.mark.parametrize("fault", [drop, drop_after, truncated(10)])
def test_what_was_perhaps_done_is_not_repeated(fake: FakeGateway, gateway: HpcGateway, fault: object) -> None:
    (fake.home / "a").touch()
    fake.faults.append(fault)  # type: ignore[arg-type]
    with pytest.raises(ConnectionFailed, match="broke off before the answer was complete") as raised:
        gateway.delete_file("home", "a")
    assert raised.value.phase is Phase.MAYBE_SENT
    assert len(fake.seen) == 1


@pytest.mark.parametrize("fault", [reply(HTML, 502), reply(HTML, 504), reply(HTML), reply('{"detail": "?"}', 503)])
def test_a_proxys_error_does_not_say_that_nothing_was_done(
    fake: FakeGateway, gateway: HpcGateway, fault: object
) -> None:
    fake.faults.append(fault)  # type: ignore[arg-type]
    with pytest.raises(Unavailable) as raised:
        gateway.delete_file("home", "a")
    assert raised.value.phase is Phase.MAYBE_SENT
    assert len(fake.seen) == 1


def test_the_gateways_own_no_may_be_repeated_for_everything(fake: FakeGateway, gateway: HpcGateway) -> None:
    fake.faults.extend([refuse(Unavailable("the database is down")), None])
    (fake.home / "a").touch()
    gateway.delete_file("home", "a")
    assert not (fake.home / "a").exists()


def test_busy_is_waited_for(fake: FakeGateway, gateway: HpcGateway, naps: list[float]) -> None:
    proxys_own = reply("slowly", 429, Retry_After="7")
    fake.faults.extend([proxys_own, refuse(Busy("slowly", retry_after=0.5), Retry_After="1"), None])
    (fake.home / "a").touch()
    gateway.delete_file("home", "a")
    assert 7 < naps[0] < 8
    assert 0.5 < naps[1] < 1.1


def test_busy_is_waited_for_as_long_as_there_is_time(fake: FakeGateway, gateway: HpcGateway) -> None:
    """A deletion is not repeated when it may have been done; this one was not."""
    (fake.home / "a").touch()
    fake.faults.extend([refuse(Busy("slowly", retry_after=0.1))] * 7)
    gateway.delete_file("home", "a")
    assert not (fake.home / "a").exists()
    fake.faults.extend([refuse(Busy("slowly", retry_after=30))])
    with pytest.raises(Busy, match="slowly"):
        gateway.delete_file("home", "a")


def test_an_upload_that_is_tried_once_waits_for_a_busy_gateway_too(
    fake: FakeGateway, gateway: HpcGateway, tmp_path: Path
) -> None:
    source = tmp_path / "large"
    source.write_bytes(bytes(2 * 1024 * 1024))
    gateway.info()
    fake.faults.extend([refuse(Busy("slowly", retry_after=0.1))] * 3)
    put_file(gateway, source, f"{gateway.info()['home']}/there")
    assert (fake.home / "there").stat().st_size == source.stat().st_size


def test_a_final_error_is_raised_at_once_with_its_request_id(fake: FakeGateway, gateway: HpcGateway) -> None:
    with pytest.raises(NotFound, match="you have no job x") as raised:
        gateway.check_job_state("x")
    assert raised.value.request_id == fake.seen[0].headers["X-Request-Id"]
    assert len(fake.seen) == 1


@pytest.mark.parametrize("status", [505, 600])
def test_the_odd_statuses_of_classic_gateways_are_errors(fake: FakeGateway, gateway: HpcGateway, status: int) -> None:
    fake.faults.append(reply('{"error": "unable to submit job in machine x."}', status, "application/json"))
    with pytest.raises(ServerFault, match="unable to submit job"):
        gateway.cancel_job("x")
    assert len(fake.seen) == 1


def test_a_login_page_is_not_an_answer(fake: FakeGateway, gateway: HpcGateway) -> None:
    fake.faults.extend([reply("<html>Sign in</html>")] * 5)
    with pytest.raises(Unavailable, match=r"text/html that is not the gateway's JSON.*check the url"):
        gateway.heartbeat()


def test_redirects_are_not_followed_and_named_without_their_query(fake: FakeGateway, gateway: HpcGateway) -> None:
    fake.faults.append(reply("", 302, Location="https://login.example.org/auth?state=s3cret"))
    with pytest.raises(
        ConfigurationError, match=r"redirects to https://login\.example\.org/auth, .*correct the url"
    ) as raised:
        gateway.heartbeat()
    assert "s3cret" not in str(raised.value)


def test_an_answer_without_end_is_not_kept(
    fake: FakeGateway, gateway: HpcGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_module, "MAX_ANSWER", 1000)
    fake.faults.append(reply('{"x": "' + "x" * 1000 + '"}', content_type="application/json"))
    with pytest.raises(Unavailable, match="larger than 1000 bytes"):
        gateway.heartbeat()
    assert len(fake.seen) == 1


def test_an_answer_before_the_body_was_read_is_heard(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    gateway.info()
    big = tmp_path / "big"
    big.write_bytes(bytes(20_000_000))
    for _ in range(3):
        fake.faults.append(refuse_early(NotFound("no such thing")))
        with pytest.raises(NotFound, match="no such thing"):
            gateway.put_file(big, str(fake.home / "big"))


# Connections that cannot be made


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_refused_connection_is_not_sent_and_repeated_for_everything(client_of: Make, naps: list[float]) -> None:
    with pytest.raises(ConnectionFailed, match="refuses connections: check the url") as raised:
        client_of(f"http://127.0.0.1:{free_port()}").delete_file("home", "a")
    assert raised.value.phase is Phase.NOT_SENT
    assert len(naps) == 4


def test_a_name_that_does_not_resolve_is_not_sent(client_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConnectionFailed, match="cannot be resolved") as raised:
        client_of("http://hpc.example.org").heartbeat()
    assert raised.value.phase is Phase.NOT_SENT


def test_a_resolver_that_hangs_holds_nobody_up(
    fake: FakeGateway, client_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's resolver may take half a minute; whoever asks again waits for the same answer."""
    resolving, goes_on, real = [], threading.Event(), socket.getaddrinfo

    def hanging(host: str, *arguments: Any, **options: Any) -> Any:
        if host != "hpc.example.org" or socket.AI_NUMERICHOST in arguments:
            return real(host, *arguments, **options)
        resolving.append(threading.current_thread())
        goes_on.wait(10)
        return real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    client = client_of(fake.url.replace("127.0.0.1", "hpc.example.org"), timeouts=QUICK)
    try:
        for _ in range(2):
            with pytest.raises(DeadlineExceeded, match="cannot be reached in time") as raised:
                client.heartbeat()
            assert raised.value.phase is Phase.NOT_SENT
        assert len(resolving) == 1
    finally:
        goes_on.set()
    resolving[0].join(5)
    assert "running" in client.heartbeat()["message"]
    assert len(resolving) == 2


def test_the_next_address_is_tried(fake: FakeGateway, client_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def two(host: str, port: Any, *arguments: Any, **options: Any) -> Any:
        if host != "hpc.example.org" or socket.AI_NUMERICHOST in arguments:
            return real(host, port, *arguments, **options)
        return [row for address in ("127.0.0.2", "127.0.0.1") for row in real(address, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    assert client_of(fake.url.replace("127.0.0.1", "hpc.example.org")).heartbeat()
    assert fake.connections == 1


def test_a_network_that_is_down_is_not_sent(client_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*arguments: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", down)
    with pytest.raises(ConnectionFailed, match=r"before the request was sent \(Network is unreachable\)") as raised:
        client_of("http://127.0.0.1:1").heartbeat()
    assert raised.value.phase is Phase.NOT_SENT


def test_a_dead_proxy_is_named(client_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConnectionFailed, match="proxy on the way") as raised:
        client_of("http://hpc.example.org").heartbeat()
    assert raised.value.phase is Phase.NOT_SENT


def test_asking_a_proxy_for_a_tunnel_is_not_sending_the_request(
    fake: FakeGateway, client_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", fake.url)
    with pytest.raises(ConnectionFailed, match="proxy on the way") as raised:
        client_of("https://hpc.example.org").delete_file("home", "a")
    assert raised.value.phase is Phase.NOT_SENT
    assert fake.connections == 5


def test_a_proxy_of_the_environment_is_used(
    fake: FakeGateway, client_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", fake.url)
    fake.faults.append(drop)
    with pytest.raises(ConnectionFailed) as raised:
        client_of("http://hpc.example.org").delete_file("home", "a")
    assert raised.value.phase is Phase.MAYBE_SENT
    assert fake.seen[0].target == "http://hpc.example.org/api/v1/file/delete/home?filename=a"


# Deadlines

QUICK = Timeouts(connect=0.2, read=0.15, total=0.4)


def test_silence_ends_in_an_error(fake: FakeGateway, client_of: Make) -> None:
    fake.faults.extend([stall] * 5)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="did not answer in time") as raised:
        client_of(fake.url, timeouts=QUICK).heartbeat()
    assert time.monotonic() - began < 1
    assert raised.value.phase is Phase.MAYBE_SENT


def test_an_endless_answer_ends_in_an_error(fake: FakeGateway, client_of: Make) -> None:
    fake.faults.extend([trickle] * 5)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client_of(fake.url, timeouts=QUICK).heartbeat()
    assert 0.3 < time.monotonic() - began < 1


def test_a_host_that_does_not_accept_ends_in_an_error(client_of: Make) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(3)]  # Fill the queue, so that the kernel lets nobody in.
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="cannot be reached in time") as raised:
            client_of(f"http://127.0.0.1:{address[1]}", timeouts=QUICK).heartbeat()
        assert time.monotonic() - began < 1
        assert raised.value.phase is Phase.NOT_SENT
        for one in waiting:
            one.close()


def test_an_upload_that_is_not_taken_ends_in_an_error(fake: FakeGateway, client_of: Make, tmp_path: Path) -> None:
    client = client_of(fake.url, timeouts=QUICK)
    client.info()
    big = tmp_path / "big"
    big.write_bytes(bytes(30_000_000))
    fake.faults.extend([deaf] * 5)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client.put_file(big, str(fake.home / "big"))
    assert time.monotonic() - began < 2


def test_a_long_transfer_may_last_longer_than_a_call(fake: FakeGateway, client_of: Make, tmp_path: Path) -> None:
    client = client_of(fake.url, timeouts=QUICK)
    client.info()
    (fake.home / "f").write_bytes(bytes(100))

    def slowly(handler: object, answer: Callable[[], object]) -> None:
        right = answer()
        handler.send_head(right)  # type: ignore[attr-defined]
        for at in range(0, len(right.body), 40):  # type: ignore[attr-defined]
            time.sleep(0.08)
            handler.wfile.write(right.body[at : at + 40])  # type: ignore[attr-defined]

    fake.faults.append(slowly)
    began = time.monotonic()
    client.get(str(fake.home / "f"), tmp_path / "f")
    assert time.monotonic() - began > QUICK.total


# Tokens


def test_a_refused_token_from_a_file_is_read_again_once(fake: FakeGateway, client_of: Make, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    token.chmod(0o600)
    fake.tokens = {"new"}

    class Renewing(FileToken):
        def forget(self, refused: str) -> None:
            assert refused == "old"
            token.write_text("new")
            super().forget(refused)

    (fake.home / "a").touch()
    client_of(fake.url, token_source=Renewing(str(token))).delete_file("home", "a")
    assert [seen.headers["Authorization"] for seen in fake.seen] == ["Bearer old", "Bearer new"]


def test_the_same_token_is_not_sent_twice(fake: FakeGateway, client_of: Make) -> None:
    client = client_of(fake.url, token_source=TokenSource.parse("command:echo bad"))
    with pytest.raises(Unauthorized, match="Invalid Authentication token"):
        client.create_user()
    assert len(fake.seen) == 1


def test_without_a_token_nothing_is_sent_but_a_heartbeat(fake: FakeGateway, client_of: Make) -> None:
    client = client_of(fake.url, token_source="env:MP_ACCESS_TOKEN")
    with pytest.raises(TokenUnavailable):
        client.create_user()
    assert client.heartbeat()["message"]
    assert "Authorization" not in fake.seen[0].headers
    assert len(fake.seen) == 1


def test_no_error_contains_the_token(fake: FakeGateway, client_of: Make) -> None:
    client = client_of(fake.url, token_source=StaticToken("s3cret"))
    for fault in (None, drop, drop_after, reply(HTML, 502), truncated(3)):
        fake.faults.extend([fault] * 5)
        with pytest.raises((Unauthorized, ConnectionFailed, Unavailable)) as raised:
            client.delete_file("home", "a")
        assert "s3cret" not in f"{raised.value!r} {raised.value} {client!r}"
        fake.faults.clear()


# TLS


@pytest.fixture
def tls_fake(tmp_path: Path, certificate: Path) -> Iterator[FakeGateway]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = FakeGateway(tmp_path / "tls", tls=context)
    yield server
    server.close()


def test_an_untrusted_certificate_says_what_to_do(
    tls_fake: FakeGateway, client_of: Make, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match=r"is not trusted.*REQUESTS_CA_BUNDLE"):
        client_of(tls_fake.url).heartbeat()
    assert tls_fake.seen == []
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    client = client_of(tls_fake.url)
    assert client.heartbeat()["message"]
    tls_fake.faults.append(drop)
    with pytest.raises(ConnectionFailed) as raised:
        client.delete_file("home", "a")
    assert raised.value.phase is Phase.MAYBE_SENT


def test_a_certificate_file_that_is_not_there_is_named(
    tls_fake: FakeGateway, client_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent.pem")
    with pytest.raises(ConfigurationError, match=r"/nonexistent\.pem.*REQUESTS_CA_BUNDLE"):
        client_of(tls_fake.url).heartbeat()


def test_https_to_a_gateway_without_tls_says_so(fake: FakeGateway, client_of: Make) -> None:
    with pytest.raises(ConfigurationError, match="does not speak TLS"):
        client_of(fake.url.replace("http:", "https:")).heartbeat()
