"""Files of a cluster that the gateway does not see: what goes there and comes back, in how many calls, and what is refused."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.retry import RetryPolicy
from aiida_marketplace_hpc.errors import (
    FileError,
    Forbidden,
    IntegrityError,
    InvalidRequest,
    MarketplaceHpcError,
    Unavailable,
)
from aiida_marketplace_hpc.gateway.firecrest.client import Made
from tests.firecrest.conftest import Remote

# pyfirecrest hands a text to httpx in a way that httpx does not like any more.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes/text content")


def made(folder: Path) -> Path:
    """A local folder with what is easily lost."""
    (folder / "empty").mkdir(parents=True)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "a b.txt").write_text("blank\n")
    for name in ("it's", 'a"b', "two\nlines", "ü", "-rf", ".hidden", "$HOME;x", "back\\slash", "pipe|"):
        (folder / name).write_text(f"{name}\n")
    Path(os.fsdecode(bytes(folder) + b"/raw-\xff")).write_text("bytes\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o750)
    (folder / "nothing").touch()
    (folder / "link").symlink_to("deep/er")
    (folder / "dangling").symlink_to("/no/such/thing")
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """What lies in a folder: content and permissions, and where links lead."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            content: Any = ("link", os.readlink(path))
        elif path.is_dir():
            content = "folder"
        else:
            content = (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
        found[str(path.relative_to(folder))] = content
    return found


def test_a_folder_goes_and_comes_as_it_is_in_a_few_calls(remote: Remote, tmp_path: Path) -> None:
    local = made(tmp_path / "local")
    remote.home  # noqa: B018 - what a caller needs once does not count.
    remote.double.calls.clear()
    transfer.put_tree(remote.client, local, f"{remote.home}/tree", dereference=False)
    up = remote.double.calls.copy()
    assert contents(Path(remote.home, "tree")) == contents(local)
    remote.double.calls.clear()
    transfer.get(remote.client, f"{remote.home}/tree", tmp_path / "back", dereference=False)
    assert contents(tmp_path / "back") == contents(local)
    down = remote.double.calls.copy()
    # Polls go on meanwhile.
    assert up.total() - up["jobs"] <= 6, up
    assert down.total() - down["jobs"] <= 4, down
    assert list(Path(remote.home, ".marketplace-hpc", "staging").iterdir()) == []


def test_what_a_killed_gateway_has_left_is_removed_after_a_day(remote: Remote, tmp_path: Path) -> None:
    staging = Path(remote.home, ".marketplace-hpc", "staging")
    now = int(time.time())
    archive, folder = f"{now - 90_000}-{'0' * 16}.tar.gz", f"{now - 90_000}-{'1' * 16}"
    kept = {f"{now - 80_000}-{'2' * 16}.tar.gz", f"{now - 90_000}-mine", "7"}
    for name in (archive, *kept):
        (staging / name).write_text("half of it")
    (staging / folder).mkdir()
    (staging / folder / "said").touch()
    for site in remote.served.gateway.sites.values():
        site.accounts.of("alice").made = Made(time.monotonic)  # As after a start.
    remote.double.calls.clear()
    transfer.put_tree(remote.client, made(tmp_path / "local"), f"{remote.home}/tree", dereference=False)
    assert set(os.listdir(staging)) == kept
    assert remote.double.calls["ls"] == 1
    remote.double.calls.clear()
    transfer.get(remote.client, f"{remote.home}/tree", tmp_path / "back", dereference=False)
    assert remote.double.calls["ls"] == 0  # It looks once in some minutes.


def test_a_folder_that_is_larger_than_one_archive(remote: Remote, tmp_path: Path) -> None:
    local = tmp_path / "local"
    (local / "closed").mkdir(parents=True)
    for number in range(12):
        (local / f"{number}").write_bytes(os.urandom(20_000))
    (local / "large").write_bytes(os.urandom(200_000))
    (local / "closed" / "inside").write_bytes(os.urandom(30_000))
    (local / "closed").chmod(0o500)
    transfer.put_tree(remote.client, local, f"{remote.home}/tree")
    assert contents(Path(remote.home, "tree")) == contents(local)
    assert stat.S_IMODE(Path(remote.home, "tree", "closed").stat().st_mode) == 0o500
    transfer.get(remote.client, f"{remote.home}/tree", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(local)
    assert remote.double.calls["transfer/upload"] == 1
    assert remote.double.calls["transfer/download"] == 1


def test_a_large_file_goes_by_the_store_and_comes_back(remote: Remote, tmp_path: Path) -> None:
    local = tmp_path / "large"
    local.write_bytes(os.urandom(9 * 1024 * 1024))
    transfer.put_file(remote.client, local, f"{remote.home}/large", mode=0o640)
    there = Path(remote.home, "large")
    assert there.read_bytes() == local.read_bytes()
    assert stat.S_IMODE(there.stat().st_mode) == 0o640
    transfer.get(remote.client, f"{remote.home}/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == local.read_bytes()
    spools = remote.served.gateway.settings.state / "spool"
    assert not [path for path in spools.glob("*/*") if path.is_file() and not path.name.startswith("fetched-")]


def test_what_takes_its_time_is_waited_for_and_done_once(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.firecrest.transfers._PATIENCE", 0.0)
    # Nor does the client wait for anything that does not get on.
    monkeypatch.setattr(remote.client._session, "_retry", RetryPolicy(attempts=1, budget=2.0))
    local = made(tmp_path / "local")
    large = tmp_path / "large"
    large.write_bytes(os.urandom(9 * 1024 * 1024))
    transfer.put_tree(remote.client, local, f"{remote.home}/tree", dereference=False)
    transfer.put_file(remote.client, large, f"{remote.home}/large")
    transfer.get(remote.client, f"{remote.home}/large", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == large.read_bytes()
    transfer.get(remote.client, f"{remote.home}/tree", tmp_path / "back", dereference=False)
    assert contents(tmp_path / "back") == contents(local)
    assert [remote.double.calls[name] for name in ("compress", "transfer/upload", "transfer/download")] == [1, 1, 1]
    assert [line["status"] for line in remote.served.requests()].count(429) >= 2
    spools = remote.served.gateway.settings.state / "spool"
    assert not [path for path in spools.glob("*/*") if path.name.startswith("packed-")]


def test_small_files_are_compared_with_what_was_sent(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "small"
    local.write_text("right\n")
    plain = remote.double.run

    def torn(command: str, stdin: bytes = b"") -> str:
        said = plain(command, stdin)
        if command.startswith("base64 -d"):
            Path(remote.home, "small").write_text("wro")
        return said

    monkeypatch.setattr(remote.double, "run", torn)
    with pytest.raises(IntegrityError):
        transfer.put_file(remote.client, local, f"{remote.home}/small")
    monkeypatch.setattr(remote.double, "run", plain)
    transfer.put_file(remote.client, local, f"{remote.home}/small")
    assert transfer.read(remote.client, f"{remote.home}/small") == b"right\n"
    assert transfer.read_range(remote.client, f"{remote.home}/small", 2, 3) == b"ght"


def test_what_one_asks_and_changes(remote: Remote) -> None:
    home, ask = remote.home, remote.client.ask
    ask("mkdir", path=f"{home}/a/b", parents=True, exist_ok=True)
    ask("mkdir", path=f"{home}/a/b", exist_ok=True)
    with pytest.raises(FileError, match="File exists"):
        ask("mkdir", path=f"{home}/a/b")
    Path(home, "a", "file").write_text("content\n")
    Path(home, "a", "a b").write_text("x")
    ask("symlink", path=f"{home}/a/link", target="b")
    with pytest.raises(FileError, match="File exists"):
        ask("symlink", path=f"{home}/a/b", target="file")
    assert not Path(home, "a", "b", "file").is_symlink()
    listed = {entry["name"]: entry for entry in ask("list", path=f"{home}/a", follow=True)["entries"]}
    assert list(listed) == ["a b", "b", "file", "link"]
    assert (listed["link"]["target"], listed["link"]["leads_to"]) == ("b", "directory")
    found = ask("stat", path=f"{home}/a/file")
    real = Path(home, "a", "file").stat()
    assert (found["mode"], found["size"], found["uid"]) == (real.st_mode, real.st_size, real.st_uid)
    assert listed["file"]["mode"] == real.st_mode
    assert listed["file"]["mtime"] == int(real.st_mtime)
    assert ask("realpath", path=f"{home}/a/link/../file")["path"] == f"{home}/a/file"
    assert ask("realpath", path=f"{home}/a/link/none")["path"] == f"{home}/a/b/none"
    assert ask("glob", pattern=f"{home}/a/*i*")["paths"] == [f"{home}/a/file", f"{home}/a/link"]
    names = [entry["name"] for entry in ask("list", path=home, recursive=True)["entries"]]
    assert names == ["a", "a/a b", "a/b", "a/file", "a/link"]
    assert ask("checksum", path=f"{home}/a/a b")["size"] == 1
    ask("chmod", path=f"{home}/a/file", mode=0o600)
    assert stat.S_IMODE(Path(home, "a", "file").stat().st_mode) == 0o600
    ask("copy", path=f"{home}/a/file", target=f"{home}/a/b")
    ask("copy", path=f"{home}/a", target=f"{home}/copied")
    assert Path(home, "copied", "b", "file").read_text() == "content\n"
    ask("rename", path=f"{home}/copied", target=f"{home}/renamed")
    with pytest.raises(FileError, match="File exists"):
        ask("rename", path=f"{home}/renamed", target=f"{home}/a")
    with pytest.raises(FileError, match="not empty"):
        ask("remove", path=f"{home}/renamed", directory=True)
    with pytest.raises(FileError, match="Is a directory"):
        ask("remove", path=f"{home}/renamed")
    ask("remove", path=f"{home}/renamed", recursive=True)
    ask("remove", path=f"{home}/renamed", recursive=True, missing_ok=True)
    ask("remove", path=f"{home}/a/link")
    assert sorted(path.name for path in Path(home, "a").iterdir()) == ["a b", "b", "file"]


@pytest.mark.parametrize("name", ["it's", "x'; touch owned; '", "two\nlines"])
def test_a_name_that_the_quoting_would_break_never_gets_there(remote: Remote, tmp_path: Path, name: str) -> None:
    local = tmp_path / "local"
    local.write_text("x")
    path = f"{remote.home}/{name}"
    ours = ("stat", "ls", "upload", "download", "rm", "checksum", "extract", "compress", "mkdir")
    before = [remote.double.calls[name] for name in ours]
    for call in (
        lambda: transfer.put_file(remote.client, local, path),
        lambda: transfer.put_tree(remote.client, tmp_path, path),
        lambda: transfer.read(remote.client, path),
        lambda: remote.client.ask("stat", path=path),
        lambda: remote.client.ask("mkdir", path=path, parents=True),
        lambda: remote.client.ask("remove", path=path, recursive=True),
    ):
        with pytest.raises(InvalidRequest, match="FirecREST"):
            call()
    assert [remote.double.calls[name] for name in ours] == before
    assert not list(Path(remote.home).glob("owned*"))


@pytest.mark.parametrize("path", ["../elsewhere", "a/../../elsewhere", ".marketplace-hpc/staging/x"])
def test_nothing_leaves_the_roots(remote: Remote, path: str) -> None:
    for operation in ("stat", "list", "mkdir"):
        with pytest.raises(Forbidden):
            remote.client.ask(operation, path=f"{remote.home}/{path}")
    with pytest.raises(Forbidden):
        remote.client.ask("remove", path=remote.home, recursive=True)


def test_the_script_of_a_live_job_stays(remote: Remote, tmp_path: Path) -> None:
    folder = remote.script("live", "sleep 60")
    job = remote.client.submit(folder, "run.sh")
    local = tmp_path / "tree"
    local.mkdir()
    (local / "run.sh").write_text("other")
    for call in (
        lambda: transfer.put_file(remote.client, local / "run.sh", f"{folder}/run.sh"),
        lambda: transfer.put_tree(remote.client, local, folder),
        lambda: remote.client.ask("remove", path=folder, recursive=True),
        lambda: remote.client.ask("rename", path=folder, target=f"{remote.home}/x"),
        lambda: remote.client.ask("remove", path=f"{folder}/run.sh"),
    ):
        with pytest.raises(FileError, match="protected"):
            call()
    assert "sleep" in Path(folder, "run.sh").read_text()
    remote.client.cancel_job(job["jobid"])
    assert remote.end_of(job["jobid"])["state"] == "CANCELLED"
    remote.client.ask("remove", path=folder, recursive=True)


def test_what_takes_too_long_at_once_is_done_by_a_job(remote: Remote, tmp_path: Path) -> None:
    local = made(tmp_path / "local")
    for operation in ("extract", "compress", "rm"):
        remote.double.fail(operation)
    transfer.put_tree(remote.client, local, f"{remote.home}/tree", dereference=False)
    transfer.get(remote.client, f"{remote.home}/tree", tmp_path / "back", dereference=False)
    assert contents(tmp_path / "back") == contents(local)
    assert remote.double.calls["transfer/extract"] == remote.double.calls["transfer/compress"] == 1


def test_whether_a_change_was_made_is_said_to_be_unknown(remote: Remote) -> None:
    Path(remote.home).mkdir(parents=True, exist_ok=True)
    remote.double.fail("mkdir", status=408, carried_out=True)
    with pytest.raises(Unavailable, match="not known") as raised:
        remote.client.ask("mkdir", path=f"{remote.home}/new")
    assert not raised.value.retryable


def test_a_question_is_asked_again(remote: Remote) -> None:
    remote.home  # noqa: B018
    remote.double.fail("stat", status=502, own=False)
    remote.double.fail("stat", status=429, headers={"Retry-After": "0.2"}, times=3)
    assert remote.client.ask("stat", path=remote.home)["type"] == "directory"


def test_a_firecrest_that_is_down_is_no_fault_of_the_gateway(remote: Remote) -> None:
    home = remote.home
    remote.double.fail("stat", status=None, times=100)
    with pytest.raises(MarketplaceHpcError) as raised:
        remote.client.ask("stat", path=home)
    assert raised.value.retryable
    assert "application running" in remote.client.heartbeat()["message"]
