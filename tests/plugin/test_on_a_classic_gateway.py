"""The transport and the scheduler on a gateway that has only the nine published capabilities."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from aiida.schedulers.datastructures import JobState

from aiida_marketplace_hpc.client.classic import jobs as classic_jobs
from aiida_marketplace_hpc.errors import NotSupported, Unavailable
from aiida_marketplace_hpc.gateway.backends.local import LocalBackend
from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport
from tests.plugin.classic_calculation import Calculation

MIB = 1024 * 1024


@pytest.fixture(scope="module", params=["secure", pytest.param("raw", marks=pytest.mark.services)])
def classic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    """A classic gateway, which renames uploads or does not."""
    folder = tmp_path_factory.mktemp("classic")
    with (
        pytest.MonkeyPatch.context() as patch,
        ServedGateway(
            folder,
            LocalBackend(folder / "spool", slots=4, kill_wait=5.0),
            classic=True,
            classic_file_names=request.param,
        ) as served,
    ):
        patch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])
        patch.setenv("XDG_STATE_HOME", str(folder / "client"))
        patch.setenv(classic_jobs.BEAT, "0.2")
        yield served


@pytest.fixture
def transport(classic: ServedGateway) -> Iterator[MarketplaceHpcTransport]:
    with MarketplaceHpcTransport(machine="cluster", url=classic.url) as transport:
        yield transport


NewCalculation = Callable[[], Calculation]


@pytest.fixture
def new(transport: MarketplaceHpcTransport, scheduler: MarketplaceHpcScheduler, tmp_path: Path) -> NewCalculation:
    return lambda: Calculation(transport, scheduler, tmp_path / "local")


def test_files_of_all_kinds_go_and_come(new: NewCalculation) -> None:
    calculation = new()
    transport, work, local = calculation.transport, calculation.work, calculation.local
    tree = local / "tree"
    (tree / "sub" / ".hidden").mkdir(parents=True)
    (tree / "empty").mkdir()
    names = ["two words", "quo'te", "new\nline", "ünï", "a;b|c", "x.gz", "-rf", os.fsdecode(b"\xff\xfe")]
    for name in names:
        (tree / "sub" / ".hidden" / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    (tree / "run").write_text("#!/bin/sh\necho it ran\n")
    (tree / "run").chmod(0o755)
    (tree / "link").symlink_to("sub/.hidden/two words")
    transport.put(f"{tree}/", work, dereference=False)
    large = random.Random(1).randbytes(11 * MIB)
    calculation.put("large.bin", large)
    calculation.submit(
        "./run\ncp -r sub out\nmkdir -p out/more; cat link > out/more/linked\n"
        "cat large.bin large.bin > twice.bin\ngzip -c link > out/real.gz\nexit 3",
        ["out", "twice.bin", "_scheduler-stdout.txt", "_scheduler-stderr.txt", ["sub/*/*", ".", 2]],
    )
    job = calculation.wait()
    assert (job["state"], job["exit_code"]) == ("FAILED", 3)
    assert calculation.get("_scheduler-stdout.txt") == b"it ran\n"
    assert calculation.get("_scheduler-stderr.txt") == b""
    assert calculation.get("twice.bin") == large + large
    transport.get(f"{work}/out", local / "out")
    for name in names:
        assert (local / "out" / ".hidden" / name).read_bytes() == name.encode("utf-8", "surrogateescape")
    assert (local / "out" / "more" / "linked").read_bytes() == b"two words"
    assert (local / "out" / "real.gz").read_bytes()[:2] == b"\x1f\x8b"
    found = transport.glob(f"{work}/sub/*")
    assert found == []  # As everywhere: a star finds nothing hidden.
    assert sorted(transport.glob(f"{work}/sub/.hidden/*.gz")) == [f"{work}/sub/.hidden/x.gz"]
    assert {".aiida", "_aiidasubmit.sh", "empty", "large.bin", "link", "out", "run", "sub"} <= set(
        transport.listdir(work)
    )
    assert not [name for name in transport.listdir(work) if name.startswith("mphpc") or name == "job.sh"]
    assert transport.get_mode(f"{work}/run") == 0o755
    assert transport.isdir(f"{work}/empty")
    assert transport.isfile(f"{work}/link")
    assert stat.S_ISLNK(transport.get_attribute(f"{work}/link").st_mode)
    assert transport.get_attribute(f"{work}/twice.bin").st_size == 22 * MIB


def test_how_many_requests_a_calculation_takes(new: NewCalculation, classic: ServedGateway) -> None:
    calculation = new()

    def logged() -> list[str]:
        """The capabilities asked for so far; what the gateway is and who we are is asked for once in a while."""
        names = [str(request["capability"]) for request in classic.requests()]
        return [name for name in names if name not in ("None", "createOrUpdateCollection")]

    seen = len(logged())

    def asked(count: int) -> list[str]:
        """Those since the last time; a request is logged when it was answered."""
        nonlocal seen
        wait_until(lambda: len(logged()) >= seen + count, within=10, failure=lambda: str(logged()[seen:]))
        names = logged()[seen:]
        seen += len(names)
        return names

    calculation.put("aiida.in", "1 2")
    calculation.submit("cat aiida.in > aiida.out", ["aiida.out", "_scheduler-stdout.txt", "_scheduler-stderr.txt"])
    assert asked(4) == ["newTransformation", "createDataset", "getDataset", "updateTransformation"]
    calculation.wait()
    assert set(asked(1)) == {"getTransformationState"}  # Polls, and nothing for the detailed information.
    assert calculation.get("aiida.out") == b"1 2"
    assert calculation.get("_scheduler-stdout.txt") == b""
    assert calculation.state is JobState.DONE
    assert asked(3) == ["getDataset"] * 3  # The list of all files once, then one for each file.


def test_a_job_uses_what_another_has_made(new: NewCalculation) -> None:
    first = new()
    first.submit("mkdir out; echo one > out/one; echo two > out/two; echo top > top")
    first.wait()
    second = new()
    transport = second.transport
    transport.copy(f"{first.work}/out", f"{second.work}/copied")
    transport.copy(f"{first.work}/t*p", second.work)
    transport.makedirs(f"{second.work}/links")
    transport.symlink(f"{first.work}/out", f"{second.work}/links/all")
    transport.symlink(f"{first.work}/out/o*", f"{second.work}/links")
    with pytest.raises(FileNotFoundError):
        transport.copy(f"{first.work}/no such", f"{second.work}/x")
    assert transport.isfile(f"{second.work}/copied/one")
    assert sorted(transport.listdir(f"{second.work}/copied")) == ["one", "two"]
    for change in (
        lambda path: transport.remove(path),
        lambda path: transport.rename(path, f"{path}-2"),
        lambda path: transport.chmod(path, 0o600),
    ):
        with pytest.raises(NotSupported, match="copie"):
            change(f"{second.work}/copied/one")
    second.submit("cat copied/one links/all/two links/one top > result; rm top", ["result"])
    assert second.wait()["state"] == "COMPLETED"
    assert second.get("result") == b"one\ntwo\none\ntop\n"
    assert first.get("top") == b"top\n"
    with pytest.raises(NotSupported):
        transport.copy(f"{first.work}/out", f"{transport.normalize('.')}/stash")


def test_a_job_whose_folder_cannot_be_made_says_so_and_does_not_run(
    new: NewCalculation, classic: ServedGateway
) -> None:
    first = new()
    first.submit("echo one > one")
    first.wait()
    second = new()
    second.transport.copy(f"{first.work}/one", f"{second.work}/one")
    # Gone behind everybody's back, as old files are from a scratch disk.
    gateway = second.transport.connection.gateway
    os.unlink(f"{gateway.list_jobs()[first.jobid]['remote_folder']}/one")
    second.submit("touch ran")
    second.wait()
    info = second.scheduler.get_detailed_job_info(second.jobid)
    code = second.scheduler.parse_output(info, "", "")
    assert code is not None
    assert code.status == 132
    assert "not there any more" in str(code.message)
    assert not second.transport.path_exists(f"{second.work}/ran")


def test_a_running_job_is_looked_at_and_told_something(new: NewCalculation) -> None:
    calculation = new()
    transport, work = calculation.transport, calculation.work
    calculation.put("in.txt", "in")
    calculation.submit("echo 7 > energy.dat; until [ -e STOP ]; do sleep 0.1; done; mv STOP seen", ["seen"])
    wait_until(lambda: transport.isfile(f"{work}/energy.dat"), within=20, failure=lambda: str(transport.listdir(work)))
    assert calculation.get("energy.dat") == b"7\n"
    assert calculation.get("in.txt") == b"in"
    assert {"energy.dat", "in.txt", ".aiida"} <= set(transport.listdir(work))
    with pytest.raises(NotSupported):
        transport.mkdir(f"{work}/sub")
    with pytest.raises(NotSupported):
        calculation.put("odd name", "no")
    calculation.put("STOP", "now")
    calculation.wait()
    assert calculation.get("seen") == b"now"


def test_names_of_our_own_are_refused(new: NewCalculation) -> None:
    calculation = new()
    for name in ("job.sh", "mphpc-lock"):
        with pytest.raises(OSError, match="cannot be called"):
            calculation.put(name, "mine")
    calculation.transport.mkdir(f"{calculation.work}/sub")
    calculation.put("sub/job.sh", "mine")


def test_a_job_is_cancelled(new: NewCalculation) -> None:
    calculation = new()
    calculation.submit("touch begun; sleep 60", ["begun"])
    wait_until(lambda: calculation.state is JobState.RUNNING, within=20, failure=lambda: str(calculation.state))
    assert calculation.scheduler.kill_job(calculation.jobid)
    assert calculation.wait()["state"] == "CANCELLED"
    assert calculation.scheduler.kill_job(calculation.jobid)


def test_a_job_over_its_time_limit(new: NewCalculation) -> None:
    calculation = new()
    calculation.submit("#SBATCH --time=00:00:01\necho partial > partial\nsleep 60", ["partial"])
    calculation.wait()
    info = calculation.scheduler.get_detailed_job_info(calculation.jobid)
    code = calculation.scheduler.parse_output(info, "", "")
    assert code is not None
    assert code.status == 120
    assert calculation.get("partial") == b"partial\n"


def test_a_large_file_is_copied_to_another_calculation_that_has_not_begun(new: NewCalculation) -> None:
    first, second = new(), new()
    large = b"x" * (6 * MIB) + b"y"
    first.put("large", large)
    second.transport.copy(f"{first.work}/large", f"{second.work}/copied")
    second.submit("tail -c 1 copied; wc -c < copied", ["_scheduler-stdout.txt"])
    assert second.wait()["state"] == "COMPLETED"
    assert second.get("_scheduler-stdout.txt").split() == [f"y{len(large)}".encode()]


def test_the_folder_can_be_filled_again_after_a_failed_upload(new: NewCalculation) -> None:
    calculation = new()
    transport, work = calculation.transport, calculation.work
    large = b"x" * (6 * MIB)
    calculation.put("large", large)
    calculation.put("stale", "stale")
    home = transport.normalize(".")
    with pytest.raises(OSError, match="exists"):
        transport.mkdir(work)
    transport.mkdir(f"{home}/aiida/lost+found", ignore_existing=True)
    target = f"{home}/aiida/lost+found/{uuid4()}"
    transport.copytree(work, target)
    transport.rmtree(work)
    assert not transport.path_exists(work)
    transport.mkdir(work)
    assert transport.listdir(work) == []
    calculation.put("large", large)
    calculation.submit("cat large | wc -c", ["_scheduler-stdout.txt"])
    assert calculation.wait()["state"] == "COMPLETED"
    assert calculation.get("_scheduler-stdout.txt").split() == [str(len(large)).encode()]
    assert not transport.path_exists(f"{work}/stale")
    # What was put aside is there, too, the large one among it, which the job has left in its place.
    place = calculation.local / "back"
    transport.get(target, place)
    assert (place / "large").read_bytes() == large
    assert (place / "stale").read_bytes() == b"stale"


def test_a_folder_is_cleaned(new: NewCalculation, classic: ServedGateway) -> None:
    calculation = new()
    transport = calculation.transport
    calculation.submit("mkdir out; touch out/a .hidden b 'two words' 'cost $x'", ["b"])
    with pytest.raises(OSError, match="not ended"):
        transport.rmtree(calculation.work)
    calculation.wait()
    transport.remove(f"{calculation.work}/b")
    assert "b" not in transport.listdir(calculation.work)
    transport.rmtree(calculation.work)
    assert not transport.path_exists(calculation.work)
    gateway = transport.connection.gateway
    assert gateway.check_job_state(calculation.jobid)["files"] == []
    folder = next(job["remote_folder"] for jobid, job in gateway.list_jobs().items() if jobid == calculation.jobid)
    assert os.listdir(folder) == []


def test_files_outside_of_working_directories(transport: MarketplaceHpcTransport, tmp_path: Path) -> None:
    home = transport.normalize(".")
    assert transport.whoami() == Path(home).name
    transport.makedirs(f"{home}/some/place", ignore_existing=True)
    (tmp_path / "file").write_text("content")
    transport.putfile(tmp_path / "file", f"{home}/some/place/file.txt")
    assert transport.path_exists(f"{home}/some/place/file.txt")
    transport.getfile(f"{home}/some/place/file.txt", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "content"
    assert transport.listdir(f"{home}/some/place") == ["file.txt"]
    transport.remove(f"{home}/some/place/file.txt")
    assert transport.listdir(f"{home}/some/place") == []
    with pytest.raises(PermissionError):
        transport.listdir("/etc")
    with pytest.raises(FileNotFoundError):
        transport.getfile(f"{home}/some/place/file.txt", tmp_path / "back")


def test_a_gateway_that_does_not_say_what_it_is_for_a_moment_is_not_taken_for_a_classic_one(
    served: ServedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MarketplaceHpcTransport(machine="cluster", url=served.url) as transport:
        gateway = transport.connection.gateway
        monkeypatch.setattr(gateway, "extensions", frozenset)
        with pytest.raises(Unavailable, match="more than the nine"):
            transport.path_exists("/anything")
        monkeypatch.undo()
        monkeypatch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])
        assert transport.path_exists(transport.normalize("."))
