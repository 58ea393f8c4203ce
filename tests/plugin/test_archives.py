"""Archives on the cluster: what is in them and what comes out of them is what aiida-core's local transport makes of it."""

from __future__ import annotations

import asyncio
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiida.transports.plugins.local import LocalTransport
from aiida.transports.transport import Transport

from aiida_marketplace_hpc.gateway.roots import PRIVATE
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

FORMATS = ("tar", "tar.gz", "tar.bz2", "tar.xz")
Case = Callable[[Transport, str], Any]
"""Does something with a transport, given a folder."""


def seed(folder: Path) -> None:
    """What each side starts from."""
    (folder / "d" / "sub").mkdir(parents=True)
    (folder / "d" / "empty").mkdir(mode=0o750)
    (folder / "d" / "a.txt").write_text("a" * 70_000)
    (folder / "d" / "a.txt").chmod(0o640)
    (folder / "d" / "sub" / "b.txt").write_text("b")
    (folder / "d" / "sub" / "run").write_text("")
    (folder / "d" / "sub" / "run").chmod(0o755)
    (folder / "d" / ".hidden").write_text("h")
    (folder / "d" / "link").symlink_to("a.txt")
    (folder / "d" / "linkdir").symlink_to("sub")
    os.link(folder / "d" / "sub" / "b.txt", folder / "d" / "sub" / "hard")
    os.mkfifo(folder / "d" / "pipe")
    (folder / "f").write_text("content of f")
    (folder / "g.dat").write_text("g")
    (folder / "h.dat").write_text("h")
    (folder / "-dash").write_text("dash")
    (folder / ("n" * 200)).mkdir()
    (folder / ("n" * 200) / ("m" * 200)).write_text("long")
    (folder / "tofile").symlink_to("f")
    (folder / "todir").symlink_to("d")
    (folder / "dangling").symlink_to("gone")
    for path in sorted(folder.rglob("*")):
        os.utime(path, (1_700_000_000, 1_700_000_000), follow_symlinks=False)


def tree(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a folder but archives: type, permission bits, time, content or target."""
    found: dict[str, tuple[Any, ...]] = {}
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root, name)
            relative = str(path.relative_to(folder))
            if relative.split("/")[0] == PRIVATE or ".tar" in name:
                continue
            attributes = path.lstat()
            kind = stat.S_IFMT(attributes.st_mode)
            content: Any = None
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = path.read_bytes()
            mode = 0 if path.is_symlink() else stat.S_IMODE(attributes.st_mode)
            found[relative] = (kind, mode, content, 0 if path.is_dir() else int(attributes.st_mtime))
    return found


def members(archive: Path) -> list[tuple[Any, ...]]:
    """What an archive says of each of its members, in an order of its own."""
    with tarfile.open(archive) as opened:
        return sorted(
            (
                member.name,
                # Which of several names of a file comes first is up to the order in which the folder is read.
                tarfile.REGTYPE if member.islnk() else member.type,
                member.mode,
                0 if member.isdir() else int(member.mtime),
                member.uid,
                member.gid,
                "" if member.islnk() else member.linkname,
                len(opened.extractfile(member).read()) if member.isfile() or member.islnk() else 0,  # type: ignore[union-attr]
            )
            for member in opened.getmembers()
        )


def both_ways(name: str, **options: Any) -> Case:
    """Compress with these options, and unpack beside."""

    def case(t: Transport, r: str) -> None:
        archive = f"{r}/made/x.tar.gz"
        t.compress("tar.gz", f"{r}/{name}", archive, r, **options)
        t.extract(archive, f"{r}/out/deep")

    return case


CASES: dict[str, Case] = {
    **{
        f"a folder as {format}": lambda t, r, format=format: [
            t.compress(format, f"{r}/d", f"{r}/x.{format}", r),
            t.extract(f"{r}/x.{format}", f"{r}/out"),
        ]
        for format in FORMATS
    },
    "an unknown format": lambda t, r: t.compress("zip", f"{r}/d", f"{r}/new/x.tar.zip", r),
    "a file": both_ways("f"),
    "a link to a file": both_ways("tofile"),
    "a link to a file, dereferenced": both_ways("tofile", dereference=True),
    "a link to a folder": both_ways("todir"),
    "a link to a folder, dereferenced": both_ways("todir", dereference=True),
    "a folder, dereferenced": both_ways("d", dereference=True),
    "a dangling link": both_ways("dangling"),
    "nothing": both_ways("gone"),
    "a name like a flag": both_ways("d/../-dash"),
    "long names": both_ways("n" * 200),
    "paths instead of texts": lambda t, r: [
        t.compress("tar", [Path(r) / "d" / "sub", Path(r) / "f"], Path(r) / "x.tar", Path(r)),
        t.extract(Path(r) / "x.tar", Path(r) / "out"),
    ],
    "several sources": lambda t, r: [
        t.compress("tar", [f"{r}/f", f"{r}/d/sub", f"{r}/g.dat"], f"{r}/x.tar", r),
        t.extract(f"{r}/x.tar", f"{r}/out"),
    ],
    "one of several is missing": lambda t, r: t.compress("tar", [f"{r}/f", f"{r}/gone"], f"{r}/x.tar", r),
    "a pattern": lambda t, r: [
        t.compress("tar", f"{r}/*.dat", f"{r}/x.tar", r),
        t.extract(f"{r}/x.tar", f"{r}/out"),
    ],
    "a pattern in a list": lambda t, r: [
        t.compress("tar", [f"{r}/d/*.txt"], f"{r}/x.tar", f"{r}/d"),
        t.extract(f"{r}/x.tar", f"{r}/out"),
    ],
    "a pattern without match": lambda t, r: t.compress("tar", [f"{r}/*.none"], f"{r}/x.tar", r),
    "the root itself": lambda t, r: [
        t.compress("tar", f"{r}/d", f"{r}/x.tar", f"{r}/d"),
        t.extract(f"{r}/x.tar", f"{r}/out"),
    ],
    "a source elsewhere": lambda t, r: t.compress("tar", f"{r}/f", f"{r}/x.tar", f"{r}/d"),
    "a source twice": lambda t, r: [
        t.compress("tar", [f"{r}/f", f"{r}/f"], f"{r}/x.tar", r),
        t.extract(f"{r}/x.tar", f"{r}/out"),
    ],
    "the root is a file": lambda t, r: t.compress("tar", f"{r}/f", f"{r}/x.tar", f"{r}/f"),
    "the root is missing": lambda t, r: t.compress("tar", f"{r}/f", f"{r}/x.tar", f"{r}/gone"),
    "the target is a folder": lambda t, r: t.compress("tar", f"{r}/f", f"{r}/d", r),
    "the target is there": lambda t, r: t.compress("tar", f"{r}/f", f"{r}/g.dat", r, overwrite=False),
    "the target is replaced": lambda t, r: [
        t.compress("tar", f"{r}/f", f"{r}/x.tar", r),
        t.compress("tar", f"{r}/d", f"{r}/x.tar", r),
        t.extract(f"{r}/x.tar", f"{r}/out"),
    ],
    "the target lies in the source": lambda t, r: [
        t.compress("tar", f"{r}/d", f"{r}/d/x.tar", r),
        t.compress("tar", f"{r}/d", f"{r}/d/x.tar", r),
        t.extract(f"{r}/d/x.tar", f"{r}/out"),
    ],
    "the target lies in the root itself": lambda t, r: [
        t.compress("tar", f"{r}/d", f"{r}/d/x.tar", f"{r}/d"),
        t.compress("tar", f"{r}/d", f"{r}/d/x.tar", f"{r}/d"),
    ],
    "the target's folder is a file": lambda t, r: t.compress("tar", f"{r}/d", f"{r}/f/x.tar", r),
    **{
        f"{count} components less": lambda t, r, count=count: [
            t.compress("tar", [f"{r}/d", f"{r}/f"], f"{r}/x.tar", r),
            t.extract(f"{r}/x.tar", f"{r}/out", strip_components=count),
        ]
        for count in range(4)
    },
    "extract nothing": lambda t, r: t.extract(f"{r}/gone.tar", f"{r}/out"),
    "extract what is no archive": lambda t, r: t.extract(f"{r}/f", f"{r}/out"),
    "extract a folder": lambda t, r: t.extract(f"{r}/d", f"{r}/out"),
    "extract into a file": lambda t, r: [
        t.compress("tar", f"{r}/d", f"{r}/x.tar", r),
        t.extract(f"{r}/x.tar", f"{r}/f"),
    ],
    "extract without replacing": lambda t, r: t.extract(f"{r}/f", f"{r}/out", overwrite=False),
    "extract over what is there": lambda t, r: [
        t.compress("tar", f"{r}/d", f"{r}/x.tar", r),
        t.remove(f"{r}/d/a.txt"),
        t.symlink("gone", f"{r}/d/a.txt"),
        t.chmod(f"{r}/d/sub", 0o700),
        t.rmdir(f"{r}/d/empty"),
        t.symlink("sub", f"{r}/d/empty"),
        t.remove(f"{r}/d/sub/hard"),
        t.mkdir(f"{r}/d/sub/hard"),
        t.mkdir(f"{r}/d/kept"),
        t.extract(f"{r}/x.tar", r),
    ],
    "extract over what is there, and is full": lambda t, r: [
        t.compress("tar", f"{r}/d/a.txt", f"{r}/x.tar", r),
        t.remove(f"{r}/d/a.txt"),
        t.makedirs(f"{r}/d/a.txt/full"),
        t.extract(f"{r}/x.tar", r),
    ],
}


@pytest.fixture
def home(transport: MarketplaceHpcTransport) -> Path:
    return Path(transport.normalize("."))


def outcome(case: Case, transport: Transport, folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """What came of a case: the error, the tree, the archives."""
    folder.mkdir()
    seed(folder)
    problem = None
    try:
        case(transport, str(folder))
    except Exception as exc:  # noqa: BLE001 - which one it is, is what is compared.
        problem = exc
    made = {str(path.relative_to(folder)): members(path) for path in folder.rglob("*.tar*") if problem is None}
    return problem, tree(folder), made


def assert_does_the_same(name: str, transport: MarketplaceHpcTransport, home: Path, tmp_path: Path) -> None:
    """Compare a case with what aiida-core's local transport does."""
    with LocalTransport(machine="localhost") as reference:
        expected = outcome(CASES[name], reference, tmp_path / "reference")
    found = outcome(CASES[name], transport, home / "ours")
    assert (found[0] is None) == (expected[0] is None), (found[0], expected[0])
    if expected[0] is not None:
        kind = next(cls for cls in (NotImplementedError, ValueError, OSError) if isinstance(expected[0], cls))
        assert isinstance(found[0], kind), (found[0], expected[0])
    assert found[1] == expected[1]
    assert found[2] == expected[2]


@pytest.mark.parametrize("name", CASES)
def test_ours_does_what_the_local_transport_does(
    name: str, transport: MarketplaceHpcTransport, home: Path, tmp_path: Path
) -> None:
    assert_does_the_same(name, transport, home, tmp_path)


# What must not come out of an archive


def entry(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """One member of an archive made by hand."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def write(path: Path, *entries: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))


LINK, HARD, FOLDER = {"type": tarfile.SYMTYPE}, {"type": tarfile.LNKTYPE}, {"type": tarfile.DIRTYPE}
HOSTILE = {
    "dot dot": [entry("../canary", b"x")],
    "dot dot in the middle": [entry("a/../../canary", b"x")],
    "below an absolute link": [entry("l", linkname="{outside}", **LINK), entry("l/canary", b"x")],
    "below a link upwards": [entry("l", linkname="..", **LINK), entry("l/canary", b"x")],
    "below a link that was there": [entry("planted/canary", b"x")],
    "below a link made anew": [entry("l", **FOLDER), entry("l", linkname="..", **LINK), entry("l/canary", b"x")],
    "a hard link upwards": [entry("h", linkname="../canary", **HARD), entry("h", b"x")],
    "a hard link by an absolute path": [entry("h", linkname="{outside}/canary", **HARD)],
    "a hard link to a link": [entry("l", linkname="../canary", **LINK), entry("h", linkname="l", **HARD)],
    "a hard link through a link": [entry("l", linkname="..", **LINK), entry("h", linkname="l/canary", **HARD)],
    "a character device": [entry("c", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "a block device": [entry("b", type=tarfile.BLKTYPE, devmajor=8, devminor=0)],
    "the gateway's own folder": [entry(f"{PRIVATE}/x", b"x")],
    "a folder upwards": [entry("..", mode=0o777, **FOLDER)],
    "a file in place of the folder itself": [entry("./", b"x")],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_unpacked_elsewhere(name: str, transport: MarketplaceHpcTransport, home: Path) -> None:
    (home / "canary").write_text("alive")
    (home / "canary").chmod(0o600)
    (home / "out").mkdir()
    (home / "out" / "planted").symlink_to(home)
    entries = []
    for info, content in HOSTILE[name]:
        info.linkname = info.linkname.format(outside=home)
        entries.append((info, content))
    write(home / "x.tar", entry("first", b"harmless"), *entries)
    before = tree(home)
    with pytest.raises(OSError) as caught:
        transport.extract(home / "x.tar", home / "out")
    assert str(home) in str(caught.value)
    assert tree(home) == before
    assert not os.listdir(home / PRIVATE / "staging")


def test_an_absolute_name_is_unpacked_below_the_target(transport: MarketplaceHpcTransport, home: Path) -> None:
    (home / "canary").write_text("alive")
    write(home / "x.tar", entry(f"{home}/canary", b"x"))
    transport.extract(home / "x.tar", home / "out", strip_components=len(home.parts) - 1)
    assert (home / "canary").read_text() == "alive"
    assert (home / "out" / "canary").read_text() == "x"


def test_links_are_made_and_not_followed(transport: MarketplaceHpcTransport, home: Path) -> None:
    (home / "canary").write_text("alive")
    write(home / "x.tar", entry("l", linkname="../canary", **LINK), entry("e", linkname="/etc/passwd", **LINK))
    write(home / "y.tar", entry("l", b"replaced"))
    transport.extract(home / "x.tar", home / "out")
    assert os.readlink(home / "out" / "l") == "../canary"
    with pytest.raises(PermissionError):
        transport.getfile(home / "out" / "e", home.parent / "stolen")
    transport.extract(home / "y.tar", home / "out")
    assert (home / "out" / "l").read_text() == "replaced"
    assert (home / "canary").read_text() == "alive"


def test_nobodys_rights_are_lent(transport: MarketplaceHpcTransport, home: Path) -> None:
    write(home / "x.tar", entry("d", mode=0o7777, **FOLDER), entry("d/f", b"x", mode=0o7755, uid=12345, gid=12345))
    transport.extract(home / "x.tar", home / "out")
    assert stat.S_IMODE((home / "out" / "d").stat().st_mode) == 0o777
    assert stat.S_IMODE((home / "out" / "d" / "f").stat().st_mode) == 0o755
    assert (home / "out" / "d" / "f").stat().st_uid == os.getuid()


def test_the_root_itself_keeps_its_bits(transport: MarketplaceHpcTransport, home: Path) -> None:
    before = home.stat().st_mode
    write(home / "x.tar", entry("./", mode=0o777, **FOLDER), entry("./f", b"x"))
    transport.extract(home / "x.tar", home)
    assert home.stat().st_mode == before
    assert (home / "f").read_text() == "x"


def test_no_link_out_of_the_roots_is_followed_into_an_archive(
    transport: MarketplaceHpcTransport, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("not hers")
    (home / "d").mkdir()
    (home / "d" / "l").symlink_to(tmp_path / "secret")
    with pytest.raises(PermissionError):
        transport.compress("tar", home / "d", home / "x.tar", home, dereference=True)
    with pytest.raises(PermissionError):
        transport.compress("tar", home / "d" / "l", home / "x.tar", home)
    with pytest.raises(PermissionError):
        transport.compress("tar", tmp_path / "secret", home / "x.tar", tmp_path)
    with pytest.raises(PermissionError):
        transport.compress("tar", home / "d", tmp_path / "x.tar", home)
    assert not (home / "x.tar").exists()
    transport.compress("tar", home / "d", home / "x.tar", home)
    with tarfile.open(home / "x.tar") as archive:
        assert archive.getmember("d/l").issym()


# Whole or not at all


def damaged(whole: bytes) -> dict[str, bytes]:
    """An archive, broken in several ways."""
    middle, plain = len(whole) // 2, whole.startswith(b"d/")
    return {
        "empty": b"",
        "cut in the middle": whole[:middle],
        "cut at a block": whole[: middle // 512 * 512],
        "cut before the end mark": whole[: -(-len(whole.rstrip(b"\0")) // 512) * 512 if plain else -1],
        "a byte is wrong": whole[:100] + bytes([whole[100] ^ 255]) + whole[101:],
        "garbage in between": whole[:512] + b"garbage!" * 64 + whole[1024:],
    }


@pytest.mark.parametrize("format", FORMATS)
def test_of_a_damaged_archive_nothing_is_unpacked(format: str, transport: MarketplaceHpcTransport, home: Path) -> None:
    (home / "d").mkdir()
    for number in range(20):
        (home / "d" / str(number)).write_bytes(os.urandom(3000))
    transport.compress(format, home / "d", home / "x", home)
    whole = (home / "x").read_bytes()
    for name, content in damaged(whole).items():
        (home / "x").write_bytes(content)
        with pytest.raises(OSError):
            transport.extract(home / "x", home / "out")
        assert os.listdir(home / "out") == [], (format, name)
    (home / "x").write_bytes(whole)
    transport.extract(home / "x", home / "out")
    assert tree(home / "out" / "d") == tree(home / "d")


def test_what_a_header_says_does_not_eat_the_memory(transport: MarketplaceHpcTransport, home: Path) -> None:
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 2**33
        (home / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
        with pytest.raises(OSError, match="too large"):
            transport.extract(home / "x.tar", home / "out")
    info = tarfile.TarInfo("x")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # A size of -512.
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]  # type: ignore[attr-defined]
    (home / "x.tar").write_bytes(bytes(header) * 20)
    with pytest.raises(OSError, match="damaged"):
        transport.extract(home / "x.tar", home / "out")


def test_no_archive_appears_when_its_making_fails(transport: MarketplaceHpcTransport, home: Path) -> None:
    (home / "d" / "loop").mkdir(parents=True)
    (home / "d" / "loop" / "l").symlink_to("..")
    (home / "x.tar").write_text("the old one")
    with pytest.raises(OSError, match="symbolic links"):
        transport.compress("tar", home / "d", home / "x.tar", home, dereference=True)
    assert (home / "x.tar").read_text() == "the old one"
    assert not os.listdir(home / PRIVATE / "unfinished")


def test_tar_reads_ours_and_ours_reads_tars(transport: MarketplaceHpcTransport, home: Path) -> None:
    seed(home)
    (home / "d" / os.fsdecode(b"latin-\xe9")).write_text("not UTF-8")
    sparse = home / "d" / "sparse"
    with sparse.open("wb") as file:
        file.truncate(10_000_000)
        file.seek(5_000_000)
        file.write(b"in the middle")
    for options in (["-S", "--format=gnu"], ["-S", "--format=pax"], ["--format=ustar", "--exclude=sparse"]):
        subprocess.run(["tar", *options, "-cJf", home / "tar.tar", "-C", home, "d"], check=True)
        transport.extract(home / "tar.tar", home / "out")
        expected = {
            name: fields for name, fields in tree(home / "d").items() if "ustar" not in options[0] or name != "sparse"
        }
        assert tree(home / "out" / "d") == expected
        transport.rmtree(home / "out")
    transport.compress("tar.xz", home / "d", home / "ours.tar", home)
    (home / "out").mkdir()
    subprocess.run(["tar", "-xf", home / "ours.tar", "-C", home / "out"], check=True)
    assert tree(home / "out" / "d") == tree(home / "d")


# As AiiDA's engine calls it


@pytest.mark.parametrize("format", FORMATS)
def test_the_calls_of_stash_and_unstash(format: str, transport: MarketplaceHpcTransport, home: Path) -> None:
    work = home / "aiida" / "ab" / "cd" / "ef-01"
    work.mkdir(parents=True)
    seed(work)
    target = str(home / "stash" / "uuid") + "." + format

    async def stash() -> None:
        await transport.compress_async(
            format=format,
            remotesources=[work / source for source in ("d", "*.dat", "tofile")],
            remotedestination=target,
            root_dir=str(home / "aiida"),
            overwrite=False,
            dereference=False,
        )

    async def unstash() -> None:
        await transport.extract_async(
            remotesource=Path(target), remotedestination=home / "new" / "place", overwrite=True, strip_components=3
        )

    asyncio.run(stash())
    with pytest.raises(OSError):  # AiiDA logs it, and goes on without a stash.
        asyncio.run(stash())
    asyncio.run(unstash())
    stashed = {
        name: fields for name, fields in tree(work).items() if name.split("/")[0] in ("d", "g.dat", "h.dat", "tofile")
    }
    assert tree(home / "new" / "place") == stashed
