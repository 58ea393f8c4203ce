"""``verdi calcjob gotocomputer`` of a real calculation, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from sites import SYSTEM, Installation, Site

from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine, process_table

pytestmark = pytest.mark.services

PROMPT = r"alice@127\.0\.0\.1:[^>\r\n]*>\x1b"


@pytest.fixture(scope="module")
def site(cluster_machine: Machine) -> Iterator[Site]:
    """One backend is enough: nothing here knows which it is."""
    with GatewayProcess(cluster_machine, roots={"system": f"{SYSTEM}:ro"}) as gateway:
        yield Site(gateway)


@pytest.fixture(scope="module")
def calculation(installation_without_broker: Installation) -> dict[str, Any]:
    script = (
        "_, node = run_get_node(ArithmeticAdd, x=orm.Int(1), y=orm.Int(2), code=code)\nprint(json.dumps(facts(node)))"
    )
    facts: dict[str, Any] = installation_without_broker.run(script)
    assert facts["status"] == 0
    return facts


@pytest.fixture
def shell(installation_without_broker: Installation, calculation: dict[str, Any]) -> Iterator[pexpect.spawn[str]]:
    installation = installation_without_broker
    profile = installation.profile
    environment = {
        **profile.environment,
        **installation.token,
        "PATH": "/usr/bin:/bin",
        "TERM": "xterm",
        "NO_COLOR": "1",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    verdi = str(Path(sys.executable).with_name("verdi"))
    arguments = ["-p", profile.NAME, "calcjob", "gotocomputer", str(calculation["pk"])]
    process = pexpect.spawn(
        verdi,
        arguments,
        env=environment,  # type: ignore[arg-type]
        cwd=str(profile.path),
        dimensions=(24, 200),
        timeout=60,
        encoding="utf-8",
    )
    process.expect("going to the remote work directory")
    process.expect(PROMPT)
    yield process
    process.close(force=True)


def test_it_opens_a_shell_in_the_calculations_folder(
    shell: pexpect.spawn[str], calculation: dict[str, Any], installation_without_broker: Installation
) -> None:
    token = installation_without_broker.site.gateway.token
    started = [entry.command() for entry in process_table() if calculation["workdir"] in entry.command()]
    assert started
    assert token not in str(started)
    shell.sendline("pwd")
    shell.expect_exact(calculation["workdir"] + "\r\n")
    shell.expect(PROMPT)
    shell.sendline("ls")
    shell.expect(r"_aiidasubmit\.sh  .*aiida\.in  .*aiida\.out")
    shell.expect(PROMPT)
    shell.send("tail aiida.o\t")
    shell.expect("ut")
    shell.send("\r")
    shell.expect("3\r\n")
    shell.expect(PROMPT)
    shell.sendline("tail -f aiida.out")
    shell.expect("3\r\n")
    shell.sendintr()
    # Neither the shell nor verdi has ended.
    shell.expect(PROMPT)
    shell.sendeof()
    shell.expect(pexpect.EOF)
    shell.wait()
    assert shell.exitstatus == 0


def test_a_folder_that_is_gone_is_said(installation_without_broker: Installation, calculation: dict[str, Any]) -> None:
    installation_without_broker.verdi("calcjob", "cleanworkdir", "-f", str(calculation["pk"]))
    done = installation_without_broker.profile.verdi(
        "calcjob", "gotocomputer", str(calculation["pk"]), env=installation_without_broker.token, check=False
    )
    assert "No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr
