"""The benchmarks still measure what they say, in tiny; how fast anything is, is nothing that a test could demand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aiida_marketplace_hpc.testing.fixtures import give_up
from aiida_marketplace_hpc.testing.machine import RigError
from benchmarks.load import DOWNLOAD, HEARTBEAT, QUERY, UPLOAD
from benchmarks.measure import OURS, Count, Pace, Poll, Results, Row, Soak, in_turns
from benchmarks.polls import CACHED, FRESH, OUR_PLUGIN, THEIR_PLUGIN
from benchmarks.report import page, text
from benchmarks.servers import program

ROOT = Path(__file__).parents[2]
PROGRAMS = {"nginx": "nginx-light", "sshd": "openssh-server", "ssh": "openssh-client", "curl": "curl", "wrk": "wrk"}


def quick_run(written: Path, *only: str) -> list[str]:
    """Measure in tiny, and return the lines of all tables on the page."""
    try:
        for name, package in PROGRAMS.items():
            program(name, package)
    except RigError as exc:
        give_up(exc)
    chosen = [word for work in only for word in ("--only", work)]
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(written), *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    return [line for line in written.read_text().splitlines() if line.startswith("|")]


@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_quick_run_measures_files_and_jobs(tmp_path: Path) -> None:
    lines = quick_run(tmp_path / "benchmarks.md", "large", "small", "calculations", "jobs", "polls")
    for work, rows in (
        ("one file of 1 MiB up", 8),
        ("one file of 1 MiB down", 8),
        ("20 files of 1 KiB as a tree up", 2),
        ("20 files of 1 KiB as a tree down", 2),
        ("20 files of 1 KiB one by one up", 2),
        ("20 files of 1 KiB one by one down", 2),
        ("calculation with 3 inputs and 2 retrieved files, once, engine.run", 2),
        ("calculation with 3 inputs and 2 retrieved files, 2 at once, daemon, 1 worker", 2),
        ("2 core.arithmetic.add at once, daemon, 1 worker, Slurm", 2),
        ("2 core.arithmetic.add at once, daemon, 1 worker, Slurm: processor time of the worker", 2),
        (CACHED, 2),
        (FRESH, 2),
        (OUR_PLUGIN, 2),
        (THEIR_PLUGIN, 2),
    ):
        assert sum(f" {work} " in line for line in lines) == rows, work


@pytest.mark.services
@pytest.mark.alone  # Slow uploads must be just fast enough.
@pytest.mark.timeout(600)
def test_a_quick_run_measures_load(tmp_path: Path) -> None:
    lines = quick_run(tmp_path / "benchmarks.md", "load")
    for work, rows in ((HEARTBEAT, 9), (QUERY, 6), (UPLOAD, 6), (DOWNLOAD, 9)):
        assert sum(f" {work} " in line for line in lines) == rows, work
    failed = [line.strip("| ").split("|")[-1].strip() for line in lines if line.count("|") == 8]
    assert set(failed[2:]) == {"0"}


def test_everybody_works_in_turns_until_the_patience_is_over() -> None:
    done: list[str] = []

    def contestant(name: str, seconds: float) -> object:
        def work(number: int) -> dict[str, float]:
            done.append(f"{name}{number}")
            return {name: seconds + number}

        return work

    contestants = {name: contestant(name, seconds) for name, seconds in ((OURS, 1.0), ("theirs", 2.0))}
    found = in_turns(contestants, Pace(3, 60), print)  # type: ignore[arg-type]
    assert done == ["ours0", "theirs0", "ours1", "theirs1", "ours2", "theirs2"]
    assert found == {OURS: [1, 2, 3], "theirs": [2, 3, 4]}
    assert in_turns(contestants, Pace(3, -1), print) == {OURS: [1], "theirs": [2]}  # type: ignore[arg-type]


def test_of_a_hundred_polls_the_fifth_slowest_tells_the_95_percent() -> None:
    poll = Poll(FRESH, 1000, [float(number) for number in range(100, 0, -1)], requests=1, commands=1.1, aim=0.3)
    assert poll.p95 == 95
    assert Poll(FRESH, 1, [2.0]).p95 == 2
    written = page(Results(polls=[poll, Poll(FRESH, 100, [5.05])]), "make bench", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    assert "| 1000 | 50500.0 | 95000.0 | 300 | 1 | 1.1 | 100 |" in " ".join(written.split())
    assert "1,000 jobs cost 10.0 times what 100 do" in written


def test_a_soak_tells_what_the_memory_did_in_its_second_half() -> None:
    samples = [(10.0 * number, 60_000 * number, 100.0 + max(0, number - 5)) for number in range(1, 11)]
    soak = Soak(samples, 0)
    assert soak.after(100_000) == 100
    assert soak.after(10**9) == 105
    assert round(soak.slope) == 360
    written = page(Results(soaks=[soak]), "make bench", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    assert "600,000 requests in 100 s, of which 0 failed" in written
    assert "changed by 360.0 MiB an hour" in " ".join(written.split())


def test_a_page_has_ratios_beside_the_figures_and_no_place_of_this_machine() -> None:
    row = Row("moving", 0.02, [1.0, 2.0, 4.0], [3.0, 5.0, 4.0], "others", 0.8)
    results = Results([row], [Count("moving", 0.02, [80], [3], 90)])
    assert row.ratio == 2.0
    written = page(results, "make bench", (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    assert "| moving | 20 " in " ".join(written.split())
    assert "2.00 (1.00 to 4.00)" in written
    assert "4.00 (3.00 to 5.00)" in text(results)
    assert str(ROOT) not in written
