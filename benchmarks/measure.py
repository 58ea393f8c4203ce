"""Doing the same work with several contestants in turns, and what comes of it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

OURS = "ours"
"""The name of our side among the contestants."""

Contestant = Callable[[int], Mapping[str, float]]
"""Does the work of one round, and returns the figures of it by name; seconds, unless a row says otherwise."""


@dataclass(frozen=True)
class Pace:
    """How often things are measured.

    :param rounds: how often each contestant does the work.
    :param patience: seconds; when the work has taken so long in all, no further round is begun.
    """

    rounds: int = 3
    patience: float = 300.0


@dataclass
class Row:
    """One comparison.

    :param work: what was done.
    :param round_trip: seconds that were added to the way, for both sides.
    :param ours: a figure for each round, as is ``theirs``; all of the rounds are here.
    :param against: what ``theirs`` are of.
    :param aim: what the ratio of theirs to ours should reach.
    """

    work: str
    round_trip: float
    ours: list[float]
    theirs: list[float]
    against: str
    aim: float | None = None

    @property
    def ratio(self) -> float:
        """How many times as long the other side takes: more than 1 is faster than it."""
        return statistics.median(self.theirs) / statistics.median(self.ours)


@dataclass
class Count:
    """A number of requests, beside its aim and what others need.

    :param work: what was done.
    :param requests: the requests of each round, for one calculation without repeated polls.
    :param polls: the repeated polls of each round for one calculation: they depend on how long the job took.
    :param aim: the greatest number that is good.
    """

    work: str
    round_trip: float
    requests: list[float]
    polls: list[float]
    aim: float


@dataclass
class Poll:
    """What it costs to ask for the states of jobs.

    :param way: who asks whom.
    :param jobs: how many jobs are asked for at once.
    :param seconds: of each question; all of them are here.
    :param requests: requests to the gateway per question, ``None`` where that is not counted, as is ``commands``, of Slurm.
    :param aim: seconds within which 95 of 100 questions should be answered.
    """

    way: str
    jobs: int
    seconds: list[float]
    requests: float | None = None
    commands: float | None = None
    aim: float | None = None

    @property
    def p95(self) -> float:
        """The seconds within which 95 of 100 are answered."""
        ordered = sorted(self.seconds)
        return ordered[math.ceil(0.95 * len(ordered)) - 1]


@dataclass
class Throughput:
    """What clients got who ask one request after the other, each over a connection of its own.

    :param work: what they asked for.
    :param way: of whom, or beside whom.
    :param clients: how many there were.
    :param rate: requests in a second, of all of them.
    :param p50: seconds within which half of the requests were answered, and ``p99``, for 99 of 100.
    :param failed: how many were not answered, or refused.
    """

    work: str
    way: str
    clients: int
    rate: float
    p50: float
    p99: float
    failed: int


@dataclass
class Soak:
    """What becomes of a gateway's memory.

    :param samples: seconds since the beginning, requests answered since then, and MiB of resident memory.
    :param failed: how many requests were not answered, or refused.
    """

    samples: list[tuple[float, int, float]]
    failed: int

    def after(self, requests: int) -> float:
        """MiB once so many requests were answered; at the end, if there were fewer."""
        return next((size for _, served, size in self.samples if served >= requests), self.samples[-1][2])

    @property
    def slope(self) -> float:
        """MiB in an hour, by the second half of the samples."""
        later = self.samples[len(self.samples) // 2 :]
        seconds, sizes = [one[0] for one in later], [one[2] for one in later]
        return statistics.linear_regression(seconds, sizes).slope * 3600 if len(later) > 1 else math.nan


@dataclass
class Results:
    """All that was measured."""

    rows: list[Row] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    polls: list[Poll] = field(default_factory=list)
    loads: list[Throughput] = field(default_factory=list)
    neighbours: list[Throughput] = field(default_factory=list)
    soaks: list[Soak] = field(default_factory=list)


def in_turns(contestants: Mapping[str, Contestant], pace: Pace, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Let each contestant do the work in turns, round after round; return all figures by their names."""
    figures: dict[str, list[float]] = {}
    started = time.monotonic()
    for number in range(pace.rounds):
        for contestant in contestants.values():
            for name, figure in contestant(number).items():
                figures.setdefault(name, []).append(figure)
        say("  " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in figures.items()))
        if time.monotonic() - started > pace.patience:
            break
    return figures
