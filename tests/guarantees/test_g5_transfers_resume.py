"""G5: a transfer that broke off goes on from where it stopped, in the same call, in another process, under another name."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from urllib3.util import connection

from aiida_marketplace_hpc.bundle import PART
from aiida_marketplace_hpc.client import kept
from aiida_marketplace_hpc.client.files import RemoteDisk
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.client.retry import RetryPolicy
from aiida_marketplace_hpc.client.session import Timeouts
from aiida_marketplace_hpc.errors import MarketplaceHpcError
from aiida_marketplace_hpc.gateway import streams
from aiida_marketplace_hpc.gateway.roots import PRIVATE
from aiida_marketplace_hpc.testing.faults import (
    CutAnswer,
    CutRequest,
    Duplicate,
    Fault,
    FlipInAnswer,
    FlipInRequest,
    LoseAnswer,
    Refuse,
    StallAnswer,
    StallRequest,
)
from aiida_marketplace_hpc.testing.forwarder import bounded
from aiida_marketplace_hpc.testing.proxy import FaultyProxy
from aiida_marketplace_hpc.testing.served import ServedGateway

MIB = 1024 * 1024
SIZE = 40 * MIB + 12345
HALF = 20 * MIB
LOST = 14 * MIB
"""Bytes that may have to be sent again: what was in the buffers of four sockets when a connection was reset."""


@pytest.fixture
def proxy(served: ServedGateway) -> Iterator[FaultyProxy]:
    with FaultyProxy(served.url) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _setting(served: ServedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    set_options = connection._set_socket_options

    def set_options_and_bound(sock: socket.socket, options: Any) -> None:
        bounded(sock)
        set_options(sock, options)

    monkeypatch.setattr(connection, "_set_socket_options", set_options_and_bound)
    # So that nobody waits here as long as in earnest.
    monkeypatch.setattr(streams, "STALLED", 1.0)
    served.gateway.keep = replace(served.gateway.keep, patience=1.0)


@pytest.fixture
def client(proxy: FaultyProxy) -> Iterator[Callable[..., RemoteDisk]]:
    """Makes clients that know nothing of each other, as processes do."""
    gateways: list[HpcGateway] = []

    def make(attempts: int = 5) -> RemoteDisk:
        gateway = HpcGateway(
            proxy.url,
            timeouts=Timeouts(connect=5, read=2, total=10),
            retry=RetryPolicy(attempts=attempts),
            sleep=lambda _: None,
        )
        gateway.info()
        gateways.append(gateway)
        return RemoteDisk(gateway)

    yield make
    for gateway in gateways:
        gateway.close()


@pytest.fixture
def home(served: ServedGateway, client: Callable[..., RemoteDisk]) -> Path:
    return Path(client().normalize("."))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(SIZE))
    return path


def sent(proxy: FaultyProxy) -> int:
    """Bytes of all bodies that reached the proxy."""
    return sum(request.body for request in proxy.requests)


def received(proxy: FaultyProxy) -> int:
    """Bytes of all answers that the proxy passed on."""
    return sum(request.answer for request in proxy.requests)


def unfinished(home: Path) -> list[Path]:
    return [path for path in (home / PRIVATE / "unfinished").iterdir() if not path.name.endswith(".complete")]


def kept_downloads(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("unfinished/*"))


UP: list[Fault] = [
    CutRequest(HALF),
    FlipInRequest(HALF),
    StallRequest(HALF),
    LoseAnswer(504),
    Refuse(502),
    Duplicate(),
    CutAnswer(10),
]
DOWN: list[Fault] = [
    CutAnswer(HALF),
    CutAnswer(HALF, "close"),
    CutAnswer(HALF, "whole"),
    FlipInAnswer(HALF),
    StallAnswer(HALF),
    Refuse(502),
    LoseAnswer(504),
]


@pytest.mark.parametrize("fault", UP, ids=repr)
def test_an_upload_goes_on_in_the_same_call(
    proxy: FaultyProxy, client: Callable[..., RemoteDisk], home: Path, large: Path, fault: Fault
) -> None:
    disk = client()
    injected = proxy.inject(fault, only=lambda request: request.method == "PUT" and "offset=" in request.query)
    before = sent(proxy)
    disk.putfile(large, home / "there")
    assert injected.hit == 1
    assert (home / "there").read_bytes() == large.read_bytes()
    if not isinstance(fault, (Refuse, FlipInRequest)):  # The proxy reads a body to its end, refused or not.
        assert sent(proxy) - before < SIZE + LOST
    assert unfinished(home) == []


@pytest.mark.parametrize("fault", DOWN, ids=repr)
def test_a_download_goes_on_in_the_same_call(
    proxy: FaultyProxy, client: Callable[..., RemoteDisk], home: Path, large: Path, tmp_path: Path, fault: Fault
) -> None:
    (home / "there").write_bytes(large.read_bytes())
    (home / "there").chmod(0o640)
    disk = client()
    injected = proxy.inject(fault, only=lambda request: request.method == "GET" and "download" in request.path)
    asked = len(proxy.requests)
    (tmp_path / "into").mkdir()
    disk.getfile(home / "there", tmp_path / "into" / "back")
    assert injected.hit == 1
    assert (tmp_path / "into" / "back").read_bytes() == large.read_bytes()
    assert os.listdir(tmp_path / "into") == ["back"]
    # What the first answer still had on its way when the client turned away from it is not asked for again.
    _, *again = proxy.requests[asked:]
    whole = isinstance(fault, (LoseAnswer, Refuse))  # Of which nothing arrived.
    assert sum(request.answer for request in again) < (SIZE if whole else SIZE - HALF) + LOST
    assert kept_downloads(tmp_path) == []


def test_an_upload_goes_on_in_another_process_from_another_file_to_another_name(
    proxy: FaultyProxy, client: Callable[..., RemoteDisk], home: Path, large: Path, tmp_path: Path
) -> None:
    """As AiiDA repeats it: from a new temporary file into a new folder."""
    first = client(attempts=1)
    (home / "first").mkdir()
    proxy.inject(CutRequest(HALF))
    before = sent(proxy)
    with pytest.raises(MarketplaceHpcError):
        first.put(large, home / "first" / "input")
    assert os.listdir(home / "first") == []
    (home / "first").rmdir()
    (home / "second").mkdir()
    other = tmp_path / "other"
    other.write_bytes(large.read_bytes())
    client().put(other, home / "second" / "input")
    assert (home / "second" / "input").read_bytes() == large.read_bytes()
    assert sent(proxy) - before < SIZE + LOST


def test_a_download_goes_on_in_another_process_into_another_folder(
    proxy: FaultyProxy, client: Callable[..., RemoteDisk], home: Path, large: Path, tmp_path: Path
) -> None:
    (home / "there").write_bytes(large.read_bytes())
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    proxy.inject(CutAnswer(HALF))
    before = received(proxy)
    with pytest.raises(MarketplaceHpcError):
        client(attempts=1).get(home / "there", tmp_path / "first")
    assert os.listdir(tmp_path / "first") == []
    client().get(home / "there", tmp_path / "second")
    assert (tmp_path / "second" / "there").read_bytes() == large.read_bytes()
    assert received(proxy) - before < SIZE + LOST
    assert kept_downloads(tmp_path) == []


def test_a_file_that_changed_meanwhile_is_not_put_together_from_two(
    proxy: FaultyProxy, client: Callable[..., RemoteDisk], home: Path, large: Path, tmp_path: Path
) -> None:
    """On either side, whether the other process or the same call goes on."""
    there = home / "there"
    there.write_bytes(large.read_bytes())
    proxy.inject(CutAnswer(HALF))
    with pytest.raises(MarketplaceHpcError):
        client(attempts=1).getfile(there, tmp_path / "back")
    there.write_bytes(bytes(SIZE))
    client().getfile(there, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == bytes(SIZE)

    proxy.inject(CutRequest(HALF))
    with pytest.raises(MarketplaceHpcError):
        client(attempts=1).putfile(large, home / "up")
    with large.open("r+b") as file:
        file.write(b"changed")
    client().putfile(large, home / "up")
    assert (home / "up").read_bytes() == large.read_bytes()


def test_a_folder_goes_on_after_its_last_whole_part(
    proxy: FaultyProxy, client: Callable[..., RemoteDisk], home: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    contents = {f"sub{number % 5}/file{number}": os.urandom(300_000) for number in range(60)}
    contents["sub1/large"] = os.urandom(9 * MIB)
    for name, content in contents.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    (tree / "empty").mkdir()
    (tree / "sub0").chmod(0o500)
    size = sum(map(len, contents.values()))

    for after in (HALF, 2 * MIB, 3 * MIB):
        proxy.inject(CutRequest(after), only=lambda request: request.method == "PUT")
    before = sent(proxy)
    client().puttree(tree, home / "up")
    assert {name: (home / "up" / name).read_bytes() for name in contents} == contents
    assert stat.S_IMODE((home / "up" / "sub0").stat().st_mode) == 0o500
    assert (home / "up" / "empty").is_dir()
    # A segment that was interrupted is sent again.
    assert sent(proxy) - before < size + 3 * 8 * MIB

    injected = proxy.inject(CutAnswer(5 * MIB), times=3, only=lambda request: request.method == "GET")
    before = received(proxy)
    client().gettree(home / "up", tmp_path / "down")
    assert injected.hit == 3
    assert {name: (tmp_path / "down" / name).read_bytes() for name in contents} == contents
    assert stat.S_IMODE((tmp_path / "down" / "sub0").stat().st_mode) == 0o500
    assert received(proxy) - before < size + 3 * LOST


def test_the_same_bytes_for_another_name_need_no_sending(
    proxy: FaultyProxy, client: Callable[..., RemoteDisk], home: Path, large: Path
) -> None:
    disk = client()
    disk.putfile(large, home / "first")
    before = sent(proxy)
    disk.putfile(large, home / "second")
    assert sent(proxy) - before < 10_000
    assert (home / "second").read_bytes() == large.read_bytes()
    assert not os.path.samefile(home / "first", home / "second")


def test_what_a_job_changed_meanwhile_is_not_taken_for_the_same_bytes(
    client: Callable[..., RemoteDisk], home: Path, large: Path
) -> None:
    disk = client()
    disk.putfile(large, home / "first")
    with (home / "first").open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"changed in place")
    disk.putfile(large, home / "second")
    assert (home / "second").read_bytes() == large.read_bytes()


def test_what_is_held_and_wrong_is_found_out(
    proxy: FaultyProxy, client: Callable[..., RemoteDisk], home: Path, large: Path
) -> None:
    """After a crash of the cluster's machine, say: blocks that never reached the disk."""
    proxy.inject(CutRequest(HALF))
    with pytest.raises(MarketplaceHpcError):
        client(attempts=1).putfile(large, home / "there")
    (held,) = unfinished(home)
    content = held.read_bytes()
    assert len(content) >= HALF - LOST
    # Another file of the same length: what the gateway knows by heart does not help.
    held.unlink()
    held.write_bytes(bytes(len(content)))
    client().putfile(large, home / "there")
    assert (home / "there").read_bytes() == large.read_bytes()


def test_several_that_upload_the_same_content_share_the_work(
    proxy: FaultyProxy, client: Callable[..., RemoteDisk], home: Path, large: Path
) -> None:
    disks = [client() for _ in range(4)]
    threads = [
        threading.Thread(target=disk.putfile, args=(large, home / f"copy{number}")) for number, disk in enumerate(disks)
    ]
    before = sent(proxy)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(len(disks)):
        assert (home / f"copy{number}").read_bytes() == large.read_bytes()
    assert sent(proxy) - before < 3 * SIZE


@pytest.mark.parametrize(
    "strict",
    [
        {"max_body": MIB},
        {"buffered": True},
        {"max_body": MIB, "known_headers_only": True, "refuse_chunked": True, "buffered": True},
    ],
    ids=str,
)
def test_strict_proxies_let_everything_pass(
    served: ServedGateway, home: Path, large: Path, tmp_path: Path, strict: dict[str, object]
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(8):
        (tree / f"file{number}").write_bytes(os.urandom(400_000))
    (tree / "middle").write_bytes(os.urandom(3 * MIB))
    with FaultyProxy(served.url, **strict) as proxy:  # type: ignore[arg-type]
        gateway = HpcGateway(proxy.url, sleep=lambda _: None)
        disk = RemoteDisk(gateway)
        disk.putfile(large, home / "large")
        disk.putfile(tree / "middle", home / "middle")
        disk.puttree(tree, home / "tree")
        disk.getfile(home / "large", tmp_path / "large-back")
        disk.gettree(home / "tree", tmp_path / "tree-back")
        gateway.close()
        assert {request.body for request in proxy.requests if request.status == 200} <= set(range(MIB + 1)) or (
            "max_body" not in strict
        )
    assert (home / "large").read_bytes() == large.read_bytes() == (tmp_path / "large-back").read_bytes()
    for name in os.listdir(tree):
        assert (
            (home / "tree" / name).read_bytes()
            == (tree / name).read_bytes()
            == (tmp_path / "tree-back" / name).read_bytes()
        )
    assert (home / "middle").read_bytes() == (tree / "middle").read_bytes()


@pytest.mark.parametrize("name", ["large", "middle"])
def test_a_proxy_that_passes_only_the_first_mebibyte_on(
    proxy: FaultyProxy, client: Callable[..., RemoteDisk], home: Path, large: Path, tmp_path: Path, name: str
) -> None:
    source = large
    if name == "middle":
        source = tmp_path / "middle"
        source.write_bytes(os.urandom(3 * MIB))
    disk = client()
    proxy.inject(CutRequest(MIB), times=None, only=lambda request: request.method == "PUT")
    disk.putfile(source, home / "up")
    assert (home / "up").read_bytes() == source.read_bytes()
    proxy.clear()
    proxy.inject(CutAnswer(MIB, "whole"), times=None, only=lambda request: "download" in request.path)
    disk.getfile(home / "up", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == source.read_bytes()


def test_a_proxy_that_passes_hardly_anything_ends_in_an_error_and_leaves_nothing(
    proxy: FaultyProxy, client: Callable[..., RemoteDisk], home: Path, large: Path, tmp_path: Path
) -> None:
    disk = client()
    proxy.inject(CutRequest(PART // 2), times=None, only=lambda request: request.method == "PUT")
    with pytest.raises(MarketplaceHpcError):
        disk.putfile(large, home / "up")
    proxy.clear()
    assert os.listdir(home) == [PRIVATE]
    (home / "there").write_bytes(large.read_bytes())
    proxy.inject(CutAnswer(PART // 2), times=None, only=lambda request: "download" in request.path)
    (tmp_path / "into").mkdir()
    with pytest.raises(MarketplaceHpcError):
        disk.getfile(home / "there", tmp_path / "into" / "down")
    assert os.listdir(tmp_path / "into") == []
    assert kept_downloads(tmp_path) == []


def test_unfinished_downloads_are_bounded_in_age_and_size(
    proxy: FaultyProxy,
    client: Callable[..., RemoteDisk],
    home: Path,
    large: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(name: str) -> None:
        (home / name).write_bytes(large.read_bytes())
        proxy.inject(CutAnswer(HALF))
        with pytest.raises(MarketplaceHpcError):
            client(attempts=1).getfile(home / name, tmp_path / "back")

    interrupted("first")
    (first,) = kept_downloads(tmp_path)
    os.utime(first, (1e9, 1e9))
    interrupted("second")
    (second,) = kept_downloads(tmp_path)
    assert second.name != first.name
    monkeypatch.setattr(kept, "_SIZE", MIB)
    interrupted("third")
    (third,) = kept_downloads(tmp_path)
    assert third.name not in (first.name, second.name)
    assert stat.S_IMODE(third.parent.stat().st_mode) == 0o700
