"""What a poll costs: the states of 1, 100 and 1,000 jobs that wait on a real Slurm, from a ledger with many rows."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.aiida_profile import FAST, AiidaProfile
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from benchmarks.calculations import SET_UP
from benchmarks.files import Say, WrongResult
from benchmarks.job_stage import JobStage
from benchmarks.measure import Poll, Results

CACHED = "one request, answered from the gateway's last round"
FRESH = "one request, with a round of its own to Slurm"
OUR_PLUGIN = "`get_jobs` of marketplace_hpc, with a round of its own"
THEIR_PLUGIN = "`get_jobs` of core.slurm through core.ssh_async"
AIM = 0.3
"""Seconds, for 95 of 100 requests."""
ALWAYS_FRESH = ("--poll-interval", "0.001")
_TALLIED = 10


@dataclass(frozen=True)
class Crowd:
    """How many jobs there are.

    :param pending: on Slurm.
    :param rows: in the ledger, those included.
    :param asked: how many are asked for at once.
    :param samples: how often each question is asked.
    """

    pending: int = 1000
    rows: int = 10_000
    asked: Sequence[int] = (1, 100, 1000)
    samples: int = 60


def measure_polls(stage: JobStage, crowd: Crowd, results: Results, say: Say) -> None:
    """Ask for the states of many jobs, in every way that there is."""
    say(f"{crowd.pending} pending jobs on Slurm, {crowd.rows} in the ledger")
    waiting = stage.fill_slurm(crowd.pending)
    try:
        with _crowded(stage, waiting, crowd.rows) as (gateway, jobids):
            _measure_requests(gateway, jobids, crowd, CACHED, None, results, say)
        with _crowded(stage, waiting, crowd.rows, ALWAYS_FRESH) as (gateway, jobids):
            polls = _measure_requests(gateway, jobids, crowd, FRESH, AIM, results, say)
            _measure_plugins(stage, gateway, jobids, list(waiting), crowd, results, say)
            _count(stage, gateway, jobids, polls)
    finally:
        stage.empty_slurm()


@contextlib.contextmanager
def _crowded(
    stage: JobStage, waiting: dict[str, str], rows: int, options: Sequence[str] = ()
) -> Iterator[tuple[GatewayProcess, list[str]]]:
    """A gateway whose ledger has all these jobs and as many that have ended as are missing; the ids of the former."""
    with stage.gateway(options) as gateway:
        jobids = stage.fill_ledger(gateway, waiting, rows)
        with _client(gateway) as client:
            # The first rounds write down what Slurm says; what is measured is how it goes on.
            for _ in range(2):
                _ask(client, jobids)
                time.sleep(2.5)
        yield gateway, jobids


def _client(gateway: GatewayProcess) -> HpcGateway:
    return HpcGateway(gateway.url, token_source=StaticToken(gateway.token))


def _ask(client: HpcGateway, jobids: Sequence[str]) -> float:
    """Ask once, and return the seconds."""
    started = time.perf_counter()
    found = client.job_states(jobids)["jobs"]
    seconds = time.perf_counter() - started
    if len(found) != len(jobids) or any(job["final"] for job in found.values()):
        raise WrongResult(f"of {len(jobids)} waiting jobs {len(found)} were found, not all of them waiting")
    return seconds


def _measure_requests(
    gateway: GatewayProcess,
    jobids: Sequence[str],
    crowd: Crowd,
    way: str,
    aim: float | None,
    results: Results,
    say: Say,
) -> list[Poll]:
    polls = [Poll(way, number, [], aim=aim) for number in crowd.asked]
    with _client(gateway) as client:
        for _ in range(crowd.samples):
            for poll in polls:
                poll.seconds.append(_ask(client, jobids[: poll.jobs]))
    for poll in polls:
        say(f"  {way}, {poll.jobs} jobs: 95 % within {poll.p95 * 1000:.0f} ms")
    results.polls += polls
    return polls


def _measure_plugins(
    stage: JobStage,
    gateway: GatewayProcess,
    jobids: Sequence[str],
    identifiers: Sequence[str],
    crowd: Crowd,
    results: Results,
    say: Say,
) -> None:
    """Ask as AiiDA does, by the methods of its plugins, in turns."""
    env = {"MP_ACCESS_TOKEN": gateway.token, "HOME": str(stage.home)}
    with AiidaProfile(stage.home / "polls", None, options=FAST, env=env) as profile:
        profile.python(SET_UP, json.dumps([stage.ours(gateway, "ours", 1), stage.theirs("theirs", 1)]))
        wanted = {"ours": list(jobids), "theirs": list(identifiers), "asked": crowd.asked, "samples": crowd.samples}
        said = profile.python(_GET_JOBS, json.dumps(wanted), timeout=1200)
    found = json.loads(said.stdout.splitlines()[-1])
    for label, way in (("ours", OUR_PLUGIN), ("theirs", THEIR_PLUGIN)):
        for number in crowd.asked:
            poll = Poll(way, number, found[label][str(number)])
            say(f"  {way}, {number} jobs: 95 % within {poll.p95 * 1000:.0f} ms")
            results.polls.append(poll)


def _count(stage: JobStage, gateway: GatewayProcess, jobids: Sequence[str], polls: Sequence[Poll]) -> None:
    """How many requests and how many of Slurm's commands the same questions need, apart from what is timed."""
    stage.tally(["squeue", "sacct", "scontrol", "sinfo"])
    with _client(gateway) as client:
        client.info()
        for poll in polls:
            served, called = len(gateway.requests()), stage.tallied()
            for _ in range(_TALLIED):
                _ask(client, jobids[: poll.jobs])
            poll.requests = (len(gateway.requests()) - served) / _TALLIED
            poll.commands = (stage.tallied() - called) / _TALLIED


_GET_JOBS = """\
import json, sys, time
from aiida import orm
from aiida.schedulers.datastructures import JobState

WAITING = (JobState.QUEUED, JobState.QUEUED_HELD)
wanted = json.loads(sys.argv[1])
found = {label: {number: [] for number in wanted["asked"]} for label in ("ours", "theirs")}
transports = {label: orm.load_computer(label).get_transport() for label in found}
for transport in transports.values():
    transport.open()
for _ in range(wanted["samples"]):
    for number in wanted["asked"]:
        for label, transport in transports.items():
            scheduler = orm.load_computer(label).get_scheduler()
            scheduler.set_transport(transport)
            started = time.perf_counter()
            jobs = scheduler.get_jobs(jobs=wanted[label][:number], as_dict=True)
            found[label][number].append(time.perf_counter() - started)
            assert len(jobs) == number and all(job.job_state in WAITING for job in jobs.values()), jobs
for transport in transports.values():
    transport.close()
print(json.dumps(found))
"""
