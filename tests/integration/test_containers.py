"""Containers on a gateway's computer: AiiDA's containerized codes, and the jobs of an image and a command as published.

There is no container runtime here: a recording stand-in takes its place, and runs the command.
"""

from __future__ import annotations

import pytest
from sites import Installation, Site

from aiida_marketplace_hpc import HpcGateway
from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.testing.machine import wait_until

pytestmark = pytest.mark.services

IMAGE = "docker://example.org/tool:1"


def test_a_containerized_code_through_the_daemon(installation: Installation, site: Site) -> None:
    command = f"{site.apptainer} exec --bind {site.home} {{image_name}}"
    total, facts = installation.run(
        "where = {'computer': orm.load_computer('cluster'), 'filepath_executable': '/usr/bin/bash'}\n"
        f"engine = {{'engine_command': {command!r}, 'image_name': {IMAGE!r}}}\n"
        "contained = orm.ContainerizedCode(label='contained', **where, **engine).store()\n"
        "node = finish(ArithmeticAdd, x=orm.Int(3), y=orm.Int(4), code=contained)\n"
        "print(json.dumps([node.outputs.sum.value, facts(node)]))"
    )
    assert (total, facts["status"]) == (7, 0)
    called = site.gateway.machine.read_text(f"{facts['workdir']}/apptainer-calls.txt")
    assert called == f"exec\n--bind\n{site.home}\n{IMAGE}\n/usr/bin/bash\n\n"


def test_a_job_of_an_image_and_a_command(site: Site) -> None:
    tasks = 2 if site.slurm else 1
    with HpcGateway(site.gateway.url, token_source=StaticToken(site.gateway.token)) as gateway:
        fields = {"job_name": "published", "ntasks_per_node": tasks, "partition": "debug" if site.slurm else "local"}
        command = """bash -c 'echo "$0 ${SLURM_PROCID:-0}"' task"""
        jobid = gateway.create_job({**fields, "image": IMAGE, "executable_cmd": command})
        gateway.launch_job(jobid)
        wait_until(lambda: gateway.check_job_state(jobid)["job"]["final"], within=60, failure=lambda: "it does not end")
        said = gateway.check_job_state(jobid)
        assert said["state"] == "COMPLETED"
        [output] = [file["name"] for file in said["files"] if file["name"].startswith("slurm-")]
        lines = gateway.download_file(jobid, output).decode().splitlines()
        called = gateway.download_file(jobid, "apptainer-calls.txt").decode()
    assert sorted(lines) == [f"task {number}" for number in range(tasks)]
    folder = said["job"]["folder"]
    words = ["run", "--bind", f"{folder}:{folder}", IMAGE, "bash", "-c", 'echo "$0 ${SLURM_PROCID:-0}"', "task"]
    assert called == "\n".join([*words, "", ""]) * tasks
