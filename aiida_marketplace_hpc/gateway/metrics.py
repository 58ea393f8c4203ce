"""What an operator watches: figures about requests, transfers, the scheduler and the jobs, in the form that Prometheus reads.

There are as many series as capabilities, statuses, states and limits: a label never has the name of a user, job or file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from aiida_marketplace_hpc.protocol import JobState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Outcome = Literal["taken", "refused", "deferred", "fault", "unknown", "found", "absent"]
"""What became of a submission; a lost one was ``found`` among the scheduler's jobs, or it is proven to be ``absent``."""
Direction = Literal["in", "out"]
TRANSFERS: Mapping[str, Direction] = {"createDataset": "in", "getDataset": "out"}
"""The capabilities that move files, and which way."""
TokenFailure = Literal["missing", "refused", "not_admitted", "unavailable"]
Limit = Literal["requests_at_once", "requests_per_second", "jobs_per_user", "operations", "connections", "size"]
_OTHER = "other"
"""Stands for whatever is no capability: the pages, and all the paths that somebody tries."""
_SECONDS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)


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
        self._requests = Counter(
            "marketplace_hpc_requests", "Requests that were answered", ["capability", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "marketplace_hpc_request_seconds",
            "Seconds from the head of a request to the end of its answer",
            ["capability"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._bytes = Counter(
            "marketplace_hpc_transfer_bytes", "Bytes of uploads and downloads", ["direction"], registry=self._registry
        )
        self._transfers = Gauge(
            "marketplace_hpc_transfers", "Uploads and downloads under way", ["direction"], registry=self._registry
        )
        self._token_failures = Counter(
            "marketplace_hpc_token_failures", "Requests without a good token", ["reason"], registry=self._registry
        )
        self._limits = Counter("marketplace_hpc_limits_hit", "Refused as too much", ["limit"], registry=self._registry)
        self._rounds = Histogram(
            "marketplace_hpc_reconciler_seconds",
            "Seconds of each round of the reconciler",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stumbles = Counter(
            "marketplace_hpc_reconciler_stumbles", "Rounds that ended in a fault", registry=self._registry
        )
        reconciled = Gauge(
            "marketplace_hpc_reconciler_age_seconds",
            "Seconds since the reconciler's last round ended; -1: none has yet",
            registry=self._registry,
        )
        self._unsettled = Gauge(
            "marketplace_hpc_unsettled_jobs",
            "Jobs whose submission is not confirmed, or whose end is wanted and has not come",
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)
        for direction in TRANSFERS.values():
            self._bytes.labels(direction)
            self._transfers.labels(direction)
        self._reconciled: float | None = None
        reconciled.set_function(lambda: -1.0 if self._reconciled is None else clock() - self._reconciled)
        self._answered: float | None = None
        self._up = False
        up.set_function(lambda: float(self._up))
        age.set_function(lambda: -1.0 if self._answered is None else clock() - self._answered)
        self._clock = clock

    def request(self, capability: str | None, status: int, seconds: float) -> None:
        """Count a request that was answered.

        :param status: 0: the connection broke before an answer began.
        """
        self._requests.labels(capability or _OTHER, str(status)).inc()
        self._seconds.labels(capability or _OTHER).observe(seconds)

    @contextmanager
    def transfer(self, direction: Direction) -> Iterator[None]:
        """Show an upload or download as under way in this block."""
        gauge = self._transfers.labels(direction)
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()

    def transferred(self, direction: Direction, size: int) -> None:
        """Count bytes of an upload or download, as they pass."""
        self._bytes.labels(direction).inc(size)

    def token_failure(self, reason: TokenFailure) -> None:
        """Count a request whose caller is not known, or not let in."""
        self._token_failures.labels(reason).inc()

    def limit(self, limit: Limit) -> None:
        """Count a request that was one too many, or too large."""
        self._limits.labels(limit).inc()

    @contextmanager
    def round(self) -> Iterator[None]:
        """Time a round of the reconciler, and count it if it raises."""
        began = self._clock()
        try:
            yield
        except Exception:
            self._stumbles.inc()
            raise
        finally:
            self._reconciled = self._clock()
            self._rounds.observe(self._reconciled - began)

    def unsettled(self, jobs: int) -> None:
        """Show how many jobs the reconciler has to do with."""
        self._unsettled.set(jobs)

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

    def show_machines(self, machines: Collection[str], is_up: Callable[[str], bool]) -> None:
        """Show of each of several machines whether its scheduler answered the last time; ``is_up`` is asked for each page."""
        up = Gauge(
            "marketplace_hpc_machine_up",
            "Whether the scheduler of a machine answered the last time, where there are several",
            ["machine"],
            registry=self._registry,
        )
        for machine in machines:
            up.labels(machine).set_function(lambda machine=machine: float(is_up(machine)))  # type: ignore[misc]

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
