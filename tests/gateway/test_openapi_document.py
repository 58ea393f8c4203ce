"""The OpenAPI document: it says what the gateway does, and the gateway does what it says, whatever schemathesis thinks up."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.gateway.document import document
from aiida_marketplace_hpc.protocol import CAPABILITIES, OPERATIONS
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway

CONFIGURATION = """
headers = { Authorization = "Bearer ${GATEWAY_TOKEN}" }
color = false

[checks]
# What a schema cannot say: which values and parameters make sense together, and what is too large.
positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "404", "409", "413", "422", "429", "501", "503"]
not_a_server_error.expected-statuses = ["2xx", "4xx", "503"]
# The gateway may refuse with each of these what makes no sense.
negative_data_rejection.expected-statuses = ["400", "401", "403", "404", "405", "409", "413", "422"]

[[operations]]
include-name = "POST /api/v1/query"
# An operation that makes no sense has an error in its place; a list that is said to have been sent before is not known (503).
checks.negative_data_rejection.expected-statuses = ["200", "400", "401", "413", "422", "503"]
"""


def test_every_row_of_the_tables_is_described() -> None:
    described = document(load({"dev_token": TOKENS}))
    assert described["security"] == [{"bearerAuth": []}]
    for row in CAPABILITIES:
        operation = described["paths"][row.path][row.method.lower()]
        assert operation["operationId"] == row.name
        assert [parameter["name"] for parameter in operation["parameters"]] == [one.name for one in row.parameters]
        assert ("requestBody" in operation) is (row.body != "none")
        assert ("security" in operation) is not row.authenticated
        assert ("401" in operation["responses"]) is row.authenticated
    body = described["paths"]["/api/v1/query"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    rows = {one["properties"]["op"]["const"]: one for one in body["properties"]["operations"]["items"]["oneOf"]}
    assert set(rows) == set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        assert set(rows[name]["properties"]) == {"op", *operation.required, *operation.optional}


@pytest.mark.services
def test_the_gateway_does_what_its_document_says(tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    seed = random.randrange(2**32)
    print(f"to see it again: --seed={seed}")
    with ServedGateway(tmp_path, FakeBackend(), requests_per_second=0) as served:
        headers = {"Authorization": f"Bearer {TOKENS[ALICE]}"}
        home = Path(requests.get(f"{served.url}/api/v1/info", headers=headers, timeout=20).json()["home"])
        (home / "0").write_bytes(b"a file with a name that is soon found")
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")),
                f"--config-file={tmp_path}/schemathesis.toml",
                "run",
                f"{served.url}/openapi.json",
                "--checks=all",
                "--max-time=45",
                f"--seed={seed}",
                "--warnings=off",
                "--generation-database=none",
            ],
            cwd=tmp_path,
            env={**os.environ, "GATEWAY_TOKEN": TOKENS[ALICE]},
            capture_output=True,
            text=True,
            timeout=150,
        )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
