"""What Slurm's end states become in AiiDA, where no parser says otherwise: through the daemon, on a real Slurm."""

from __future__ import annotations

from typing import Any

import pytest
from sites import Installation, Site

from aiida_marketplace_hpc.testing.machine import wait_until

pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(300),
    pytest.mark.parametrize("site", ["slurm"], indirect=True, scope="session"),
]

SLEEP = "node = submit(ShellJob, line=orm.Str('exec sleep 250'), code=code, metadata={options!r})\nprint(node.pk)"


def start(installation: Installation, seconds: int) -> int:
    """Submit a job that sleeps, with a time limit, and return the node's number."""
    pk: int = installation.run(SLEEP.format(options={"options": {"max_wallclock_seconds": seconds}}))
    return pk


def wait_for(installation: Installation, pk: int) -> dict[str, Any]:
    """Wait until a calculation has ended, and return what its node says."""
    found: dict[str, Any] = installation.run(
        f"print(json.dumps(facts(wait(orm.load_node({pk}), seconds=200))))",
    )
    return found


def scheduler_id(installation: Installation, site: Site, pk: int) -> str:
    """Slurm's id of a calculation's job, as soon as it runs."""
    slurm = site.slurm
    assert slurm is not None
    running: list[str] = []

    def runs() -> bool:
        folder = installation.run(f"print(json.dumps(orm.load_node({pk}).get_remote_workdir()))")
        for line in slurm.run("squeue", "-h", "-t", "RUNNING", "-o", "%i %Z").stdout.splitlines():
            id, _, where = line.partition(" ")
            running.extend([id] if where == folder else [])
        return bool(running)

    wait_until(runs, within=60, poll=0.5, failure=lambda: f"calculation {pk} does not run")
    return running[0]


def test_a_job_over_its_time_limit(installation: Installation, site: Site) -> None:
    pk = start(installation, 60)
    facts = wait_for(installation, pk)
    assert (facts["state"], facts["status"]) == ("finished", 120)
    job = facts["detailed"]["job"]
    assert job["state"] == "TIMEOUT"
    assert site.accounted(job["scheduler_id"])["State"] == "TIMEOUT"


def test_a_job_whose_node_fails(installation: Installation, site: Site) -> None:
    slurm = site.slurm
    assert slurm is not None
    pk = start(installation, 240)
    id = scheduler_id(installation, site, pk)
    slurm.run("scontrol", "update", "nodename=node1", "state=down", "reason=test", check=True)
    try:
        facts = wait_for(installation, pk)
    finally:
        # The node may have come back by itself: then this is refused.
        slurm.run("scontrol", "update", "nodename=node1", "state=resume")
        wait_until(
            lambda: slurm.run("sinfo", "--noheader", "--format=%T").stdout.split() == ["idle"],
            within=60,
            failure=lambda: "the node does not come back",
        )
    assert (facts["state"], facts["status"]) == ("finished", 140)
    job = facts["detailed"]["job"]
    assert (job["scheduler_id"], job["state"]) == (id, "NODE_FAIL")
    assert site.accounted(id)["State"] == "NODE_FAIL"


def test_a_job_out_of_memory(installation: Installation, site: Site) -> None:
    """Memory is limited by cgroups, which this Slurm has not: it says of a failed job what is on record of such a one."""
    assert site.faults is not None
    words = {"FAILED": "OUT_OF_MEMORY", "NonZeroExitCode": "OutOfMemory", r"\b1:0\b": "0:125"}
    answers = [site.faults.inject(command, "reworded", always=True, words=words) for command in ("squeue", "sacct")]
    try:
        facts = installation.run("print(json.dumps(facts(finish(ShellJob, line=orm.Str('exit 1'), code=code))))")
    finally:
        for answer in answers:
            answer.release()
    assert (facts["state"], facts["status"]) == ("finished", 110)
    job = facts["detailed"]["job"]
    assert facts["message"].endswith(f" [request {job['request_id']}]")
    assert (job["state"], job["signal"]) == ("OUT_OF_MEMORY", 125)
    assert answers[1].hits
    assert site.accounted(job["scheduler_id"])["State"] == "FAILED"
