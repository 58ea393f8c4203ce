"""Archives on a cluster that the gateway does not see: as core.local makes them, by jobs that leave nothing."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc.errors import FileError, TooLarge, Unavailable
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport
from tests.firecrest.conftest import Remote
from tests.plugin.test_archives import HOSTILE, assert_does_the_same, damaged, entry, tree, write

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes/text content")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.firecrest.files._POLL", 0.1)


@pytest.fixture
def home(remote: Remote) -> Path:
    path = Path(remote.home)
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def transport(remote: Remote) -> Iterator[MarketplaceHpcTransport]:
    with MarketplaceHpcTransport(machine="firecrest", url=remote.served.url) as transport:
        yield transport


def left(remote: Remote) -> list[str]:
    """What archives have left in the gateway's own folder."""
    return os.listdir(f"{remote.home}/.marketplace-hpc/staging")


QUICK = (
    "a folder as tar.xz",
    "several sources",
    "a link to a folder, dereferenced",
    "a name like a flag",
    "the target lies in the root itself",
    "the target is there",
    "one of several is missing",
    "extract over what is there",
)
"""Of all cases those that are run each time."""
MORE = (
    "a folder as tar",
    "a folder as tar.gz",
    "a folder as tar.bz2",
    "a folder, dereferenced",
    "a pattern in a list",
    "long names",
    "the target's folder is a file",
    "3 components less",
    "extract over what is there, and is full",
)
"""Others whose outcome is up to the job; what the gateway refuses before, it refuses as on a disk of its own."""


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.services) for name in MORE)])
def test_a_job_does_what_the_local_transport_does(
    name: str, remote: Remote, transport: MarketplaceHpcTransport, home: Path, tmp_path: Path
) -> None:
    assert_does_the_same(name, transport, home, tmp_path)
    assert left(remote) == []


@pytest.mark.parametrize("format", ["tar", "tar.bz2"])
def test_of_a_damaged_archive_nothing_is_unpacked(format: str, transport: MarketplaceHpcTransport, home: Path) -> None:
    (home / "d").mkdir()
    for number in range(20):
        (home / "d" / str(number)).write_bytes(os.urandom(3000))
    transport.compress(format, home / "d", home / "x", home)
    broken = damaged((home / "x").read_bytes())
    # Of a plain archive without its end mark tar says nothing.
    for name in ("cut in the middle", "garbage in between") if format == "tar" else ("cut before the end mark",):
        (home / "x").write_bytes(broken[name])
        with pytest.raises(OSError, match="damaged"):
            transport.extract(home / "x", home / "out")
        assert os.listdir(home / "out") == [], name


@pytest.mark.parametrize("name", ["dot dot in the middle", "a character device", "the gateway's own folder"])
def test_what_would_lie_elsewhere_is_refused(name: str, transport: MarketplaceHpcTransport, home: Path) -> None:
    write(home / "x.tar", entry("first", b"harmless"), *HOSTILE[name])
    before = tree(home)
    with pytest.raises(OSError, match="member"):
        transport.extract(home / "x.tar", home / "out")
    assert tree(home) == {**before, "out": tree(home)["out"]}


def test_an_archive_has_its_limits(remote: Remote, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home / "x.tar", *[entry(str(number), b"12345") for number in range(5)])
    settings = remote.gateway.settings
    for most in ({"archive_members": 4}, {"archive_size": 0}):
        monkeypatch.setattr(remote.gateway, "settings", settings.model_copy(update=most))
        with pytest.raises(TooLarge, match="nothing was unpacked"):
            remote.client.ask("extract", path=f"{home}/x.tar", target=f"{home}/out")
        assert os.listdir(home / "out") == []
    monkeypatch.setattr(remote.gateway, "settings", settings.model_copy(update={"archive_members": 5}))
    assert remote.client.ask("extract", path=f"{home}/x.tar", target=f"{home}/out")["entries"] == 5


def test_the_script_of_a_live_job_is_not_unpacked_over(remote: Remote, home: Path) -> None:
    folder = remote.script("of ü", "sleep 60")
    write(home / "x.tar", entry("top/of ü/other", b"o"), entry("top/of ü/./run.sh", b"x"))
    job = remote.client.submit(folder, "run.sh")
    with pytest.raises(FileError, match="protected"):
        remote.client.ask("extract", path=f"{home}/x.tar", target=str(home), strip_components=1)
    assert not Path(folder, "other").exists()
    with pytest.raises(FileError, match="protected"):
        remote.client.ask("compress", sources=[folder], root_dir=str(home), target=f"{folder}/run.sh", format="tar")
    assert "sleep" in Path(folder, "run.sh").read_text()
    remote.client.cancel_job(job["jobid"])
    remote.end_of(job["jobid"])
    remote.client.ask("extract", path=f"{home}/x.tar", target=str(home), strip_components=1)
    assert Path(folder, "run.sh").read_text() == "x"


def test_awkward_names_are_put_in_by_a_pattern(transport: MarketplaceHpcTransport, home: Path) -> None:
    (home / "d").mkdir()
    for name in ("it's", 'a"b', "$HOME;touch x", "ü", "-rf", "back\\slash"):
        (home / "d" / name).write_text(name)
    (home / "d" / "link").symlink_to(".")
    transport.compress("tar.gz", home / "d" / "*", home / "x", home)
    transport.extract(home / "x", home / "out")
    assert tree(home / "out") == {name: fields for name, fields in tree(home).items() if name.startswith("d")}


def test_what_is_the_gateways_own_is_left_out(remote: Remote, transport: MarketplaceHpcTransport, home: Path) -> None:
    folder = Path(remote.script("work", "true"))
    remote.end_of(remote.client.submit(str(folder), "run.sh")["jobid"])
    assert list(folder.glob(".marketplace-hpc-*"))
    transport.compress("tar.gz", home, home / "x.tar.gz", home)
    with tarfile.open(home / "x.tar.gz") as archive:
        names = archive.getnames()
    assert {".", "./work", "./work/run.sh"} < set(names)
    assert not [name for name in names if "marketplace-hpc" in name or "x.tar" in name]


def test_a_link_at_the_target_is_looked_through(transport: MarketplaceHpcTransport, home: Path) -> None:
    (home / "f").write_text("f")
    (home / "real").write_text("old")
    (home / "real").chmod(0o600)
    (home / "link").symlink_to("real")
    transport.compress("tar", home / "f", home / "link", home)
    assert (home / "link").is_symlink()
    assert (home / "real").stat().st_mode & 0o777 == 0o600
    assert b"ustar" in (home / "real").read_bytes()


# When something goes wrong


def packed(remote: Remote, home: Path, **more: object) -> object:
    (home / "f").write_text("f")
    return remote.client.ask(
        "compress", sources=[f"{home}/f"], root_dir=str(home), target=f"{home}/x.tar", format="tar", **more
    )


def test_a_submission_without_an_answer_is_found_again(remote: Remote, home: Path) -> None:
    remote.double.fail("submit", status=408, carried_out=True)
    assert packed(remote, home, overwrite=False)
    assert remote.double.calls["submit"] == 1
    assert (home / "x.tar").exists()
    assert left(remote) == []


def test_what_was_never_submitted_is_told_and_leaves_nothing(
    remote: Remote, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.firecrest.packing._LOOK", 0.02)
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.firecrest.packing._LOST", 0.06)
    remote.double.fail("submit", status=502, own=False)
    with pytest.raises(Unavailable):
        packed(remote, home)
    assert not (home / "x.tar").exists()
    assert left(remote) == []


def test_a_job_that_fails_says_why_and_the_old_archive_stays(
    remote: Remote, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "x.tar").write_text("the old one")
    plain = remote.double.jobs.submit

    def late(script: str, folder: str, user: str) -> str:
        (home / "f").unlink()
        return plain(script, folder, user)

    monkeypatch.setattr(remote.double.jobs, "submit", late)
    with pytest.raises(FileError, match="f: Cannot stat: No such file or directory") as raised:
        packed(remote, home)
    assert raised.value.errno == "ENOENT"
    assert (home / "x.tar").read_text() == "the old one"
    assert left(remote) == []


def test_what_came_meanwhile_is_not_replaced(remote: Remote, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = remote.double.jobs.submit

    def late(script: str, folder: str, user: str) -> str:
        (home / "x.tar").write_text("somebody's")
        return plain(script, folder, user)

    monkeypatch.setattr(remote.double.jobs, "submit", late)
    with pytest.raises(FileError, match="File exists"):
        packed(remote, home, overwrite=False)
    assert (home / "x.tar").read_text() == "somebody's"
    assert left(remote) == []


def test_a_client_is_told_to_ask_again_and_nothing_goes_on_when_it_gives_up(
    remote: Remote, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "f").write_text("f")
    monkeypatch.setattr(remote.gateway.operations, "patience", 0.2)
    plain = remote.double.jobs.submit

    def held(script: str, folder: str, user: str) -> str:
        return plain(script.replace("\nexport", "\n#SBATCH --hold\nexport", 1), folder, user)

    monkeypatch.setattr(remote.double.jobs, "submit", held)

    def ask(**fields: object) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {TOKENS[ALICE]}"}
        body = {"key": "k" * 20, **fields}
        answer = requests.post(f"{remote.served.url}/api/v1/query", json=body, headers=headers, timeout=20)
        said: dict[str, Any] = answer.json()
        return said

    packing = {
        "op": "compress",
        "sources": [f"{home}/f"],
        "root_dir": str(home),
        "target": f"{home}/x",
        "format": "tar",
    }
    progress = [ask(operations=[packing])["pending"]["progress"]]
    wait_until(lambda: remote.double.calls["job"] > 2, within=20, failure=lambda: "the job is not asked for")
    progress.append(ask()["pending"]["progress"])
    assert progress[0] < progress[1]
    ask(stop=True)
    wait_until(lambda: "results" in ask(), within=20, failure=lambda: "it goes on")
    assert "gave up" in ask()["results"][0]["error"]["error"]
    assert remote.double.calls["cancel"] == 1
    assert not (home / "x").exists()
    assert left(remote) == []
