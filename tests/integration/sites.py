"""A gateway on a batch system, and an AiiDA installation that uses it."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiida_marketplace_hpc.testing.aiida_profile import AiidaProfile
from aiida_marketplace_hpc.testing.aiida_session import AiidaSession
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine, RigError
from aiida_marketplace_hpc.testing.slurm import SlurmCluster
from aiida_marketplace_hpc.testing.slurm_faults import SlurmFaults

EXAMPLES = Path(__file__).parents[2] / "examples" / "computer"
LABEL = "cluster"
SYSTEM = "/usr"
"""A read-only root: the system's executables."""


PLUGINS = """\
[aiida.parsers]
test.files = file_plugins:FilesParser
[aiida.calculations.monitors]
test.too_hot = file_plugins:too_hot
test.listing = file_plugins:listing
"""


def publish_plugins(folder: Path) -> Path:
    """Make what AiiDA finds the plugins of ``file_plugins`` by, in a folder for the path of imports, and return it."""
    metadata = folder / "file_plugins-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: file_plugins\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(PLUGINS)
    return folder


@dataclass
class Site:
    """A gateway, and the Slurm behind it if there is one, with faults for its commands."""

    gateway: GatewayProcess
    slurm: SlurmCluster | None = None
    faults: SlurmFaults | None = None

    @property
    def home(self) -> str:
        """The folder of the first user; like every path here it is on the cluster."""
        return self.gateway.home.format(username="alice")

    @property
    def scratch(self) -> str:
        """The other root that can be written."""
        return self.gateway.roots["scratch"].format(username="alice")

    @property
    def apptainer(self) -> str:
        """The recording stand-in for a container runtime."""
        return f"{self.gateway.machine.software}/bin/apptainer"

    @property
    def work_dir(self) -> str:
        return f"{self.gateway.home}/aiida"

    def accounted(self, scheduler_id: str) -> dict[str, str]:
        """What Slurm's own accounting says about a job."""
        assert self.slurm is not None
        columns = "JobID,State,ExitCode,Partition,NodeList"
        argv = ["sacct", "-X", "-n", "-P", "-o", columns, "-j", scheduler_id]
        rows = self.slurm.run(*argv, check=True).stdout.splitlines()
        assert len(rows) == 1
        return dict(zip(columns.split(","), rows[0].split("|"), strict=True))

    def tree(self, path: str) -> dict[str, str | None]:
        """What lies below a folder of the cluster, as ``contents`` of ``file_plugins`` says it."""
        machine = self.gateway.machine
        program = Path(__file__).with_name("contents.py").read_text()
        return dict(json.loads(machine.run([sys.executable, "-I", "-c", program, path], check=True).stdout))


@dataclass
class Installation:
    """An AiiDA installation whose computer ``cluster`` is the site's gateway."""

    profile: AiidaProfile
    site: Site
    _sessions: list[AiidaSession] = field(default_factory=list)

    @property
    def token(self) -> dict[str, str]:
        return {"MP_ACCESS_TOKEN": self.site.gateway.token}

    def verdi(self, *args: str, **options: Any) -> str:
        return self.profile.verdi(*args, env=self.token, **options).stdout

    def run(self, code: str) -> Any:
        """Run Python in the installation and return what its last line printed, from JSON."""
        if not self._sessions:
            self._sessions.append(AiidaSession(self.profile, env=self.token))
        try:
            return json.loads(self._sessions[0].run(_PRELUDE + code).splitlines()[-1])
        except RigError as exc:
            raise RigError(f"{exc}\n{self.profile.daemon_log()}") from None

    def start_daemon(self, workers: int = 1) -> None:
        """Start the daemon, whose workers have the token."""
        self.profile.start_daemon(workers, env=self.token)

    def stop_daemon(self) -> None:
        """Stop the daemon. The broker goes with it, and who was connected to it would submit into the void: :meth:`close`."""
        self.close()
        self.profile.stop_daemon()

    def close(self) -> None:
        """End what was started for :meth:`run`."""
        while self._sessions:
            self._sessions.pop().close()

    def set_up(self) -> None:
        """Make the computer from the examples, word for word but for where things are, and the code on it."""
        self.add_computer(LABEL, self.site.gateway.url, self.site.work_dir)

    def add_computer(self, label: str, url: str, work_dir: str) -> None:
        """Make a computer that is a gateway's cluster, and the code ``bash`` on it."""
        where = ["--label", label, "--work-dir", work_dir]
        self.verdi("computer", "setup", "--non-interactive", "--config", str(EXAMPLES / "computer-setup.yaml"), *where)
        configure = ["computer", "configure", "marketplace_hpc", label]
        config = str(EXAMPLES / "computer-configure.yaml")
        self.verdi(*configure, "--non-interactive", "--config", config, "--url", url)
        code = ["--label", "bash", "--computer", label, "--filepath-executable", f"{SYSTEM}/bin/bash"]
        self.verdi(
            "code", "create", "core.code.installed", "-n", "--default-calc-job-plugin", "core.arithmetic.add", *code
        )
        self.run(f"print(json.dumps(orm.load_computer({label!r}).set_minimum_job_poll_interval(0.2)))")


_PRELUDE = """\
import json
import time
from aiida import orm
from aiida.engine import run_get_node, submit
from contents import contents
from file_plugins import FilesJob, finished, folder, folders, report, repository, start, wait
from gateway_workflows import ArithmeticAdd, ShellJob, TwoSteps

code = orm.load_code("bash@cluster")

def finish(process, **inputs):
    node = submit(process, **inputs)
    deadline = time.monotonic() + 120
    while not node.is_terminated and time.monotonic() < deadline:
        time.sleep(0.1)
    return node

def facts(node):
    return {
        "pk": node.pk, "uuid": node.uuid, "state": node.process_state.value, "status": node.exit_status,
        "message": node.exit_message, "job_id": node.get_job_id() if hasattr(node, "get_job_id") else None,
        "last": node.base.attributes.get("last_job_info", None),
        "detailed": node.base.attributes.get("detailed_job_info", None),
        "workdir": node.base.attributes.get("remote_workdir", None),
    }
"""


@contextmanager
def before_firecrest(
    site: Site, home: str, options: Sequence[str], environment: Mapping[str, str]
) -> Iterator[GatewayProcess]:
    """A gateway to a FirecREST, on a machine of its own; its user has the token that the daemon has."""
    with Machine(getpass.getuser()) as machine:  # It has what the tests have; the cluster may not.
        gateway = GatewayProcess(
            machine,
            backend="firecrest",
            users=(),
            home=f"{home}/{{username}}",
            roots={"system": f"{SYSTEM}:ro"},
            options=[*options, "--poll-interval", "0.5"],
            env=environment,
        )
        gateway.tokens["alice"] = site.gateway.token
        with gateway:
            yield gateway


def add_behind_firecrest(installation: Installation, label: str) -> dict[str, Any]:
    """Run a calculation on a computer behind FirecREST, and return what is known about it."""
    add = "node = finish(ArithmeticAdd, x=orm.Int(3), y=orm.Int(4), code=code)\n"
    load = f"code = orm.load_code('bash@{label}')\n"
    total, facts = installation.run(load + add + "print(json.dumps([node.outputs.sum.value, facts(node)]))")
    assert total == 7
    assert facts["status"] == 0
    job: dict[str, Any] = facts["detailed"]["job"]
    assert (facts["job_id"], job["client_ref"], job["state"]) == (job["jobid"], facts["uuid"], "COMPLETED")
    assert (job["exit_code"], job["backend"], bool(job["scheduler_id"])) == (0, "firecrest", True)
    return dict(facts)
