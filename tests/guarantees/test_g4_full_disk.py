"""G4, on a disk that is full or read-only and in a folder that vanishes: an error of the right kind, and no partial file."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiida_marketplace_hpc.client.files import RemoteDisk
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.gateway.roots import PRIVATE
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway

MIB = 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    if os.getuid() != 0:
        pytest.skip("only root can mount a file system; run as root")
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def disk(
    tmp_path: Path, small_disk: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RemoteDisk]:
    monkeypatch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])
    with ServedGateway(tmp_path / "gateway", backend, root=(f"small={small_disk}",)) as served:
        gateway = HpcGateway(served.url, sleep=lambda _: None)
        yield RemoteDisk(gateway)
        gateway.close()


def visible(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != PRIVATE)


@pytest.mark.parametrize("size", [6 * MIB, 12 * MIB], ids=["in one piece", "in parts"])
def test_a_full_disk(disk: RemoteDisk, small_disk: Path, tmp_path: Path, size: int) -> None:
    (small_disk / "filler").write_bytes(bytes(12 * MIB))
    (small_disk / "file").write_bytes(b"old")
    local = tmp_path / "local"
    local.write_bytes(os.urandom(size))
    with pytest.raises(OSError) as raised:
        disk.putfile(local, small_disk / "file")
    assert raised.value.errno == errno.ENOSPC
    assert (small_disk / "file").read_bytes() == b"old"
    assert visible(small_disk) == ["file", "filler"]
    (small_disk / "filler").unlink()
    disk.putfile(local, small_disk / "file")
    assert (small_disk / "file").read_bytes() == local.read_bytes()


def test_a_full_disk_in_the_middle_of_a_folder(disk: RemoteDisk, small_disk: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(8):
        (tree / f"file{number}").write_bytes(os.urandom(3 * MIB))
    with pytest.raises(OSError) as raised:
        disk.puttree(tree, small_disk / "tree")
    assert raised.value.errno == errno.ENOSPC
    for name in visible(small_disk / "tree"):
        assert (small_disk / "tree" / name).read_bytes() == (tree / name).read_bytes()


def test_leftovers_make_room(disk: RemoteDisk, small_disk: Path, tmp_path: Path) -> None:
    """What is kept for others to go on with is not worth more than a file that is to be written now."""
    first = tmp_path / "first"
    first.write_bytes(os.urandom(9 * MIB))
    disk.putfile(first, small_disk / "first")
    (small_disk / "first").unlink()  # Still kept, for another name.
    second = tmp_path / "second"
    second.write_bytes(os.urandom(12 * MIB))
    disk.putfile(second, small_disk / "second")
    assert (small_disk / "second").read_bytes() == second.read_bytes()


def test_a_full_local_disk(disk: RemoteDisk, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk / "cache"))
    home = Path(disk.normalize("."))
    for name, size in (("middle", 7 * MIB), ("large", 20 * MIB)):
        (home / name).write_bytes(os.urandom(size))
    (small_disk / "filler").write_bytes(bytes(12 * MIB))
    for name in ("middle", "large"):
        with pytest.raises(OSError) as raised:
            disk.getfile(home / name, small_disk / name)
        assert raised.value.errno == errno.ENOSPC
    assert visible(small_disk) == ["cache", "filler"]


def test_a_read_only_folder(local_gateway: GatewayProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a gateway that runs as an ordinary user: root may write everywhere."""
    monkeypatch.setenv("MP_ACCESS_TOKEN", local_gateway.token)
    with HpcGateway(local_gateway.url) as gateway:
        disk = RemoteDisk(gateway)
        closed = f"{disk.normalize('.')}/closed"
        disk.mkdir(closed)
        disk.chmod(closed, 0o500)
        for size in (10, 9 * MIB):
            (tmp_path / "local").write_bytes(bytes(size))
            with pytest.raises(PermissionError):
                disk.putfile(tmp_path / "local", f"{closed}/file")
        (tmp_path / "tree").mkdir()
        with pytest.raises(PermissionError):
            disk.puttree(tmp_path / "tree", f"{closed}/tree")
        assert disk.listdir(closed) == []
        disk.chmod(closed, 0o700)
        disk.rmtree(closed)


@pytest.mark.parametrize("size", [10, 9 * MIB], ids=["in one piece", "in parts"])
def test_a_vanished_folder(disk: RemoteDisk, tmp_path: Path, size: int) -> None:
    home = Path(disk.normalize("."))
    (tmp_path / "local").write_bytes(bytes(size))
    with pytest.raises(FileNotFoundError):
        disk.putfile(tmp_path / "local", home / "gone" / "file")
    with pytest.raises(FileNotFoundError):
        disk.getfile(home / "gone" / "file", tmp_path / "back")
    (home / "there").write_bytes(bytes(size))
    with pytest.raises(FileNotFoundError):
        disk.getfile(home / "there", tmp_path / "gone" / "back")
