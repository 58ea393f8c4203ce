"""G8: memory is O(chunk) on both sides, whatever the file's size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

MIB = 1024 * 1024
SIZE = 400 * MIB
ALLOWED = 64 * MIB


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
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as exc:
        pytest.skip(f"the peak of the memory cannot be reset here: {exc}")
    source = tmp_path / "large"
    with source.open("wb") as file:
        for _ in range(SIZE // MIB):
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
    print(f"\n{SIZE // MIB} MiB up and down: the peak of client and gateway grew by {grown / MIB:.1f} MiB")
    assert (tmp_path / "again").stat().st_size == SIZE
    assert grown < ALLOWED
