"""The servers that the gateway is compared with, and the way to each: nginx, sshd, and lines that are longer than they look.

Every server is started by the account that runs the benchmarks, on a free port of 127.0.0.1, with its configuration in a
temporary folder, on the same disk as the gateway's files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from aiida_marketplace_hpc.testing.install import install
from aiida_marketplace_hpc.testing.machine import (
    SYSTEM_PATH,
    Machine,
    NotPossibleHere,
    RigError,
    free_ports,
    is_root_on_debian,
    tail,
    wait_until,
)

SSH_HOST = "mphpc-bench"
"""The name of the sshd in the client's SSH configuration; that of a line has its round trip in ms behind it."""


def program(name: str, package: str) -> str:
    """The path of a program, which is installed where that is allowed.

    :raises NotPossibleHere: it is not there and may not be installed.
    """
    found = shutil.which(name, path=SYSTEM_PATH)
    if found is None and is_root_on_debian():
        install(package)
        found = shutil.which(name, path=SYSTEM_PATH)
    if found is None:
        raise NotPossibleHere(f"there is no {name}", f"sudo apt-get install --no-install-recommends {package}")
    return found


@contextlib.contextmanager
def nginx(machine: Machine, folder: Path) -> Iterator[int]:
    """Serve a folder by HTTP, for GET and PUT; the value is the port."""
    location = f"root {folder}; location / {{ dav_methods PUT DELETE; create_full_put_path on; }}"
    with _nginx(machine, location) as port:
        yield port


@contextlib.contextmanager
def balancer(machine: Machine, ports: Sequence[int]) -> Iterator[int]:
    """Pass requests on to one server after the other; the value is the port."""
    servers = " ".join(f"server 127.0.0.1:{port};" for port in ports)
    # As in examples/deployment: nothing is held back, and connections to the servers are kept.
    location = """\
location / {
      proxy_pass http://servers;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_request_buffering off;
      proxy_buffering off;
    }"""
    with _nginx(machine, location, f"upstream servers {{ {servers} keepalive 256; }}") as port:
        yield port


@contextlib.contextmanager
def _nginx(machine: Machine, server: str, beside: str = "") -> Iterator[int]:
    """Run nginx with one server; the value is its port."""
    state = machine.make_directory("nginx")
    port = free_ports(1)[0]
    folders = "\n".join(
        f"  {name}_temp_path {state}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # What a PUT brings is renamed to its place, as with the gateway; so it has to be on the same file system.
    configuration = f"""\
daemon off;
master_process off;
pid {state}/pid;
error_log {state}/error.log;
events {{ worker_connections 2048; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  client_max_body_size 0;
{folders}
  {beside}
  server {{
    listen 127.0.0.1:{port};
    {server}
  }}
}}
"""
    machine.write(f"{state}/nginx.conf", configuration)
    command = [program("nginx", "nginx-light"), "-e", f"{state}/error.log", "-c", f"{state}/nginx.conf"]
    with _running(machine, command, port, machine.outside(f"{state}/error.log")):
        yield port


@contextlib.contextmanager
def sshd(machine: Machine, home: Path, environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """Serve SSH and SFTP for the machine's account; the value is the port.

    :param home: the client's home, which gets a key; see :func:`ssh_host`.
    :param environment: set in every session.
    """
    state = machine.make_directory("sshd")
    port = free_ports(1)[0]
    binary = program("sshd", "openssh-server")
    keygen = [program("ssh-keygen", "openssh-client"), "-q", "-t", "ed25519", "-N", "", "-f"]
    (home / ".ssh").mkdir(mode=0o700, parents=True, exist_ok=True)
    subprocess.run([*keygen, str(home / ".ssh" / "id_ed25519")], check=True)
    machine.run([*keygen, f"{state}/host_key"], check=True)
    machine.write(f"{state}/authorized_keys", (home / ".ssh" / "id_ed25519.pub").read_text())
    variables = "".join(f"SetEnv {name}={value}\n" for name, value in (environment or {}).items())
    settings = f"""\
ListenAddress 127.0.0.1
Port {port}
HostKey {state}/host_key
PidFile none
AuthorizedKeysFile {state}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxSessions 100
MaxStartups 100
Subsystem sftp internal-sftp
{variables}"""
    machine.write(f"{state}/sshd_config", settings)
    if os.geteuid() == 0:
        # What sshd wants where it runs as root; Debian makes it when the service starts. It stays: another sshd may use it.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    log = machine.outside(f"{state}/log")
    with _running(machine, [binary, "-D", "-f", f"{state}/sshd_config", "-E", f"{state}/log"], port, log):
        yield port


def ssh_host(home: Path, server: int, name: str, port: int, user: str) -> None:
    """Make a server known under a name to SSH clients with that home.

    :param server: the port of the sshd, under which its key is known whatever the line to it.
    :param port: where the line begins.
    :param user: whom it logs in.
    """
    ssh = home / ".ssh"
    known = ssh / "known_hosts"
    if not known.exists():
        keys = [program("ssh-keyscan", "openssh-client"), "-p", str(server), "-t", "ed25519", "127.0.0.1"]
        scanned = subprocess.run(keys, check=True, capture_output=True, text=True).stdout
        known.write_text("".join(f"{SSH_HOST} {line.split(None, 1)[1]}\n" for line in scanned.splitlines()))
    with (ssh / "config").open("a") as config:
        config.write(f"""\
Host {name}
  HostName 127.0.0.1
  Port {port}
  User {user}
  HostKeyAlias {SSH_HOST}
  IdentityFile {ssh}/id_ed25519
  UserKnownHostsFile {known}
  IdentitiesOnly yes
""")


@contextlib.contextmanager
def line(machine: Machine, port: int, round_trip: float) -> Iterator[int]:
    """A way to a server that is longer by so many seconds, in a process of its own; the value is where it begins.

    Without a round trip there is nothing in between, and the way begins at the server.
    """
    if not round_trip:
        yield port
        return
    command = [sys.executable, "-m", "benchmarks.line", str(port), str(round_trip)]
    root = str(Path(__file__).parents[1])
    child = machine.popen(command, stdout=subprocess.PIPE, cwd=root)
    try:
        assert child.stdout is not None  # noqa: S101 - for the type.
        with child.stdout as said:
            yield int(said.readline())
    finally:
        child.terminate()
        child.wait(10)


@contextlib.contextmanager
def _running(machine: Machine, command: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("ab") as output:
        child = machine.popen(command, stdout=output, stderr=output)
    try:

        def listens() -> bool:
            if child.poll() is not None:
                raise RigError(f"{command[0]} ended\n{tail(log)}")
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(listens, within=20, failure=lambda: f"{command[0]} does not listen\n{tail(log)}")
        yield
    finally:
        child.terminate()
        child.wait(10)
