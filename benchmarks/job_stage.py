"""A real Slurm, and the two ways to it: a gateway and an sshd, both on its login node, both under the account of its user."""

from __future__ import annotations

import contextlib
import json
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.cluster import IsolatedCluster
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.install import install
from aiida_marketplace_hpc.testing.machine import SYSTEM_PATH, Machine, NotPossibleHere, RigError, is_root_on_debian
from aiida_marketplace_hpc.testing.slurm import SlurmCluster
from benchmarks import servers

ACCOUNT = "mphpc-bench"
"""The cluster's user. Slurm runs no jobs of root's, and the account of the tests cannot log in."""
USER = "alice"


@dataclass
class JobStage:
    """What jobs are compared on.

    :param home: the clients' home, with the SSH configuration; also that of the AiiDA installation.
    :param ssh: the folder of the other side's files, on the cluster.
    :param commands: a folder that a gateway finds commands in before the system's, empty at first.
    """

    machine: Machine
    slurm: SlurmCluster
    home: Path
    ssh: str
    commands: str

    @contextlib.contextmanager
    def gateway(
        self, options: Sequence[str] = (), *, database: str = "", beside: GatewayProcess | None = None
    ) -> Iterator[GatewayProcess]:
        """A gateway to this Slurm.

        :param database: its address; by default one of SQLite.
        :param beside: another one, with the same users and homes.
        """
        roots = {"system": "/usr:ro"}
        env = {**self.slurm.env, "PATH": f"{self.commands}:{SYSTEM_PATH}"}
        if database:
            env["MARKETPLACE_HPC_DATABASE"] = database
        with GatewayProcess(
            self.machine,
            backend="slurm",
            roots=roots,
            env=env,
            options=options,
            beside=beside,
            own_state=beside is not None,
        ) as gateway:
            yield gateway

    def fill_slurm(self, number: int) -> dict[str, str]:
        """Submit jobs that do not begin before tomorrow; their folders by their ids."""
        folder = self.machine.make_directory("pending", user=self.machine.user)
        script = (
            f'i=0; while [ $i -lt {number} ]; do sbatch --parsable --begin=now+1day --job-name=aiida-$i --chdir="$0/$i" '
            "--wrap=true || exit 1; i=$((i + 1)); done"
        )
        done = self.slurm.machine.run(
            ["sh", "-c", script, folder], user=self.machine.user, env=self.slurm.env, timeout=600, check=True
        )
        return {identifier: f"{folder}/{place}" for place, identifier in enumerate(done.stdout.split())}

    def empty_slurm(self) -> None:
        """Cancel all jobs."""
        self.slurm.run("scancel", f"--user={self.machine.user}")

    def fill_ledger(
        self, gateway: GatewayProcess, waiting: Mapping[str, str], rows: int, database: str = ""
    ) -> list[str]:
        """Put jobs of :data:`USER` into the ledger of a gateway, which is restarted; the ids of those that wait on Slurm.

        :param waiting: folders by Slurm's ids.
        :param rows: how many there are to be in all; the others have ended.
        """
        with HpcGateway(gateway.url, token_source=StaticToken(gateway.token)) as client:
            client.info()
        gateway.stop()
        database = database or f"sqlite:///{gateway.state}/ledger.sqlite"
        done = self.machine.run(
            [sys.executable, "-m", "benchmarks.crowd", database, USER, str(rows)],
            user=self.machine.user,
            cwd=str(Path(__file__).parents[1]),
            input=json.dumps(waiting),
            timeout=300,
            check=True,
        )
        gateway.start()
        jobids: list[str] = json.loads(done.stdout)
        return jobids

    def ours(self, gateway: GatewayProcess, label: str, poll: float) -> dict[str, object]:
        """What AiiDA is told about the cluster behind a gateway."""
        return {
            "label": label,
            "hostname": "gateway",
            "transport": "marketplace_hpc",
            "scheduler": "marketplace_hpc",
            "work_dir": f"{gateway.home}/aiida",
            "parameters": {"url": gateway.url, "safe_interval": 0.0},
            "poll": poll,
        }

    def theirs(self, label: str, poll: float) -> dict[str, object]:
        """What AiiDA is told about the cluster behind the sshd."""
        return {
            "label": label,
            "hostname": servers.SSH_HOST,
            "transport": "core.ssh_async",
            "scheduler": "core.slurm",
            "work_dir": self.ssh,
            "parameters": {"host": servers.SSH_HOST, "use_login_shell": False, "safe_interval": 0.0},
            "poll": poll,
        }

    def tally(self, names: Sequence[str]) -> None:
        """From now on, count the calls of commands by gateways."""
        for name in names:
            script = f'#!/bin/sh\necho {name} >> {self.commands}/tally\nPATH={SYSTEM_PATH} exec {name} "$@"\n'
            self.machine.write(f"{self.commands}/{name}", script, user=self.machine.user, mode=0o755)

    def tallied(self) -> int:
        """How many calls were counted so far."""
        path = f"{self.commands}/tally"
        return len(self.machine.read_text(path).splitlines()) if self.machine.exists(path) else 0


@contextlib.contextmanager
def set_up() -> Iterator[JobStage]:
    """Bring Slurm and sshd up, and end them.

    :raises NotPossibleHere: if this machine does not allow it.
    :raises RigError: with the reason, if something cannot be had.
    """
    if is_root_on_debian():
        install("slurm")
    SlurmCluster.check_possible()
    _ensure_account()
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(_machine())
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mphpc-bench-")))
        slurm = stack.enter_context(SlurmCluster(machine))
        port = stack.enter_context(servers.sshd(machine, home, slurm.env))
        servers.ssh_host(home, port, servers.SSH_HOST, port, machine.user)
        commands = machine.make_directory("commands", user=machine.user)
        yield JobStage(machine, slurm, home, f"{machine.scratch}/ssh/aiida", commands)


def _machine() -> Machine:
    try:
        IsolatedCluster.check_possible()
    except NotPossibleHere:
        return Machine(ACCOUNT)
    return IsolatedCluster(user=ACCOUNT)


def _ensure_account() -> None:
    """Create the account if there is none: with a shell, without a password; only a key opens it."""
    with contextlib.suppress(KeyError):
        pwd.getpwnam(ACCOUNT)
        return
    command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/", "--shell", "/bin/sh"]
    # Where the password begins with an exclamation mark, as without this option, sshd takes the account for closed.
    command += ["--password", "*", ACCOUNT]
    environment: Mapping[str, str] = {"PATH": SYSTEM_PATH}
    made = subprocess.run(command, capture_output=True, text=True, env=environment)
    if made.returncode:
        raise RigError(f"useradd {ACCOUNT}: {made.stderr.strip()}")
