"""What AiiDA sees where the folder of a live job would be changed: a plain OSError, which it reads as nothing else."""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from aiida.schedulers.datastructures import JobState

from aiida_marketplace_hpc.protocol import OPERATIONS
from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

SCRIPT = "_aiidasubmit.sh"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A local folder: another script, one in an archive, and one that is too large for one request."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / SCRIPT).write_text("#!/bin/sh\necho other\n")
    with tarfile.open(tmp_path / "archive.tar", "w") as archive:
        archive.add(folder / SCRIPT, SCRIPT)
    (tmp_path / "large").write_bytes(os.urandom(9 * 1024 * 1024))
    return folder


@pytest.fixture
def workdir(transport: MarketplaceHpcTransport, scheduler: MarketplaceHpcScheduler, tmp_path: Path) -> str:
    """The folder of a job that was submitted."""
    path = f"{transport.normalize('.')}/aiida/ab/cd/work"
    transport.makedirs(path)
    (tmp_path / "script").write_text("#!/bin/sh\necho 1\n")
    transport.put(tmp_path / "script", f"{path}/{SCRIPT}")
    scheduler.submit_job(path, SCRIPT)
    return path


def test_aiida_gets_a_plain_os_error(
    transport: MarketplaceHpcTransport,
    scheduler: MarketplaceHpcScheduler,
    workdir: str,
    here: Path,
    backend: FakeBackend,
) -> None:
    t, w, script = transport, workdir, f"{workdir}/{SCRIPT}"
    other, aiida = f"{w}/other", os.path.dirname(os.path.dirname(os.path.dirname(w)))
    t.put(here / SCRIPT, other)
    t.put(here.parent / "archive.tar", f"{w}/archive.tar")
    attempts: dict[str, Callable[[], object]] = {
        "rmtree": lambda: t.rmtree(w),
        "rmtree above": lambda: t.rmtree(aiida),
        "rmdir": lambda: t.rmdir(w),
        "remove": lambda: t.remove(script),
        "rename": lambda: t.rename(w, f"{w}-gone"),
        "rename script": lambda: t.rename(script, f"{w}/elsewhere"),
        "put": lambda: t.put(here / SCRIPT, script),
        "put into": lambda: t.put(here / SCRIPT, w),
        "put pattern": lambda: t.put(f"{here}/*", w),
        "putfile": lambda: t.putfile(here / SCRIPT, script),
        "putfile large": lambda: t.putfile(here.parent / "large", script),
        "puttree": lambda: t.puttree(f"{here}/", w),
        "copy": lambda: t.copy(other, script),
        "copyfile": lambda: t.copyfile(other, script),
        "compress": lambda: t.compress("tar", other, script, w),
        "extract": lambda: t.extract(f"{w}/archive.tar", w),
    }
    for name, attempt in attempts.items():
        with pytest.raises(OSError, match="is protected") as caught:
            attempt()
        assert (type(caught.value), caught.value.errno) == (OSError, errno.EBUSY), name
        assert Path(script).read_text() == "#!/bin/sh\necho 1\n", name
    backend.end("101")
    jobid = scheduler.submit_job(workdir, SCRIPT)  # The same one.
    wait_until(
        lambda: scheduler.get_jobs([jobid])[0].job_state is JobState.DONE, within=10, failure=lambda: "it does not end"
    )
    for name in (
        "put",
        "putfile",
        "putfile large",
        "puttree",
        "copy",
        "copyfile",
        "compress",
        "extract",
        "rmtree above",
    ):
        attempts[name]()
    assert not os.path.exists(aiida)


def test_what_aiida_does_with_a_running_job_goes_on(
    transport: MarketplaceHpcTransport, workdir: str, here: Path, tmp_path: Path
) -> None:
    t, w = transport, workdir
    t.put(here / SCRIPT, f"{w}/input")
    t.put(here / SCRIPT, f"{w}/input")
    t.get(f"{w}/*", tmp_path)
    t.copytree(w, f"{w}-stashed")
    t.compress("tar.gz", w, f"{w}-stashed.tar.gz", os.path.dirname(w))
    t.remove(f"{w}/input")
    t.rmtree(f"{w}-stashed")
    assert sorted(t.listdir(w)) == [SCRIPT]


def test_force_on_every_way_that_has_it(served: ServedGateway, workdir: str) -> None:
    folder, home = Path(workdir), Path(workdir).parents[3]
    place = str(folder.relative_to(home))
    (folder / "other").write_text("other")
    with tarfile.open(folder / "archive.tar", "w") as archive:
        archive.add(folder / "other", SCRIPT)
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {TOKENS[ALICE]}"

    def query(force: bool, op: str, **fields: object) -> int:
        operation = {"op": op, **fields, **({"force": True} if force else {})}
        answer = session.post(f"{served.url}/api/v1/query", json={"operations": [operation]}, timeout=20).json()
        result = answer["results"][0]
        return 200 if result["ok"] else {"EBUSY": 409}[result["error"]["errno"]]

    def send(force: bool, method: str, way: str, name: str, **options: object) -> int:
        parameters = {"filename": f"{place}/{name}", **({"force": "true"} if force else {})}
        answer = session.request(
            method,
            f"{served.url}/api/v1/file/{way}/home",
            params=parameters,
            timeout=20,
            **options,  # type: ignore[arg-type]
        )
        assert answer.status_code == 200 or answer.json()["errno"] == "EBUSY"
        return answer.status_code

    w, script = workdir, f"{workdir}/{SCRIPT}"
    ways: dict[str, Callable[[bool], int]] = {
        "upload": lambda force: send(force, "PUT", "upload", SCRIPT, data=b"other"),
        "upload as published": lambda force: send(force, "PUT", "upload", SCRIPT, files={"file": (SCRIPT, b"other")}),
        "copy": lambda force: query(force, "copy", path=f"{w}/other", target=script),
        "extract": lambda force: query(force, "extract", path=f"{w}/archive.tar", target=w),
        "compress": lambda force: query(
            force, "compress", sources=[f"{w}/other"], target=script, root_dir=w, format="tar"
        ),
        "rename": lambda force: query(force, "rename", path=script, target=f"{w}/renamed"),
        "delete": lambda force: send(force, "DELETE", "delete", ""),
        "remove": lambda force: query(force, "remove", path=w, recursive=True),
    }
    assert {name for name, operation in OPERATIONS.items() if "force" in operation.optional} <= set(ways)
    for name, way in ways.items():
        folder.mkdir(exist_ok=True)
        for file in ("other", SCRIPT):
            (folder / file).write_text(file)
        assert way(False) == 409, name
        assert (folder / SCRIPT).read_text() == SCRIPT, name
        assert way(True) == 200, name
        assert not (folder / SCRIPT).exists() or (folder / SCRIPT).read_bytes() != SCRIPT.encode(), name
