"""G10: every capability and every operation, asked by everybody: without a token, with a bad or an expired one, as somebody
else, and as whom it belongs to.

What is asked is one row for each row of the tables in ``protocol.py``; one without its row here fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc.errors import Unauthorized
from aiida_marketplace_hpc.gateway.auth import Authenticator, Identity
from aiida_marketplace_hpc.protocol import CAPABILITIES, JOB_FIELDS, OPERATIONS, Capability, Operation
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway

EXPIRED = "the-token-of-alice-of-yesterday"
REFUSED = {
    "no token": None,
    "no scheme": "",
    "bad token": "nobodys-token",
    "the right one and more": f"{TOKENS[ALICE]}x",
    "expired token": EXPIRED,
}


class Expiring:
    """An authenticator to which a token has expired; all others are as they were."""

    def __init__(self, inner: Authenticator) -> None:
        self._inner = inner
        self.method, self.issuer, self.refresh_margin = inner.method, inner.issuer, inner.refresh_margin

    def identify(self, token: str) -> Identity:
        if token == EXPIRED:
            raise Unauthorized("the token has expired: get a new one")
        return self._inner.identify(token)


@dataclass
class Site:
    """A gateway with something of Alice's: a folder with a script, and a job in it."""

    served: ServedGateway
    home: str
    folder: str
    jobid: str

    def send(self, token: str | None, method: str, path: str, **options: Any) -> requests.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}".strip()}
        return requests.request(method, self.served.url + path, headers=headers, timeout=20, **options)

    def query(self, user: str, *operations: dict[str, Any]) -> list[dict[str, Any]]:
        answer = self.send(TOKENS[user], "POST", "/api/v1/query", json={"operations": list(operations)})
        assert answer.status_code == 200, answer.text
        results: list[dict[str, Any]] = answer.json()["results"]
        return results


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    with ServedGateway(tmp_path_factory.mktemp("gateway"), FakeBackend()) as served:
        served.gateway.authenticator = Expiring(served.gateway.authenticator)
        yield served


_numbers = itertools.count()


@pytest.fixture
def site(gateway: ServedGateway) -> Site:
    site = Site(gateway, "", "", "")
    site.home = str(site.send(TOKENS[ALICE], "GET", "/api/v1/info").json()["home"])
    name = f"work-{next(_numbers)}"
    site.folder = f"{site.home}/{name}"
    folder = Path(site.folder)
    folder.mkdir()
    (folder / "run.sh").write_bytes(b"#!/bin/sh\n")
    (folder / "data").write_bytes(b"alice's own")
    job = site.send(
        TOKENS[ALICE], "POST", "/api/v1/job/create", json={"folder": site.folder, "script": "run.sh", "launch": True}
    )
    assert job.status_code == 200, job.text
    assert set(job.json()) == set(JOB_FIELDS)
    site.jobid = str(job.json()["jobid"])
    return site


# Capabilities


@dataclass(frozen=True)
class Asked:
    """One request, and what somebody else gets for it.

    :param other: the status, and the error's code if it is one.
    :param shows: whether the answer to its owner names the job, and the answer to others must not.
    """

    params: dict[str, str] = field(default_factory=dict)
    json: Callable[[Site], dict[str, Any]] | None = None
    data: bytes | None = None
    other: tuple[int, str | None] = (404, "not_found")
    shows: bool = False


OWN = (200, None)
CAPABILITY_ROWS = {
    "heartbeat": Asked(other=OWN),
    "createOrUpdateCollection": Asked(other=OWN),
    "newTransformation": Asked(
        json=lambda site: {"folder": site.folder, "script": "run.sh"}, other=(403, "forbidden"), shows=True
    ),
    "updateTransformation": Asked(shows=True),
    "getTransformationState": Asked(shows=True),
    "deleteTransformation": Asked(shows=True),
    "createDataset": Asked(params={"filename": "new"}, data=b"content"),
    "getDataset": Asked(params={"filename": "data"}),
    "deleteDataset": Asked(params={"filename": "data"}),
    "getInfo": Asked(other=OWN),
    "query": Asked(json=lambda site: {"operations": [{"op": "jobs.active"}]}, other=OWN, shows=True),
    "listJobs": Asked(other=OWN, shows=True),
    "listFiles": Asked(),
}


def test_every_row_of_the_tables_is_asked() -> None:
    assert set(CAPABILITY_ROWS) == {capability.name for capability in CAPABILITIES}
    assert set(OPERATION_ROWS) == set(OPERATIONS)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda capability: capability.name)
def test_a_capability_is_for_whom_it_belongs_to(site: Site, capability: Capability) -> None:
    asked = CAPABILITY_ROWS[capability.name]
    options: dict[str, Any] = {"params": asked.params, "data": asked.data}
    if asked.json is not None:
        options["json"] = asked.json(site)
    path = capability.path.replace("{jobid}", site.jobid)
    before = contents(site)
    for name, token in REFUSED.items():
        answer = site.send(token, capability.method, path, **options)
        if not capability.authenticated:
            assert answer.status_code == 200, name
            continue
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), name
        assert site.jobid not in answer.text
    other = site.send(TOKENS[BOB], capability.method, path, **options)
    code = None if other.ok else other.json()["code"]
    assert (other.status_code, code) == asked.other
    if "{jobid}" in capability.path:
        # What is not there at all is answered in the same words.
        nothing = "f" * 24
        unknown = site.send(TOKENS[BOB], capability.method, path.replace(site.jobid, nothing), **options)
        assert unknown.json()["error"].replace(nothing, site.jobid) == other.json()["error"]
    elif capability.authenticated:
        assert site.jobid not in other.text
        assert f"{site.home}/" not in other.text or asked.json is not None
    assert contents(site) == before
    right = site.send(TOKENS[ALICE], capability.method, path, **options)
    assert right.status_code == 200, right.text
    assert (site.jobid in right.text) is asked.shows


def contents(site: Site) -> dict[str, bytes | None]:
    """All of Alice's files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path(site.home).rglob("*"))}


# Operations


def path(name: str) -> Callable[[Site], dict[str, Any]]:
    return lambda site: {"path": f"{site.folder}/{name}"}


FORBIDDEN = "forbidden"
OPERATION_ROWS: dict[str, tuple[Callable[[Site], dict[str, Any]], Any]] = {
    "stat": (path("data"), FORBIDDEN),
    "list": (path(""), FORBIDDEN),
    "glob": (lambda site: {"pattern": f"{site.folder}/*"}, FORBIDDEN),
    "realpath": (path("data"), FORBIDDEN),
    "checksum": (path("data"), FORBIDDEN),
    "usage": (path(""), FORBIDDEN),
    "mkdir": (path("made"), FORBIDDEN),
    "rename": (lambda site: {**path("data")(site), "target": f"{site.folder}/renamed"}, FORBIDDEN),
    "copy": (lambda site: {**path("data")(site), "target": f"{site.folder}/copied"}, FORBIDDEN),
    "symlink": (lambda site: {**path("link")(site), "target": f"{site.folder}/data"}, FORBIDDEN),
    "chmod": (lambda site: {**path("data")(site), "mode": 0o600}, FORBIDDEN),
    "remove": (path("data"), FORBIDDEN),
    "compress": (
        lambda site: {
            "sources": [f"{site.folder}/data"],
            "target": f"{site.folder}/archive.tar",
            "root_dir": site.folder,
            "format": "tar",
        },
        FORBIDDEN,
    ),
    "extract": (lambda site: {**path("archive.tar")(site), "target": f"{site.folder}/unpacked"}, FORBIDDEN),
    "jobs.states": (lambda site: {"jobids": [site.jobid]}, {"jobs": {}}),
    "jobs.show": (lambda site: {"jobid": site.jobid}, "not_found"),
    "jobs.active": (lambda site: {}, {"jobs": []}),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=lambda operation: operation.name)
def test_an_operation_is_for_whom_it_belongs_to(site: Site, operation: Operation) -> None:
    fields, for_others = OPERATION_ROWS[operation.name]
    if operation.name == "extract":
        make = {"op": "compress", **OPERATION_ROWS["compress"][0](site)}
        assert site.query(ALICE, make)[0]["ok"]
    asked = {"op": operation.name, **fields(site)}
    assert set(operation.required) <= set(asked)
    before = contents(site)
    for name, token in REFUSED.items():
        answer = site.send(token, "POST", "/api/v1/query", json={"operations": [asked]})
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), name
    other = site.query(BOB, asked)[0]
    if isinstance(for_others, str):
        assert other["error"]["code"] == for_others
    else:
        assert for_others.items() <= other["result"].items()
    assert contents(site) == before
    right = site.query(ALICE, asked)[0]
    assert right["ok"], right
    if not isinstance(for_others, str):
        assert site.jobid in str(right["result"]["jobs"])


def test_what_another_user_asked_for_under_a_key_is_not_told(site: Site) -> None:
    """Results of lists are kept by key; whoever guesses the key of another user's gets nothing."""
    key = f"key{next(_numbers):020d}"
    body = {"operations": [{"op": "mkdir", "path": f"{site.folder}/made"}], "key": key}
    done = site.send(TOKENS[ALICE], "POST", "/api/v1/query", json=body).json()
    assert done["results"] == [{"ok": True, "result": {}}]
    answer = site.send(TOKENS[BOB], "POST", "/api/v1/query", json={"key": key})
    assert answer.json() == {"unknown": {"key": key}}
    assert site.send(TOKENS[ALICE], "POST", "/api/v1/query", json={"key": key}).json() == done
