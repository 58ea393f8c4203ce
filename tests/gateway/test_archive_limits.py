"""How much may come out of one archive, however little it is itself."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from aiida_marketplace_hpc.errors import TooLarge
from aiida_marketplace_hpc.gateway.archives import extract
from aiida_marketplace_hpc.gateway.files import Files
from aiida_marketplace_hpc.gateway.roots import PRIVATE, Root, Roots

MIB = 1024 * 1024


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def files(home: Path) -> Files:
    return Files(Roots([Root("home", str(home))]))


def bomb(path: Path, *, members: int, size: int) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for number in range(members):
            info = tarfile.TarInfo(f"m{number}")
            info.size = size
            archive.addfile(info, io.BytesIO(bytes(size)))


def sparse(path: Path, size: int) -> None:
    """A member that takes next to nothing in the archive and is large outside."""
    info = tarfile.TarInfo("hole")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (size, 0)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(1024))


def test_what_is_within_the_limits_comes_out(files: Files, home: Path) -> None:
    bomb(home / "a.tgz", members=3, size=1000)
    extract(files, f"{home}/a.tgz", f"{home}/out", most=(3, 3000))
    assert sorted(os.listdir(home / "out")) == ["m0", "m1", "m2"]


@pytest.mark.parametrize(
    ("members", "size", "most"), [(4, 10, (3, 1000)), (3, 1000, (3, 2999)), (1, 8 * MIB, (3, MIB))]
)
def test_of_what_is_over_a_limit_nothing_comes_out(
    files: Files, home: Path, members: int, size: int, most: tuple[int, int]
) -> None:
    bomb(home / "a.tgz", members=members, size=size)
    with pytest.raises(TooLarge, match="nothing was unpacked"):
        extract(files, f"{home}/a.tgz", f"{home}/out", most=most)
    assert os.listdir(home / "out") == []
    assert os.listdir(home / PRIVATE / "staging") == []


def test_a_hole_counts_as_what_it_is_outside(files: Files, home: Path) -> None:
    sparse(home / "a.tar", 4 * MIB)
    extract(files, f"{home}/a.tar", f"{home}/whole", most=(1, 4 * MIB))
    assert (home / "whole" / "hole").stat().st_size == 4 * MIB
    with pytest.raises(TooLarge):
        extract(files, f"{home}/a.tar", f"{home}/out", most=(1, MIB))
    assert os.listdir(home / "out") == []


def test_members_that_are_left_out_count_too(files: Files, home: Path) -> None:
    bomb(home / "a.tgz", members=4, size=0)
    with pytest.raises(TooLarge):
        extract(files, f"{home}/a.tgz", f"{home}/out", strip_components=5, most=(3, 1000))
