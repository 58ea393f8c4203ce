"""What is kept of uploads that are not finished: that it is right, and that it does not pile up."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.bundle import PART, Entry, digest_line, end_line
from aiida_marketplace_hpc.errors import FileError, Forbidden, IntegrityError, InvalidRequest
from aiida_marketplace_hpc.gateway.files import Files
from aiida_marketplace_hpc.gateway.roots import PRIVATE, Root, Roots
from aiida_marketplace_hpc.gateway.transfers import Transfers
from aiida_marketplace_hpc.gateway.unfinished import Keep, _states, sweep
from aiida_marketplace_hpc.testing.served import ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

CONTENT = os.urandom(3 * PART + 1000)
DIGEST = bundle.digest_of(CONTENT)
KEEP = Keep(patience=0.2)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def transfers(home: Path, tmp_path: Path) -> Transfers:
    (tmp_path / "software").mkdir()
    roots = [Root("home", str(home)), Root("software", str(tmp_path / "software"), read_only=True)]
    return Transfers(Files(Roots(roots)), KEEP)


@pytest.fixture
def folder(home: Path) -> Iterator[int]:
    (home / PRIVATE / "unfinished").mkdir(parents=True)
    descriptor = os.open(home / PRIVATE / "unfinished", os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def parts(offset: int, end: int | None = None, content: bytes = CONTENT) -> bytes:
    """A body with the parts between two positions."""
    body, count = [bundle.MAGIC], 0
    for part in Entry("", "file", size=len(content)).parts(offset):
        if end is not None and part.end > end:
            break
        chunk = content[part.offset : part.end]
        body += [part.to_line(), chunk, digest_line(bundle.digest_of(content[: part.end]))]
        count += 1
    return b"".join([*body, end_line(count)])


def send(
    transfers: Transfers, path: Path, body: bytes | None = None, offset: int | None = None, **options: Any
) -> dict[str, Any]:
    left = [body] if body else []
    digest = options.pop("digest", DIGEST)
    return transfers.write_parts(
        str(path), lambda _: left.pop() if left else b"", total=len(CONTENT), digest=digest, offset=offset, **options
    )


def lying(home: Path) -> list[str]:
    return sorted(os.listdir(home / PRIVATE / "unfinished"))


def test_a_file_appears_when_it_is_whole(transfers: Transfers, home: Path) -> None:
    asked = send(transfers, home / "a")
    assert asked == {"complete": False, "held": 0, "digest": bundle.digest_of(b""), "wait": False}
    assert lying(home) == []
    first = send(transfers, home / "a", parts(0, 2 * PART), 0)
    assert (first["held"], first["digest"]) == (2 * PART, bundle.digest_of(CONTENT[: 2 * PART]))
    assert os.listdir(home) == [PRIVATE]
    last = send(transfers, home / "a", parts(2 * PART), 2 * PART, mode=0o640)
    assert last == {"complete": True, "path": str(home / "a"), "size": len(CONTENT), "digest": DIGEST}
    assert (home / "a").read_bytes() == CONTENT
    assert stat.S_IMODE((home / "a").stat().st_mode) == 0o640


def test_only_whole_verified_parts_are_held(transfers: Transfers, home: Path) -> None:
    body = parts(0)
    with pytest.raises(IntegrityError):
        send(transfers, home / "a", body[: len(body) // 2], 0)
    held = send(transfers, home / "a")["held"]
    assert held == PART
    wrong = bytearray(parts(held))
    wrong[PART // 2] ^= 1
    with pytest.raises(IntegrityError):
        send(transfers, home / "a", bytes(wrong), held)
    assert send(transfers, home / "a")["held"] == held
    assert send(transfers, home / "a", parts(held), held)["complete"]


def test_a_part_that_was_being_written_when_the_gateway_was_killed_is_dropped(transfers: Transfers, home: Path) -> None:
    send(transfers, home / "a", parts(0, 2 * PART), 0)
    (name,) = lying(home)
    with (home / PRIVATE / "unfinished" / name).open("ab") as file:
        file.write(CONTENT[2 * PART : 2 * PART + 100])
    _states._known.clear()  # Another process.
    answer = send(transfers, home / "a")
    assert (answer["held"], answer["digest"]) == (2 * PART, bundle.digest_of(CONTENT[: 2 * PART]))
    assert send(transfers, home / "a", parts(2 * PART), 2 * PART)["complete"]
    assert (home / "a").read_bytes() == CONTENT


def test_what_an_earlier_process_left_is_read_a_while_at_a_time(
    transfers: Transfers, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(transfers, home / "a", parts(0, 3 * PART), 0)
    _states._known.clear()
    hurried = Transfers(transfers._files, replace(KEEP, patience=0.0))
    answer = send(hurried, home / "a")
    assert answer["wait"] is True
    assert answer["held"] < 3 * PART
    while answer["wait"]:
        answer = send(transfers, home / "a")
    assert answer["held"] == 3 * PART


def test_bytes_out_of_place_are_not_taken(transfers: Transfers, home: Path) -> None:
    assert send(transfers, home / "a", parts(PART), PART)["held"] == 0
    send(transfers, home / "a", parts(0, 2 * PART), 0)
    # A request that was duplicated on the way.
    assert send(transfers, home / "a", parts(0, 2 * PART), 0)["held"] == 2 * PART
    with pytest.raises(InvalidRequest):
        send(transfers, home / "a", parts(0), 2 * PART)
    with pytest.raises(InvalidRequest):
        send(transfers, home / "a", parts(0), 2 * PART, digest="sha-256:../../evil")


def test_a_digest_that_is_not_the_files_leaves_nothing(transfers: Transfers, home: Path) -> None:
    with pytest.raises(IntegrityError):
        send(transfers, home / "a", parts(0), 0, digest=bundle.digest_of(b"another"))
    assert os.listdir(home) == [PRIVATE]
    assert lying(home) == []


def test_a_caller_that_finds_what_is_held_wrong_begins_anew(transfers: Transfers, home: Path) -> None:
    send(transfers, home / "a", parts(0, 2 * PART), 0)
    assert send(transfers, home / "a", restart=True)["held"] == 0
    assert send(transfers, home / "a", parts(0), 0)["complete"]


def test_where_it_cannot_go_is_said_before_anything_is_sent(transfers: Transfers, home: Path, tmp_path: Path) -> None:
    (home / "folder").mkdir()
    (home / "file").write_text("x")
    for path, options, errno in (
        (home / "gone" / "a", {}, "ENOENT"),
        (home / "folder", {}, "EISDIR"),
        (home / "file", {"overwrite": False}, "EEXIST"),
        (home / "file" / "a", {}, "ENOTDIR"),
    ):
        with pytest.raises(FileError) as raised:
            send(transfers, path, **options)
        assert raised.value.errno == errno
    with pytest.raises(Forbidden):
        send(transfers, tmp_path / "software" / "a")
    with pytest.raises(Forbidden):
        send(transfers, tmp_path / "elsewhere")
    assert send(transfers, home / "folder", parts(0), 0, into="b")["path"] == str(home / "folder" / "b")
    assert send(transfers, home / "new" / "deep" / "c", parents=True)["complete"]


def test_a_folder_that_vanishes_meanwhile_loses_nothing_that_arrived(transfers: Transfers, home: Path) -> None:
    (home / "folder").mkdir()
    send(transfers, home / "folder" / "a", parts(0, 2 * PART), 0)
    (home / "folder").rmdir()
    with pytest.raises(FileError):
        send(transfers, home / "folder" / "a", parts(2 * PART), 2 * PART)
    assert send(transfers, home / "b")["held"] == 2 * PART


def test_a_completed_content_is_copied_for_another_name_and_never_shared(transfers: Transfers, home: Path) -> None:
    send(transfers, home / "a", parts(0), 0, mode=0o600)
    assert send(transfers, home / "b")["complete"]
    assert (home / "b").read_bytes() == CONTENT
    assert stat.S_IMODE((home / "b").stat().st_mode) == 0o644
    assert not os.path.samefile(home / "a", home / "b")
    (home / "b").write_bytes(b"x" * len(CONTENT))
    # What is there under the second name now is something else.
    assert send(transfers, home / "c")["held"] == 0
    assert not (home / "c").exists()


def test_a_completed_file_is_not_overwritten_where_that_is_not_wanted(transfers: Transfers, home: Path) -> None:
    assert send(transfers, home / "a", parts(0), 0, overwrite=False)["complete"]
    assert (home / "a").read_bytes() == CONTENT
    with pytest.raises(FileError):
        send(transfers, home / "a", overwrite=False)


def test_what_is_kept_is_bounded_in_age_and_size(home: Path, folder: int) -> None:
    private = home / PRIVATE / "unfinished"

    def make(name: str, size: int, age: float) -> None:
        (private / name).write_bytes(bytes(size))
        status = (private / name).stat()
        os.utime(private / name, (status.st_atime, status.st_mtime - age))

    make("100000-aa", 100_000, 5000)
    make("100000-bb", 100_000, 100)
    make("100000-cc", 100_000, 50)
    make("draft", 10, 100)
    make("olddraft", 10, 200_000)
    keep = Keep(unfinished=1000, size=250_000)
    assert sweep(folder, keep) == 2
    assert lying(home) == ["100000-bb", "100000-cc", "draft"]
    assert sweep(folder, replace(keep, size=150_000)) == 1
    assert lying(home) == ["100000-cc", "draft"]
    assert sweep(folder, keep, everything=True) == 1
    assert lying(home) == ["draft"]


def test_what_is_being_written_to_is_not_swept(transfers: Transfers, home: Path, folder: int) -> None:
    seen: list[list[str]] = []

    def read(size: int) -> bytes:
        if not seen:
            sweep(folder, KEEP, everything=True)
            seen.append(lying(home))
            return parts(0)
        return b""

    answer = transfers.write_parts(str(home / "a"), read, total=len(CONTENT), digest=DIGEST, offset=0)
    assert answer["complete"]
    assert seen == [[f"{len(CONTENT)}-{hashlib.sha256(CONTENT).hexdigest()}"]]


def test_the_gateway_sweeps_by_itself(served: ServedGateway, transport: MarketplaceHpcTransport) -> None:
    home = Path(transport.normalize("."))
    old = home / PRIVATE / "unfinished" / "10-aa"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x")
    served.gateway.sweep()
    assert old.exists()
    os.utime(old, (1e9, 1e9))
    served.gateway.sweep()
    assert not old.exists()
