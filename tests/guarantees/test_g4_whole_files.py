"""G4: no file appears under its final name with wrong or missing bytes."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.session import GatewaySession
from aiida_marketplace_hpc.errors import MarketplaceHpcError
from aiida_marketplace_hpc.gateway.roots import PRIVATE
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

SIZE = 3_000_000
DAMAGED = 100_000


def send_part_of_an_upload(served: ServedGateway, target: str, announced: int, sent: bytes) -> None:
    """Begin an upload as a client that dies in the middle of it."""
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        head = (
            f"PUT /api/v1/file/upload/home?filename={target} HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {TOKENS[ALICE]}\r\nContent-Length: {announced}\r\n\r\n"
        )
        connection.sendall(head.encode() + sent)


@pytest.mark.parametrize("existing", [None, b"the old content"])
def test_an_upload_that_breaks_off_changes_nothing(
    served: ServedGateway, transport: MarketplaceHpcTransport, home: str, tmp_path: Path, existing: bytes | None
) -> None:
    if existing is not None:
        (tmp_path / "old").write_bytes(existing)
        transport.put(tmp_path / "old", f"{home}/file")
    send_part_of_an_upload(served, "file", SIZE, os.urandom(SIZE // 2))
    served.stop()  # The gateway has then dealt with everything that reached it.
    folder = Path(home)
    assert [path.name for path in folder.iterdir() if path.name != PRIVATE] == ([] if existing is None else ["file"])
    if existing is not None:
        assert (folder / "file").read_bytes() == existing
    assert list(folder.glob(f"{PRIVATE}/unfinished/*")) == []


def test_of_several_writers_of_one_name_one_wins_with_a_whole_file(
    transport: MarketplaceHpcTransport, home: str, tmp_path: Path
) -> None:
    contents = [os.urandom(SIZE) for _ in range(6)]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                seen.add(hashlib.sha256(Path(home, "file").read_bytes()).hexdigest())
            except FileNotFoundError:
                pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    writers = [
        threading.Thread(target=transport.putfile, args=(tmp_path / str(number), f"{home}/file"))
        for number in range(len(contents))
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    watcher.join()
    assert Path(home, "file").read_bytes() in contents
    assert seen <= {hashlib.sha256(content).hexdigest() for content in contents}


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_download_that_is_damaged_on_the_way_leaves_nothing(
    transport: MarketplaceHpcTransport, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    Path(home, "file").write_bytes(os.urandom(SIZE))
    original = transfer.Receiver.receive

    def damaged(self: transfer.Receiver, read: object) -> object:
        position = 0

        def broken(size: int) -> bytes:
            nonlocal position
            chunk: bytes = read(size)  # type: ignore[operator]
            begin, position = position, position + len(chunk)
            # In its first part: so nothing of any attempt can be kept.
            if begin <= DAMAGED < position:
                middle = DAMAGED - begin
                return (
                    chunk[:middle]
                    if damage == "cut"
                    else chunk[:middle] + bytes([chunk[middle] ^ 1]) + chunk[middle + 1 :]
                )
            return b"" if damage == "cut" and begin > DAMAGED else chunk

        return original(self, broken)

    monkeypatch.setattr(transfer.Receiver, "receive", damaged)
    monkeypatch.setattr(GatewaySession, "_sleep", lambda *_: None, raising=False)
    (tmp_path / "there").mkdir()
    with pytest.raises(MarketplaceHpcError):
        transport.get(f"{home}/file", tmp_path / "there" / "file")
    assert list((tmp_path / "there").iterdir()) == []
