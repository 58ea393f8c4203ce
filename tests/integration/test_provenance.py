"""From a calculation's node alone one can tell where and how it ran, in an archive too, and from the job back to the node."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sites import Installation, Site

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.testing.aiida_profile import AiidaProfile
from aiida_marketplace_hpc.testing.machine import wait_until

pytestmark = [
    pytest.mark.services,
    pytest.mark.parametrize("site", ["local", "slurm"], indirect=True, scope="session"),
]

READ = """\
import json, sys
from aiida import orm

(node,) = orm.QueryBuilder().append(orm.CalcJobNode).all(flat=True)
print(json.dumps([node.uuid, dict(node.get_last_job_info()), node.get_detailed_job_info()], default=str))
"""


def test_an_archive_in_an_empty_profile_says_where_and_how_a_calculation_ran(
    installation: Installation, site: Site, aiida_installations: Callable[..., AiidaProfile], tmp_path: Path
) -> None:
    facts = installation.run(
        "node = start(code, 'until test -e go; do sleep 0.1; done')\n"
        "deadline = time.monotonic() + 60\n"
        "while not node.get_job_id() and time.monotonic() < deadline:\n"
        "    time.sleep(0.05)\n"
        "print(json.dumps(facts(node)))"
    )
    job = see_the_node_in_the_job(installation, site, facts["job_id"], facts["uuid"])
    script = site.gateway.machine.read_text(f"{facts['workdir']}/_aiidasubmit.sh")
    site.gateway.machine.write(f"{facts['workdir']}/go", "")
    assert installation.profile.wait_for([facts["pk"]])[facts["pk"]].exit_status == 0

    archive = tmp_path / "archive.aiida"
    installation.verdi("archive", "create", str(archive), "--nodes", str(facts["pk"]))
    with aiida_installations(broker=None) as elsewhere:
        elsewhere.verdi("archive", "import", str(archive))
        uuid, last, detailed = json.loads(elsewhere.python(READ).stdout.splitlines()[-1])
    assert uuid == facts["uuid"]
    for said in (last["raw_data"], {"gateway": detailed["gateway"], **detailed["job"]}):
        assert said["gateway"] == site.gateway.url
        assert said["jobid"] == facts["job_id"]
        assert said["scheduler_id"] == job["scheduler_id"]
        assert said["client_ref"] == uuid
        assert said["request_id"] == job["request_id"]
        assert said["machine"]
        assert said["partition"]
        assert said["nodes"]
        assert said["script_digest"] == bundle.digest_of(script.encode())
        assert said["submitted_at"] <= said["started_at"] <= said["ended_at"]
        assert (said["state"], said["exit_code"]) == ("COMPLETED", 0)
    see_the_request_in_the_logs(site, facts["job_id"], job["request_id"])
    header, *rows = [line.split("|") for line in detailed["stdout"].splitlines()]
    assert rows
    accounted = dict(zip(header, rows[0], strict=True))
    assert (accounted["JobID"], accounted["State"]) == (job["scheduler_id"], "COMPLETED")
    if site.slurm is not None:
        assert site.accounted(job["scheduler_id"])["NodeList"] == accounted["NodeList"]


def see_the_node_in_the_job(installation: Installation, site: Site, jobid: str, uuid: str) -> dict[str, str]:
    """Look at a job that runs, and find its node's UUID: through the gateway, and in Slurm where there is one."""
    program = str(Path(sys.executable).with_name("marketplace-hpc"))
    show = [program, "--json", "--url", site.gateway.url, "job", "show", jobid]
    shown: dict[str, str] = {}

    def runs() -> bool:
        shown.update(json.loads(installation.profile.run(show, env=installation.token).stdout))
        return shown["state"] == "RUNNING"

    wait_until(runs, within=60, failure=lambda: str(shown), poll=0.2)
    assert shown["client_ref"] == uuid
    if site.slurm is not None:
        said = site.slurm.run("scontrol", "show", "job", shown["scheduler_id"], check=True).stdout
        (comment,) = [line.strip() for line in said.splitlines() if "Comment=" in line]
        assert comment == f"Comment=marketplace-hpc:{jobid} {uuid} request:{shown['request_id']}"
    return shown


def see_the_request_in_the_logs(site: Site, jobid: str, request_id: str) -> None:
    """Find the request that launched a job in both of the gateway's logs."""
    (line,) = [one for one in site.gateway.requests() if one.request_id == request_id]
    assert (line.capability, line.status) == ("newTransformation", 200)
    about = f"[request {request_id} user {line.user} job {jobid}]"
    told = [line for line in site.gateway.log.splitlines() if about in line]
    assert f"job {jobid} submitted as" in told[0]
    assert "-> COMPLETED" in told[-1]
