"""``marketplace-hpc demo`` as a newcomer runs it: its result, its messages, and that it leaves nothing running."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from aiida_marketplace_hpc.demo import onsager, study
from aiida_marketplace_hpc.demo.stage import Stage, check_port, check_python
from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.testing.machine import process_table

COMMAND = [str(Path(sys.executable).with_name("marketplace-hpc")), "demo"]
PROCESSES = 1 + len(study.TEMPERATURES) + 2
PATIENCE = 600.0
"""Seconds for a whole demo, which takes less than two minutes where nothing else runs."""


def processes_of(directory: Path) -> list[str]:
    """Every living process that has to do with a directory, in its arguments, its environment or as where it is."""
    found = []
    for entry in process_table():
        words = [*entry.command(), *entry.environment().values()]
        try:
            words.append(os.readlink(f"/proc/{entry.pid}/cwd"))
        except OSError:
            pass
        if entry.pid != os.getpid() and any(str(directory) in word for word in words):
            found.append(f"{entry.pid} {' '.join(entry.command())}")
    return found


@dataclass
class Run:
    directory: Path
    said: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One whole demo, in the default directory, in an environment that is set for somebody's own work."""
    folder = tmp_path_factory.mktemp("demo")
    foreign = {"AIIDA_PATH": str(folder / "own"), "AIIDA_PROFILE": "own", "MARKETPLACE_HPC_BACKEND": "slurm"}
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    directory = folder / "demo-result"
    log = directory / "demo.log"
    heard = folder / "said"
    began = time.monotonic()
    with open(heard, "wb") as output:
        demo = subprocess.Popen(
            [*COMMAND, "--port", "0"],
            cwd=folder,
            env={**os.environ, **foreign, **proxies},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status = demo.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            demo.send_signal(signal.SIGINT)  # It ends what it has started.
            demo.wait(60)
            status = None
    said = heard.read_text()
    assert status == 0, f"{said}\n{log.read_text() if log.exists() else ''}"
    print(f"\nthe demo took {time.monotonic() - began:.0f} s")
    yield Run(directory, said)
    assert not (folder / "own").exists()


@pytest.mark.services
def test_every_process_has_finished_well(run: Run) -> None:
    # Without graphviz there is a tree of the processes, too, in which they are written a little differently.
    assert run.said.count("⏹ Finished [0]") == PROCESSES
    verdi = str(Path(sys.executable).with_name("verdi"))
    environment = {**os.environ, "AIIDA_PATH": str(run.directory)}
    listed = subprocess.run(
        [verdi, "process", "list", "--all", "--raw", "--project", "process_label", "state"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(listed) == PROCESSES
    assert sum("IsingJob" in line for line in listed) == len(study.TEMPERATURES)
    assert all("Finished [0]" in line for line in listed)


@pytest.mark.services
def test_its_table_shows_the_transition(run: Run) -> None:
    text = (run.directory / "result" / "ising.txt").read_text(encoding="utf-8")
    assert text.strip() in run.said
    rows = [line.replace("±", "").split() for line in text.splitlines()[2:]]
    assert [float(row[0]) for row in rows] == list(study.TEMPERATURES)
    for row in rows:
        temperature, magnetisation, magnetisation_error, exact, energy, energy_error, exact_energy, capacity = map(
            float, row[:8]
        )
        assert exact == pytest.approx(onsager.magnetisation(temperature), abs=1e-4)
        assert exact_energy == pytest.approx(onsager.energy(temperature), abs=1e-4)
        assert 0 < magnetisation < 1
        assert -2 < energy < 0
        assert capacity > 0
        # Where the lattice is much larger than what hangs together in it, it is as good as infinite.
        if abs(temperature - onsager.CRITICAL_TEMPERATURE) > 0.06:
            assert abs(energy - exact_energy) < 5 * energy_error + 1e-4
            if temperature < onsager.CRITICAL_TEMPERATURE:
                assert abs(magnetisation - exact) < 5 * magnetisation_error + 1e-4
    magnetisations = [float(row[1]) for row in rows]
    assert magnetisations == sorted(magnetisations, reverse=True)
    assert magnetisations[0] > 0.95
    assert magnetisations[-1] < 0.1


@pytest.mark.services
def test_it_leaves_pictures_and_says_where_everything_is(run: Run) -> None:
    pictures = ["ising.png", *(["provenance.png"] if shutil.which("dot") else [])]
    for name in pictures:
        assert (run.directory / "result" / name).read_bytes().startswith(b"\x89PNG")
        assert f"demo-result/result/{name}" in run.said
    for name in ("cluster", "gateway", ".aiida", "demo.log"):
        assert f"demo-result/{name} " in run.said
        assert (run.directory / name).exists()
    assert "AIIDA_PATH=demo-result" in run.said
    for command in ("computer setup", "computer configure marketplace_hpc", "-m aiida_marketplace_hpc.demo.submit"):
        assert command in run.said


@pytest.mark.services
def test_no_step_failed_and_each_has_its_time(run: Run) -> None:
    steps = [line for line in run.said.splitlines() if line.startswith("  ✓ ")]
    assert len(steps) >= 10
    assert all(line.endswith(" s") for line in steps)
    assert "✗" not in run.said
    assert "all 6 tests succeeded" in run.said


@pytest.mark.services
def test_nothing_is_left_running(run: Run) -> None:
    assert processes_of(run.directory) == []


@pytest.mark.services
def test_the_token_is_in_its_own_file_only(run: Run) -> None:
    file = run.directory / "token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    token = file.read_bytes()
    assert len(token) >= 32
    assert token.decode() not in run.said
    others = [path for path in run.directory.rglob("*") if path.is_file() and path != file]
    assert [path for path in others if token in path.read_bytes()] == []


@pytest.mark.services
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_when_it_is_interrupted_nothing_is_left_running(tmp_path: Path, number: signal.Signals) -> None:
    directory = tmp_path / "result"
    trigger = {signal.SIGINT: b"is on its way", signal.SIGTERM: b"verdi computer test"}[number]
    demo = subprocess.Popen(
        [*COMMAND, "--port", "0", "--directory", str(directory)],
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert demo.stdout is not None
    said = b""
    with demo.stdout:
        while trigger not in said:
            line = demo.stdout.readline()
            assert line, said.decode()
            said += line
        demo.send_signal(number)
        said += demo.stdout.read()
    assert demo.wait(60) == 130
    assert b"Nothing is left running" in said
    assert b"Traceback" not in said
    assert processes_of(directory) == []


def refused(*options: str, cwd: Path) -> str:
    done = subprocess.run([*COMMAND, *options], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_taken_port_is_said_before_anything_happens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("--port", str(port), cwd=tmp_path)
    assert f"port {port}" in said
    assert "--port 0" in said
    assert list(tmp_path.iterdir()) == []


def test_a_free_port_is_accepted() -> None:
    check_port(0)


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    said = refused("--port", "0", "--directory", str(tmp_path), cwd=tmp_path)
    assert "not empty" in said
    assert "--directory" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused("--port", "0", "--directory", str(tmp_path / "file" / "below"), cwd=tmp_path)
    assert "cannot be written" in said
    assert "--directory" in said


def test_a_directory_whose_path_means_something_else_to_aiida_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--directory"), Stage(tmp_path / "a:b", 0):
        pass


def test_a_second_demo_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with Stage(tmp_path, 0), pytest.raises(ConfigurationError, match="another demo is running"), Stage(tmp_path, 0):
        pass


def test_the_lock_of_a_directory_is_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with Stage(tmp_path, 0):
            pass
    with open(tmp_path / ".marketplace-hpc-demo") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_an_earlier_demo_left_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    with Stage(tmp_path, 0) as earlier:
        (earlier.layout.result / "ising.txt").touch()
    (tmp_path / "notes.txt").touch()
    with Stage(tmp_path, 0) as stage:
        assert list(stage.layout.result.iterdir()) == []
    assert (tmp_path / "notes.txt").exists()


def test_what_a_killed_demo_left_running_is_ended(tmp_path: Path) -> None:
    with Stage(tmp_path, 0) as killed:
        environment = killed.environment
    leftover = subprocess.Popen(["sh", "-c", "sleep 600 & wait"], env=environment, start_new_session=True)
    with Stage(tmp_path, 0):
        assert leftover.poll() is not None
        assert processes_of(tmp_path) == []


def test_an_earlier_result_that_a_daemon_works_on_is_not_replaced(tmp_path: Path) -> None:
    with Stage(tmp_path, 0) as earlier:
        daemon = earlier.layout.aiida / "daemon"
        daemon.mkdir(parents=True)
        (daemon / "circus-demo.pid").write_text(str(os.getpid()))
    with pytest.raises(ConfigurationError, match="verdi daemon stop"), Stage(tmp_path, 0):
        pass
    assert daemon.exists()


def test_an_old_python_is_refused_by_name() -> None:
    check_python((3, 10))
    with pytest.raises(ConfigurationError, match=r"Python 3\.9.*3\.10"):
        check_python((3, 9))
