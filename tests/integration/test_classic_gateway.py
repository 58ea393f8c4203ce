"""AiiDA's daemon on gateways that have only the nine published capabilities: the main job and what can happen to it.

``gateway serve --classic`` is the gateway, on processes of the machine's own and on a real Slurm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sites import LABEL, SYSTEM, Installation, Site, publish_plugins

from aiida_marketplace_hpc.testing.aiida_profile import AiidaProfile
from aiida_marketplace_hpc.testing.faults import LoseAnswer, ProxiedRequest
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine, wait_until
from aiida_marketplace_hpc.testing.platform import APP_ID, Platform
from aiida_marketplace_hpc.testing.proxy import FaultyProxy
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

pytestmark = pytest.mark.services  # It takes long.

HEARTBEAT = "0.25"
MIB = 1024 * 1024


class ClassicInstallation(Installation):
    """An AiiDA installation whose jobs' hearts beat fast."""

    @property
    def token(self) -> dict[str, str]:
        return {**super().token, "MARKETPLACE_HPC_CLASSIC_HEARTBEAT": HEARTBEAT}

    def real(self, path: str) -> str:
        """Where the only file of a name below the homes is, on the cluster."""
        found = self.site.gateway.machine.run(["find", self.site.home, "-name", path], check=True).stdout.split()
        assert len(found) == 1, found
        return str(found[0])

    def computer(self, label: str, url: str, app_id: str = "") -> None:
        """Make a further computer with the code ``bash``, by another way to the same gateway."""
        self.run(
            f"where = {{'label': {label!r}, 'hostname': 'gateway', 'workdir': orm.load_computer({LABEL!r}).get_workdir()}}\n"
            "plugins = {'transport_type': 'marketplace_hpc', 'scheduler_type': 'marketplace_hpc'}\n"
            "computer = orm.Computer(**where, **plugins).store()\n"
            "computer.set_minimum_job_poll_interval(0.5)\n"
            f"computer.configure(url={url!r}, app_id={app_id!r}, token_source='env:MP_ACCESS_TOKEN')\n"
            f"orm.InstalledCode(label='bash', computer=computer, filepath_executable='{SYSTEM}/bin/bash').store()\n"
            "print(json.dumps(computer.pk))"
        )


@pytest.fixture(scope="module", params=["local", "slurm"])
def classic_site(request: pytest.FixtureRequest, cluster_machine: Machine) -> Iterator[Site]:
    """A classic gateway on each backend."""
    slurm: SlurmCluster | None = request.getfixturevalue("slurm_cluster") if request.param == "slurm" else None
    environment = dict(slurm.env) if slurm else {}
    with GatewayProcess(cluster_machine, backend=request.param, classic=True, roots={}, env=environment) as gateway:
        yield Site(gateway, slurm)


@pytest.fixture(scope="module")
def classic(
    classic_site: Site, aiida_installations: Callable[..., AiidaProfile], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClassicInstallation]:
    """With a running daemon."""
    plugins = publish_plugins(tmp_path_factory.mktemp("plugins"))
    with aiida_installations(import_path=[Path(__file__).parent, plugins]) as profile:
        installation = ClassicInstallation(profile, classic_site)
        installation.set_up()
        installation.start_daemon()
        yield installation
        installation.close()


def on_slurm_only(function: Any) -> Any:
    """Run a test on Slurm only: it needs a scheduler."""
    only = pytest.mark.parametrize("classic_site", ["slurm"], indirect=True, scope="module")
    return pytest.mark.services(only(function))


MAIN_JOBS = """\
import hashlib
label = LABEL
code = orm.load_code(f"bash@{label}")
nested = "mkdir -p out/x/y; cp 'in/deep/er/a b.txt' out/x/y; ls -A in > out/seen; echo done"
upload = orm.SinglefileData.from_bytes(b"0123456789abcdef" * 400_000, "large.bin")
large = "cat large.bin large.bin > twice.bin; mkdir -p many/a many/b; echo 1 > many/a/1.txt; echo 2 > 'many/b/two words.txt'"
lists = {
    "local_copy_list": [["large", "large.bin", "large.bin"]],
    "retrieve_list": ["twice.bin", ["many/*/*.txt", ".", 2]],
    "sandbox": {"odd $name 'x'/a;b": "odd"},
}
add = submit(ArithmeticAdd, x=orm.Int(3), y=orm.Int(4), code=code)
shell = submit(ShellJob, line=orm.Str(nested), code=code)
chain = submit(TwoSteps, x=orm.Int(1), y=orm.Int(2), z=orm.Int(4), code=code)
fails = submit(ShellJob, line=orm.Str("echo no >&2; exit 3"), code=code)
first = start(code, large, lists, nodes={"large": upload})
finished(first)
parent = first.outputs.remote_folder
lists = {
    "remote_copy_list": [["parent", "many", "copied"], ["parent", "t*n", "."]],
    "remote_symlink_list": [["parent", "many", "linked"]],
    "retrieve_list": ["sums"],
}
line = "cat copied/a/1.txt linked/*/*.txt > sums; sha256sum < twice.bin >> sums"
second = start(code, line, lists, nodes={"parent": parent})
finished(add, shell, chain, second)
wait(fails)
digest = hashlib.sha256(b"0123456789abcdef" * 800_000).hexdigest()
retrieved = first.outputs.retrieved.base.repository
print(json.dumps({
    "sum": add.outputs.sum.value,
    "chain": chain.outputs.result.value,
    "shell": repository(shell.outputs.retrieved),
    "fails": facts(fails),
    "first": sorted(retrieved.list_object_names()),
    "twice": hashlib.sha256(retrieved.get_object_content("twice.bin", mode="rb")).hexdigest() == digest,
    "sums": second.outputs.retrieved.get_object_content("sums").split(),
    "digest": digest,
    "listed": sorted(parent.listdir()),
    "add": facts(add),
}))
"""


def run_the_main_jobs(installation: ClassicInstallation, label: str = LABEL) -> dict[str, Any]:
    """Run calculations of every kind at once, and check what came of them."""
    said: dict[str, Any] = installation.run(MAIN_JOBS.replace("LABEL", repr(label)))
    assert (said["sum"], said["chain"]) == (7, 10)
    assert said["shell"]["out/x/y/a b.txt"] == "from the depth\n"
    assert said["shell"]["er/a b.txt"] == "from the depth\n"
    assert said["shell"]["out/seen"] == "deep\nempty\n"
    assert said["shell"]["stdout.txt"] == "done\n"
    job = said["fails"]["detailed"]["job"]
    assert (job["state"], job["exit_code"]) == ("FAILED", 3)
    assert said["fails"]["last"]["exit_status"] == 3
    assert said["twice"]
    assert {"a", "b", "twice.bin", "_scheduler-stdout.txt", "_scheduler-stderr.txt"} <= set(said["first"])
    assert said["sums"] == ["1", "1", "2", said["digest"], "-"]
    assert {"many", "twice.bin", "_aiidasubmit.sh", ".aiida", "odd $name 'x'"} <= set(said["listed"])
    job = said["add"]["detailed"]["job"]
    assert (job["state"], job["exit_code"], job["jobid"]) == ("COMPLETED", 0, said["add"]["job_id"])
    return said


def test_the_main_jobs_through_the_daemon(classic: ClassicInstallation, classic_site: Site) -> None:
    said = run_the_main_jobs(classic)
    if classic_site.slurm is not None:
        accounted = classic_site.accounted(said["add"]["detailed"]["job"]["scheduler_id"])
        assert (accounted["State"], accounted["ExitCode"]) == ("COMPLETED", "0:0")
        accounted = classic_site.accounted(said["fails"]["detailed"]["job"]["scheduler_id"])
        assert (accounted["State"], accounted["ExitCode"]) == ("FAILED", "3:0")


def test_the_computer_passes_every_test(classic: ClassicInstallation) -> None:
    assert "all 6 tests succeeded" in classic.verdi("computer", "test", LABEL)


@on_slurm_only
def test_the_daemon_is_restarted_while_a_job_runs(classic: ClassicInstallation) -> None:
    pk = classic.run("print(json.dumps(start(code, 'touch restarted; until [ -e go.txt ]; do sleep 0.1; done').pk))")
    home = classic.site.home
    machine = classic.site.gateway.machine
    wait_until(
        lambda: machine.run(["find", home, "-name", "restarted"]).stdout.strip() != "",
        within=60,
        failure=lambda: classic.profile.daemon_log(),
    )
    classic.stop_daemon()
    folder = str(Path(classic.real("restarted")).parent)
    machine.run(["touch", f"{folder}/go.txt"], check=True)
    classic.start_daemon(2)
    (outcome,) = classic.profile.wait_for([pk]).values()
    assert (outcome.state, outcome.exit_status) == ("finished", 0)
    assert machine.run(["ls", folder], check=True).stdout.count("mphpc-started-") == 1


@on_slurm_only
def test_what_ends_jobs_early(classic: ClassicInstallation) -> None:
    """A time limit, a cancellation and a batch script that is killed, at once: a limit takes Slurm's whole minutes."""
    limited, killed, silent = classic.run(
        "options = {'options': {'max_wallclock_seconds': 60}}\n"
        "lists = {'retrieve_list': ['partial']}\n"
        "nodes = [start(code, 'echo partial > partial; sleep 600', lists, metadata=options),\n"
        "    start(code, 'touch victim; sleep 600'), start(code, 'touch silent; sleep 600')]\n"
        "print(json.dumps([node.pk for node in nodes]))"
    )
    machine, home = classic.site.gateway.machine, classic.site.home
    for name in ("victim", "silent"):
        wait_until(
            lambda name=name: machine.run(["find", home, "-name", name]).stdout.strip() != "",  # type: ignore[misc]
            within=60,
            failure=lambda: classic.profile.daemon_log(),
        )
    ids = classic.run(f"print(json.dumps([orm.load_node(pk).get_job_id() for pk in {[killed, silent]}]))")
    started = {
        name: next(
            line.rpartition("-")[2]
            for line in machine.run(["ls", str(Path(classic.real(name)).parent)], check=True).stdout.split()
            if line.startswith("mphpc-started-")
        )
        for name in ("victim", "silent")
    }
    assert len(set(ids)) == 2
    # Nothing of the job is left that could say anything.
    slurm = classic.site.slurm
    assert slurm is not None
    pids = slurm.run("scontrol", "listpids", started["silent"], check=True).stdout.split("\n")[1:]
    for line in pids:
        if line.split() and line.split()[0] not in ("-1", "0"):
            machine.run(["kill", "-KILL", line.split()[0]], user="root")
    classic.verdi("process", "kill", str(killed))
    outcomes = classic.profile.wait_for([limited, killed, silent], timeout=240)
    assert outcomes[killed].state == "killed"
    assert classic.site.accounted(started["victim"])["State"].startswith("CANCELLED")
    assert (outcomes[silent].state, outcomes[silent].exit_status) == ("finished", 140)
    assert (outcomes[limited].state, outcomes[limited].exit_status) == ("finished", 120)
    assert (
        classic.run(f"print(json.dumps(repository(orm.load_node({limited}).outputs.retrieved)))")["partial"]
        == "partial\n"
    )


@on_slurm_only
def test_a_launch_whose_answer_is_lost_is_one_execution(classic: ClassicInstallation) -> None:
    def is_launch(request: ProxiedRequest) -> bool:
        return "/job/launch/" in request.path

    with FaultyProxy(classic.site.gateway.url) as proxy:
        classic.computer("lossy", proxy.url)
        injected = proxy.inject(LoseAnswer(), times=None, only=is_launch)
        said = classic.run(
            "node = start(orm.load_code('bash@lossy'), 'echo ran >> executed', {'retrieve_list': ['executed']})\n"
            "finished(node)\n"
            "print(json.dumps([node.outputs.retrieved.get_object_content('executed'), facts(node)]))"
        )
        assert said[0] == "ran\n"
        assert injected.hit == 1
        assert said[1]["detailed"]["job"]["state"] == "COMPLETED"
        classic.run("orm.load_computer('lossy').disable = True\nprint(1)")


@on_slurm_only
@pytest.mark.parametrize("way", ["raw names", "platform"])
def test_the_main_jobs_by_other_ways(classic: ClassicInstallation, way: str) -> None:
    with contextlib.ExitStack() as stack:
        if way == "platform":
            platform = stack.enter_context(
                Platform(
                    classic.site.gateway.url,
                    only_published=True,
                    undeclared="refuse",
                    known_headers_only=True,
                    max_body=MIB,
                    refuse_chunked=True,
                )
            )
            classic.computer("by-platform", platform.url, APP_ID)
            run_the_main_jobs(classic, "by-platform")
        else:
            gateway = stack.enter_context(
                GatewayProcess(
                    classic.site.gateway.machine,
                    backend="slurm",
                    classic=True,
                    roots={},
                    env=classic.site.slurm.env,  # type: ignore[union-attr]
                    beside=classic.site.gateway,
                    options=["--classic-file-names", "raw", "--classic-listing", "whole"],
                )
            )
            classic.computer("raw", gateway.url)
            run_the_main_jobs(classic, "raw")
