"""Measure, print the table, write the page: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from aiida_marketplace_hpc.testing.machine import NotPossibleHere, RigError
from benchmarks import job_stage
from benchmarks.calculations import Load, measure_calculations
from benchmarks.files import MIB, Say, measure_large, measure_small
from benchmarks.jobs import measure_jobs
from benchmarks.load import Pressure, measure_load
from benchmarks.measure import Pace, Results
from benchmarks.polls import Crowd, measure_polls
from benchmarks.report import page, text
from benchmarks.stage import set_up

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
_FILES = ("large", "small", "calculations")
_ON_SLURM = ("jobs", "polls", "load")
_WORK = (*_FILES, *_ON_SLURM)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: does the harness still work?")
    parser.add_argument("--only", choices=_WORK, action="append", help="measure only this (repeatable)")
    parser.add_argument("--round-trips", default=None, help="added round-trip times in ms (default: 0,20,100)")
    parser.add_argument("--size", type=int, default=1024, help="MiB of the large file (default: 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side does the work (default: 3)")
    parser.add_argument(
        "--patience", type=int, default=300, help="seconds of one comparison after which no further round begins (300)"
    )
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write (default: docs/benchmarks.md)")
    given = parser.parse_args()
    work = given.only or _WORK
    round_trips = [
        float(item) / 1000 for item in (given.round_trips or ("0,5" if given.quick else "0,20,100")).split(",")
    ]
    pace = Pace(1) if given.quick else Pace(given.rounds, given.patience)
    size, count = (MIB, 20) if given.quick else (given.size * MIB, 1000)
    load = Load(3, 2, 2) if given.quick else Load()
    # Also where it runs in the background or is told to end otherwise: everything that was started is ended.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    results, before, whole = Results(), os.getloadavg(), True

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        if set(work) & set(_FILES):
            with set_up(round_trips) as stage:
                if "large" in work:
                    measure_large(stage, size, pace, results, say)
                if "small" in work:
                    measure_small(stage, count, pace, results, say)
                if "calculations" in work:
                    # The other ways cost a quick run a minute, and go through the same code.
                    ways = stage.ways[-1:] if given.quick else stage.ways
                    measure_calculations(stage, ways, load, pace, results, say)
        if set(work) & set(_ON_SLURM):
            _on_slurm(work, given.quick, pace, results, say)
    except KeyboardInterrupt:
        whole = False
        say("ended before its end")
    except RigError as exc:
        say(str(exc))
        return 1
    print(text(results))
    given.output.write_text(page(results, _command(given), before, os.getloadavg(), whole=whole))
    say(f"written: {given.output}")
    return 0


def _on_slurm(work: Sequence[str], quick: bool, pace: Pace, results: Results, say: Say) -> None:
    """What needs a real Slurm; where there can be none it is left out, and the page says so by not having it."""
    try:
        with job_stage.set_up() as stage:
            if "polls" in work:
                measure_polls(stage, Crowd(20, 100, (1, 20), 3) if quick else Crowd(), results, say)
            if "jobs" in work:
                measure_jobs(stage, (2,) if quick else (20, 100), pace, results, say)
            if "load" in work:
                measure_load(stage, Pressure((1, 4), 1, 3, 0.5, 100) if quick else Pressure(), results, say)
    except NotPossibleHere as exc:
        say(f"left out, for want of a Slurm: {exc}")


def _command(given: argparse.Namespace) -> str:
    """What to run to get such a page, without where it was written to: that says nothing, and names a place."""
    options = ["--quick"] * given.quick + [f"--only {item}" for item in given.only or ()]
    unusual = (
        ("round-trips", given.round_trips, None),
        ("size", given.size, 1024),
        ("rounds", given.rounds, 3),
        ("patience", given.patience, 300),
    )
    options += [f"--{name} {value}" for name, value, usual in unusual if value != usual]
    return f"make bench BENCH='{' '.join(options)}'" if options else "make bench"


if __name__ == "__main__":
    sys.exit(main())
