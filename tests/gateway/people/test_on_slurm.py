"""What a real Slurm says of jobs, on the page."""

from __future__ import annotations

import pytest
import requests

from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import wait_until
from tests.gateway.people.visitors import Browser

pytestmark = pytest.mark.services


def test_partition_reason_and_accounting_are_those_of_slurm(slurm_gateway: GatewayProcess) -> None:
    headers = {"Authorization": f"Bearer {slurm_gateway.token}"}
    home = requests.get(f"{slurm_gateway.url}/api/v1/info", headers=headers, timeout=30).json()["home"]

    def launched(folder: str, script: str) -> str:
        into = {"filename": f"{folder}/run.sh", "parents": "true"}
        url = f"{slurm_gateway.url}/api/v1"
        text = script.encode()
        assert requests.put(f"{url}/file/upload/home", data=text, params=into, headers=headers, timeout=30).ok
        body = {"folder": f"{home}/{folder}", "script": "run.sh", "launch": True}
        answer = requests.post(f"{url}/job/create", json=body, headers=headers, timeout=30)
        assert answer.ok, answer.text
        return str(answer.json()["jobid"])

    held = launched("page-held", "#!/bin/sh\n#SBATCH --hold --job-name=page-held\n")
    done = launched("page-done", "#!/bin/sh\n#SBATCH --job-name=page-done\necho the output\nexit 3\n")
    browser = Browser(slurm_gateway)
    token = browser.token_on("/sign-in")
    assert browser.post("/sign-in", token=token, access=slurm_gateway.token).ok

    def await_on(page: str, *parts: str) -> None:
        wait_until(
            lambda: all(part in browser.get(page).text for part in parts),
            within=60,
            failure=lambda: browser.get(page).text,
        )

    await_on(f"/jobs/{held}", "page-held", "held</span>", "(JobHeldUser)", "<dt>Partition</dt>")
    accounting = '<th scope="col">State'
    await_on(f"/jobs/{done}", "page-done", "failed</span>", "the output", "<dt>Exit code</dt><dd>3</dd>", accounting)
    assert browser.post(f"/jobs/{held}/cancel", token=browser.token_on("/")).status_code == 303
    await_on(f"/jobs/{held}", "cancelled</span>")
