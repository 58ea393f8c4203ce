"""A gateway with a page, and jobs on it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from tests.gateway.people.visitors import Browser, MakeJob


@pytest.fixture
def served(tmp_path: Path, backend: FakeBackend) -> Iterator[ServedGateway]:
    # Whatever the backend says is seen at the next request.
    with ServedGateway(tmp_path, backend, poll_interval=1e-9) as served:
        yield served


@pytest.fixture
def browser(served: ServedGateway) -> Browser:
    return Browser(served)


@pytest.fixture
def make_job(served: ServedGateway) -> MakeJob:
    """Make and launch a job, of a folder and a script, as a program does; the answer is its id."""

    def make(folder: str = "", script: str = "run.sh", user: str = ALICE, launch: bool = True) -> str:
        folder = folder or f"work-{secrets.token_hex(4)}"
        headers = {"Authorization": f"Bearer {TOKENS[user]}"}
        home = requests.get(f"{served.url}/api/v1/info", headers=headers, timeout=20).json()["home"]
        upload = f"{served.url}/api/v1/file/upload/home"
        name = f"{folder}/{script}"
        into = {"filename": name, "parents": "true"}
        assert requests.put(upload, data=b"#!/bin/sh\n", params=into, headers=headers, timeout=20).ok
        body = {"folder": f"{home}/{folder}", "script": script, "launch": launch}
        answer = requests.post(f"{served.url}/api/v1/job/create", json=body, headers=headers, timeout=20)
        assert answer.ok, answer.text
        return str(answer.json()["jobid"])

    return make
