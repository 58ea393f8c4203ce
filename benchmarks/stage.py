"""Everything that is compared, brought up once: servers on the same disk, and for each round trip a way to each."""

from __future__ import annotations

import contextlib
import getpass
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine
from benchmarks import servers
from benchmarks.clients import Worker

USER = "alice"
SLOTS = 32
"""How many jobs the gateway runs at once: AiiDA's scheduler ``core.direct``, with which it is compared, has no limit."""


@dataclass(frozen=True)
class Way:
    """The ways of one length.

    :param round_trip: seconds that were added to it.
    :param gateway: where the gateway is reached.
    :param web: where nginx is.
    :param ssh_host: under which name the sshd is known to SSH clients.
    """

    round_trip: float
    gateway: str
    web: str
    ssh_host: str

    @property
    def label(self) -> str:
        return f"{self.round_trip * 1000:g}"


@dataclass
class Stage:
    """What is compared.

    :param remote: the folder of our side's files: below the home of the gateway's user.
    :param web: the folder that nginx serves.
    :param ssh: the folder of the other transport's files.
    :param local: the clients' folder.
    :param home: the clients' home; also that of the AiiDA installation.
    """

    gateway: GatewayProcess
    remote: Path
    web: Path
    ssh: Path
    local: Path
    home: Path
    ways: list[Way] = field(default_factory=list)

    @property
    def token(self) -> dict[str, str]:
        return {"MP_ACCESS_TOKEN": self.gateway.token}

    @contextlib.contextmanager
    def ours(self, way: Way) -> Iterator[Worker]:
        """A client of the gateway."""
        with Worker("marketplace_hpc", {"url": way.gateway}, self.home, self.token) as worker:
            worker.do("warm")
            yield worker

    @contextlib.contextmanager
    def theirs(self, way: Way) -> Iterator[Worker]:
        """A client of the sshd."""
        with Worker("core.ssh_async", {"machine": way.ssh_host}, self.home, {}) as worker:
            worker.do("warm")
            yield worker


@contextlib.contextmanager
def set_up(round_trips: Sequence[float]) -> Iterator[Stage]:
    """Bring everything up, and end it.

    :raises RigError: with the reason, if something cannot be had.
    """
    user = getpass.getuser()
    with contextlib.ExitStack() as stack:
        # All under one account, that of the clients: so they can look at what has arrived.
        machine = stack.enter_context(Machine(user))
        base = Path(machine.path)
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mphpc-bench-")))
        web_folder, ssh_folder, local = base / "web", base / "ssh", base / "local"
        for folder in (web_folder, ssh_folder, local):
            folder.mkdir()
        # What is measured is how fast it is, not how fast one user may be.
        options = ["--slots", str(SLOTS), "--requests-per-second", "0"]
        roots = {"system": "/usr:ro"}
        gateway = stack.enter_context(GatewayProcess(machine, user=user, roots=roots, options=options))
        web = stack.enter_context(servers.nginx(machine, web_folder))
        ssh = stack.enter_context(servers.sshd(machine, home))
        stage = Stage(gateway, Path(machine.home) / USER / "bench", web_folder, ssh_folder, local, home)
        for round_trip in round_trips:
            ports = [int(gateway.url.rpartition(":")[2]), web, ssh]
            begins = [stack.enter_context(servers.line(machine, port, round_trip)) for port in ports]
            name = f"{servers.SSH_HOST}-{round_trip * 1000:g}"
            servers.ssh_host(home, ssh, name, begins[2], user)
            stage.ways.append(Way(round_trip, f"http://127.0.0.1:{begins[0]}", f"http://127.0.0.1:{begins[1]}", name))
        yield stage
