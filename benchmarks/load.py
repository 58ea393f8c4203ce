"""What a gateway bears: requests per second and latencies, what one user can take from another, and memory in the long run.

The clients are wrk's: each asks one request after the other over a connection of its own, as fast as answers come.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.install import install
from aiida_marketplace_hpc.testing.machine import RigError, is_root_on_debian
from aiida_marketplace_hpc.testing.postgresql import PostgreSql
from benchmarks import servers
from benchmarks.files import Say, WrongResult
from benchmarks.job_stage import JobStage
from benchmarks.measure import Results, Soak, Throughput

HEARTBEAT, QUERY, UPLOAD, DOWNLOAD = "heartbeat", "states of 20 jobs", "upload of 4 KiB", "download of 4 KiB"
MIX = "all four in turns"
DIRECT = "1 process, SQLite"
BEHIND = "{} process{}, PostgreSQL, behind nginx"
ALONE = "alone"
GREEDY = "beside a user with 128 uploads at once, as many as they are let"
SLOW = "beside 60 uploads of 600 bytes/s"

_ASKED = 20
_SIZE = 4096
_UNLIMITED = ("--requests-per-second", "0", "--requests-at-once", "0")
_SCRIPT = Path(__file__).with_name("wrk.lua")
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Pressure:
    """How much there is of everything.

    :param clients: at once, one number after the other.
    :param seconds: that each measurement takes.
    :param soak: seconds of the long run.
    :param sample: seconds between two looks at the memory.
    :param rows: of the ledger.
    """

    clients: Sequence[int] = (1, 32, 256)
    seconds: int = 6
    soak: int = 600
    sample: float = 10.0
    rows: int = 10_000


@dataclass(frozen=True)
class _Request:
    """What wrk sends; see there."""

    method: str
    path: str
    body: str = "-"


@dataclass
class _Loaded:
    """A gateway with something in it.

    :param url: where clients reach it.
    :param works: what can be asked of it, by name.
    """

    gateway: GatewayProcess
    url: str
    works: Mapping[str, _Request] = field(default_factory=dict)

    def press(self, requests: Sequence[_Request], clients: int, seconds: int, token: str = "") -> dict[str, float]:
        """Have clients ask these requests in turns."""
        arguments = [part for one in requests for part in (one.method, one.path, one.body)]
        options = ["-t", "1", "-c", str(clients), "-d", f"{seconds}s", "--timeout", "30s", "-s", str(_SCRIPT)]
        command = [servers.program("wrk", "wrk"), *options, self.url, "--", *arguments]
        environment = {**os.environ, "MP_ACCESS_TOKEN": token or self.gateway.token}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 90)
        if done.returncode:
            raise RigError(f"wrk ended with {done.returncode}: {done.stderr}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    def measure(self, work: str, way: str, clients: int, seconds: int, token: str = "") -> Throughput:
        """Have clients do one work."""
        found = self.press([self.works[work]], clients, seconds, token)
        rate = found["requests"] / found["seconds"]
        return Throughput(work, way, clients, rate, found["p50"], found["p99"], int(found["failed"]))


def measure_load(stage: JobStage, pressure: Pressure, results: Results, say: Say) -> None:
    """Measure one gateway by itself, then one and two of them on PostgreSQL behind nginx."""
    waiting = stage.fill_slurm(_ASKED)
    try:
        with tempfile.TemporaryDirectory(prefix="mphpc-load-") as folder, contextlib.ExitStack() as stack:
            with stage.gateway(_UNLIMITED) as gateway:
                jobids = stage.fill_ledger(gateway, waiting, pressure.rows)
                loaded = _prepared(gateway, gateway.url, jobids, Path(folder))
                _each(loaded, DIRECT, pressure, results, say)
                results.soaks.append(_soak(loaded, pressure, say))
            with stage.gateway() as gateway:
                loaded = _prepared(gateway, gateway.url, stage.fill_ledger(gateway, waiting, _ASKED), Path(folder))
                _neighbours(loaded, pressure, results, say)
            for number in (1, 2):
                with _replicas(stage, number, waiting, pressure.rows) as (gateways, jobids):
                    port = stack.enter_context(servers.balancer(stage.machine, [_port(one.url) for one in gateways]))
                    loaded = _prepared(gateways[0], f"http://127.0.0.1:{port}", jobids, Path(folder))
                    _each(loaded, BEHIND.format(number, "es" * (number > 1)), pressure, results, say)
    finally:
        stage.empty_slurm()


@contextlib.contextmanager
def _replicas(
    stage: JobStage, number: int, waiting: Mapping[str, str], rows: int
) -> Iterator[tuple[list[GatewayProcess], list[str]]]:
    """Some gateways on one PostgreSQL; and the ids of the jobs that wait."""
    if is_root_on_debian():
        install("postgresql")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(PostgreSql(stage.machine))
        database = server.url(server.create())
        gateways = [stack.enter_context(stage.gateway(_UNLIMITED, database=database))]
        jobids = stage.fill_ledger(gateways[0], waiting, rows, database)
        for _ in range(number - 1):
            gateways.append(stack.enter_context(stage.gateway(_UNLIMITED, database=database, beside=gateways[0])))
        yield gateways, jobids


def _prepared(gateway: GatewayProcess, url: str, jobids: Sequence[str], folder: Path) -> _Loaded:
    """Put the files there that are asked for, and see that everything is answered."""
    content = os.urandom(_SIZE)
    upload, query = folder / "upload", folder / "query"
    upload.write_bytes(content)
    query.write_text(json.dumps({"operations": [{"op": "jobs.states", "jobids": list(jobids)}]}))
    digest = f"sha-256:{hashlib.sha256(content).hexdigest()}"
    # As the client asks.
    sent = urlencode({"digest": digest, "overwrite": "true", "parents": "false"})
    works = {
        HEARTBEAT: _Request("GET", "/heartbeat"),
        QUERY: _Request("POST", "/api/v1/query", str(query)),
        UPLOAD: _Request("PUT", f"/api/v1/file/upload/home?filename={quote('load/')}{{n}}&{sent}", str(upload)),
        DOWNLOAD: _Request("GET", f"/api/v1/file/download/home?filename={quote('load/')}file&bundle=true"),
    }
    for token in gateway.tokens.values():
        with HpcGateway(url, token_source=StaticToken(token)) as client:
            transfer.put_file(client, upload, f"{client.info()['home']}/load/file", parents=True)
    with HpcGateway(url, token_source=StaticToken(gateway.token)) as client:
        found = client.job_states(jobids)["jobs"]
        if len(found) != _ASKED or any(job["final"] for job in found.values()):
            raise WrongResult(f"of {_ASKED} waiting jobs {len(found)} were found, not all of them waiting")
    return _Loaded(gateway, url, works)


def _each(loaded: _Loaded, way: str, pressure: Pressure, results: Results, say: Say) -> None:
    for work in loaded.works:
        for clients in pressure.clients:
            measured = loaded.measure(work, way, clients, pressure.seconds)
            say(f"  {way}, {work}, {clients} clients: {measured.rate:.0f}/s, p99 {measured.p99 * 1000:.0f} ms")
            results.loads.append(measured)


def _neighbours(loaded: _Loaded, pressure: Pressure, results: Results, say: Say) -> None:
    """What the second user gets, while the first one is at rest, greedy, or slow; with the limits as they are set."""
    other = list(loaded.gateway.tokens.values())[1]

    def measure(way: str) -> None:
        for work in (HEARTBEAT, DOWNLOAD):
            measured = loaded.measure(work, way, 4, pressure.seconds, other)
            say(f"  {work} {way}: {measured.rate:.0f}/s, p99 {measured.p99 * 1000:.0f} ms")
            results.neighbours.append(measured)

    measure(ALONE)
    greedy = threading.Thread(target=loaded.press, args=([loaded.works[UPLOAD]], 128, 2 * pressure.seconds + 4))
    greedy.start()
    time.sleep(1)
    try:
        measure(GREEDY)
    finally:
        greedy.join()
    with _slow_clients(loaded, 60):
        measure(SLOW)


@contextlib.contextmanager
def _slow_clients(loaded: _Loaded, number: int) -> Iterator[None]:
    """Uploads of the first user that go on for as long as this does, each just fast enough not to be cut off."""
    stopping = threading.Event()
    head = (
        "PUT /api/v1/file/upload/home?filename=load/slow-{} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
        f"Content-Type: application/octet-stream\r\nAuthorization: Bearer {loaded.gateway.token}\r\n\r\n"
    )
    connections = [socket.create_connection(("127.0.0.1", _port(loaded.url))) for _ in range(number)]

    def send() -> None:
        while not stopping.wait(1.0):
            for connection in connections:
                connection.sendall(b"x" * 600)

    sender = threading.Thread(target=send)
    try:
        for place, connection in enumerate(connections):
            connection.sendall(head.format(place).encode())
        sender.start()
        yield
        if not sender.is_alive():
            raise WrongResult("the slow uploads were cut off")
    finally:
        stopping.set()
        sender.join()
        for connection in connections:
            connection.close()


def _soak(loaded: _Loaded, pressure: Pressure, say: Say) -> Soak:
    """Ask all there is in turns for a long time, and look at the memory."""
    process, samples, found = loaded.gateway.process, [], {}

    def press() -> None:
        found.update(loaded.press(list(loaded.works.values()), 32, pressure.soak))

    before = _served(loaded.gateway)
    started = time.monotonic()
    clients = threading.Thread(target=press)
    clients.start()
    while clients.is_alive():
        clients.join(pressure.sample)
        size = process.memory("VmRSS") / _MIB
        samples.append((time.monotonic() - started, _served(loaded.gateway) - before, size))
    soak = Soak(samples, int(found["failed"]))
    say(f"  {samples[-1][1]} requests: {samples[-1][2]:.0f} MiB, {soak.slope:.1f} MiB an hour")
    return soak


def _served(gateway: GatewayProcess) -> int:
    """How many requests a gateway has answered so far."""
    with open(gateway.machine.outside(gateway.access_log), "rb") as log:
        return sum(piece.count(b"\n") for piece in iter(lambda: log.read(_MIB), b""))


def _port(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None  # noqa: S101 - for the type.
    return port
