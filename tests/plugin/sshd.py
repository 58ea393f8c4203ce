"""An SSH server of the test's own, on a free port, for whoever runs the tests."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiida_marketplace_hpc.testing.install import install

_SSHD = "/usr/sbin/sshd"  # It insists on being started by its full path.


@contextmanager
def ssh_server(folder: Path, home: Path, host: str) -> Iterator[None]:
    """Serve SSH, so that ``host`` can be reached by any client that takes its settings from ``home``.

    :param folder: for keys, settings and log.
    :param home: gets ``.ssh/config``.
    :param host: a name that need not mean anything to anybody else.
    :raises NotPossibleHere: if no SSH server is installed and none can be.
    """
    install("openssh-server", "openssh-client")
    for name in ("host", "client"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    (folder / "authorized").write_text((folder / "client.pub").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile {folder}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        "Subsystem sftp internal-sftp\nMaxSessions 100\nMaxStartups 100\n"
    )
    (home / ".ssh").mkdir(mode=0o700)
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (home / ".ssh" / "config").write_text(
        f"Host {host}\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n IdentityFile {folder}/client\n"
        f" UserKnownHostsFile {home}/.ssh/known_hosts\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # Where it confines itself before it knows the user.
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([_SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        _wait_for(port, server, folder / "log")
        yield
    finally:
        server.terminate()
        server.wait(timeout=20)


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError as exc:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the SSH server does not answer: {log.read_text()}") from exc
            time.sleep(0.02)


def _run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, stdin=subprocess.DEVNULL, capture_output=True)
