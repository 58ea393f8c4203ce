"""Files and confinement: what the file system does, and that nothing leads out of the roots."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.errors import FileError, Forbidden, GatewayError, IntegrityError, InvalidRequest
from aiida_marketplace_hpc.gateway.files import Files
from aiida_marketplace_hpc.gateway.roots import PRIVATE, Root, Roots
from aiida_marketplace_hpc.gateway.transfers import Transfers
from aiida_marketplace_hpc.gateway.unfinished import Keep

CANARY = b"nobody may read or change this"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "cluster" / "home" / "alice"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def canary(home: Path) -> Path:
    """A file of somebody else's, beside the home."""
    path = home.parent / "bob" / "canary"
    path.parent.mkdir()
    path.write_bytes(CANARY)
    return path


@pytest.fixture
def files(home: Path) -> Files:
    scratch, software = home.parents[1] / "scratch", home.parents[1] / "software"
    scratch.mkdir()
    software.mkdir()
    (software / "program").write_text("#!/bin/sh\n")
    return Files(
        Roots([Root("home", str(home)), Root("scratch", str(scratch)), Root("software", str(software), read_only=True)])
    )


def write(files: Files, path: Path | str, content: bytes = b"content", **options: object) -> None:
    files.write(str(path), io.BytesIO(content).read, **options)  # type: ignore[arg-type]


def errno_of(info: pytest.ExceptionInfo[FileError]) -> str:
    return info.value.errno


def test_a_file_is_written_whole_with_its_mode(files: Files, home: Path) -> None:
    write(files, home / "a.sh", b"hello", mode=0o750, digest=bundle.digest_of(b"hello"))
    assert (home / "a.sh").read_bytes() == b"hello"
    assert stat.S_IMODE((home / "a.sh").stat().st_mode) == 0o750


def test_a_wrong_digest_leaves_the_old_file_and_nothing_unfinished(files: Files, home: Path) -> None:
    write(files, home / "a", b"old")
    with pytest.raises(IntegrityError):
        write(files, home / "a", b"new", digest=bundle.digest_of(b"other"))
    assert (home / "a").read_bytes() == b"old"
    assert list((home / PRIVATE / "unfinished").iterdir()) == []


def test_a_body_that_breaks_off_leaves_nothing(files: Files, home: Path) -> None:
    pieces = [b"half"]

    def read(_: int) -> bytes:
        if pieces:
            return pieces.pop()
        raise IntegrityError("the connection broke off")

    with pytest.raises(IntegrityError):
        files.write(str(home / "a"), read)
    assert not (home / "a").exists()
    assert list((home / PRIVATE / "unfinished").iterdir()) == []


def test_without_overwrite_an_existing_file_is_refused(files: Files, home: Path) -> None:
    write(files, home / "a", b"old", overwrite=False)
    with pytest.raises(FileError) as info:
        write(files, home / "a", b"new", overwrite=False)
    assert errno_of(info) == "EEXIST"
    assert (home / "a").read_bytes() == b"old"


def test_a_replaced_file_keeps_its_mode(files: Files, home: Path) -> None:
    write(files, home / "a", mode=0o600)
    write(files, home / "a", b"again")
    assert stat.S_IMODE((home / "a").stat().st_mode) == 0o600


def test_into_uses_the_name_only_inside_a_folder(files: Files, home: Path) -> None:
    (home / "folder").mkdir()
    write(files, home / "folder", into="x")
    write(files, home / "plain", into="x")
    assert (home / "folder" / "x").is_file()
    assert (home / "plain").is_file()


def test_the_gateways_own_folder_is_out_of_sight(files: Files, home: Path) -> None:
    write(files, home / "a")
    assert [entry["name"] for entry in files.listing(str(home))] == ["a"]
    assert files.glob(f"{home}/.*") == []
    with pytest.raises(Forbidden):
        files.listing(f"{home}/{PRIVATE}")


def test_a_folder_travels_as_a_bundle_and_back(files: Files, home: Path) -> None:
    (home / "from" / "empty").mkdir(parents=True)
    (home / "from" / "nested").mkdir(mode=0o750)
    (home / "from" / "nested" / ".hidden").write_bytes(b"x" * 1000)
    (home / "from" / "odd \n'\" näme").write_bytes(b"")
    (home / "from" / "link").symlink_to("nested/.hidden")
    sent = b"".join(Transfers(files, Keep()).send(str(home / "from"), dereference=False))
    Transfers(files, Keep()).write_folder(str(home / "to"), io.BytesIO(sent).read)
    assert sorted(path.name for path in (home / "to").iterdir()) == ["empty", "link", "nested", "odd \n'\" näme"]
    assert os.readlink(home / "to" / "link") == "nested/.hidden"
    assert (home / "to" / "nested" / ".hidden").read_bytes() == b"x" * 1000
    assert stat.S_IMODE((home / "to" / "nested").stat().st_mode) == 0o750


def test_a_truncated_bundle_leaves_no_partial_file(files: Files, home: Path) -> None:
    (home / "from").mkdir()
    (home / "from" / "a").write_bytes(b"a" * 5000)
    sent = b"".join(Transfers(files, Keep()).send(str(home / "from")))
    with pytest.raises(IntegrityError):
        Transfers(files, Keep()).write_folder(str(home / "to"), io.BytesIO(sent[: len(sent) // 2]).read)
    assert list((home / "to").iterdir()) == []


def test_copy_keeps_links_inside_a_folder_and_modes(files: Files, home: Path) -> None:
    (home / "from").mkdir()
    (home / "from" / "a").write_text("a")
    (home / "from" / "a").chmod(0o755)
    (home / "from" / "link").symlink_to("a")
    files.copy(str(home / "from"), str(home / "to"))
    assert (home / "to" / "link").is_symlink()
    assert stat.S_IMODE((home / "to" / "a").stat().st_mode) == 0o755
    files.copy(str(home / "from"), str(home / "to"))
    assert (home / "to" / "from" / "a").is_file()


def test_copy_into_itself_is_refused(files: Files, home: Path) -> None:
    (home / "a").mkdir()
    with pytest.raises(InvalidRequest):
        files.copy(str(home / "a"), str(home / "a"))
    with pytest.raises(FileError) as info:
        files.copy(str(home / "a"), str(home / "a" / "b"))
    assert info.value.errno == "EINVAL"
    assert not (home / "a" / "b").exists()


def test_rename_never_replaces(files: Files, home: Path) -> None:
    write(files, home / "a", b"a")
    write(files, home / "b", b"b")
    with pytest.raises(FileError) as info:
        files.rename(str(home / "a"), str(home / "b"))
    assert errno_of(info) == "EEXIST"


def test_remove_recursive_does_not_follow_links(files: Files, home: Path, canary: Path) -> None:
    (home / "tree").mkdir()
    (home / "tree" / "out").symlink_to(canary.parent)
    files.remove(str(home / "tree"), recursive=True)
    assert not (home / "tree").exists()
    assert canary.read_bytes() == CANARY


def test_missing_parents_are_made_but_not_below_a_read_only_root(files: Files, home: Path) -> None:
    files.mkdir(str(home / "a" / "b" / "c"), parents=True)
    assert (home / "a" / "b" / "c").is_dir()
    with pytest.raises(FileError) as info:
        files.mkdir(str(home / "x" / "y"))
    assert errno_of(info) == "ENOENT"
    with pytest.raises(Forbidden):
        files.mkdir(f"{home.parents[1]}/software/x/y", parents=True)


def test_missing_things_are_told_apart(files: Files, home: Path) -> None:
    write(files, home / "file")
    for path, code in (
        ("missing", "ENOENT"),
        ("missing/below", "ENOENT"),
        ("file/below", "ENOTDIR"),
        ("x" * 300, "ENAMETOOLONG"),
    ):
        with pytest.raises(FileError) as info:
            files.stat(str(home / path))
        assert errno_of(info) == code
    (home / "loop").symlink_to("loop")
    with pytest.raises(FileError) as info:
        files.stat(str(home / "loop"), follow=True)
    assert errno_of(info) == "ELOOP"


def test_a_named_pipe_is_not_waited_for(files: Files, home: Path) -> None:
    os.mkfifo(home / "pipe")
    with pytest.raises(FileError):
        files.read(str(home / "pipe"))


def test_links_between_roots_are_followed(files: Files, home: Path) -> None:
    software = home.parents[1] / "software"
    (home / "sw").symlink_to(software)
    assert files.stat(str(home / "sw" / "program"), follow=True)["path"] == str(software / "program")
    files.copy(str(home / "sw" / "program"), str(home / "mine"))
    assert (home / "mine").is_file()


def test_a_read_only_root_is_never_written(files: Files, home: Path) -> None:
    program = home.parents[1] / "software" / "program"
    (home / "sw").symlink_to(program.parent)
    before = program.read_bytes()
    attempts = [
        lambda path: write(files, path),
        lambda path: files.remove(path),
        lambda path: files.chmod(path, 0o777),
        lambda path: files.rename(path, str(home / "stolen")),
        lambda path: files.mkdir(f"{path}-dir"),
        lambda path: files.symlink(f"{path}-link", "x"),
        lambda path: files.copy(str(home / "sw"), f"{path}-copy"),
    ]
    for attempt in attempts:
        for path in (str(program), str(home / "sw" / "program")):
            with pytest.raises(Forbidden):
                attempt(path)
    assert program.read_bytes() == before


def hostile_paths(home: Path, canary: Path) -> list[str]:
    return [
        str(canary),
        f"{home}/../bob/canary",
        f"{home}/./x/../../bob/canary",
        f"{home}/..",
        f"{home}/out/canary",
        f"{home}/file-out",
        f"{home}/relative-out/canary",
        f"{home}/chain/canary",
        f"{home}/absolute-home/../bob/canary",
        f"/{home}/../bob/canary",
        f"{home.parents[1]}/scratch/../home/bob/canary",
        "/etc/passwd",
        "/",
        f"{home}-evil/canary",
    ]


def test_nothing_leads_out_of_the_roots(files: Files, home: Path, canary: Path) -> None:
    (home / "x").mkdir()
    (home / "out").symlink_to(canary.parent)
    (home / "file-out").symlink_to(canary)
    (home / "relative-out").symlink_to("../bob")
    (home / "chain").symlink_to("out")
    (home / "absolute-home").symlink_to(home)
    for path in hostile_paths(home, canary):
        for attempt in every_operation(files, path, home):
            with pytest.raises((Forbidden, InvalidRequest, FileError)):
                attempt()
    assert canary.read_bytes() == CANARY
    assert sorted(entry.name for entry in canary.parent.iterdir()) == ["canary"]


def every_operation(files: Files, path: str, home: Path) -> list:
    inside = str(home / "x")
    return [
        lambda: files.stat(path, follow=True),
        lambda: files.read(path),
        lambda: Transfers(files, Keep()).send(path),
        lambda: files.listing(path),
        lambda: write(files, path),
        lambda: files.chmod(path, 0o777),
        lambda: files.mkdir(f"{path}/made", parents=True),
        lambda: files.copy(path, inside),
        lambda: files.copy(inside, f"{path}/copied"),
        lambda: files.rename(inside, f"{path}/moved"),
        lambda: files.remove(f"{path}/canary", recursive=True),
        lambda: files.symlink(f"{path}/link", "x"),
    ]


names = st.sampled_from(["..", ".", "", "out", "x", "canary", "bob", "alice", "home", "up", "loop", "file", PRIVATE])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(parts=st.lists(names, min_size=1, max_size=8))
def test_no_combination_of_names_reaches_the_canary(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    top = tmp_path_factory.getbasetemp() / "confined"
    home, bob = top / "home" / "alice", top / "home" / "bob"
    if not home.exists():
        home.mkdir(parents=True)
        bob.mkdir()
        (home / "out").symlink_to(bob)
        (home / "up").symlink_to("..")
        (home / "loop").symlink_to("loop/x")
        (home / "x").mkdir()
        (home / "file").write_text("mine")
    (bob / "canary").write_bytes(CANARY)
    files = Files(Roots([Root("home", str(home))]))
    path = str(home) + "/" + "/".join(parts)
    try:
        content, _ = files.read(path)
        with content:
            assert content.read() != CANARY
    except GatewayError:
        pass
    for change in (lambda: files.chmod(path, 0o600), lambda: write(files, path, b"overwritten")):
        try:
            change()
        except GatewayError:
            pass
    assert (bob / "canary").read_bytes() == CANARY
    assert sorted(entry.name for entry in bob.iterdir()) == ["canary"]
    (home / "file").write_text("mine")
    for leftover in home.iterdir():
        if leftover.name not in {"out", "up", "loop", "x", "file", PRIVATE}:
            leftover.unlink()
