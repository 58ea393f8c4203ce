"""Files and folders to a gateway and back, whole or not at all."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
import stat
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.bundle import Entry
from aiida_marketplace_hpc.client.body import BundleBody, FileBody
from aiida_marketplace_hpc.client.folder import Received, Receiver, inside_if_folder, walk
from aiida_marketplace_hpc.client.gateway import HpcGateway, Place
from aiida_marketplace_hpc.client.session import Timeouts
from aiida_marketplace_hpc.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    FileError,
    Forbidden,
    IntegrityError,
    NotSupported,
)
from tests.client.fake_gateway import FakeGateway, altered, deaf, drop, drop_after, reply, truncated, wait_until

ODD = os.fsdecode(b"odd \xff\xfe\n'\"")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with everything that gets lost on the way."""
    top = tmp_path / "tree"
    (top / "empty").mkdir(parents=True)
    (top / "sub" / "ünï").mkdir(parents=True)
    (top / ".hidden").write_text("h")
    (top / "zero").write_text("")
    (top / ODD).write_bytes(b"\0\xff")
    (top / "sub" / "run.sh").write_text("#!/bin/sh\n")
    (top / "sub" / "run.sh").chmod(0o750)
    (top / "sub" / "big").write_bytes(os.urandom(bundle.CHUNK + 1))
    (top / "link").symlink_to("sub/run.sh")
    (top / "folder-link").symlink_to("sub")
    return top


def listing(top: Path) -> dict[str, tuple[str, int | str]]:
    found: dict[str, tuple[str, int | str]] = {}
    for folder, folders, files in os.walk(top):
        for name in folders + files:
            path = Path(folder, name)
            relative = str(path.relative_to(top))
            if path.is_symlink():
                found[relative] = ("link", os.readlink(path))
            else:
                found[relative] = ("folder" if path.is_dir() else "file", stat.S_IMODE(path.stat().st_mode))
    return found


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".part")]


def bundle_of(*entries: tuple[Entry, bytes]) -> bytes:
    import io

    return b"".join(
        bundle.write((entry, io.BytesIO(content) if entry.type == "file" else None) for entry, content in entries)
    )


def sent(content: bytes) -> object:
    return reply(content, content_type=bundle.MEDIA_TYPE)


FOLDER = (Entry("", "directory", 0o755), b"")

# One file up


@pytest.mark.parametrize("content", [b"", b"x", os.urandom(3 * bundle.CHUNK), os.urandom(bundle.CHUNK)])
def test_a_file_goes_up_in_one_request(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path, content: bytes) -> None:
    local = tmp_path / "local"
    local.write_bytes(content)
    gateway.info()
    moved: list[int] = []
    answer = gateway.put_file(local, str(fake.home / "remote"), mode=0o640, progress=moved.append)
    assert answer["size"] == len(content) == sum(moved)
    assert (fake.home / "remote").read_bytes() == content
    assert stat.S_IMODE((fake.home / "remote").stat().st_mode) == 0o640
    (upload,) = fake.named("createDataset")
    assert upload.parameters["digest"] == bundle.digest_of(content)
    assert upload.headers["Content-Length"] == str(len(content))
    assert "Transfer-Encoding" not in upload.headers


def test_options_of_an_upload(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_text("x")
    (fake.home / "folder").mkdir()
    assert gateway.put_file(local, str(fake.home / "folder"), into="name")["path"] == str(fake.home / "folder/name")
    gateway.put_file(local, str(fake.home / "a/b/c"), parents=True)
    gateway.put_file(local, Place("home", ODD))
    assert (fake.home / ODD).exists()
    with pytest.raises(FileError) as raised:
        gateway.put_file(local, str(fake.home / "a/b/c"), overwrite=False)
    assert raised.value.errno == "EEXIST"
    with pytest.raises(Forbidden, match="outside"):
        gateway.put_file(local, "/etc/passwd")


def test_an_upload_is_repeated_when_it_replaces(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_text("x" * 100_000)
    gateway.info()
    fake.faults.extend([drop, drop_after])
    gateway.put_file(local, str(fake.home / "remote"))
    assert len(fake.named("createDataset")) == 3
    fake.faults.append(drop_after)
    with pytest.raises(ConnectionFailed):
        gateway.put_file(local, str(fake.home / "other"), overwrite=False)


def test_an_upload_that_arrived_wrong_is_repeated(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_text("x")
    gateway.info()
    fake.faults.append(reply('{"error": "wrong digest", "code": "integrity"}', 422, "application/json"))
    gateway.put_file(local, str(fake.home / "remote"))
    assert len(fake.named("createDataset")) == 2
    fake.faults.append(reply('{"digest": "sha-256:00"}', content_type="application/json"))
    with pytest.raises(IntegrityError, match="wrong digest"):
        gateway.put_file(local, str(fake.home / "remote"))


@pytest.mark.parametrize("change", ["grow", "shrink", "rewrite"])
def test_a_file_that_changes_while_it_is_sent_is_noticed(
    fake: FakeGateway, gateway: HpcGateway, tmp_path: Path, change: str
) -> None:
    local = tmp_path / "local"
    local.write_bytes(bytes(4 * bundle.CHUNK))
    before = local.stat()
    changed: list[int] = []

    def meddle(count: int) -> None:
        if changed:
            return
        changed.append(count)
        with local.open("r+b") as file:
            if change == "shrink":
                file.truncate(10)
            else:
                file.seek(
                    3 * bundle.CHUNK if change == "rewrite" else 0, os.SEEK_SET if change == "rewrite" else os.SEEK_END
                )
                file.write(b"new")
        os.utime(local, ns=(before.st_atime_ns, before.st_mtime_ns))

    gateway.info()
    if change == "grow":
        # What was announced is what is sent: the file as it was.
        gateway.put_file(local, str(fake.home / "remote"), progress=meddle)
        assert (fake.home / "remote").stat().st_size == 4 * bundle.CHUNK
        return
    with pytest.raises(IntegrityError, match="changed while it was being uploaded") as raised:
        gateway.put_file(local, str(fake.home / "remote"), progress=meddle)
    assert not raised.value.retryable
    assert not (fake.home / "remote").exists()


def test_a_file_that_changes_before_it_is_sent_is_noticed_before_a_byte_is(tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(bytes(2 * bundle.CHUNK))
    body = FileBody(local)
    local.write_text("three")
    with pytest.raises(IntegrityError):
        next(iter(body))


def test_local_errors_of_an_upload_stay_os_errors(
    fake: FakeGateway, gateway: HpcGateway, tmp_path: Path, tree: Path
) -> None:
    remote = str(fake.home / "remote")
    with pytest.raises(FileNotFoundError):
        gateway.put_file(tmp_path / "nothing", remote)
    with pytest.raises(IsADirectoryError):
        gateway.put_file(tmp_path, remote)
    with pytest.raises(NotADirectoryError):
        gateway.put_tree(tree / "zero", remote)
    os.mkfifo(tree / "pipe")
    with pytest.raises(shutil.SpecialFileError):
        gateway.put_file(tree / "pipe", remote)
    with pytest.raises(shutil.SpecialFileError):
        gateway.put_tree(tree, remote)
    assert fake.named("createDataset") == []


def test_a_file_that_vanishes_while_a_folder_is_sent_is_an_os_error(
    fake: FakeGateway, gateway: HpcGateway, tree: Path
) -> None:
    def vanish(count: int) -> None:
        (tree / "zero").unlink(missing_ok=True)

    with pytest.raises(FileNotFoundError):
        gateway.put_tree(tree, str(fake.home / "remote"), progress=vanish)
    wait_until(lambda: len(fake.named("createDataset")) == 1)
    assert not (fake.home / "remote").exists()


# Folders up


@pytest.mark.parametrize("dereference", [True, False])
def test_a_folder_goes_up_in_one_request(
    fake: FakeGateway, gateway: HpcGateway, tree: Path, tmp_path: Path, dereference: bool
) -> None:
    gateway.put_tree(tree, str(fake.home / "remote"), dereference=dereference)
    shutil.copytree(tree, tmp_path / "expected", symlinks=not dereference)
    assert listing(fake.home / "remote") == listing(tmp_path / "expected")
    (upload,) = fake.named("createDataset")
    assert upload.headers["Content-Length"] == str(len(upload.body))
    assert "Transfer-Encoding" not in upload.headers


def test_the_length_of_a_bundle_is_known_beforehand(tree: Path) -> None:
    body = BundleBody(list(walk(tree, dereference=False)))
    assert len(body) == sum(len(chunk) for chunk in body)


def test_a_folder_is_repeated_only_where_it_cannot_land_inside_itself(
    fake: FakeGateway, gateway: HpcGateway, tree: Path
) -> None:
    gateway.info()
    fake.faults.append(drop)
    gateway.put_tree(tree, str(fake.home / "remote"), dereference=False)
    fake.faults.append(drop_after)
    with pytest.raises(ConnectionFailed):
        gateway.put_tree(tree, str(fake.home / "again"), into="again", dereference=False)
    assert not (fake.home / "again" / "again").exists()


def test_an_upload_that_broke_off_leaves_no_file_open(
    fake: FakeGateway, client_of: Callable[..., HpcGateway], tree: Path
) -> None:
    with (tree / "huge").open("wb") as file:
        file.truncate(50_000_000)
    client = client_of(fake.url, timeouts=Timeouts(read=0.1, total=0.2))
    client.info()
    fake.faults.append(deaf)
    with pytest.raises(DeadlineExceeded) as raised:
        client.put_tree(tree, str(fake.home / "remote"), into="x", dereference=False)
    # While the error, which refers to everything under way, is still there.
    assert raised.value.__cause__ is not None
    numbers = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    opened = [os.readlink(number) for number in numbers if os.path.lexists(number)]
    assert [path for path in opened if path.startswith(str(tree))] == []


def test_a_link_in_a_circle_is_an_os_error(fake: FakeGateway, gateway: HpcGateway, tree: Path) -> None:
    (tree / "sub" / "up").symlink_to("..")
    # Found at the first turn, not when the kernel has had enough after forty.
    with pytest.raises(OSError, match="levels of symbolic links") as raised:
        list(walk(tree, dereference=True))
    assert raised.value.filename == str(tree / "folder-link" / "up")
    with pytest.raises(OSError, match="levels of symbolic links") as raised:
        gateway.put_tree(tree, str(fake.home / "remote"), dereference=True)
    assert raised.value.errno == errno.ELOOP
    gateway.put_tree(tree, str(fake.home / "remote"), dereference=False)


def test_a_dangling_link_is_an_os_error_unless_it_is_kept(fake: FakeGateway, gateway: HpcGateway, tree: Path) -> None:
    (tree / "dangling").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        gateway.put_tree(tree, str(fake.home / "remote"))
    gateway.put_tree(tree, str(fake.home / "remote"), dereference=False)
    assert os.readlink(fake.home / "remote" / "dangling") == "nowhere"


def test_a_file_that_shrinks_while_a_folder_is_sent_is_noticed(
    fake: FakeGateway, gateway: HpcGateway, tree: Path
) -> None:
    with pytest.raises(IntegrityError, match="shrank"):
        gateway.put_tree(
            tree, str(fake.home / "remote"), progress=lambda count: os.truncate(tree / "sub" / "run.sh", 1)
        )


# Down


@pytest.mark.parametrize("dereference", [True, False])
def test_a_folder_comes_down_in_one_request(
    fake: FakeGateway, gateway: HpcGateway, tree: Path, tmp_path: Path, dereference: bool
) -> None:
    shutil.copytree(tree, fake.home / "remote", symlinks=True)
    (fake.home / "remote" / "empty").chmod(0o555)
    gateway.info()
    received = gateway.get(str(fake.home / "remote"), tmp_path / "new" / "local", dereference=dereference)
    assert received == Received("directory", tmp_path / "new" / "local")
    shutil.copytree(fake.home / "remote", tmp_path / "expected", symlinks=not dereference)
    assert listing(tmp_path / "new" / "local") == listing(tmp_path / "expected")
    assert filecmp.cmp(tmp_path / "new/local/sub/big", tree / "sub/big", shallow=False)
    assert (tmp_path / "new/local" / ODD).read_bytes() == b"\0\xff"
    assert len(fake.named("getDataset")) == 1


def test_a_file_comes_down_with_the_users_default_mode(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    (fake.home / "remote").write_bytes(b"content")
    (fake.home / "remote").chmod(0o777)
    moved: list[int] = []
    received = gateway.get(str(fake.home / "remote"), tmp_path / "local", progress=moved.append)
    assert received == Received("file", tmp_path / "local")
    shutil.copyfile(fake.home / "remote", tmp_path / "expected")
    assert (tmp_path / "local").read_bytes() == b"content"
    assert (tmp_path / "local").stat().st_mode == (tmp_path / "expected").stat().st_mode
    assert sum(moved) == 7
    (tmp_path / "local").chmod(0o604)
    gateway.get(str(fake.home / "remote"), tmp_path / "local")
    assert stat.S_IMODE((tmp_path / "local").stat().st_mode) == 0o604


def test_names_follow_the_type(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    (fake.home / "folder").mkdir()
    (fake.home / "file").write_text("x")
    local = tmp_path / "local"
    for name in ("folder", "file"):
        remote = str(fake.home / name)
        shutil.rmtree(local, ignore_errors=True)
        assert gateway.get(remote, inside_if_folder(local, name)).path == local
        local.unlink() if local.is_file() else shutil.rmtree(local)
        local.mkdir()
        assert gateway.get(remote, inside_if_folder(local, name)).path == local / name


def test_the_hook_can_refuse(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    (fake.home / "folder").mkdir()
    types: list[str] = []

    def refuse(entry: Entry) -> Path:
        types.append(entry.type)
        raise IsADirectoryError(errno.EISDIR, "a folder", str(fake.home))

    with pytest.raises(IsADirectoryError):
        gateway.get(str(fake.home / "folder"), refuse)
    assert types == ["directory"]


def test_what_is_there_is_kept_where_it_should_be(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    (fake.home / "folder").mkdir()
    (fake.home / "folder" / "new").write_text("new")
    (fake.home / "file").write_text("new")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    (tmp_path / "file").write_text("old")
    for name in ("folder", "file"):
        with pytest.raises(FileExistsError):
            gateway.get(str(fake.home / name), tmp_path / name, overwrite=False)
    gateway.get(str(fake.home / "folder"), tmp_path / "folder")
    assert sorted(os.listdir(tmp_path / "folder")) == ["new", "old"]
    with pytest.raises(FileExistsError):
        gateway.get(str(fake.home / "folder"), tmp_path / "file")
    with pytest.raises(IsADirectoryError):
        gateway.get(str(fake.home / "file"), tmp_path / "folder")
    assert (tmp_path / "file").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_what_is_not_there_is_a_file_error(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    with pytest.raises(FileError) as raised:
        gateway.get(str(fake.home / "nothing"), tmp_path / "local")
    assert raised.value.errno == "ENOENT"
    (fake.home / "file").write_text("x")
    with pytest.raises(FileNotFoundError):
        gateway.get(str(fake.home / "file"), tmp_path / "missing" / "local")
    assert os.listdir(tmp_path) == ["cluster"]


def test_a_file_into_memory(fake: FakeGateway, gateway: HpcGateway) -> None:
    (fake.home / "file").write_bytes(b"\0" * 300_000)
    assert gateway.download_file("home", "file") == b"\0" * 300_000
    (fake.home / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        gateway.download_file("home", "folder")
    fake.classic = True
    fake.faults.extend([None, truncated(100), truncated(0), None])
    assert gateway.download_file("home", "file") == b"\0" * 300_000


def test_a_classic_gateway_is_told_apart(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    fake.classic = True
    with pytest.raises(NotSupported):
        gateway.get(Place("job", "x"), tmp_path / "x")
    with pytest.raises(NotSupported):
        gateway.put_tree(tmp_path, Place("job", "x"))


# Whole or not at all


def spoil(content: bytes) -> bytes:
    return content.replace(b"sha-256:", b"sha-256:0", 1)


def flip(content: bytes) -> bytes:
    return content.replace(b"precious", b"precioux")


def headless(content: bytes) -> bytes:
    return content[len(bundle.MAGIC) :]


def endless(content: bytes) -> bytes:
    return content[: content.rindex(b'{"end"')]


@pytest.mark.parametrize(
    "fault",
    [altered(spoil), altered(flip), altered(headless), altered(endless), truncated(90), truncated(150), drop],
)
@pytest.mark.parametrize("times", [1, 5])
def test_wrong_bytes_never_get_a_name(
    fake: FakeGateway, gateway: HpcGateway, tmp_path: Path, fault: object, times: int
) -> None:
    (fake.home / "file").write_bytes(b"precious" * 20)
    (tmp_path / "local").mkdir()
    target = tmp_path / "local" / "file"
    target.write_text("old")
    gateway.info()
    fake.faults.extend([fault] * times)  # type: ignore[list-item]
    if times == 1:
        gateway.get(str(fake.home / "file"), target)
        assert target.read_bytes() == b"precious" * 20
    else:
        with pytest.raises((IntegrityError, ConnectionFailed)):
            gateway.get(str(fake.home / "file"), target)
        assert target.read_bytes() in (b"old", b"precious" * 20)
    assert leftovers(tmp_path) == []


def test_a_second_attempt_does_not_go_inside_the_first(
    fake: FakeGateway, gateway: HpcGateway, tree: Path, tmp_path: Path
) -> None:
    shutil.copytree(tree, fake.home / "remote", symlinks=True)
    gateway.info()
    fake.faults.append(truncated(bundle.CHUNK))
    target = tmp_path / "local"
    received = gateway.get(str(fake.home / "remote"), inside_if_folder(target, "remote"), overwrite=False)
    assert received.path == target
    assert not (target / "remote").exists()
    assert (target / "zero").exists()
    assert leftovers(target) == []


LINK = (Entry("out", "symlink", target="../outside"), b"")


@pytest.mark.parametrize(
    "entries",
    [
        [FOLDER, (Entry("../evil", "file", 0o644, 1), b"x")],
        [FOLDER, (Entry("a/../../evil", "file", 0o644, 1), b"x")],
        [FOLDER, (Entry("/evil", "file", 0o644, 1), b"x")],
        [FOLDER, (Entry("..", "directory", 0o777), b"")],
        [FOLDER, (Entry("./x", "file", 0o644, 1), b"x")],
        [FOLDER, (Entry("a//x", "file", 0o644, 1), b"x")],
        [FOLDER, (Entry("nul\0", "file", 0o644, 1), b"x")],
        [FOLDER, (Entry("\ud800", "file", 0o644, 1), b"x")],
        [FOLDER, LINK, (Entry("out/evil", "file", 0o644, 1), b"x")],
        [FOLDER, LINK, (Entry("out", "directory", 0o755), b""), (Entry("out/evil", "file", 0o644, 1), b"x")],
        [FOLDER, LINK, (Entry("out/evil", "symlink", target="x"), b"")],
        [FOLDER, (Entry("empty", "symlink", target=""), b"")],
        [(Entry("", "symlink", target="outside"), b""), (Entry("evil", "file", 0o644, 1), b"x")],
        [(Entry("", "file", 0o644, 1), b"x"), (Entry("", "file", 0o644, 1), b"y")],
        [(Entry("evil", "file", 0o644, 1), b"x")],
        [],
    ],
)
def test_a_gateway_cannot_write_elsewhere(
    fake: FakeGateway, gateway: HpcGateway, tmp_path: Path, entries: list[tuple[Entry, bytes]]
) -> None:
    area = tmp_path / "area"
    (area / "outside").mkdir(parents=True)
    fake.faults.extend([None, sent(bundle_of(*entries))])  # type: ignore[list-item]
    with pytest.raises(IntegrityError):
        gateway.get(str(fake.home), area / "local")
    assert os.listdir(area / "outside") == []
    assert not (area / "evil").exists()
    assert leftovers(area) == []
    assert len(fake.named("getDataset")) == 1


def test_a_link_of_an_earlier_download_is_not_followed(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    gateway.info()
    first, second = [FOLDER, LINK], [FOLDER, (Entry("out/evil", "file", 0o644, 1), b"x")]
    fake.faults.extend([sent(bundle_of(*first)), sent(bundle_of(*second))])  # type: ignore[list-item]
    gateway.get(str(fake.home), tmp_path / "local", dereference=False)
    with pytest.raises(IntegrityError, match="symbolic link"):
        gateway.get(str(fake.home), tmp_path / "local")
    assert os.listdir(tmp_path / "outside") == []


def test_a_file_replaces_a_link_and_not_what_it_points_to(
    fake: FakeGateway, gateway: HpcGateway, tmp_path: Path
) -> None:
    (tmp_path / "victim").write_text("precious")
    gateway.info()
    entries = [FOLDER, (Entry("x", "symlink", target="../victim"), b""), (Entry("x", "file", 0o644, 1), b"!")]
    fake.faults.append(sent(bundle_of(*entries)))  # type: ignore[arg-type]
    gateway.get(str(fake.home), tmp_path / "local")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "local" / "x").read_text() == "!"


def test_no_setuid_file_is_made(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    gateway.info()
    fake.faults.append(sent(bundle_of(FOLDER, (Entry("x", "file", 0o4755, 1), b"!"))))  # type: ignore[arg-type]
    gateway.get(str(fake.home), tmp_path / "local")
    assert stat.S_IMODE((tmp_path / "local" / "x").stat().st_mode) == 0o755


def test_a_link_that_is_the_whole_bundle_becomes_a_link(fake: FakeGateway, gateway: HpcGateway, tmp_path: Path) -> None:
    gateway.info()
    fake.faults.append(sent(bundle_of((Entry("", "symlink", target="there"), b""))))  # type: ignore[arg-type]
    assert gateway.get(str(fake.home), tmp_path / "local").type == "symlink"
    assert os.readlink(tmp_path / "local") == "there"


def test_folders_that_are_not_announced_are_made(tmp_path: Path) -> None:
    content = bundle_of(FOLDER, (Entry("a/b/c", "file", 0o600, 1), b"x"))
    pieces = iter([content])
    Receiver(lambda entry: tmp_path / "local", overwrite=True).receive(lambda size: next(pieces, b""))
    assert (tmp_path / "local/a/b/c").read_text() == "x"


def test_memory_is_a_few_chunks(tmp_path: Path) -> None:
    size = 64 * bundle.CHUNK
    local = tmp_path / "local"
    with local.open("wb") as file:
        file.truncate(size)

    def through(chunks: Iterator[bytes]) -> Callable[[int], bytes]:
        return lambda _: next(chunks, b"")

    tracemalloc.start()
    try:
        for _ in FileBody(local):
            pass
        body = BundleBody([source for source in walk(tmp_path, dereference=True) if source.path in (tmp_path, local)])
        Receiver(lambda entry: tmp_path / "copy", overwrite=True).receive(through(iter(body)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "copy" / "local").stat().st_size == size
    assert peak < 8 * bundle.CHUNK


# Pieces


def test_a_piece_of_a_file(fake: FakeGateway, gateway: HpcGateway) -> None:
    (fake.home / "f").write_bytes(b"0123456789")
    (fake.home / "empty").write_bytes(b"")
    path = f"{fake.home}/f"
    assert gateway.read_range(path, 0, 4) == b"0123"
    assert gateway.read_range(path, 8, 4) == b"89"
    assert gateway.read_range(path, 10, 4) == gateway.read_range(path, 99, 4) == gateway.read_range(path, 3, 0) == b""
    assert gateway.read_range(f"{fake.home}/empty", 0, 4) == b""
    with pytest.raises(FileError) as info:
        gateway.read_range(f"{fake.home}/gone", 0, 4)
    assert info.value.errno == "ENOENT"


def test_a_piece_that_arrives_wrong_is_asked_for_again(fake: FakeGateway, gateway: HpcGateway) -> None:
    (fake.home / "f").write_bytes(b"0123456789")
    gateway.info()
    fake.faults.append(altered(lambda body: b"x" + body[1:]))
    assert gateway.read_range(f"{fake.home}/f", 0, 4) == b"0123"
    assert len(fake.named("getDataset")) == 2


def test_a_gateway_that_sends_whole_files_is_not_asked_for_pieces(fake: FakeGateway, gateway: HpcGateway) -> None:
    (fake.home / "f").write_bytes(b"0123456789")
    info = {**fake.getInfo(None), "extensions": ["query", "bundle", "digest"]}  # type: ignore[arg-type]
    fake.faults.append(reply(json.dumps(info), content_type="application/json"))
    with pytest.raises(NotSupported, match="ranges"):
        gateway.read_range(f"{fake.home}/f", 0, 4)
    assert fake.named("getDataset") == []


def test_more_than_was_asked_for_is_not_read_to_the_end(fake: FakeGateway, gateway: HpcGateway) -> None:
    (fake.home / "f").write_bytes(b"0123456789")
    gateway.info()
    fake.faults.append(reply(b"0123456789" * 1000))
    with pytest.raises(IntegrityError, match="more than"):
        gateway.read_range(f"{fake.home}/f", 0, 4)
