"""Asking a classic gateway, as a client does that has only the published routes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from aiida_marketplace_hpc.testing.served import ALICE, TOKENS

JOB = {"job_name": "a", "ntasks_per_node": 1, "partition": "local", "image": "c.sif", "executable_cmd": "hello"}
"""What the published ``newTransformation`` needs."""


class Asker:
    """Sends requests with one user's token."""

    def __init__(self, url: str, token: str = TOKENS[ALICE]) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"}

    def __call__(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {**self._headers, **options.pop("headers", {})}
        return requests.request(
            method, f"{self._url}{path}", headers=headers, timeout=30, allow_redirects=False, **options
        )

    def new_job(self, script: bytes | None = None) -> str:
        """Create a job, with another script than the template's."""
        self("PUT", "/api/v1/user/create")
        jobid: str = self("POST", "/api/v1/job/create", json=JOB).json()["jobid"]
        if script is not None:
            assert self.upload(jobid, "job.sh", script).status_code == 200
        return jobid

    def upload(self, jobid: str, filename: str, content: bytes) -> requests.Response:
        """Upload a file as the published client does."""
        part = {"file": (f"/home/me/{filename}", content, "multipart/form-data")}
        return self("PUT", f"/api/v1/file/upload/{jobid}", params={"filename": filename}, files=part)

    def download(self, jobid: str, filename: str) -> requests.Response:
        """Download a file."""
        return self("GET", f"/api/v1/file/download/{jobid}", params={"filename": filename})

    def text(self, jobid: str, filename: str) -> str:
        """The content of a file, empty where there is none."""
        answer = self.download(jobid, filename)
        return answer.text if answer.ok else ""

    def files(self, jobid: str) -> dict[str, dict[str, str]]:
        """What is in a job's folder, by name."""
        return {row["name"]: row for row in self("GET", f"/api/v1/file/list/{jobid}").json()["files"]}

    def folder(self, jobid: str) -> Path:
        """Where a job's folder is."""
        return Path(self("GET", "/api/v1/job/").json()["jobs"][jobid]["remote_folder"])


def eventually(condition: Callable[[], Any]) -> None:
    """Wait for something that is bound to happen."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)
