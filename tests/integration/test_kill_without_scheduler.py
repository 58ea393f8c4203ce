"""``verdi process kill`` while Slurm's controller is away: it is answered, and the job ends when the controller is back."""

from __future__ import annotations

import time

import pytest
from sites import Installation, Site

pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(300),
    pytest.mark.parametrize("site", ["slurm"], indirect=True, scope="session"),
]


@pytest.fixture
def job_that_runs(installation: Installation) -> dict[str, object]:
    facts: dict[str, object] = installation.run(
        "node = start(code, 'sleep 600')\n"
        "deadline = time.monotonic() + 60\n"
        "while time.monotonic() < deadline:\n"
        "    last = orm.load_node(node.pk).get_last_job_info()\n"
        "    if last and last.raw_data.get('state') == 'RUNNING':\n"
        "        break\n"
        "    time.sleep(0.1)\n"
        "print(json.dumps({**facts(node), 'scheduler_id': last.raw_data['scheduler_id']}))"
    )
    return facts


def test_a_kill_while_the_controller_is_away(
    installation: Installation, site: Site, job_that_runs: dict[str, object]
) -> None:
    assert site.slurm is not None
    pk, scheduler_id = int(str(job_that_runs["pk"])), str(job_that_runs["scheduler_id"])
    site.slurm.stop_controller()
    try:
        began = time.monotonic()
        installation.profile.verdi("process", "kill", str(pk), check=False)
        (outcome,) = installation.profile.wait_for([pk], timeout=120).values()
        print(f"\nkilled {time.monotonic() - began:.1f} s after it was asked for")
        assert outcome.state == "killed"
    finally:
        site.slurm.start_controller()
    site.slurm.wait_for(scheduler_id, "CANCELLED", within=90)
