"""The folder of a live job: what nobody takes away or replaces through the gateway, and all that stays allowed."""

from __future__ import annotations

import hashlib
import itertools
import os
import tarfile
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
from sqlalchemy import event

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.errors import FileError, Forbidden
from aiida_marketplace_hpc.gateway import archives
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.backends.base import Deferred, Submission
from aiida_marketplace_hpc.gateway.backends.wrapper import GUARD_PREFIX
from aiida_marketplace_hpc.gateway.files import Files, Read
from aiida_marketplace_hpc.gateway.protection import LiveJobs
from aiida_marketplace_hpc.gateway.roots import Root, Roots
from aiida_marketplace_hpc.gateway.schema import Job, User
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.gateway.submission import guard_of
from aiida_marketplace_hpc.gateway.transfers import Transfers
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.backend import FakeBackend

pytestmark = pytest.mark.databases

SCRIPT = b"#!/bin/sh\necho done\n"
OTHER = b"#!/bin/sh\necho something else\n"


def reading(content: bytes) -> Read:
    return BytesIO(content).read


class Setting:
    """Alice's gateway and a way to have one live job after another."""

    def __init__(self, gateway: Gateway, backend: FakeBackend, alice: User) -> None:
        self.gateway = gateway
        self.backend = backend
        self.alice = alice
        self.files = gateway.files_of(alice)
        self.transfers = Transfers(self.files, gateway.keep)
        root = self.files.roots.by_name("home")
        assert root is not None
        self.home = Path(root.path)
        self._numbers = itertools.count()

    def launch(self) -> Live:
        """A job that runs, in ``N/above/work``, with its guard."""
        folder = self.home / str(next(self._numbers)) / "above" / "work"
        folder.mkdir(parents=True)
        (folder / "run.sh").write_bytes(SCRIPT)
        (folder / "out").write_bytes(b"so far")
        (folder / "sub").mkdir()
        job = self.gateway.jobs.launch(
            self.alice, self.gateway.jobs.create_in_folder(self.alice, str(folder), "run.sh")
        )
        assert job.scheduler_id is not None
        self.backend.run(job.scheduler_id)
        (folder / guard_of(job.id)).write_text(f"{job.scheduler_id}\n")
        return Live(self, job, folder)


class Live:
    def __init__(self, setting: Setting, job: Job, folder: Path) -> None:
        self.job = job
        self.folder = folder
        self.path = str(folder)
        self.script = f"{folder}/run.sh"
        self.guard = f"{folder}/{guard_of(job.id)}"
        self.beside = str(folder.parent / "beside")
        self._setting = setting
        source = folder.parent / "source"
        source.write_bytes(OTHER)
        self.source = str(source)
        (folder.parent / "empty").mkdir()

    def end(self) -> None:
        """Let it end, without the gateway knowing yet."""
        self._setting.backend.end(str(self.job.scheduler_id))

    def kept(self) -> list[tuple[str, bytes]]:
        """What must not change: the script and the guards."""
        paths = sorted(self.folder.glob(f"{GUARD_PREFIX}*")) + sorted(self.folder.glob("run.sh"))
        return [(str(path), path.read_bytes()) for path in paths]

    def archive(self, *members: str) -> str:
        """An archive beside the folder."""
        path = self.folder.parent / "archive.tar"
        with tarfile.open(path, "w") as archive:
            for name in members:
                header = tarfile.TarInfo(name)
                header.size = len(OTHER)
                archive.addfile(header, BytesIO(OTHER))
        return str(path)

    def bundle(self, entry: bundle.Entry) -> Read:
        top = bundle.Entry("", "directory", 0o755), None
        content = BytesIO(OTHER) if entry.type == "file" else None
        return reading(b"".join(bundle.write(item for item in [top, (entry, content)])))


@pytest.fixture
def setting(gateway: Gateway, backend: FakeBackend, alice: User) -> Setting:
    return Setting(gateway, backend, alice)


Act = Callable[[Files, Transfers, Live], object]


def in_parts(transfers: Transfers, target: str) -> object:
    entry = bundle.Entry("", "file", 0o644, len(OTHER))
    body = b"".join(bundle.write((part, BytesIO(OTHER)) for part in entry.parts(0)))
    digest = f"sha-256:{hashlib.sha256(OTHER).hexdigest()}"
    return transfers.write_parts(target, reading(body), total=len(OTHER), digest=digest, offset=0)


def compress(files: Files, live: Live, target: str) -> object:
    return archives.compress(files, [live.source], target, str(Path(live.source).parent), format="tar")


CHANGES: dict[str, Act] = {
    "remove the folder": lambda f, t, j: f.remove(j.path, recursive=True),
    "remove the folder, missing or not": lambda f, t, j: f.remove(j.path, recursive=True, missing_ok=True),
    "remove a folder above": lambda f, t, j: f.remove(str(j.folder.parent), recursive=True),
    "remove the top": lambda f, t, j: f.remove(str(j.folder.parent.parent), recursive=True),
    "remove the script": lambda f, t, j: f.remove(j.script),
    "remove the guard": lambda f, t, j: f.remove(j.guard),
    "remove the script as whatever it is": lambda f, t, j: f.remove(j.script, recursive=True),
    "rename the folder": lambda f, t, j: f.rename(j.path, j.beside),
    "rename a folder above": lambda f, t, j: f.rename(str(j.folder.parent), f"{j.folder.parent}-x"),
    "rename the script": lambda f, t, j: f.rename(j.script, j.beside),
    "rename the guard": lambda f, t, j: f.rename(j.guard, j.beside),
    "upload over the script": lambda f, t, j: f.write(j.script, reading(OTHER)),
    "upload over the guard": lambda f, t, j: f.write(j.guard, reading(OTHER)),
    "upload into the folder": lambda f, t, j: f.write(j.path, reading(OTHER), into="run.sh"),
    "upload with folders on the way": lambda f, t, j: f.write(j.script, reading(OTHER), parents=True),
    "upload in parts": lambda f, t, j: in_parts(t, j.script),
    "upload a folder": lambda f, t, j: t.write_folder(
        j.path, j.bundle(bundle.Entry("run.sh", "file", 0o644, len(OTHER)))
    ),
    "upload a link": lambda f, t, j: t.write_folder(j.path, j.bundle(bundle.Entry("run.sh", "symlink", target="out"))),
    "copy over the script": lambda f, t, j: f.copy(j.source, j.script),
    "copy exactly over the script": lambda f, t, j: f.copy(j.source, j.script, exact=True),
    "copy over the guard": lambda f, t, j: f.copy(j.source, j.guard),
    "compress over the script": lambda f, t, j: compress(f, j, j.script),
    "extract over the script": lambda f, t, j: archives.extract(f, j.archive("new", "run.sh"), j.path),
    "extract over the script from above": lambda f, t, j: archives.extract(
        f, j.archive("new", "work/run.sh"), str(j.folder.parent)
    ),
    "extract over the guard": lambda f, t, j: archives.extract(f, j.archive(guard_of(j.job.id)), j.path),
}

NEW_GUARDS: dict[str, Act] = {
    "upload": lambda f, t, j: f.write(j.guard, reading(OTHER)),
    "upload, replacing nothing": lambda f, t, j: f.write(j.guard, reading(OTHER), overwrite=False),
    "upload in parts": lambda f, t, j: in_parts(t, j.guard),
    "upload a folder": lambda f, t, j: t.write_folder(
        j.path, j.bundle(bundle.Entry(guard_of(j.job.id), "file", 0o644, len(OTHER)))
    ),
    "make a folder": lambda f, t, j: f.mkdir(j.guard),
    "make a folder, there or not": lambda f, t, j: f.mkdir(j.guard, parents=True, exist_ok=True),
    "make a link": lambda f, t, j: f.symlink(j.guard, "out"),
    "rename": lambda f, t, j: f.rename(j.source, j.guard),
    "rename a folder": lambda f, t, j: f.rename(str(j.folder.parent / "empty"), j.guard),
    "copy": lambda f, t, j: f.copy(j.source, j.guard),
    "copy a folder": lambda f, t, j: f.copy(str(j.folder.parent / "empty"), j.guard),
    "compress": lambda f, t, j: compress(f, j, j.guard),
    "extract": lambda f, t, j: archives.extract(f, j.archive("new", guard_of(j.job.id)), j.path),
}


def refused(act: Callable[[], object]) -> FileError:
    with pytest.raises(FileError) as caught:
        act()
    assert (caught.value.errno, caught.value.status, caught.value.retryable) == ("EBUSY", 409, False)
    return caught.value


def test_what_a_live_job_needs_is_not_taken_away_or_replaced(setting: Setting) -> None:
    for name, act in CHANGES.items():
        live = setting.launch()
        before = live.kept()
        error = refused(partial(act, setting.files, setting.transfers, live))
        assert live.job.id in error.message, name
        assert "RUNNING" in error.message, name
        assert live.kept() == before, name
        assert not (live.folder / "new").exists(), name  # Of an archive nothing.
        act(setting.files.forced(), setting.transfers.forced(), live)
        assert live.kept() != before, name


def test_no_guard_is_made_before_the_job_makes_it(setting: Setting) -> None:
    for name, act in NEW_GUARDS.items():
        live = setting.launch()
        os.unlink(live.guard)
        refused(partial(act, setting.files, setting.transfers, live))
        assert live.kept() == [(live.script, SCRIPT)], name
    live = setting.launch()
    os.unlink(live.guard)
    with pytest.raises(Forbidden):
        setting.files.write(f"{live.guard}/in/it", reading(OTHER), parents=True)
    assert not os.path.lexists(live.guard)


def test_a_job_that_has_ended_protects_nothing_also_before_the_gateway_knew(setting: Setting) -> None:
    for name, act in CHANGES.items():
        live = setting.launch()
        before = live.kept()
        live.end()
        act(setting.files, setting.transfers, live)
        assert live.kept() != before, name


def test_a_job_counts_as_live_while_the_scheduler_does_not_answer(setting: Setting) -> None:
    live = setting.launch()
    live.end()
    setting.backend.down = True
    refused(lambda: setting.files.remove(live.path, recursive=True))
    setting.backend.down = False
    setting.files.remove(live.path, recursive=True)


def test_a_job_is_live_from_its_launch_on(setting: Setting, folder: str) -> None:
    gateway, files = setting.gateway, setting.files
    job = gateway.jobs.create_in_folder(setting.alice, folder, "run.sh")
    files.write(f"{folder}/run.sh", reading(SCRIPT))  # Not launched yet: it may change.

    def submit(_: Submission) -> str:
        refused(lambda: files.write(f"{folder}/run.sh", reading(OTHER)))
        raise Deferred("the controller is down")

    setting.backend.on_submit = submit
    assert gateway.jobs.launch(setting.alice, job).job_state is JobState.SUBMITTING
    error = refused(lambda: files.remove(folder, recursive=True))
    assert "SUBMITTING" in error.message
    gateway.jobs.cancel(gateway.jobs.get(setting.alice, job.id))
    files.remove(folder, recursive=True)


def test_everything_else_in_the_folder_is_free(setting: Setting) -> None:
    live, files, transfers = setting.launch(), setting.files, setting.transfers
    before = live.kept()
    folder = live.path
    files.write(f"{folder}/new", reading(OTHER))
    files.write(f"{folder}/out", reading(OTHER))
    files.mkdir(f"{folder}/made")
    files.symlink(f"{folder}/link", "run.sh")
    files.remove(f"{folder}/link")  # The link, not what it leads to.
    files.rename(f"{folder}/new", f"{folder}/renamed")
    files.remove(f"{folder}/sub", recursive=True)
    files.copy(live.source, f"{folder}/copied")
    in_parts(transfers, f"{folder}/in-parts")
    archives.extract(files, live.archive("a", "b/run.sh", f"b/{guard_of(live.job.id)}"), folder)
    transfers.write_folder(folder, live.bundle(bundle.Entry("c", "file", 0o644, len(OTHER))))
    files.chmod(live.script, 0o755)
    # What is in it is read and copied, the script, too; what is beside it is nobody's.
    files.copy(folder, live.beside)
    archives.compress(files, [folder], f"{live.beside}.tar", str(live.folder.parent), format="tar")
    assert b"".join(transfers.send(folder))
    files.remove(live.beside, recursive=True)
    files.remove(live.source)
    (live.folder.parent / "wor").mkdir()
    files.remove(str(live.folder.parent / "wor"), directory=True)
    assert live.kept() == before


def spellings(live: Live) -> list[str]:
    """Other ways to write the folder of a live job, all of which lead there."""
    above = live.folder.parent
    (above / "to-it").symlink_to("work")
    (above / "absolute").symlink_to(live.path)
    (above / "up").symlink_to("..")
    (above / "chain").symlink_to("up/above/to-it")
    return [
        f"{above}//work",
        f"{above}/./work",
        f"{above}/beyond/../work",
        f"{above}/work/../work",
        f"{above}/to-it",
        f"{above}/absolute",
        f"{above}/chain",
        f"{above}/up/above/work",
        f"/{above}/work",
    ]


def test_no_other_way_to_write_a_path_helps(setting: Setting) -> None:
    live, files = setting.launch(), setting.files
    (live.folder.parent / "beyond").mkdir()
    before = live.kept()
    guard = guard_of(live.job.id)
    for folder in spellings(live):
        for name in ("run.sh", guard):
            refused(partial(files.write, f"{folder}/{name}", reading(OTHER)))
            refused(partial(files.write, folder, reading(OTHER), into=name))
            refused(partial(files.remove, f"{folder}/{name}"))
            refused(partial(files.rename, f"{folder}/{name}", live.beside))
            refused(partial(files.copy, live.source, f"{folder}/{name}"))
            refused(partial(in_parts, setting.transfers, f"{folder}/{name}"))
            refused(partial(archives.extract, files, live.archive(name), folder))
        if not os.path.islink(folder):  # A link to it may go.
            refused(partial(files.remove, folder, recursive=True))
            refused(partial(files.remove, f"{folder}/", recursive=True))
            refused(partial(files.rename, folder, live.beside))
        assert live.kept() == before, folder
    (live.folder.parent / "script").symlink_to("work/run.sh")
    refused(lambda: files.write(str(live.folder.parent / "script"), reading(OTHER)))
    assert live.kept() == before


def test_a_folder_that_is_renamed_and_launched_during_an_upload_is_protected(setting: Setting) -> None:
    """The place was found before; what counts is where it is when the file gets its name."""
    files, jobs = setting.files, setting.gateway.jobs
    early, late = setting.home / "early", setting.home / "late"
    early.mkdir()
    (early / "run.sh").write_bytes(SCRIPT)
    pieces = iter([OTHER, b""])

    def read(_: int) -> bytes:
        piece = next(pieces)
        if not piece:
            early.rename(late)
            jobs.launch(setting.alice, jobs.create_in_folder(setting.alice, str(late), "run.sh"))
        return piece

    refused(lambda: files.write(f"{early}/run.sh", read))
    assert (late / "run.sh").read_bytes() == SCRIPT


def test_a_script_that_is_a_link_is_not_written_through(setting: Setting) -> None:
    files, jobs = setting.files, setting.gateway.jobs
    folder, shared = setting.home / "linked", setting.home / "shared.sh"
    folder.mkdir()
    shared.write_bytes(SCRIPT)
    (folder / "run.sh").symlink_to("../shared.sh")
    jobs.launch(setting.alice, jobs.create_in_folder(setting.alice, str(folder), "run.sh"))
    refused(lambda: files.write(f"{folder}/run.sh", reading(OTHER)))
    refused(lambda: files.rename(f"{folder}/run.sh", f"{folder}/other"))
    refused(lambda: files.remove(f"{folder}/run.sh"))
    assert shared.read_bytes() == SCRIPT


def test_a_root_under_two_names_protects_under_both(setting: Setting, tmp_path: Path) -> None:
    """One folder, known by way of a root that is a link and by way of a root above what that leads to."""
    gateway, alice = setting.gateway, setting.alice
    everything = Root("everything", str(setting.home))
    (tmp_path / "short").symlink_to(setting.home / "deep" / "down")
    (setting.home / "deep" / "down" / "work").mkdir(parents=True)
    (setting.home / "deep" / "down" / "work" / "run.sh").write_bytes(SCRIPT)
    roots = Roots([Root("short", str(tmp_path / "short")), everything])
    files = Files(roots, protection=LiveJobs(gateway.ledger, gateway.watch.refresh, roots, alice.id))
    job = gateway.ledger.add(gateway.jobs._new(alice, "k", str(tmp_path / "short" / "work"), "run.sh", None, None))
    assert gateway.ledger.change(job, {"state": JobState.QUEUED}) is not None
    (setting.home / "x").mkdir()
    around = f"{setting.home}/x/../deep/down"  # Only so it is not taken for the deeper root.
    refused(lambda: files.write(f"{around}/work/run.sh", reading(OTHER)))
    refused(lambda: files.remove(f"{around}/work", recursive=True))
    refused(lambda: files.remove(around, recursive=True))
    refused(lambda: files.remove(f"{setting.home}/deep", recursive=True))
    refused(lambda: files.rename(f"{setting.home}/deep", f"{setting.home}/elsewhere"))


def test_jobs_of_others_are_protected_and_forcing_does_not_help(setting: Setting) -> None:
    """In a home that several share, for instance."""
    live, gateway = setting.launch(), setting.gateway
    bob = gateway.ledger.user_of(Identity("dev", "bob", "bob@example.org", "Bob"))
    shared = Roots([Root("home", str(setting.home))])
    files = Files(shared, protection=LiveJobs(gateway.ledger, gateway.watch.refresh, shared, bob.id))
    transfers = Transfers(files, gateway.keep)
    before = live.kept()
    for act in CHANGES.values():
        for one in (act, lambda f, t, j, act=act: act(f.forced(), t.forced(), j)):
            error = refused(partial(one, files, transfers, live))
            assert live.job.id not in error.message.replace(guard_of(live.job.id), "")
            assert "somebody else" in error.message
    assert live.kept() == before
    live.end()
    files.remove(live.path, recursive=True)


def test_new_files_cost_no_question(setting: Setting) -> None:
    live, files, transfers = setting.launch(), setting.files, setting.transfers
    asked: list[str] = []

    @event.listens_for(setting.gateway.ledger.engine, "before_cursor_execute")
    def note(*arguments: object) -> None:
        asked.append(str(arguments[2]))

    for folder in (live.path, str(live.folder.parent)):
        files.write(f"{folder}/n1", reading(OTHER))
        in_parts(transfers, f"{folder}/n2")
        files.mkdir(f"{folder}/n3", parents=True)
        files.symlink(f"{folder}/n4", "n1")
        files.copy(f"{folder}/n1", f"{folder}/n5")
        transfers.write_folder(f"{folder}/n6", live.bundle(bundle.Entry("f", "file", 0o644, len(OTHER))))
        archives.extract(files, live.archive("x1", "x2/x"), f"{folder}/n7")
    assert asked == []
    files.write(f"{live.path}/n1", reading(OTHER))
    assert asked


def test_names_that_no_ledger_can_hold_are_no_problem(setting: Setting) -> None:
    files, name = setting.files, os.fsdecode(b"\xff")
    files.mkdir(f"{setting.home}/{name}")
    files.write(f"{setting.home}/{name}/{name}", reading(OTHER))
    files.write(f"{setting.home}/{name}/{name}", reading(SCRIPT))
    files.mkdir(f"{setting.home}/{name}/{GUARD_PREFIX}{name}")
    files.rename(f"{setting.home}/{name}", f"{setting.home}/{name}{name}")
    files.remove(f"{setting.home}/{name}{name}", recursive=True)
