"""The job script of a classic gateway, run as the scheduler runs it: by bash, in the job's folder."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from aiida_marketplace_hpc.client.classic.journal import Node
from aiida_marketplace_hpc.client.classic.manifest import Manifest
from aiida_marketplace_hpc.client.classic.names import piece_name
from aiida_marketplace_hpc.client.classic.records import End, read_end, read_records
from aiida_marketplace_hpc.client.classic.script import Plan, make_script
from aiida_marketplace_hpc.client.classic.tree import InJob, Inline, Piece, Pieces, Tree
from aiida_marketplace_hpc.testing.machine import wait_until

WORK = "/home/me/aiida/ab/cd/0123-4567-89ab-cdef-0123456789ab"
ODD = [
    "two words",
    "quo'te\"s",
    "new\nline",
    "-rf",
    "ünïcode",
    "$HOME `id` \\n",
    "*?[a]",
    ".hidden",
    "not utf-8 \udcff\udcfe",
    "x" * 255,
    "trailing ",
    "a\tb",
    "semi;colon|pipe&<>()",
]


class Job:
    """A job's folder, as a classic gateway makes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[Node] = []
        folder.mkdir()

    def file(self, path: str, data: bytes = b"", mode: int | None = None) -> None:
        self.nodes.append(
            Node(f"{WORK}/{path}", "file", mode, size=len(data), content=Inline(f"{WORK}/{path}"), data=data)
        )

    def directory(self, path: str, mode: int | None = None) -> None:
        self.nodes.append(Node(f"{WORK}/{path}", "directory", mode))

    def uploaded(self, data: bytes, size: int) -> Pieces:
        """What was uploaded in pieces of ``size`` bytes."""
        pieces = []
        for start in range(0, len(data), size):
            part = data[start : start + size]
            pieces.append(Piece("job", len(part), hashlib.sha256(part).hexdigest()))
            (self.folder / piece_name(pieces[-1].digest)).write_bytes(part)
        return Pieces(tuple(pieces), hashlib.sha256(data).hexdigest())

    def write(
        self,
        text: str = "#!/bin/bash\ntrue\n",
        *,
        retrieved: tuple[str, ...] = (),
        packed: bool = False,
        piece: int = 4096,
    ) -> None:
        """Write ``job.sh``."""
        self.file("_aiidasubmit.sh", text.encode())
        pack = None
        if packed:
            pack = self.uploaded(b"".join(node.data or b"" for node in self.nodes), 1000)
        self.piece = piece
        plan = Plan(
            WORK,
            "_aiidasubmit.sh",
            text.encode(),
            tuple(self.nodes),
            pack=pack,
            retrieved=retrieved,
            beat=0.1,
            piece=piece,
        )
        (self.folder / "job.sh").write_bytes(make_script(plan))

    def start(self, **env: str) -> subprocess.Popen[bytes]:
        """Start it, with its output where the header says."""
        with open(self.folder / "out", "ab") as out, open(self.folder / "err", "ab") as err:
            return subprocess.Popen(
                ["/bin/bash", "job.sh"],
                cwd=self.folder,
                env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "17", **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def run(self, **env: str) -> int:
        """Run it to the end; its exit code."""
        with self.start(**env) as process:
            return process.wait(timeout=30)

    @property
    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))

    @property
    def end(self) -> End | None:
        files = [{"name": name, "size": "0", "type": "-"} for name in self.names if not name.startswith(".")]
        end = read_records(files).end
        if end is not None:
            same = read_end((self.folder / "mphpc-end").read_bytes())
            assert (same.state, same.code, same.began, same.ended, same.pieces) == tuple(vars(end).values())[:5]
            assert same.scheduler_id == end.scheduler_id or not end.scheduler_id
        return end

    @property
    def reason(self) -> str:
        return read_end((self.folder / "mphpc-end").read_bytes()).reason

    @property
    def tree(self) -> Tree:
        parts = sorted(self.folder.glob("mphpc-manifest-*"))
        return Manifest(b"".join(part.read_bytes() for part in parts)).tree("job", self.piece)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "job")


@pytest.fixture
def ended() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """Ends what a test has started, with everything in its session."""
    started: list[subprocess.Popen[bytes]] = []
    yield started.append
    for process in started:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a job with everything in its session."""
    while alive := _alive({process.pid}):
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait(timeout=10)


def _alive(sessions: set[int]) -> list[int]:
    """The processes of some sessions."""
    listed = subprocess.run(["ps", "-eo", "pid,sid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.split("\n")[1:] if line.strip()]
    return [int(pid) for pid, session, state in rows if int(session) in sessions and not state.startswith("Z")]


@pytest.mark.parametrize("packed", [False, True])
def test_what_was_made_before_is_there_when_the_script_runs(job: Job, packed: bool) -> None:
    for number, name in enumerate(ODD):
        job.file(name, f"content {number}".encode())
        job.directory(f"d{name[:200]}")
        job.file(f"d{name[:200]}/{name}", bytes(range(256)) * number)
    job.directory("empty/deep/er")
    job.file("empty file")
    job.file("tool", b"#!/bin/sh\necho tool ran\n", 0o755)
    job.directory("closed", 0o555)
    job.file("closed/inside", b"inside", 0o400)
    job.write("#!/bin/bash\n./tool\nls -A empty/deep\npwd\n", packed=packed)
    assert job.run() == 0, job.read("err")
    for number, name in enumerate(ODD):
        place = os.fsencode(str(job.folder)) + b"/"
        raw = name.encode("utf-8", "surrogateescape")
        with open(place + raw, "rb") as file:
            assert file.read() == f"content {number}".encode()
        with open(place + b"d" + raw[: len(name[:200].encode("utf-8", "surrogateescape"))] + b"/" + raw, "rb") as file:
            assert file.read() == bytes(range(256)) * number
    assert job.read("out") == f"tool ran\ner\n{job.folder}\n"
    assert job.read("err") == ""
    assert (job.folder / "empty file").read_bytes() == b""
    assert stat.S_IMODE((job.folder / "closed").stat().st_mode) == 0o555
    assert stat.S_IMODE((job.folder / "closed" / "inside").stat().st_mode) == 0o400
    assert (
        not list(job.folder.glob("mphpc-piece-*"))
        + list(job.folder.glob("mphpc-p*k"))
        + list(job.folder.glob("mphpc-new"))
    )
    end = job.end
    assert end is not None
    assert (end.state, end.code, end.scheduler_id) == ("COMPLETED", 0, "17")
    # The manifest knows all of it, under the names that it has.
    tree = job.tree
    assert set(ODD) <= set(tree)
    assert tree["closed"].mode == 0o555
    assert tree["empty/deep/er"].kind == "directory"
    assert "job.sh" not in tree
    assert not [path for path in tree if path.startswith("mphpc-")]


def test_large_files_are_joined_and_verified(job: Job) -> None:
    data = os.urandom(10_000)
    content = job.uploaded(data, 3000)
    for name in ("large", "same again"):
        job.nodes.append(Node(f"{WORK}/{name}", "file", 0o640, size=len(data), content=content))
    job.write("#!/bin/bash\nsha256sum < large > sum\n")
    assert job.run() == 0, job.read("err")
    assert (job.folder / "large").read_bytes() == (job.folder / "same again").read_bytes() == data
    assert job.read("sum").split()[0] == content.digest
    assert not list(job.folder.glob("mphpc-piece-*"))


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_file_that_arrived_wrong_keeps_the_script_from_running(job: Job, damage: str) -> None:
    content = job.uploaded(b"a" * 5000, 3000)
    job.nodes.append(Node(f"{WORK}/large", "file", size=5000, content=content))
    job.write("#!/bin/bash\ntouch ran\n")
    piece = job.folder / piece_name(content.pieces[1].digest)
    {
        "cut": lambda: piece.write_bytes(b"a" * 1999),
        "changed": lambda: piece.write_bytes(b"b" * 2000),
        "gone": piece.unlink,
    }[damage]()
    assert job.run() == 74
    assert "ran" not in job.names
    end = job.end
    assert end is not None
    assert end.state == "UNPREPARED"
    assert job.reason.startswith("large ")
    assert "large" in job.read("err")


def test_a_second_copy_ends_before_the_script(job: Job) -> None:
    job.write("#!/bin/bash\necho ran >> ran\n")
    assert job.run() == 0
    before = job.names
    assert job.run(SLURM_JOB_ID="18") == 75
    assert job.read("ran") == "ran\n"
    assert job.names == before
    assert "second copy" in job.read("err")


def test_many_copies_at_once_run_the_script_once(job: Job) -> None:
    job.write("#!/bin/bash\necho ran >> ran\nsleep 0.2\n")
    copies = [job.start(SLURM_JOB_ID=str(number)) for number in range(8)]
    codes = sorted(copy.wait(timeout=30) for copy in copies)
    assert codes == [0, *[75] * 7]
    assert job.read("ran") == "ran\n"


def test_a_job_that_is_started_again_under_its_id_ends_and_says_so(job: Job) -> None:
    job.write("#!/bin/bash\necho ran >> ran\nkill -KILL $PPID; sleep 0.1\n")
    assert job.run() == -signal.SIGKILL
    assert job.end is None
    assert job.run(SLURM_RESTART_COUNT="1") == 75
    assert job.read("ran") == "ran\n"
    end = job.end
    assert end is not None
    assert end.state == "NODE_FAIL"


def test_a_cancellation_that_is_there_already_keeps_the_script_from_running(job: Job) -> None:
    job.write("#!/bin/bash\ntouch ran\n")
    (job.folder / "mphpc-cancel").touch()
    assert job.run() == 143
    assert "ran" not in job.names
    end = job.end
    assert end is not None
    assert end.state == "CANCELLED"


def test_a_cancellation_ends_a_job_that_runs(job: Job) -> None:
    job.write("#!/bin/bash\nsleep 60 & wait\n")
    with job.start() as process:
        wait_until(lambda: "mphpc-beat-0.1" in job.names, within=10, failure=lambda: str(job.names))
        (job.folder / "mphpc-cancel").touch()
        assert process.wait(timeout=10) == 143
    end = job.end
    assert end is not None
    assert (end.state, end.signal) == ("CANCELLED", signal.SIGTERM)


def test_exit_codes_are_told_and_kept(job: Job) -> None:
    job.write("#!/bin/bash\necho no >&2\nexit 3\n")
    assert job.run() == 3
    end = job.end
    assert end is not None
    assert (end.state, end.exit_code, end.signal) == ("FAILED", 3, None)
    assert job.read("err") == "no\n"


@pytest.mark.parametrize(
    ("env", "limit", "state"),
    [
        ({}, "", "CANCELLED"),
        ({}, "#SBATCH --time=00:00:01\n", "TIMEOUT"),
        ({"SLURM_JOB_END_TIME": "now"}, "", "TIMEOUT"),
    ],
)
def test_a_signal_before_the_end_leaves_a_record(job: Job, env: dict[str, str], limit: str, state: str) -> None:
    job.write(
        f"#!/bin/bash\n{limit}trap 'touch told; exit 7' TERM\ntouch begun\nsleep 60 &\nwait\n", retrieved=("told",)
    )
    with job.start(**{name: str(int(time.time())) for name in env}) as process:
        wait_until(lambda: "begun" in job.names, within=10, failure=lambda: str(job.names))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 7
    end = job.end
    assert end is not None
    assert (end.state, end.code) == (state, 7)
    assert "told" in job.tree


def test_a_signal_at_the_very_end_of_the_script_is_survived(
    tmp_path: Path, ended: Callable[[subprocess.Popen[bytes]], None]
) -> None:
    """As Slurm sends it: to all processes at once, so that the script dies just when its parent is told."""
    jobs = [Job(tmp_path / str(number)) for number in range(24)]
    for job in jobs:
        job.write("#!/bin/bash\ntouch begun\nsleep 60\n")
    processes = [job.start() for job in jobs]
    for process in processes:
        ended(process)
    wait_until(lambda: all("begun" in job.names for job in jobs), within=30, failure=lambda: "not all have begun")
    for pid in _alive({process.pid for process in processes}):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    for job, process in zip(jobs, processes, strict=True):
        assert process.wait(timeout=20) == 143
        assert job.end is not None


def test_a_job_that_is_killed_while_it_ends_leaves_why_and_what_is_known(job: Job) -> None:
    job.write("#!/bin/bash\ntouch made\nexit 5\n", retrieved=("fifo",))
    # The digest of what it retrieves takes for ever, and the list comes before.
    text = (job.folder / "job.sh").read_text().replace("digest=$(sha256sum", "sleep 60; digest=$(sha256sum")
    (job.folder / "job.sh").write_text(text)
    (job.folder / "fifo").write_text("slow")
    with job.start() as process:
        wait_until(lambda: "mphpc-ending-FAILED-5" in job.names, within=10, failure=lambda: str(job.names))
        _kill(process)
    records = read_records([{"name": name, "size": "0"} for name in job.names])
    assert (records.end, records.ending, records.ending_code) == (None, "FAILED", 5)
    with pytest.raises(ValueError, match="cut off"):
        _ = job.tree


def test_other_signals_reach_the_script_and_end_nothing(job: Job) -> None:
    job.write(
        "#!/bin/bash\ntrap 'touch told' USR1\ntouch begun\nsleep 0.1 & wait\nuntil [ -e told ]; do sleep 0.05; done\n"
    )
    with job.start() as process:
        wait_until(lambda: "begun" in job.names, within=10, failure=lambda: str(job.names))
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=10) == 0
    assert "told" in job.names


def test_the_heartbeat_grows_while_the_job_lives_and_stops_with_it(
    job: Job, ended: Callable[[subprocess.Popen[bytes]], None]
) -> None:
    job.write("#!/bin/bash\nsleep 60\n")
    process = job.start()
    ended(process)

    def beats() -> int:
        path = job.folder / "mphpc-beat-0.1"
        return path.stat().st_size if path.exists() else 0

    wait_until(lambda: beats() > 3, within=10, failure=lambda: str(job.names))
    process.kill()
    process.wait(timeout=10)
    wait_until(lambda: not _beats_on(process.pid), within=10, failure=lambda: "the heartbeat goes on")
    assert job.end is None


def _beats_on(group: int) -> bool:
    """Whether a process of ours is left in the session beside the script's own."""
    listed = subprocess.run(["ps", "-eo", "sid,args"], capture_output=True, text=True, check=True).stdout
    return any(line.split()[0] == str(group) and "job.sh" in line for line in listed.split("\n")[1:] if line.split())


def test_the_script_is_run_by_its_own_interpreter(job: Job) -> None:
    job.write("#!/usr/bin/env python3\nimport sys\nprint('python', sys.argv[0])\n")
    assert job.run() == 0, job.read("err")
    assert job.read("out") == "python ./_aiidasubmit.sh\n"
    assert (job.folder / "_aiidasubmit.sh").read_text().startswith("#!/usr/bin/env python3")


def test_the_header_is_the_scripts_own(job: Job) -> None:
    job.write("#!/bin/bash\n#SBATCH --job-name=x\n#SBATCH --time=1:00:00\n\ntrue\n#SBATCH --nodes=9\n")
    lines = job.read("job.sh").split("\n")
    assert lines[:4] == ["#!/bin/bash", "#SBATCH --open-mode=append", "#SBATCH --job-name=x", "#SBATCH --time=1:00:00"]
    assert not any("--nodes=9" in line for line in lines)


def test_copies_and_links_from_another_job(job: Job, tmp_path: Path) -> None:
    parent = Job(tmp_path / "parent job")
    parent.file("sub/data", b"data", 0o600)
    parent.nodes.append(Node(f"{WORK}/link", "symlink", source="sub/data"))
    parent.write("#!/bin/bash\ntouch made .hidden\n")
    assert parent.run() == 0
    real = str(parent.folder)
    copies = [
        ("all", "copy", real, WORK, False),
        ("one", "copy", f"{real}/sub", f"{WORK}/sub", False),
        ("followed", "copy", f"{real}/link", f"{WORK}/link", True),
        ("kept", "copy", f"{real}/link", f"{WORK}/link", False),
        ("linked", "symlink", f"{real}/sub", "", False),
        ("relative", "symlink", "sub/x", "", False),
        ("own", "symlink", "", f"{WORK}/sub/x", False),
        ("no such", "copy", "/no/such/place", "", False),
        ("\0a", "copies", f"{real}/m*e", "", False),
        ("into/\0b", "links", f"{real}/s*", "", False),
    ]
    job.file("sub/x", b"x")
    job.directory("into")
    job.nodes += [
        Node(f"{WORK}/{name}", kind, source=source, origin=origin, follow=follow)
        for name, kind, source, origin, follow in copies
    ]
    job.write("#!/bin/bash\ncat all/sub/data one/data followed linked/data own\n")
    assert job.run() == 0, job.read("err")
    assert job.read("out") == "datadatadatadatax"
    assert sorted(os.listdir(job.folder / "all")) == [".hidden", "_aiidasubmit.sh", "err", "link", "made", "out", "sub"]
    assert stat.S_IMODE((job.folder / "one" / "data").stat().st_mode) == 0o600
    assert os.readlink(job.folder / "kept") == "sub/data"
    assert os.readlink(job.folder / "relative") == "sub/x"
    assert os.readlink(job.folder / "into" / "sub") == f"{real}/sub"
    assert (job.folder / "made").exists()
    assert "/no/such/place" in job.read("err")


def test_what_was_to_be_copied_and_is_gone_keeps_the_script_from_running(job: Job) -> None:
    job.nodes.append(Node(f"{WORK}/x", "copy", source="/no/such/place", origin=f"{WORK[:-1]}0/x"))
    job.write("#!/bin/bash\ntouch ran\n")
    assert job.run() == 74
    assert "ran" not in job.names
    assert "/no/such/place" in job.reason


def test_what_is_retrieved_is_handed_out(job: Job, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "through").write_bytes(b"through a link")
    job.nodes.append(Node(f"{WORK}/results/link", "symlink", source=str(elsewhere)))
    for name in ODD:
        job.file(f"results/{name}", name.encode("utf-8", "surrogateescape"))
    job.file("results/plain", b"plain")
    job.file("large", b"0123456789" * 1000)
    job.file("scratch", b"s" * 10_000)
    job.file("many/a/x.txt", b"x")
    job.file("many/b/y.txt", b"")
    job.write(
        "#!/bin/bash\n#SBATCH --output=out.txt\necho said\n",
        retrieved=("results", "large", "many/*/*.txt", "no such", "in [brackets] *"),
        piece=4096,
    )
    assert job.run() == 0, job.read("err")
    tree = job.tree

    def content(path: str) -> bytes:
        entry = tree.find(path)
        assert entry is not None
        found = entry.content
        assert isinstance(found, InJob)
        assert found.digest is not None
        data = (
            b"".join((job.folder / piece).read_bytes() for piece in found.pieces)
            if found.handed_out
            else (job.folder / found.path).read_bytes()
        )
        assert hashlib.sha256(data).hexdigest() == found.digest
        return data

    for name in ODD:
        assert content(f"results/{name}") == name.encode("utf-8", "surrogateescape")
    assert content("large") == b"0123456789" * 1000
    assert content("results/plain") == b"plain"
    assert content("many/a/x.txt") == b"x"
    assert content("many/b/y.txt") == b""
    assert content("results/link/through") == b"through a link"
    assert tree["results/link"].kind == "symlink"
    scratch = tree["scratch"].content
    assert isinstance(scratch, InJob)
    assert not scratch.handed_out
    # As many as are needed, and none of what nobody asks for.
    assert len(list(job.folder.glob("mphpc-out-*"))) == 3 + sum(
        not name.isascii() or not name.isalnum() for name in ODD
    ) - sum(name in (".hidden", "-rf") for name in ODD)


def test_the_output_of_the_job_itself_has_no_final_size(job: Job) -> None:
    job.write("#!/bin/bash\necho said\n", retrieved=("out",))
    assert job.run() == 0
    entry = job.tree["out"].content
    assert isinstance(entry, InJob)
    assert (entry.exact, entry.digest) == (False, None)


def test_a_folder_that_cannot_be_written_ends_the_job(job: Job) -> None:
    job.write("#!/bin/bash\ntouch ran\n")
    (job.folder / "mphpc-lock").write_text("not a folder")
    assert job.run() == 73
    assert "cannot write" in job.read("err")
