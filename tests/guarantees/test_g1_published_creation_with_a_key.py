"""G1: a published ``newTransformation`` that arrives twice, as through a message broker, is one job."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway

PUBLISHED = {"job_name": "j", "ntasks_per_node": 1, "partition": "p", "image": "i", "executable_cmd": "c"}


def create(served: ServedGateway, key: str | None, user: str = ALICE, **change: Any) -> str:
    answer = requests.post(
        f"{served.url}/api/v1/job/create",
        params={"key": key} if key else {},
        json={**PUBLISHED, **change},
        headers={"Authorization": f"Bearer {TOKENS[user]}"},
        timeout=20,
    )
    answer.raise_for_status()
    return str(answer.json()["jobid"])


def jobs(served: ServedGateway) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {TOKENS[ALICE]}"}
    found: dict[str, Any] = requests.get(f"{served.url}/api/v1/job/", headers=headers, timeout=20).json()["jobs"]
    return found


def test_the_same_key_is_the_same_job(served: ServedGateway) -> None:
    first = create(served, "k")
    assert create(served, "k") == first
    assert create(served, "other") != first
    assert create(served, "k", job_name="another") != first
    assert create(served, "k", BOB) != first
    assert create(served, None) != create(served, None)
    assert len(jobs(served)) == 5


def test_what_is_launched_with_it_runs_once(served: ServedGateway, backend: Any) -> None:
    with ThreadPoolExecutor(6) as pool:
        made = set(pool.map(lambda _: create(served, "k", launch=True), range(6)))
    assert len(made) == 1
    assert len(backend.submissions) == 1
