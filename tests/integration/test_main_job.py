"""The main job, end to end on real parts: AiiDA's daemon, the gateway, a batch system, and back into the provenance.

Whatever runs, runs on a disk that the AiiDA side cannot see, and what AiiDA says is compared with what Slurm itself says.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sites import LABEL, Installation, Site

from aiida_marketplace_hpc.testing.machine import wait_until

ADD = "node = finish(ArithmeticAdd, x=orm.Int(3), y=orm.Int(4), code=code)\n"


def expect_on_slurm(site: Site, facts: dict[str, Any], state: str, exit_code: str = "0:0") -> None:
    """Compare a node with Slurm's accounting, where there is a Slurm."""
    job = facts["detailed"]["job"]
    if site.slurm is None:
        return
    accounted = site.accounted(job["scheduler_id"])
    assert accounted["State"] == state
    assert accounted["ExitCode"] == exit_code
    assert accounted["Partition"] == job["partition"]
    assert accounted["NodeList"] == job["nodes"]


def passes_every_test(installation: Installation) -> None:
    said = installation.verdi("computer", "test", LABEL)
    assert "all 6 tests succeeded" in said
    assert "alice" in said
    assert "all tests succeeded" in installation.verdi("code", "test", f"bash@{LABEL}")
    shown = installation.verdi("computer", "configure", "show", LABEL)
    assert installation.site.gateway.url in shown
    assert installation.site.gateway.token not in shown


def test_the_computer_passes_every_test_beside_a_daemon(installation: Installation) -> None:
    passes_every_test(installation)


def test_the_computer_passes_every_test_without_a_broker(installation_without_broker: Installation) -> None:
    passes_every_test(installation_without_broker)


def test_the_computer_is_configured_interactively(installation_without_broker: Installation, site: Site) -> None:
    installation = installation_without_broker
    setup = [
        "computer",
        "setup",
        "--non-interactive",
        "--label",
        "typed",
        "--hostname",
        "gateway",
        "--work-dir",
        site.work_dir,
    ]
    installation.verdi(*setup, "--transport", "marketplace_hpc", "--scheduler", "marketplace_hpc")
    typed = f"?\n{site.gateway.url}\n\nlocal-cluster\nenv:MP_ACCESS_TOKEN\n\n"
    said = installation.verdi("computer", "configure", "marketplace_hpc", "typed", input=typed)
    assert "successfully configured" in said
    assert "login shell" not in said.lower()
    assert "cooldown" not in said.lower()
    shown = installation.verdi("computer", "configure", "show", "typed")
    values = dict(line.removeprefix("* ").split(maxsplit=1) for line in shown.splitlines() if len(line.split()) > 2)
    assert values["url"] == site.gateway.url
    assert values["gateway_machine"] == "local-cluster"
    assert values["token_source"] == "env:MP_ACCESS_TOKEN"
    assert values["max_io_allowed"] == "8"
    assert values["use_login_shell"] == "False"
    assert float(values["safe_interval"]) == 0
    refused = installation.profile.verdi(
        "computer", "configure", "marketplace_hpc", "typed", "-n", "--token-source", "my-secret", check=False
    )
    assert refused.returncode != 0
    assert "env:" in refused.stderr + refused.stdout


def test_a_calculation_through_the_daemon(installation: Installation, site: Site) -> None:
    answer = installation.run(ADD + "print(json.dumps([node.outputs.sum.value, facts(node)]))")
    total, facts = answer
    assert total == 7
    assert facts["status"] == 0
    job = facts["detailed"]["job"]
    assert facts["detailed"]["gateway"] == site.gateway.url
    assert (facts["job_id"], job["client_ref"], job["state"]) == (job["jobid"], facts["uuid"], "COMPLETED")
    assert facts["last"]["raw_data"]["scheduler_id"] == job["scheduler_id"]
    for name in (
        "scheduler_id",
        "partition",
        "nodes",
        "submitted_at",
        "started_at",
        "ended_at",
        "machine",
        "script_digest",
    ):
        assert job[name], name
    assert job["exit_code"] == 0
    expect_on_slurm(site, facts, "COMPLETED")
    # Only the cluster has the files: nothing has taken a short cut.
    assert site.gateway.machine.exists(f"{facts['workdir']}/aiida.out")
    if site.gateway.machine.outside("/") != Path("/"):
        assert not Path(facts["workdir"]).exists()


def test_everything_blocking_works_without_broker_and_daemon(
    installation_without_broker: Installation, site: Site
) -> None:
    script = (
        "results, node = run_get_node(ArithmeticAdd, x=orm.Int(1), y=orm.Int(2), code=code)\n"
        "print(json.dumps([results['sum'].value, node.outputs.remote_folder.listdir(), facts(node)]))"
    )
    total, listed, facts = installation_without_broker.run(script)
    assert total == 3
    assert {"aiida.in", "aiida.out", "_aiidasubmit.sh", ".aiida"} <= set(listed)
    expect_on_slurm(site, facts, "COMPLETED")


def test_nested_folders_go_and_come(installation: Installation, site: Site) -> None:
    line = "mkdir -p out/x/y; cp 'in/deep/er/a b.txt' out/x/y; ls -A in > out/seen; echo done"
    script = (
        f"node = finish(ShellJob, line=orm.Str({line!r}), code=code)\n"
        "files = {}\n"
        "for root, _, names in node.outputs.retrieved.base.repository.walk():\n"
        "    for name in names:\n"
        "        files[str(root / name)] = node.outputs.retrieved.base.repository.get_object_content(str(root / name))\n"
        "print(json.dumps([files, facts(node)]))"
    )
    files, facts = installation.run(script)
    assert facts["status"] == 0, facts
    assert files["out/x/y/a b.txt"] == "from the depth\n"
    assert files["er/a b.txt"] == "from the depth\n"
    assert files["out/seen"] == "deep\nempty\n"
    assert files["stdout.txt"] == "done\n"
    expect_on_slurm(site, facts, "COMPLETED")


def test_a_workchain_of_two_steps(installation: Installation, site: Site) -> None:
    script = (
        "node = finish(TwoSteps, x=orm.Int(1), y=orm.Int(2), z=orm.Int(4), code=code)\n"
        "steps = [facts(child) for child in node.called if 'Add' in child.process_label]\n"
        "print(json.dumps([node.outputs.result.value, steps]))"
    )
    result, steps = installation.run(script)
    assert result == 10
    assert len(steps) == 2
    for facts in steps:
        expect_on_slurm(site, facts, "COMPLETED")


def test_a_job_that_fails(installation: Installation, site: Site) -> None:
    script = "node = finish(ShellJob, line=orm.Str('echo no; exit 3'), code=code)\nprint(json.dumps(facts(node)))"
    facts = installation.run(script)
    job = facts["detailed"]["job"]
    assert (job["state"], job["exit_code"]) == ("FAILED", 3)
    assert facts["last"]["exit_status"] == 3
    expect_on_slurm(site, facts, "FAILED", "3:0")


def test_a_job_that_is_refused_for_good(installation: Installation, site: Site) -> None:
    script = (
        "options = {'queue_name': 'no-such-partition', 'resources': {'num_machines': 1}}\n"
        "node = finish(ArithmeticAdd, x=orm.Int(1), y=orm.Int(1), code=code, metadata={'options': options})\n"
        "print(json.dumps(facts(node)))"
    )
    before = creations(site)
    facts = installation.run(script)
    assert (facts["state"], facts["status"], facts["job_id"]) == ("finished", 130, None)
    assert "nvalid partition" in facts["message"]
    assert creations(site) == before + 1  # Said once, not tried again.


def creations(site: Site) -> int:
    return sum(request.capability == "newTransformation" for request in site.gateway.requests())


def test_a_job_over_its_time_limit(installation: Installation, site: Site) -> None:
    if site.slurm is not None:
        pytest.skip("Slurm's time limits are whole minutes; this runs where they are seconds")
    script = (
        "metadata = {'options': {'max_wallclock_seconds': 1}}\n"
        "node = finish(ShellJob, line=orm.Str('exec sleep 60'), code=code, metadata=metadata)\n"
        "print(json.dumps(facts(node)))"
    )
    facts = installation.run(script)
    assert facts["detailed"]["job"]["state"] == "TIMEOUT"
    assert facts["status"] == 120


def test_how_many_requests_one_calculation_needs(installation_without_broker: Installation, site: Site) -> None:
    script = (
        "results, node = run_get_node(ArithmeticAdd, x=orm.Int(1), y=orm.Int(2), code=code)\n"
        "print(json.dumps(results['sum'].value))"
    )
    before = len(site.gateway.requests())
    assert installation_without_broker.run(script) == 3
    served = site.gateway.requests()[before:]
    polls = [number for number, request in enumerate(served) if request.capability == "newTransformation"]
    after = served[polls[0] + 1 :]
    # After the submission: polls, one question for the accounting, one request for each retrieved file.
    repeated = sum(request.capability == "query" for request in after) - 2
    print(
        f"\n{site.gateway.backend}: {len(served)} requests for one core.arithmetic.add, {repeated} of them repeated polls"
    )
    assert len(served) - repeated <= 14
    assert sum(request.capability == "getDataset" for request in served) == 3


def test_no_token_is_left_anywhere(installation: Installation, site: Site) -> None:
    """In no file of AiiDA's (with its database and all nodes), of the gateway's or of a user's, in no log, and, while all that
    runs, among nobody's arguments."""
    token = site.gateway.token.encode()
    with arguments_watched(token) as seen:
        found = installation.run(
            ADD + "print(json.dumps(node.base.attributes.all | node.base.extras.all, default=str))"
        )
    assert token.decode() not in json.dumps(found)
    assert seen.looked
    assert seen.at == []
    places = [path for path in installation.profile.path.rglob("*") if path.is_file()]
    assert len(places) > 10
    assert [path for path in places if token in content(path)] == []
    assert token.decode() not in site.gateway.log
    assert token.decode() not in str(site.gateway.requests())
    kept = [site.gateway.state, site.home, site.scratch]
    search = site.gateway.machine.run(["grep", "-rlF", "--file=-", "--no-messages", *kept], input=site.gateway.token)
    assert search.stdout == ""
    # The same search finds what is there.
    search = site.gateway.machine.run(["grep", "-rlF", "--file=-", "--no-messages", *kept], input="getDataset")
    assert search.stdout != ""


@dataclass
class Seen:
    """How often all processes were looked at, and those among whose arguments it was."""

    looked: int = 0
    at: list[bytes] = field(default_factory=list)


@contextmanager
def arguments_watched(secret: bytes) -> Iterator[Seen]:
    """Look at the arguments of all processes of the machine again and again."""
    seen = Seen()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    arguments = path.read_bytes()
                    if secret in arguments:
                        seen.at.append(arguments)
            seen.looked += 1

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        stop.set()
        watching.join()


def test_the_watch_sees_arguments() -> None:
    with arguments_watched(b"a-secret-among-the-arguments") as seen:
        idle = [sys.executable, "-c", "import sys; sys.stdin.read()", "a-secret-among-the-arguments"]
        with subprocess.Popen(idle, stdin=subprocess.PIPE):
            wait_until(lambda: bool(seen.at), within=10, failure=lambda: "it was not seen")


def content(path: Path) -> bytes:
    """What is in a file, of a database's journal above all: it is there one moment and gone the next."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
