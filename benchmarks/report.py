"""The table, for a terminal and as the page of the documentation."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from tabulate import tabulate

from benchmarks.load import MIX
from benchmarks.measure import Results, Soak, Throughput
from benchmarks.polls import FRESH
from benchmarks.servers import program

_TIMES = ("work", "added round trip, ms", "ours, s", "against", "theirs, s", "ratio", "aim", "rounds")
_POLLS = ("question", "jobs", "median, ms", "95 % within, ms", "aim", "requests", "Slurm commands", "samples")
_COUNTS = ("work", "added round trip, ms", "requests", "aim: at most", "repeated polls", "rounds")

_LOADS = ("work", "gateway", "clients", "requests/s", "p50, ms", "p99, ms", "failed")
_NEIGHBOURS = ("work", "while the other user is", "requests/s", "p50, ms", "p99, ms", "failed")

_TIMED = """\
## Times

{times}

"""
_COUNTED = """\
## Requests

Where several calculations run at once, the requests of all of them together, with all polls; for a single one, the polls
that came before its end stand apart. For comparison: for one calculation with 50 inputs and 20 retrieved files
aiida-firecrest 1.0.0 sends 247 HTTP requests, `core.ssh_async` with `core.slurm` 495 SFTP requests. The aim is one request
for each file and ten more, AiiDA's own files included: the script, the folder `.aiida`, standard output, standard error.

{counts}

"""
_POLLED = """\
## Polls

The states of so many jobs at once, while 1,000 jobs wait on a real Slurm and the ledger has 10,000 rows. {growth}

{polls}

"""
_LOADED = """\
## Load

So many clients, each of whom asks one request after the other, as fast as answers come. The gateways have no limits for one
user here. 20 jobs wait on a real Slurm, the ledger has 10,000 rows. Clients, gateways, nginx, database and Slurm share this
machine's processors.

{loads}

"""
_SHARED = """\
## Beside others

What 4 clients of one user get while another user does this or that; with the limits that a gateway has by default.

{neighbours}

"""
_SOAKED = """\
## Memory

One gateway under 32 clients who ask {mix}: {requests:,} requests in {seconds:.0f} s, of which {failed} failed. Resident
memory was {base:.0f} MiB at the first look, {after:.0f} MiB after 100,000 requests and {end:.0f} MiB at the end; over
the second half it changed by {slope:.1f} MiB an hour.

"""
_RATIOS = """\
Ratios, measured side by side in one run: both sides do the same work in turns, on one machine and one disk, over ways of
equal length. A ratio is the time of the other side divided by ours: above 1 we are faster. Figures are medians, with the
least and the greatest of all rounds behind them; nothing was left out."""
_ONE_RUN = "All figures are of one run, and nothing was left out."
_COMPARED = """\
- *Ours* is the transport `marketplace_hpc` in a process of its own, with a gateway in another one (backend `local`). It
  verifies a digest and flushes each uploaded file to the disk before that gets its name; none of the others does so by
  itself.
- *curl and nginx*: PUT by nginx's dav module, GET with sendfile; then `sha256sum` of the result where it has arrived, or
  also of the original. The digest is in their time because a transfer that nobody has verified is not the same work; what
  curl alone takes stands beside it. (Debian's `sha256sum` makes no use of the processor's instructions for it, Python's does.)
- *core.ssh_async* is aiida-core's transport with its backend asyncssh, in the same process around it as ours, with
  OpenSSH's sshd. Both transports are open before the clock starts; both use their own `max_io_allowed`, which is 8.
- *Calculations*: one AiiDA profile (SQLite, ZeroMQ broker), both computers with the same settings: a poll each second, no
  pause between connections, no login shell. `engine.run` includes the making of connections.
- *Jobs* run on one real Slurm (Debian's, with accounting), whose login node has both, gateway and sshd; one AiiDA profile, one
  daemon worker, and equal intervals between polls. The engine's floor is the same number of the same calculations with
  `core.local` and `core.direct`, which have neither network nor scheduler.
- *Polls* are asked one after the other over an open connection. Those that Slurm is asked for have to wait for it; the others
  find what the gateway was told less than two seconds ago. Requests and commands are counted apart from what is timed; what
  the gateway asks by itself every two seconds is among the commands.
- *Round trips* are added by a forwarding process in front of each server, the same for all. It delays bytes without
  limiting what is under way; connections cost a round trip, too. The windows of TCP, which limit single connections on
  long lines, do not show.
- Before each measurement old results are removed and the disk is synchronised, outside of what is timed. A comparison gets
  fewer rounds where one takes very long; the last column says how many there were."""
_PRESSED = """\
- *Load* is made by wrk, one thread, over connections that stay open; latencies are seen from there. A heartbeat needs no
  token; states of jobs are asked for in one request, and answered from what the gateway was told less than two seconds
  ago; an upload has its digest, is flushed to the disk, and is a new file each time."""
_CUT = " The run was ended before its end: what is missing below was not measured."


def _load(averages: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in averages)


def text(results: Results) -> str:
    """The tables for a terminal."""
    return "\n\n".join(_tables(results, "simple"))


def page(results: Results, command: str, before: Sequence[float], after: Sequence[float], *, whole: bool = True) -> str:
    """The page of the documentation.

    :param command: the one that measured.
    :param before: the machine's load averages before it, and ``after``.
    :param whole: whether it came to its end.
    """
    times, counts, polls, loads, neighbours = _tables(results, "github")
    versions = "\n".join(f"| {name} | {found} |" for name, found in _versions())
    today = datetime.now(timezone.utc).date().isoformat()
    sections = _TIMED.format(times=times) if results.rows else ""
    sections += _COUNTED.format(counts=counts) if results.counts else ""
    sections += _POLLED.format(growth=_growth(results), polls=polls) if results.polls else ""
    sections += _LOADED.format(loads=loads) if results.loads else ""
    sections += _SHARED.format(neighbours=neighbours) if results.neighbours else ""
    sections += "".join(_memory(soak) for soak in results.soaks)
    return f"""\
# Benchmarks{_subject(results)}

{_RATIOS if results.rows or results.polls else _ONE_RUN} This page was written on {today} by

    {command}

on {_machine()}; load averages before the run: {_load(before)}; after it: {_load(after)}.{"" if whole else _CUT}

{sections}## How it is measured

{_explained(results)}

## Versions

| | |
|---|---|
{versions}
"""


def _explained(results: Results) -> str:
    """How what is on the page was measured."""
    compared = results.rows or results.counts or results.polls
    return "\n".join([_COMPARED] * bool(compared) + [_PRESSED] * bool(results.loads))


def _subject(results: Results) -> str:
    if results.loads and not results.counts:
        return ": load"
    if results.polls and not results.counts:
        return ": jobs"
    return ": long lines" if results.rows and all(row.round_trip for row in results.rows) else ""


def _growth(results: Results) -> str:
    """Whether ten times the jobs cost ten times the time."""
    found = {poll.jobs: statistics.median(poll.seconds) for poll in results.polls if poll.way == FRESH}
    if not {100, 1000} <= found.keys():
        return ""
    return f"With a round to Slurm, 1,000 jobs cost {found[1000] / found[100]:.1f} times what 100 do."


def _memory(soak: Soak) -> str:
    seconds, requests, end = soak.samples[-1]
    return _SOAKED.format(
        mix=MIX,
        requests=requests,
        seconds=seconds,
        failed=soak.failed,
        base=soak.samples[0][2],
        after=soak.after(100_000),
        end=end,
        slope=soak.slope,
    )


def _tables(results: Results, style: str) -> tuple[str, str, str, str, str]:
    times = [
        (
            row.work,
            f"{row.round_trip * 1000:g}",
            _figures(row.ours),
            row.against,
            _figures(row.theirs),
            f"{row.ratio:.2f}",
            "" if row.aim is None else f"{row.aim:g}",
            len(row.ours),
        )
        for row in results.rows
    ]
    counts = [
        (
            count.work,
            f"{count.round_trip * 1000:g}",
            f"{statistics.median(count.requests):g}",
            f"{count.aim:g}",
            f"{statistics.median(count.polls):g}",
            len(count.requests),
        )
        for count in results.counts
    ]
    polls = [
        (
            poll.way,
            poll.jobs,
            f"{statistics.median(poll.seconds) * 1000:.1f}",
            f"{poll.p95 * 1000:.1f}",
            "" if poll.aim is None else f"{poll.aim * 1000:g}",
            "" if poll.requests is None else f"{poll.requests:g}",
            "" if poll.commands is None else f"{poll.commands:g}",
            len(poll.seconds),
        )
        for poll in results.polls
    ]
    loads = [(one.work, one.way, one.clients, *_throughput(one)) for one in results.loads]
    neighbours = [(one.work, one.way, *_throughput(one)) for one in results.neighbours]
    return (
        tabulate(times, _TIMES, tablefmt=style, disable_numparse=True),
        tabulate(counts, _COUNTS, tablefmt=style, disable_numparse=True),
        tabulate(polls, _POLLS, tablefmt=style, disable_numparse=True),
        tabulate(loads, _LOADS, tablefmt=style, disable_numparse=True),
        tabulate(neighbours, _NEIGHBOURS, tablefmt=style, disable_numparse=True),
    )


def _throughput(one: Throughput) -> tuple[str, str, str, int]:
    return f"{one.rate:.0f}", f"{one.p50 * 1000:.1f}", f"{one.p99 * 1000:.1f}", one.failed


def _figures(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def _machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"a machine with {os.cpu_count()} CPUs ({name}) and {memory:.0f} GiB of memory, under {platform.system()}"


def _versions() -> list[tuple[str, str]]:
    packages = ("aiida-marketplace-hpc", "aiida-core", "asyncssh", "requests", "urllib3", "fastapi", "uvicorn")
    found = [("Python", platform.python_version()), *((name, version(name)) for name in packages)]
    for name, package, option in (
        ("wrk", "wrk", "-v"),
        ("nginx", "nginx-light", "-v"),
        ("ssh", "openssh-client", "-V"),
        ("curl", "curl", "-V"),
    ):
        done = subprocess.run([program(name, package), option], capture_output=True, text=True)
        line = (done.stdout + done.stderr).splitlines()[0]
        found.append((name, line.removeprefix("nginx version: ").partition(" (")[0]))
    return found
