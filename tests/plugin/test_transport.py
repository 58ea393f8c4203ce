"""The transport over a real HTTP gateway: AiiDA's semantics, how many requests, and never a blocked loop."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from plumpy.greenback_bridge import ensure_portal

from aiida_marketplace_hpc.errors import ConfigurationError, ConnectionFailed
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from aiida_marketplace_hpc.transport import MACHINE, MarketplaceHpcTransport


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedGateway]:
    monkeypatch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])
    (tmp_path / "software").mkdir()
    (tmp_path / "software" / "program").write_text("#!/bin/sh\n")
    (tmp_path / "software" / "program").chmod(0o755)
    with ServedGateway(tmp_path, FakeBackend(), root=(f"software={tmp_path}/software:ro",)) as served:
        yield served


@pytest.fixture
def work(transport: MarketplaceHpcTransport) -> str:
    path = f"{transport.normalize('.')}/work"
    transport.mkdir(path)
    return path


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "local"
    (path / "tree" / "nested" / "empty").mkdir(parents=True)
    (path / "tree" / "nested" / "b.txt").write_text("b")
    (path / "tree" / ".hidden").write_text("h")
    (path / "a.txt").write_text("a")
    return path


def test_whoami_is_the_name_in_the_home(transport: MarketplaceHpcTransport) -> None:
    assert transport.whoami() == "alice_a"
    assert transport.normalize(".").endswith("/home/alice_a")


def test_looking(transport: MarketplaceHpcTransport, work: str, local: Path) -> None:
    transport.putfile(local / "a.txt", f"{work}/a.txt")
    transport.symlink(f"{work}/a.txt", f"{work}/link")
    transport.symlink("nowhere", f"{work}/dangling")
    assert transport.isdir(work)
    assert not transport.isfile(work)
    assert transport.isfile(f"{work}/link")
    assert not transport.path_exists(f"{work}/dangling")
    assert not transport.isfile(f"{work}/a.txt/below")
    assert sorted(transport.listdir(work)) == ["a.txt", "dangling", "link"]
    assert transport.listdir(work, "*.txt") == ["a.txt"]
    assert transport.glob(f"{work}/*.txt") == [f"{work}/a.txt"]
    assert list(transport.iglob(f"{work}/l*")) == [f"{work}/link"]
    attributes = transport.get_attribute(f"{work}/a.txt")
    assert (attributes.st_size, stat.S_ISREG(attributes.st_mode)) == (1, True)
    assert stat.S_ISLNK(transport.get_attribute(f"{work}/link").st_mode)
    listed = {entry["name"]: entry["isdir"] for entry in transport.listdir_withattributes(transport.normalize("."))}
    assert listed == {"work": True}
    with pytest.raises(FileNotFoundError):
        transport.get_attribute(f"{work}/gone")
    with pytest.raises(OSError):
        transport.listdir(f"{work}/gone")


def test_changing(transport: MarketplaceHpcTransport, work: str, local: Path) -> None:
    transport.makedirs(f"{work}/x/y")
    with pytest.raises(OSError):
        transport.makedirs(f"{work}/x/y")
    transport.makedirs(f"{work}/x/y", ignore_existing=True)
    with pytest.raises(FileExistsError):
        transport.mkdir(f"{work}/x")
    transport.mkdir(f"{work}/x", ignore_existing=True)
    transport.putfile(local / "a.txt", f"{work}/x/a")
    transport.chmod(f"{work}/x/a", 0o741)
    assert transport.get_mode(f"{work}/x/a") == 0o741
    transport.rename(f"{work}/x/a", f"{work}/x/b")
    with pytest.raises(OSError):
        transport.rename(f"{work}/x/gone", f"{work}/x/c")
    with pytest.raises(OSError):
        transport.rename(f"{work}/x/b", f"{work}/x/y")
    with pytest.raises(OSError):
        transport.rmdir(f"{work}/x")
    transport.remove(f"{work}/x/b")
    transport.rmdir(f"{work}/x/y")
    transport.copytree(f"{work}/x", f"{work}/z")
    transport.rmtree(f"{work}/x")
    transport.rmtree(f"{work}/x")
    assert transport.listdir(work) == ["z"]
    with pytest.raises(FileNotFoundError):
        transport.copy(f"{work}/gone", f"{work}/there")
    with pytest.raises(ValueError, match="itself"):
        transport.copy(f"{work}/z", f"{work}/z")


def test_put_and_get(transport: MarketplaceHpcTransport, work: str, local: Path, tmp_path: Path) -> None:
    transport.put(local / "a.txt", f"{work}/renamed.txt")
    transport.put(local / "a.txt", work)
    transport.put(local / "tree", work)
    transport.put(f"{local}/tree/", f"{work}/new")
    transport.put(f"{local}/*.txt", f"{work}/tree")
    assert sorted(transport.listdir(work)) == ["a.txt", "new", "renamed.txt", "tree"]
    assert sorted(transport.listdir(f"{work}/tree")) == [".hidden", "a.txt", "nested"]
    assert sorted(transport.listdir(f"{work}/new")) == [".hidden", "nested"]
    there = tmp_path / "there"
    there.mkdir()
    transport.get(f"{work}/a.txt", there / "b.txt")
    transport.get(f"{work}/a.txt", there)
    transport.get(f"{work}/tree", there)
    transport.get(f"{work}/*.txt", there)
    transport.get(f"{work}/gone", there / "gone", ignore_nonexisting=True)
    assert sorted(os.listdir(there)) == ["a.txt", "b.txt", "renamed.txt", "tree"]
    assert (there / "tree" / "nested" / "empty").is_dir()
    with pytest.raises(FileNotFoundError):
        transport.get(f"{work}/gone", there / "gone")
    with pytest.raises(IsADirectoryError):
        transport.getfile(f"{work}/tree", there / "x")
    with pytest.raises(FileExistsError):
        transport.getfile(f"{work}/a.txt", there / "a.txt", overwrite=False)
    with pytest.raises(OSError):
        transport.putfile(local / "a.txt", f"{work}/a.txt", overwrite=False)
    with pytest.raises(ValueError, match="absolute"):
        transport.put("relative", work)
    with pytest.raises(FileNotFoundError):
        transport.put(local / "gone", work)
    assert not list(there.glob(".*"))


def test_the_content_of_a_folder_goes_right_into_a_root(transport: MarketplaceHpcTransport, local: Path) -> None:
    home = transport.normalize(".")
    before = transport.get_mode(home)
    transport.put(f"{local}/tree/", home)
    assert sorted(transport.listdir(home)) == [".hidden", "nested"]
    assert transport.get_mode(home) == before


def test_a_read_only_root_can_be_looked_at_and_copied_from(
    transport: MarketplaceHpcTransport, work: str, tmp_path: Path
) -> None:
    program = f"{tmp_path}/software/program"
    assert transport.isfile(program)
    assert transport.get_mode(program) == 0o755
    transport.copy(program, f"{work}/program")
    transport.symlink(program, f"{work}/link")
    assert transport.isfile(f"{work}/link")
    with pytest.raises(PermissionError):
        transport.remove(program)


def test_outside_the_roots_is_a_permission_error(transport: MarketplaceHpcTransport, tmp_path: Path) -> None:
    for attempt in (
        lambda: transport.isfile("/etc/passwd"),
        lambda: transport.get("/etc/passwd", tmp_path / "x"),
        lambda: transport.put(__file__, "/etc/x"),
        lambda: transport.listdir("/"),
    ):
        with pytest.raises(PermissionError):
            attempt()


def test_one_request_per_file_or_folder(
    served: ServedGateway, transport: MarketplaceHpcTransport, work: str, local: Path, tmp_path: Path
) -> None:
    before = ["getInfo", "query", "query"]  # normalize and mkdir of the fixtures
    transport.put(local / "a.txt", f"{work}/a.txt")
    transport.put(local / "tree", f"{work}/tree")
    transport.get(f"{work}/a.txt", tmp_path / "a.txt", ignore_nonexisting=True)
    transport.get(f"{work}/tree", tmp_path / "tree", ignore_nonexisting=True)
    transport.get(f"{work}/gone", tmp_path / "gone", ignore_nonexisting=True)
    transport.glob(f"{work}/*")
    transport.copytree(f"{work}/tree", f"{work}/copy")
    transport.rmtree(f"{work}/copy")
    served.stop()
    assert [line["capability"] for line in served.requests()] == [
        *before,
        "createDataset",
        "createDataset",
        "getDataset",
        "getDataset",
        "getDataset",
        "query",
        "query",
        "query",
    ]


def test_requests_for_patterns_and_lists(
    served: ServedGateway, transport: MarketplaceHpcTransport, work: str, local: Path, tmp_path: Path
) -> None:
    for name in ("b.txt", "c.txt"):
        (local / name).write_text(name)
    (local / "tree" / "link.txt").symlink_to("nested/b.txt")
    (tmp_path / "got").mkdir()
    before = len(served.requests())

    def asked() -> list[str]:
        nonlocal before
        lines = [line["capability"] for line in served.requests()]
        found, before = lines[before:], len(lines)
        return found

    transport.put(f"{local}/*.txt", work)
    assert asked() == ["createDataset"] * 3
    transport.put(f"{local}/[at]*", work)
    assert asked() == ["createDataset"] * 2
    transport.puttree(local / "tree", f"{work}/new", overwrite=False)
    assert asked() == ["createDataset"]
    with pytest.raises(FileExistsError):
        transport.puttree(local / "tree", f"{work}/new", overwrite=False)
    assert asked() == ["createDataset"]
    transport.get(f"{work}/*.txt", tmp_path / "got")
    assert asked() == ["query"] + ["getDataset"] * 3
    transport.symlink(f"{work}/*.txt", f"{work}/new/nested/empty")
    assert asked() == ["query"] * 2
    listed = transport.listdir_withattributes(f"{work}/new/nested/empty")
    assert [(entry["name"], entry["isdir"]) for entry in listed] == [(f"{name}.txt", False) for name in "abc"]
    assert asked() == ["query"]
    matching = transport.listdir_withattributes(work, "[at]*")
    assert [(entry["name"], entry["isdir"]) for entry in matching] == [("a.txt", False), ("tree", True)]
    assert asked() == ["query"]
    transport.copy(f"{work}/*.txt", f"{work}/tree")
    assert asked() == ["query"] * 3


def test_a_folder_that_appears_between_look_and_making_is_welcome(
    transport: MarketplaceHpcTransport, work: str
) -> None:
    async def make(barrier: asyncio.Event, path: str) -> None:
        assert not await transport.path_exists_async(path)
        await barrier.wait()
        await transport.makedirs_async(path)

    async def main() -> None:
        barrier = asyncio.Event()
        tasks = [asyncio.create_task(make(barrier, f"{work}/x/aiida")) for _ in range(6)]
        await asyncio.sleep(0)
        while len(transport.connection.missing) < 6:
            await asyncio.sleep(0)
        barrier.set()
        await asyncio.gather(*tasks)
        with pytest.raises(FileExistsError):  # Whoever has not looked, is told.
            await transport.makedirs_async(f"{work}/x/aiida")
        assert not await transport.path_exists_async(f"{work}/y")
        await transport.makedirs_async(f"{work}/y")
        with pytest.raises(FileExistsError):  # A look counts once,
            await transport.makedirs_async(f"{work}/y")
        assert not await transport.path_exists_async(f"{work}/z")
        await transport.mkdir_async(f"{work}/z")
        with pytest.raises(FileExistsError):  # and only for the very next call.
            await transport.makedirs_async(f"{work}/z")

    asyncio.run(main())
    assert not transport.connection.missing


def test_the_asynchronous_form_runs_off_the_loop(transport: MarketplaceHpcTransport, work: str) -> None:
    threads: set[str] = set()
    original = transport.connection.far.disk.isdir.__func__

    async def ask() -> list[bool]:
        return list(await asyncio.gather(*(transport.isdir_async(work) for _ in range(4))))

    def spy(*args: object) -> bool:
        threads.add(threading.current_thread().name)
        return bool(original(*args))

    assert asyncio.run(ask()) == [True] * 4
    run = transport.connection.off_loop.run
    asyncio.run(run(spy, transport.connection.far.disk, work))  # type: ignore[arg-type]
    assert all(name.startswith("marketplace-hpc") for name in threads)


def test_the_blocking_form_on_the_loop_lets_others_run(transport: MarketplaceHpcTransport, work: str) -> None:
    async def main() -> tuple[bool, int]:
        await ensure_portal()
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.ensure_future(tick())
        answer = transport.isdir(work)
        ticking.cancel()
        return answer, ticks

    answer, ticks = asyncio.run(main())
    assert answer
    assert ticks > 1


def test_no_shell_says_what_to_use_instead(transport: MarketplaceHpcTransport) -> None:
    with pytest.raises(NotImplementedError, match="jobs, not commands") as refused:
        transport.exec_command_wait('which "date"')
    assert 'which "date"' in str(refused.value)
    assert "launch_shell_job(..., resolve_command=False)" in str(refused.value)
    with pytest.raises(NotImplementedError, match="'ls'"):
        asyncio.run(transport.exec_command_wait_async(command="ls"))


def test_a_gateway_that_is_not_there_is_no_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # AiiDA reads an OSError of mkdir as "the folder is there already" and moves it away.
    monkeypatch.setenv("MP_ACCESS_TOKEN", "some-token")
    with (
        MarketplaceHpcTransport(machine="x", url="http://127.0.0.1:1") as transport,
        pytest.raises(ConnectionFailed) as info,
    ):
        transport.mkdir("/x")
    assert not isinstance(info.value, OSError)


def test_parameters_that_make_no_sense_are_named() -> None:
    with pytest.raises(ConfigurationError, match="verdi computer configure"):
        MarketplaceHpcTransport(machine="x").open()
    with pytest.raises(ConfigurationError):
        MarketplaceHpcTransport(machine="x", url="ftp://x").open()


def test_the_stored_parameters_never_include_the_name_that_aiida_uses_itself() -> None:
    stored = MarketplaceHpcTransport.get_valid_auth_params()
    assert "machine" not in stored
    assert MACHINE in stored
    assert {"url", "app_id", "token_source", "max_io_allowed", "safe_interval", "use_login_shell"} <= set(stored)
