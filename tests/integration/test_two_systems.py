"""The main job on two systems of one FirecREST behind one gateway, as two computers of AiiDA at once."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from sites import SYSTEM, Installation, Site

from aiida_marketplace_hpc.testing.firecrest_jobs import Processes
from aiida_marketplace_hpc.testing.firecrest_v2 import FirecrestDouble
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine
from aiida_marketplace_hpc.testing.oidc import OidcProvider

BOTH = """\
codes = [orm.load_code(f"bash@{label}") for label in MACHINES]
nodes = [submit(ArithmeticAdd, x=orm.Int(3), y=orm.Int(number), code=code) for number, code in enumerate(codes)]
deadline = time.monotonic() + 120
while not all(node.is_terminated for node in nodes) and time.monotonic() < deadline:
    time.sleep(0.1)
print(json.dumps([[node.outputs.sum.value, facts(node)] for node in nodes]))
"""


COMPUTERS = """\
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.new_computer import plan

for label, machine in MACHINES.items():
    computer = plan(label, HpcGateway(URL, machine=machine), "env:MP_ACCESS_TOKEN").store()
    computer.set_minimum_job_poll_interval(0.2)
    where = dict(label="bash", computer=computer, filepath_executable="/usr/bin/bash")
    orm.InstalledCode(default_calc_job_plugin="core.arithmetic.add", **where).store()
"""


@pytest.fixture(scope="module")
def doubles(cluster_machine: Machine) -> Iterator[list[FirecrestDouble]]:
    """``alps``, with jobs where the tests may not see them, and ``bora`` beside it."""
    with ExitStack() as stack:
        provider = stack.enter_context(OidcProvider())
        other = stack.enter_context(Machine(getpass.getuser()))
        bora = FirecrestDouble(other, Processes(other), provider, system="bora")
        alps = FirecrestDouble(cluster_machine, Processes(cluster_machine), provider, system="alps", beside=[bora])
        yield [stack.enter_context(alps), bora]


@pytest.fixture(scope="module")
def gateway(doubles: list[FirecrestDouble], site: Site) -> Iterator[GatewayProcess]:
    alps, bora = doubles
    with Machine(getpass.getuser()) as machine:
        gateway = GatewayProcess(
            machine,
            backend="firecrest",
            users=(),
            home=f"{alps.machine.home}/{{username}}",
            roots={"system": f"{SYSTEM}:ro", "bora.home": f"{bora.machine.home}/{{username}}"},
            options=[*alps.options, "--poll-interval", "0.5"],
            env=alps.env,
        )
        gateway.tokens["alice"] = site.gateway.token
        with gateway:
            yield gateway


@pytest.mark.parametrize("site", ["local"], indirect=True, scope="session")
def test_a_calculation_on_each_at_once(
    installation: Installation, gateway: GatewayProcess, doubles: list[FirecrestDouble]
) -> None:
    # One that names no machine is on the default one.
    machines = {f"alps-{gateway.pid}": "", f"bora-{gateway.pid}": "bora"}
    given = f"MACHINES, URL = {machines!r}, {gateway.url!r}\n"
    before = [double.calls.copy() for double in doubles]
    for number, (total, facts) in enumerate(installation.run(given + COMPUTERS + BOTH)):
        job, double = facts["detailed"]["job"], doubles[number]
        assert (total, facts["status"], job["state"], job["machine"]) == (3 + number, 0, "COMPLETED", double.system)
        assert job["scheduler_id"] == ("1", "bora/1")[number]
        assert facts["workdir"].startswith(f"{double.machine.home}/alice/aiida/")
        assert double.machine.exists(f"{facts['workdir']}/aiida.out")
        assert (double.calls - before[number])["submit"] == 1
