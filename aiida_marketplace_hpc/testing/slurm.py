"""A real Slurm, with accounting or without, on one node, for as long as a test session lasts."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiida_marketplace_hpc.testing.machine import (
    SYSTEM_PATH,
    Machine,
    NotPossibleHere,
    RigError,
    end_all,
    free_ports,
    process_table,
    tail,
    wait_until,
    with_descendants,
)

PROGRAMS = (
    "munged",
    "mariadbd",
    "mariadb-install-db",
    "slurmdbd",
    "slurmctld",
    "slurmd",
    "sbatch",
    "sacct",
    "sacctmgr",
)
"""What has to be installed; on Debian by ``python -m aiida_marketplace_hpc.testing.install slurm``."""
ACCOUNT = "project"
"""The Slurm account of the cluster's user."""
CLUSTER = "mphpc"


@dataclass
class Daemon:
    """One of the processes of a Slurm.

    :param argv: the command, which must stay in the foreground.
    :param user: the account that it runs under; ``None`` is root.
    :param ready: says whether it answers.
    """

    name: str
    machine: Machine
    argv: Sequence[str]
    user: str | None
    log: Path
    ready: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def launch(self, *options: str) -> None:
        """Start it without waiting; nothing happens if it runs."""
        if self.running:
            return
        with self.log.open("ab") as log:
            self.process = self.machine.popen(
                [*self.argv, *options], user=self.user, env=self.env, stdout=log, stderr=log
            )

    def wait_ready(self, within: float = 30.0) -> None:
        """Wait until it answers.

        :raises RigError: with the end of its log, if it ends or does not answer in time.
        """
        wait_until(
            lambda: not self.running or self.ready(),
            within=within,
            failure=lambda: f"{self.name} does not get ready\n{tail(self.log)}",
        )
        if not self.running:
            raise RigError(f"{self.name} ended while it started\n{tail(self.log)}")

    def start(self, *options: str) -> None:
        """Start it and wait until it answers.

        :raises RigError: with the end of its log, if it does not.
        """
        self.launch(*options)
        self.wait_ready()

    def stop(self, within: float = 20.0) -> None:
        """Ask it to end, as an operator would, and wait for that; nothing happens if it does not run.

        :raises RigError: if it does not end in time.
        """
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout=within)
            except subprocess.TimeoutExpired:
                raise RigError(f"{self.name} does not end\n{tail(self.log)}") from None

    def kill(self) -> None:
        """Kill it at once, with the helpers that it has started itself."""
        if self.process is not None and self.running:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=10)


class SlurmCluster:
    """A Slurm of its own: munged, mariadbd, slurmdbd, slurmctld and slurmd.

    Everything (configuration, key, sockets, database, spool) lies in a directory of the machine and listens on sockets there
    or on free ports of the host's own address (127.0.0.1 in an isolated cluster): neither a Slurm of this machine's nor
    another one of these is touched. The node's CPUs are fictitious. Accounting is what a cluster has by default: no
    comments, scripts or environments of jobs are stored. Accounts and limits are enforced, so that ``sbatch`` refuses as it
    does on a real cluster.

    :param machine: where it runs: on this machine or on an isolated part of it.
    :param cpus: of the one node.
    :param accounting: without it there are neither mariadbd nor slurmdbd, ``sacct`` fails, and no limits are enforced.
    :param min_job_age: seconds for which Slurm remembers an ended job; it looks once a minute. For forgetting at once there
        is :meth:`forget_ended_jobs`.
    :param options: further lines of ``slurm.conf``, which stand over those here.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        cpus: int = 32,
        accounting: bool = True,
        min_job_age: int = 300,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.machine = machine
        self.user = machine.user
        self._cpus = cpus
        self._accounting = accounting
        self._options = {"MinJobAge": str(min_job_age), **(options or {})}
        self._daemons: dict[str, Daemon] = {}
        self.directory = ""
        self.logs = Path()

    def __enter__(self) -> SlurmCluster:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @staticmethod
    def check_possible() -> None:
        """Return if a Slurm can be started here.

        :raises NotPossibleHere: with the reason, if not.
        """
        if os.geteuid() != 0:
            raise NotPossibleHere("starting a Slurm takes root", "run the tests as root")
        if missing := [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]:
            install = "python -m aiida_marketplace_hpc.testing.install slurm"
            raise NotPossibleHere(f"Slurm is not installed ({', '.join(missing)})", install)

    @property
    def env(self) -> dict[str, str]:
        """What a process on the machine needs in its environment to talk to this Slurm."""
        return {"SLURM_CONF": f"{self.directory}/slurm.conf"}

    def run(
        self,
        *argv: str,
        user: str | None = None,
        cwd: str = "/",
        input: str | None = None,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a Slurm command (``sacct``, ``squeue``, ``scontrol``, ``sacctmgr``, ``sbatch``) on the machine.

        :param user: by default root, who is Slurm's administrator.
        :raises RigError: for an exit code other than 0, if ``check`` is set.
        """
        return self.machine.run(argv, user=user, env=self.env, cwd=cwd, input=input, check=check)

    def start(self) -> None:
        """Start all of it, and wait until the node is idle.

        :raises NotPossibleHere: if this machine does not allow it.
        :raises RigError: with the end of the log of the daemon that does not start; nothing is left running then.
        """
        self.check_possible()
        self.logs = Path(tempfile.mkdtemp(prefix="mphpc-slurm-logs-"))
        try:
            self._configure()
            self._start_munge()
            if self._accounting:
                self._start_database()
                self._start_accounting()
            self._start_scheduling()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill all of it and every process of its jobs, without regard for state. May be repeated."""
        for name in ("slurmd", "slurmctld"):
            if name in self._daemons:
                self._daemons[name].kill()
        try:
            end_all(self._job_processes)
        finally:
            for daemon in self._daemons.values():
                daemon.kill()
        self._daemons = {}
        if self.directory:
            self.machine.run(["rm", "-rf", self.directory])
        self.directory = ""
        shutil.rmtree(self.logs, ignore_errors=True)

    def stop_controller(self) -> None:
        """End slurmctld as an operator does; jobs go on, and no Slurm command works but ``sacct``.

        The others take about 9 s until they fail.
        """
        self._daemons["slurmctld"].stop()

    def start_controller(self) -> None:
        """Start slurmctld again, with what it knew."""
        self._daemons["slurmctld"].start()

    def stop_dbd(self) -> None:
        """End slurmdbd; jobs go on, and ``sacct`` fails."""
        self._daemons["slurmdbd"].stop()

    def start_dbd(self) -> None:
        """Start slurmdbd again; slurmctld then delivers what it could not (it tries every few seconds)."""
        self._daemons["slurmdbd"].start()

    def stop_munge(self) -> None:
        """End munged: jobs go on, and no Slurm command works, nor do the daemons talk to each other."""
        self._daemons["munged"].stop()

    def start_munge(self) -> None:
        """Start munged again, with the same key."""
        self._daemons["munged"].start()

    def stop_node(self) -> None:
        """End slurmd: running jobs go on, none starts."""
        self._daemons["slurmd"].stop()

    def start_node(self) -> None:
        """Start slurmd again."""
        self._daemons["slurmd"].start()

    def forget_ended_jobs(self, *, next_id: str | None = None) -> None:
        """Make Slurm forget its ended jobs now, as it does after ``MinJobAge``: only accounting still knows them.

        Waits until accounting, where there is one, has whole records of them, which it gets from what Slurm remembers.

        :param next_id: of the next job; one that was used already is used again.
        :raises RigError: if jobs are alive, which would be lost.
        """
        alive = self.run("squeue", "--noheader", "--format=%i %T", check=True).stdout
        if alive.strip():
            raise RigError(f"jobs are alive, Slurm cannot forget: {', '.join(alive.splitlines())}")
        known = self.run("squeue", "--states=all", "--noheader", "--format=%i", check=True).stdout.split()
        for jobid in known if self._accounting else ():
            self._wait_for_record(jobid, lambda record: record[1] != "", "on record as a whole", 30)
        settings = self.run("scontrol", "show", "config", check=True).stdout
        following = re.search(r"^NEXT_JOB_ID\s*=\s*(\d+)", settings, re.MULTILINE)
        if following is None:
            raise RigError(f"Slurm does not say its next job id:\n{settings}")
        self.stop_controller()
        self._options["FirstJobId"] = next_id or following[1]
        self._write_configuration()
        self.machine.run(["sh", "-c", 'rm -f -- "$0"/job_state*', f"{self.directory}/state"], check=True)
        self.start_controller()
        self.stop_node()  # it must read the same configuration
        self.start_node()

    def wait_for(self, jobid: str, state: str = "COMPLETED", within: float = 60.0) -> None:
        """Wait until accounting has a whole record of a job, in a state.

        Whole: for some seconds after a submission there is none, or one without name and partition.

        :raises RigError: with the job's state, if it does not get there in time.
        """
        self._wait_for_record(jobid, lambda record: record[0] == state and record[1] != "", state, within)

    def _wait_for_record(
        self, jobid: str, accept: Callable[[tuple[str, str]], bool], wanted: str, within: float
    ) -> None:
        def record() -> tuple[str, str]:
            argv = ("sacct", "-j", jobid, "--allocations", "--noheader", "--parsable2", "--format=State,Partition")
            state, _, partition = self.run(*argv).stdout.strip().partition("|")
            return state.partition(" ")[0], partition  # "CANCELLED by 0"

        wait_until(
            lambda: accept(record()),
            within=within,
            poll=0.1,
            failure=lambda: f"job {jobid} is not {wanted} but {record()}\n{tail(self.logs / 'slurmctld.log')}",
        )

    def _configure(self) -> None:
        self.directory = self.machine.make_directory("slurm")
        for name, owner in (("munge", "munge"), ("mysql", "mysql"), ("state", "slurm"), ("spool", "root")):
            self._administer("install", "-d", "-m", "755", "-o", owner, f"{self.directory}/{name}")
        self._host = self._host_name()
        self._ports = dict(zip(("slurmctld", "slurmd", "slurmdbd"), free_ports(3), strict=True))
        self.machine.write(f"{self.directory}/munge/key", secrets.token_bytes(128), user="munge", mode=0o400)
        self.machine.write(f"{self.directory}/mysql/init.sql", _DATABASE, user="mysql")
        # Nothing uses cgroups, but Slurm does not start without a plugin for them that it knows.
        self.machine.write(f"{self.directory}/cgroup.conf", "CgroupPlugin=cgroup/v1\n")
        accounting = f"{self.directory}/slurmdbd.conf"
        self.machine.write(accounting, _lines(self._accounting_settings()), mode=0o600)
        self._administer("chown", "slurm", accounting)
        self._write_configuration()

    def _host_name(self) -> str:
        name = self.machine.run(["hostname", "-s"], check=True).stdout.strip()
        address = (self.machine.run(["getent", "ahostsv4", name]).stdout.split() or ["nothing"])[0]
        if address == "nothing" or (address.startswith("127.") and address != "127.0.0.1"):
            # Slurm would listen on one address and have itself called on another.
            remedy = f"sed -i '/^127.0.1.1/d' /etc/hosts && echo '127.0.0.1 {name}' >>/etc/hosts"
            raise NotPossibleHere(f"the host's name, {name}, stands for {address}", remedy)
        return name

    def _administer(self, *argv: str) -> None:
        self.machine.run(argv, check=True)

    def _write_configuration(self) -> None:
        settings = _lines({**self._settings(), **self._options})
        self.machine.write(f"{self.directory}/slurm.conf", settings + self._layout())

    def _settings(self) -> dict[str, str]:
        return {
            "ClusterName": CLUSTER,
            # By name throughout: the daemons listen on the address of the host's own name and on no other.
            "SlurmctldHost": self._host,
            "SlurmctldPort": str(self._ports["slurmctld"]),
            "SlurmdPort": str(self._ports["slurmd"]),
            "SlurmUser": "slurm",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._munge_socket}",
            "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
            "StateSaveLocation": f"{self.directory}/state",
            "SlurmdSpoolDir": f"{self.directory}/spool",
            "SlurmctldPidFile": f"{self.directory}/state/slurmctld.pid",
            "SlurmdPidFile": f"{self.directory}/spool/slurmd.pid",
            # Neither cgroups nor systemd: a container has none to give.
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/linux",
            "JobAcctGatherFrequency": "1",
            "SlurmdParameters": "config_overrides",
            "MpiDefault": "none",
            "SwitchType": "switch/none",
            "MailProg": "/bin/true",
            "ReturnToService": "2",
            "KillWait": "5",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,bf_interval=2",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            **(self._accounting_client() if self._accounting else {"AccountingStorageType": "accounting_storage/none"}),
        }

    def _accounting_client(self) -> dict[str, str]:
        return {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": self._host,
            "AccountingStoragePort": str(self._ports["slurmdbd"]),
            "AccountingStoragePass": self._munge_socket,  # a socket by this name, not a password
            "AccountingStorageEnforce": "associations,limits",
        }

    def _layout(self) -> str:
        partition = "Nodes=node1 MaxTime=1-00:00:00 State=UP"
        return (
            f"NodeName=node1 NodeHostname={self._host} CPUs={self._cpus} RealMemory=16000 State=UNKNOWN\n"
            f"PartitionName=debug Default=YES DefaultTime=00:10:00 {partition}\n"
            f"PartitionName=normal Default=NO DefaultTime=01:00:00 {partition}\n"
        )

    def _accounting_settings(self) -> dict[str, str]:
        return {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._munge_socket}",
            "CommunicationParameters": "NoInAddrAny",
            "DbdHost": "localhost",
            "DbdPort": str(self._ports["slurmdbd"]),
            "SlurmUser": "slurm",
            "PidFile": f"{self.directory}/state/slurmdbd.pid",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "localhost",  # by the socket of MYSQL_UNIX_PORT, on which the account is the password
            "StorageUser": "slurm",
            "StorageLoc": "slurm_accounting",
        }

    @property
    def _munge_socket(self) -> str:
        return f"{self.directory}/munge/socket"

    @property
    def _mysql_socket(self) -> str:
        return f"{self.directory}/mysql/socket"

    def _daemon(
        self, user: str | None, *argv: str, ready: Callable[[], bool], env: Mapping[str, str] | None = None
    ) -> Daemon:
        name = argv[0]
        daemon = Daemon(name, self.machine, argv, user, self.logs / f"{name}.log", ready, {**self.env, **(env or {})})
        self._daemons[name] = daemon
        return daemon

    def _answers(self, *argv: str) -> bool:
        try:
            return self.machine.run(argv, env=self.env, timeout=10).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def _start_munge(self) -> None:
        files = [f"--{name}-file={self.directory}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon(
            "munge",
            *("munged", "--foreground", f"--socket={self._munge_socket}", *files),
            ready=lambda: self._answers("munge", "-n", "-S", self._munge_socket),
        ).start()

    def _start_database(self) -> None:
        """Start mariadbd."""
        data = f"{self.directory}/mysql/data"
        make = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db", "--skip-name-resolve"]
        self.machine.run([*make, "--auth-root-authentication-method=socket"], user="mysql", check=True)
        speed = ("--innodb-flush-log-at-trx-commit=0", "--innodb-log-file-size=64M", "--skip-name-resolve")
        self._daemon(
            "mysql",
            *("mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={self._mysql_socket}", "--skip-networking"),
            *(f"--pid-file={data}/pid", f"--init-file={self.directory}/mysql/init.sql", *speed),
            *("--innodb-lock-wait-timeout=900",),
            ready=lambda: self._answers("mariadb-admin", "--no-defaults", f"--socket={self._mysql_socket}", "ping"),
        ).start()

    def _start_accounting(self) -> None:
        """Start slurmdbd, and give the cluster and its user their accounts."""
        self._daemon(
            "slurm",
            *("slurmdbd", "-D"),
            ready=lambda: self._listens("slurmdbd") and self._answers("sacctmgr", "--noheader", "show", "cluster"),
            env={"MYSQL_UNIX_PORT": self._mysql_socket},
        ).start()
        self.run("sacctmgr", "--immediate", "add", "cluster", CLUSTER, check=True)
        self.run("sacctmgr", "--immediate", "add", "account", ACCOUNT, f"cluster={CLUSTER}", check=True)
        self.run("sacctmgr", "--immediate", "add", "user", self.user, f"account={ACCOUNT}", check=True)

    def _start_scheduling(self) -> None:
        """Start slurmctld and slurmd."""
        controller = self._daemon(
            "slurm",
            *("slurmctld", "-D"),
            ready=lambda: self._listens("slurmctld") and self._answers("sh", "-c", "scontrol ping | grep -q 'is UP'"),
        )
        node = self._daemon(
            None,
            *("slurmd", "-D", "-N", "node1"),
            ready=lambda: self._answers(
                "sh", "-c", "sinfo --noheader --format=%T | grep -qE '^(idle|mixed|allocated)$'"
            ),
        )
        controller.launch()
        node.launch()
        controller.wait_ready()
        node.wait_ready()

    def _listens(self, name: str) -> bool:
        return self._answers("bash", "-c", 'exec 3<>/dev/tcp/"$0"/"$1"', self._host, str(self._ports[name]))

    def _job_processes(self) -> set[int]:
        """The processes of jobs: slurmstepd, what descends from it, and what has run away from it in a job's environment."""
        if not self.directory:
            return set()
        table = list(process_table())  # of all: slurmd clears the environment of its helpers, except for SLURM_CONF
        ours = self.env["SLURM_CONF"]
        roots = set()
        for entry in table:
            environment = entry.environment()
            job = "SLURM_JOB_ID" in environment or entry.name == "slurmstepd"
            if job and environment.get("SLURM_CONF") == ours:
                roots.add(entry.pid)
        return with_descendants(roots, table)


_DATABASE = """\
CREATE DATABASE IF NOT EXISTS slurm_accounting;
CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED VIA unix_socket;
GRANT ALL ON slurm_accounting.* TO slurm@localhost;
"""


def _lines(settings: Mapping[str, str]) -> str:
    return "".join(f"{key}={value}\n" for key, value in settings.items())
