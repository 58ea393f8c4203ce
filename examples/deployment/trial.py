"""The set-up of compose.yaml as plain processes of this machine: PostgreSQL, RabbitMQ, two gateways, nginx, a relay.

    python examples/deployment/trial.py

Needed are Debian's `postgresql`, `rabbitmq-server` and `nginx-light`, and the extras `gateway`, `postgresql` and `relay`.
Nothing needs root, and nothing is left: everything lies in temporary folders, listens on 127.0.0.1 and ends with Ctrl-C. Jobs
are processes of this machine (backend `local`). Tokens are made up; a real site has --auth oidc or marketplace.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from aiida_marketplace_hpc.testing.cluster import IsolatedCluster
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine, NotPossibleHere, RigError, free_ports, tail, wait_until
from aiida_marketplace_hpc.testing.postgresql import PostgreSql
from aiida_marketplace_hpc.testing.rabbitmq import RabbitMq
from aiida_marketplace_hpc.testing.relay import RelayProcess

HERE = Path(__file__).resolve().parent
CLIENT_ID, CLIENT_SECRET, QUEUE = "trial", "only-for-a-trial", "trial"
PROGRAM_FOLDERS = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"


@dataclass(frozen=True)
class Trial:
    """What runs.

    :param url: of nginx, with TLS.
    :param certificate: which nginx shows; a file.
    """

    url: str
    certificate: Path
    gateways: tuple[GatewayProcess, GatewayProcess]
    database: PostgreSql
    broker: RabbitMq
    relay: RelayProcess

    @property
    def token(self) -> str:
        """Of the first user."""
        return self.gateways[0].token


@contextlib.contextmanager
def trial(machine: Machine) -> Iterator[Trial]:
    """Start everything, and end it afterwards.

    :raises NotPossibleHere: where a program is missing.
    """
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(PostgreSql(machine))
        broker = stack.enter_context(RabbitMq(machine))
        env = {"MARKETPLACE_HPC_DATABASE": database.url(database.create())}
        # nginx comes from there, and so may whoever has an account on this machine.
        options = ["--trusted-proxy", "127.0.0.1", "--allow-dev-tokens"]
        first = stack.enter_context(GatewayProcess(machine, env=env, options=options))
        second = stack.enter_context(GatewayProcess(machine, env=env, options=options, beside=first))
        url, certificate = stack.enter_context(nginx(machine, [first.url, second.url]))
        secret = {"MARKETPLACE_HPC_RELAY_CLIENT_SECRET": CLIENT_SECRET}
        arguments = ["--client-id", CLIENT_ID, "--queue", QUEUE]
        relay = stack.enter_context(RelayProcess(machine, broker.url, first.url, *arguments, env=secret))
        yield Trial(url, certificate, (first, second), database, broker, relay)


@contextlib.contextmanager
def nginx(machine: Machine, gateways: list[str]) -> Iterator[tuple[str, Path]]:
    """nginx with the example's own file; where it listens, and its certificate."""
    program = shutil.which("nginx", path=PROGRAM_FOLDERS)
    if program is None:
        raise NotPossibleHere("nginx is not installed", "sudo apt-get install --no-install-recommends nginx-light")
    folder = machine.make_directory("nginx", user=machine.user, mode=0o700)
    certificate, key = f"{folder}/certificate.pem", f"{folder}/key.pem"
    make = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    make += ["-days", "30", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    machine.run([*make, "-keyout", key, "-out", certificate], user=machine.user, check=True)
    [port] = free_ports(1)
    servers = " ".join(f"server {url.removeprefix('http://')};" for url in gateways)
    site = Template((HERE / "nginx.conf.template").read_text()).safe_substitute(
        GATEWAYS=servers, SERVER_NAME="localhost", LISTEN=f"127.0.0.1:{port}", CERTIFICATE=certificate, KEY=key
    )
    machine.write(f"{folder}/site.conf", site, user=machine.user)
    temporary = "".join(
        f"  {name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    machine.write(
        f"{folder}/nginx.conf",
        f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
        f"http {{\n{temporary}  include {folder}/site.conf;\n}}\n",
        user=machine.user,
    )
    command = [program, "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]
    checked = machine.run([*command, "-t"], user=machine.user)
    if checked.returncode:
        raise RigError(f"nginx takes the configuration for wrong:\n{checked.stderr}")
    process = machine.popen(command, user=machine.user)
    try:
        wait_until(
            lambda: process.poll() is not None or machine.exists(f"{folder}/pid"),
            within=20,
            failure=lambda: f"nginx does not start\n{tail(machine.outside(f'{folder}/error.log'))}",
        )
        yield f"https://127.0.0.1:{port}", machine.outside(certificate)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _machine() -> Machine:
    """A part of this machine that is set apart, where that is possible (as root): there other accounts find everything."""
    try:
        IsolatedCluster.check_possible()
    except NotPossibleHere:
        return Machine()
    return IsolatedCluster()


def main() -> None:
    """Start it, say where everything is, and wait for Ctrl-C."""
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    with _machine() as machine, trial(machine) as started:
        print(f"database   {started.database.url('postgres')}")
        print(f"broker     {started.broker.url}, queue {QUEUE}")
        print(f"gateways   {', '.join(one.url for one in started.gateways)}")
        print(f"           of {', '.join(started.gateways[0].tokens)}; roots below {machine.path}")
        print("try        ", end="")
        print(f"REQUESTS_CA_BUNDLE={started.certificate} MP_HOST={started.url} MP_ACCESS_TOKEN={started.token} \\")
        print("           marketplace-hpc doctor")
        print("ready; Ctrl-C ends it", flush=True)
        over.wait()


if __name__ == "__main__":
    main()
