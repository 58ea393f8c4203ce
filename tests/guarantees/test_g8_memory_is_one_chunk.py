"""G8: memory is O(chunk) on both sides, whatever the file's size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.platform import APP_ID, Platform
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

MIB = 1024 * 1024
SIZE = 400 * MIB
ALLOWED = 64 * MIB
CODED = 160 * MIB
ALLOWED_CODED = 96 * MIB
"""Each of client, platform and gateway holds a message of 6 MiB, as text and in parts of it, now and then in copies."""


def status(name: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def test_client_and_gateway_together_hold_a_few_chunks(
    transport: MarketplaceHpcTransport, home: str, tmp_path: Path
) -> None:
    """Both run in this process here, so that the peak of its memory is the sum of theirs."""
    grown = growth(transport, home, tmp_path, SIZE)
    print(f"\n{SIZE // MIB} MiB up and down: the peak of client and gateway grew by {grown / MIB:.1f} MiB")
    assert grown < ALLOWED


@pytest.mark.services
@pytest.mark.parametrize("way", ["envelope", "base64"])
def test_where_content_is_coded_they_hold_a_few_messages(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the platform, which holds whole bodies, in this process, too."""
    monkeypatch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])
    with (
        ServedGateway(tmp_path / "gateway", FakeBackend(), text_only=way == "base64") as served,
        Platform(served.url, only_published=way == "envelope", undeclared="refuse") as platform,
        MarketplaceHpcTransport(machine="cluster", url=platform.url, app_id=APP_ID) as transport,
    ):
        grown = growth(transport, transport.normalize("."), tmp_path, CODED)
        assert {request.status for request in platform.proxy.requests} == {200}
        coded = sum(request.body + request.answer for request in platform.proxy.requests)
    print(f"\n{CODED // MIB} MiB up and down, {way}: the peak grew by {grown / MIB:.1f} MiB")
    assert coded > CODED * 8 // 3
    assert grown < ALLOWED_CODED


def growth(transport: MarketplaceHpcTransport, home: str, tmp_path: Path, size: int) -> int:
    """By how many bytes the peak of this process grows while a file goes up and comes back."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as exc:
        pytest.skip(f"the peak of the memory cannot be reset here: {exc}")
    source = tmp_path / "large"
    with source.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(4096) * 256)
    # Once with a small file, so that what is loaded and pooled is there already.
    (tmp_path / "small").write_bytes(b"x")
    transport.put(tmp_path / "small", f"{home}/small")
    transport.get(f"{home}/small", tmp_path / "small-again")
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    transport.put(source, f"{home}/large")
    transport.get(f"{home}/large", tmp_path / "again")
    grown = status("VmHWM") - before
    assert (tmp_path / "again").stat().st_size == size
    return grown
