"""The published client, unmodified, in an environment of its own, against our gateway: what it expects is what it gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.protocol import CAPABILITIES
from aiida_marketplace_hpc.testing.fixtures import give_up
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import RigError
from aiida_marketplace_hpc.testing.oidc import OidcProvider
from aiida_marketplace_hpc.testing.platform import Platform

pytestmark = pytest.mark.services

REQUIREMENTS = """\
marketplace-hpc==2.0.0
marketplace-sdk==0.3.2
marketplace-standard-app-api==0.3.0
fastapi==0.75.2
starlette==0.17.1
anyio==3.7.1
sniffio==1.3.1
requests==2.26.0
urllib3==1.26.20
charset-normalizer==2.0.12
certifi
idna
packaging==21.3
pyparsing
email-validator==1.2.1
dnspython
typing-extensions
six
pydantic==1.10.*
python-multipart==0.0.9
"""
"""As pip resolves ``marketplace-hpc==2.0.0``, but for the last two: what is pinned there (pydantic 1.9.0 and python-multipart
0.0.5) does not import on Python 3.11 and newer, or has to be built. No pin of the published client's own is broken."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python in which the published client is installed."""
    folder = tmp_path_factory.mktemp("published")
    python = folder / "env" / "bin" / "python"
    (folder / "requirements.txt").write_text(REQUIREMENTS)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    for argv in (
        [sys.executable, "-m", "venv", str(folder / "env")],
        [str(python), *install, "--requirement", str(folder / "requirements.txt")],
    ):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=150)
        if done.returncode:
            give_up(RigError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stderr[-2000:]}"))
    return python


def test_all_nine_calls_of_the_published_client(
    published: Path, gateway_factory: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    with OidcProvider() as provider:
        gateway = gateway_factory(provider=provider, auth="marketplace")
        got = _got(published, gateway, provider, tmp_path)
    _check_jobs_and_files(got, gateway)
    # A second launch is no second job, as it was with the published gateway.
    assert got["launch_job"].get("scheduler_id") == got["launch_job again"].get("scheduler_id")
    assert got["check_job_state at the end"]["state"] == "COMPLETED"
    for call in ("check_job_state unknown", "delete_file unknown"):
        assert got[call]["error"]


def test_all_nine_calls_with_a_gateway_that_is_served_as_published(
    published: Path, gateway_factory: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    with OidcProvider() as provider:
        gateway = gateway_factory(provider=provider, auth="marketplace", classic=True)
        got = _got(published, gateway, provider, tmp_path, "classic")
    _check_jobs_and_files(got, gateway, unnamed=f"{tmp_path}/local-in.txt".strip("/").replace("/", "_"))
    assert set(got["launch_job"]) == {"jobid"}


def _got(
    published: Path, gateway: GatewayProcess, provider: OidcProvider, folder: Path, *options: str
) -> dict[str, Any]:
    token = provider.issue("ada", email="ada.l@example.org", name="Ada L")
    strict = {"undeclared": "drop", "known_headers_only": True, "max_body": 1024 * 1024, "refuse_chunked": True}
    with Platform(gateway.url, provider=provider, only_published=True, **strict) as platform:  # type: ignore[arg-type]
        return _calls(published, platform, token, folder, *options)


def _calls(python: Path, platform: Platform, token: str, folder: Path, *options: str) -> dict[str, Any]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        [str(python), str(Path(__file__).with_name("published_calls.py")), platform.url, str(folder), *options],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, "MP_ACCESS_TOKEN": token, "NO_PROXY": "*"},
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def _check_jobs_and_files(got: dict[str, Any], gateway: GatewayProcess, unnamed: str = "local-in.txt") -> None:
    """What the client is told in any case.

    :param unnamed: how a file is called that was uploaded without a name.
    """
    assert got["heartbeat"] == {"message": "HPC-gateway-App : application running."}
    user = got["create_user"]
    assert {"_id", "email", "home", "message", "name"} <= set(user)
    assert (user["email"], user["name"]) == ("ada.l@example.org", "Ada L")
    assert user["message"] == "Success: Create user in database."

    jobid = got["create_job"]
    assert jobid
    for name in ("job.sh", "in.txt"):
        status, answer = got[f"upload_file {name}"]
        assert (status, answer["message"]) == (200, "File uploaded.")
    assert got["upload_file unnamed"]["message"] == "File uploaded."
    listed = {file["name"]: file for file in got["check_job_state"]["files"]}
    assert set(listed) == {"job.sh", "in.txt", unnamed}
    assert got["check_job_state"]["message"] == "Files in the job folder."
    keys = {"group", "last_modified", "link_target", "name", "permissions", "size", "type", "user"}
    assert keys <= set(listed["in.txt"])
    assert listed["in.txt"]["size"] == "10"

    assert got["launch_job"]["jobid"] == got["launch_job again"]["jobid"] == jobid
    assert got["download_file"] == [200, "from here\ndone\n"]
    assert got["delete_file"]["message"] == "File deleted."
    assert got["download_file of nothing"] >= 400

    assert "not launched" in got["cancel_job too early"]["error"]
    assert got["cancel_job"]["message"].startswith("Send cancelling signal to job-")
    assert got["create_job wrong"] == ""
    refused = "request fail, check access token is renewed."
    assert got["launch_job unknown"] == got["get_app wrong token"] == refused

    nine = {row.name for row in CAPABILITIES if row.published and row.registered}
    assert {request.capability for request in gateway.requests()} == nine
