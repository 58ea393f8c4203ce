"""A gateway that is away for a while: what waits for its job goes on waiting, what is paused goes on at one command."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sites import LABEL, SYSTEM, Installation, Site, publish_plugins

from aiida_marketplace_hpc.client.retry import RetryPolicy
from aiida_marketplace_hpc.testing.aiida_profile import FAST, AiidaProfile
from aiida_marketplace_hpc.testing.faults import Refuse
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine, wait_until
from aiida_marketplace_hpc.testing.proxy import FaultyProxy

OUTAGE = float(os.environ.get("MARKETPLACE_HPC_OUTAGE", "0"))
"""Seconds that a gateway stays away at least; the suggested poll interval makes an hour of it some hundred polls."""

pytestmark = [pytest.mark.services, pytest.mark.timeout(400 + OUTAGE)]

ATTEMPTS = 3
"""How often AiiDA tries a transport task before it pauses a calculation; its own setting is 5, with which it takes longer."""
POLLS = 8
UNTIL_TOLD = "until test -e go; do sleep 0.1; done"


@pytest.fixture(scope="module")
def site(cluster_machine: Machine) -> Iterator[Site]:
    with GatewayProcess(cluster_machine, roots={"system": f"{SYSTEM}:ro"}) as gateway:
        yield Site(gateway)


@pytest.fixture(scope="module")
def proxy(site: Site) -> Iterator[FaultyProxy]:
    with FaultyProxy(site.gateway.url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def installation(
    site: Site,
    proxy: FaultyProxy,
    aiida_installations: Callable[..., AiidaProfile],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Installation]:
    options = {**FAST, "transport.task_maximum_attempts": ATTEMPTS}
    imports = [Path(__file__).parent, publish_plugins(tmp_path_factory.mktemp("plugins"))]
    with aiida_installations(options=options, import_path=imports) as profile:
        installation = Installation(profile, site)
        installation.set_up()
        configure = ["computer", "configure", "marketplace_hpc", LABEL, "--non-interactive"]
        installation.verdi(*configure, "--url", proxy.url)
        installation.start_daemon()
        yield installation
        installation.close()


def start(installation: Installation, line: str) -> int:
    return int(installation.run(f"print(json.dumps(start(code, {line!r}).pk))"))


def facts(installation: Installation, pk: int) -> dict[str, Any]:
    found: dict[str, Any] = installation.run(f"print(json.dumps(facts(orm.load_node({pk}))))")
    return found


def wait_until_running(installation: Installation, pk: int) -> None:
    def running() -> bool:
        last = facts(installation, pk)["last"]
        return bool(last) and last["raw_data"].get("state") == "RUNNING"

    wait_until(running, within=60, failure=lambda: f"{facts(installation, pk)}\n{installation.profile.daemon_log()}")


def wait_until_paused(installation: Installation, *pks: int) -> None:
    def paused() -> bool:
        return all(outcome.paused for outcome in installation.profile.outcomes(pks).values())

    wait_until(paused, within=120, failure=lambda: installation.profile.daemon_log(), poll=1)


def go_on(installation: Installation, pk: int) -> None:
    installation.site.gateway.machine.write(f"{facts(installation, pk)['workdir']}/go", "")


def test_an_outage_pauses_no_calculation_that_waits_for_its_job(
    installation: Installation, site: Site, proxy: FaultyProxy
) -> None:
    pk = start(installation, UNTIL_TOLD)
    wait_until_running(installation, pk)
    site.gateway.stop()
    before, since = len(proxy.requests), time.monotonic()

    def polls() -> int:
        return (len(proxy.requests) - before) // RetryPolicy().attempts

    wait_until(
        lambda: polls() >= POLLS and time.monotonic() - since >= OUTAGE,
        within=120 + OUTAGE,
        failure=lambda: f"{polls()} polls",
    )
    (outcome,) = installation.profile.outcomes([pk]).values()
    assert (outcome.state, outcome.paused) == ("waiting", False)
    last = facts(installation, pk)["last"]
    assert last["job_state"] == "undetermined"
    assert last["raw_data"]["last_known"]["state"] == "RUNNING"
    site.gateway.start()
    go_on(installation, pk)
    (outcome,) = installation.profile.wait_for([pk]).values()
    assert outcome.exit_status == 0
    print(f"\n{polls()} polls in {time.monotonic() - since:.0f} s of outage, and the calculation went on by itself")


def test_what_aiida_paused_in_an_outage_goes_on_at_one_command(
    installation: Installation, site: Site, proxy: FaultyProxy
) -> None:
    users = start(installation, UNTIL_TOLD)
    wait_until_running(installation, users)
    installation.verdi("process", "pause", str(users))
    refused = proxy.inject(Refuse(), times=None, only=lambda request: "/file/download/" in request.path)
    to_retrieve = start(installation, "echo done")
    wait_until_paused(installation, to_retrieve)
    site.gateway.stop()
    to_upload = start(installation, "echo done")
    wait_until_paused(installation, to_upload, users)
    site.gateway.start()
    refused.withdraw()

    program = str(Path(sys.executable).with_name("marketplace-hpc"))
    resume = [program, "--json", "computer", "resume", LABEL]
    said = json.loads(installation.profile.run(resume, env=installation.token).stdout)
    assert said == {"resumed": [to_retrieve, to_upload], "failed": []}
    outcomes = installation.profile.wait_for([to_retrieve, to_upload])
    assert {outcome.exit_status for outcome in outcomes.values()} == {0}
    assert installation.profile.outcomes([users])[users].paused
    again = installation.profile.run([program, "computer", "resume", LABEL], env=installation.token)
    assert again.stdout == "0 calculations resumed.\n"

    go_on(installation, users)
    installation.verdi("process", "play", str(users))
    assert installation.profile.wait_for([users])[users].exit_status == 0
