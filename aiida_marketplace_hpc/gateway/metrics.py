"""What an operator watches: figures about the scheduler and the jobs, in the form that Prometheus reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from aiida_marketplace_hpc.protocol import JobState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Outcome = Literal["taken", "refused", "deferred", "fault", "unknown", "found", "absent"]
"""What became of a submission; a lost one was ``found`` among the scheduler's jobs, or it is proven to be ``absent``."""


class Metrics:
    """The figures of one gateway; several in one process do not mix.

    :param clock: the seconds of a monotonic clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = CollectorRegistry()
        self._questions = Counter(
            "marketplace_hpc_scheduler_questions",
            "Rounds of questions to the scheduler",
            ["outcome"],
            registry=self._registry,
        )
        up = Gauge(
            "marketplace_hpc_scheduler_up", "Whether the scheduler answered the last time", registry=self._registry
        )
        age = Gauge(
            "marketplace_hpc_scheduler_answer_age_seconds",
            "Seconds since the scheduler last answered; -1: it has not yet",
            registry=self._registry,
        )
        self._submissions = Counter(
            "marketplace_hpc_submissions", "What became of submissions", ["outcome"], registry=self._registry
        )
        self._duplicates = Counter(
            "marketplace_hpc_duplicates", "Second copies of jobs, which end before user code", registry=self._registry
        )
        self._answered: float | None = None
        self._up = False
        up.set_function(lambda: float(self._up))
        age.set_function(lambda: -1.0 if self._answered is None else clock() - self._answered)
        self._clock = clock

    def asked(self, *, answered: bool) -> None:
        """Count a round of questions to the scheduler."""
        self._questions.labels("answered" if answered else "failed").inc()
        self._up = answered
        if answered:
            self._answered = self._clock()

    def submission(self, outcome: Outcome) -> None:
        """Count what became of a submission."""
        self._submissions.labels(outcome).inc()

    def duplicate(self) -> None:
        """Count a second copy of a job."""
        self._duplicates.inc()

    def count_jobs(self, count: Callable[[], Mapping[JobState, int]]) -> None:
        """Show how many jobs there are in each state; ``count`` is asked for each page."""
        self._registry.register(_Jobs(count))

    def page(self) -> bytes:
        """All figures, as text."""
        return generate_latest(self._registry)


class _Jobs(Collector):
    def __init__(self, count: Callable[[], Mapping[JobState, int]]) -> None:
        self._count = count

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily("marketplace_hpc_jobs", "Jobs in the ledger", labels=["state"])
        found = self._count()
        for state in JobState:
            family.add_metric([state.value], found.get(state, 0))
        yield family
