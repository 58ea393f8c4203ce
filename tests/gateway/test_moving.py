"""From one file system to another: whole at the old place, at the new one, or at both; copying and measuring besides."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiida_marketplace_hpc.errors import FileError, Forbidden, Unavailable
from aiida_marketplace_hpc.gateway import moving, trees
from aiida_marketplace_hpc.gateway.files import Files
from aiida_marketplace_hpc.gateway.roots import PRIVATE, Root, Roots


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def scratch(home: Path) -> Iterator[Path]:
    """A folder on another file system."""
    try:
        folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    except OSError:
        pytest.skip("needs a second file system: mount a tmpfs at /dev/shm")
    if folder.stat().st_dev == home.stat().st_dev:
        folder.rmdir()
        pytest.skip("needs a second file system: /dev/shm is on the same as the temporary folder")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def files(home: Path, scratch: Path) -> Files:
    return Files(Roots([Root("home", str(home)), Root("scratch", str(scratch))]))


def seed(folder: Path) -> Path:
    (folder / "d" / "sub").mkdir(parents=True)
    (folder / "d" / "sub" / "f").write_bytes(os.urandom(3_000_000))
    (folder / "d" / "run").write_text("#!/bin/sh")
    (folder / "d" / "run").chmod(0o755)
    (folder / "d" / "link").symlink_to("sub/f")
    (folder / "d" / "away").symlink_to("/etc/passwd")
    os.mkfifo(folder / "d" / "pipe")
    (folder / "d" / "closed").mkdir()
    (folder / "d" / "closed" / "x").write_text("x")
    (folder / "d" / "closed").chmod(0o555)
    for path in (folder / "d").rglob("*"):
        os.utime(path, (1_600_000_000, 1_700_000_000), follow_symlinks=False)
    (folder / "d").chmod(0o555)
    return folder / "d"


def tree(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {".": folder.lstat().st_mode}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = status.st_mode, int(status.st_mtime), content
    return found


def nothing_is_left(*roots: Path) -> bool:
    return not any(
        (root / PRIVATE / name).is_dir() and os.listdir(root / PRIVATE / name)
        for root in roots
        for name in ("staging", "unfinished")
    )


def test_a_folder_moves_to_another_file_system(files: Files, home: Path, scratch: Path) -> None:
    before = tree(seed(home))
    files.rename(f"{home}/d", f"{scratch}/moved")
    assert tree(scratch / "moved") == before
    assert not (home / "d").exists()
    assert nothing_is_left(home, scratch)
    files.rename(f"{scratch}/moved", f"{home}/back")
    assert tree(home / "back") == before
    assert nothing_is_left(home, scratch)


def test_a_file_and_a_link_move(files: Files, home: Path, scratch: Path) -> None:
    (home / "f").write_text("f")
    (home / "l").symlink_to("gone")
    files.rename(f"{home}/f", f"{scratch}/f")
    files.rename(f"{home}/l", f"{scratch}/l")
    assert (scratch / "f").read_text() == "f"
    assert os.readlink(scratch / "l") == "gone"
    assert os.listdir(home) == [PRIVATE]


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_nothing_is_replaced(there: str, files: Files, home: Path, scratch: Path) -> None:
    before = tree(seed(home))
    for goal in (scratch / "x", home / "x"):
        if there == "file":
            goal.write_text("mine")
        elif there == "folder":
            goal.mkdir()
        else:
            goal.symlink_to("gone")
        with pytest.raises(FileError) as raised:
            files.rename(f"{home}/d", str(goal))
        assert raised.value.errno == "EEXIST"
    assert tree(home / "d") == before
    assert nothing_is_left(home, scratch)


def test_what_comes_there_meanwhile_is_not_replaced(
    files: Files, home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(seed(home))
    real = moving._duplicate

    def and_somebody_comes(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        (scratch / "x").mkdir(exist_ok=True)

    monkeypatch.setattr(moving, "_duplicate", and_somebody_comes)
    with pytest.raises(FileError) as raised:
        files.rename(f"{home}/d", f"{scratch}/x")
    assert raised.value.errno == "EEXIST"
    assert os.listdir(scratch / "x") == []
    assert tree(home / "d") == before
    assert nothing_is_left(home, scratch)


def test_where_the_kernel_cannot_refuse_it_is_looked_before(
    files: Files, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "_libc", object())
    (home / "a").write_text("a")
    (home / "b").write_text("b")
    with pytest.raises(FileError) as raised:
        files.rename(f"{home}/a", f"{home}/b")
    assert raised.value.errno == "EEXIST"
    files.rename(f"{home}/a", f"{home}/c")
    assert (home / "c").read_text() == "a"


@pytest.mark.parametrize("fails", [1, 2])
def test_what_cannot_be_moved_stays_whole(
    fails: int, files: Files, home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(seed(home))
    real, calls = moving.rename_new, 0

    def refuses(old: object, new: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fails + 1:  # The first finds out that there are two file systems.
            raise PermissionError(13, "refused")
        real(old, new)  # type: ignore[arg-type]

    monkeypatch.setattr(moving, "rename_new", refuses)
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.files.rename_new", refuses)
    with pytest.raises(FileError) as raised:
        files.rename(f"{home}/d", f"{scratch}/x")
    assert raised.value.errno == "EACCES"
    assert tree(home / "d") == before
    assert not (scratch / "x").exists()
    assert nothing_is_left(home, scratch)


def test_one_that_is_told_to_end_stays_whole(home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "_CHUNK", 10_000)
    monkeypatch.setattr(trees, "_PIECE", 10_000)
    steps = 0

    def advance(amount: int) -> None:
        nonlocal steps
        steps += amount
        if steps > 1_000_000:
            raise Unavailable("enough")

    files = Files(Roots([Root("home", str(home)), Root("scratch", str(scratch))]), advance)
    before = tree(seed(home))
    with pytest.raises(Unavailable):
        files.rename(f"{home}/d", f"{scratch}/x")
    assert tree(home / "d") == before
    assert not (scratch / "x").exists()
    assert nothing_is_left(home, scratch)


def test_a_read_only_root_neither_gives_nor_takes(home: Path, scratch: Path) -> None:
    (home / "f").write_text("f")
    (scratch / "g").write_text("g")
    files = Files(Roots([Root("home", str(home)), Root("scratch", str(scratch), read_only=True)]))
    for old, new in ((f"{home}/f", f"{scratch}/f"), (f"{scratch}/g", f"{home}/g")):
        with pytest.raises(Forbidden):
            files.rename(old, new)
    assert (scratch / "g").exists()
    assert not (scratch / PRIVATE).exists()


# Copying


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("size", [0, 1, 16 * 1024 * 1024, 20_000_001])
def test_content_is_copied(
    size: int, kernel: bool, files: Files, home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(trees, "_copy_in_kernel", lambda *_: None)
    monkeypatch.setattr(trees, "SYNC_EVERY", 1_000_000)
    content = os.urandom(size)
    (home / "f").write_bytes(content)
    (home / "f").chmod(0o640)
    for goal in (home / "g", scratch / "g"):
        files.copy(f"{home}/f", str(goal))
        assert goal.read_bytes() == content
        assert stat.S_IMODE(goal.stat().st_mode) == 0o640
    assert nothing_is_left(home, scratch)


def test_a_file_of_which_the_kernel_says_that_it_is_empty_is_copied(home: Path) -> None:
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("needs /proc")
    with open("/proc/cpuinfo", "rb") as source, (home / "copy").open("wb") as goal:
        trees.copy_content(source.fileno(), goal.fileno())
    assert (home / "copy").stat().st_size > 100


# Measuring


def test_usage_is_what_du_says(files: Files, home: Path) -> None:
    seed(home)
    os.link(home / "d" / "run", home / "another")
    (home / "d").chmod(0o755)
    os.link(home / "d" / "run", home / "d" / "again")
    for name in ("d", "d/sub/f", "d/pipe"):

        def du(flag: str, name: str = name) -> int:
            found = subprocess.run(["du", "-s", flag, home / name], check=True, capture_output=True, text=True)
            return int(found.stdout.split()[0])

        usage = files.usage(f"{home}/{name}")
        assert usage.size == du("-b")
        assert usage.allocated == du("-B1")
    assert files.usage(f"{home}/d").entries == 9
    assert files.usage(f"{home}/d/link").entries == 1
    with pytest.raises(FileError):
        files.usage(f"{home}/gone")
    with pytest.raises(Forbidden):
        files.usage(f"{home}/d/away")


def test_checksum(files: Files, home: Path) -> None:
    content = os.urandom(2_500_000)
    (home / "f").write_bytes(content)
    (home / "l").symlink_to("f")
    expected = {"digest": f"sha-256:{hashlib.sha256(content).hexdigest()}", "size": len(content)}
    assert files.checksum(f"{home}/f") == files.checksum(f"{home}/l") == expected
    for name, number in ((".", "EISDIR"), ("gone", "ENOENT")):
        with pytest.raises(FileError) as raised:
            files.checksum(f"{home}/{name}")
        assert raised.value.errno == number
