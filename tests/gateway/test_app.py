"""The HTTP side: every capability of the table, who may use it, and errors that are always JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.gateway.routes import HANDLERS
from aiida_marketplace_hpc.gateway.routes.query import RUN
from aiida_marketplace_hpc.protocol import CAPABILITIES, OPERATIONS
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway


@pytest.fixture
def served(tmp_path: Path, backend: FakeBackend) -> Iterator[ServedGateway]:
    with ServedGateway(tmp_path, backend, root=("software=/usr:ro",)) as served:
        yield served


class Client:
    """Bare HTTP as one user, to see exactly what goes over the wire."""

    def __init__(self, served: ServedGateway, user: str | None) -> None:
        self._url = served.url
        self.headers = {"Authorization": f"Bearer {TOKENS[user]}"} if user else {}

    def send(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {**self.headers, **options.pop("headers", {})}
        return requests.request(method, self._url + path, headers=headers, timeout=20, **options)

    def query(self, *operations: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
        answer = self.send("POST", "/api/v1/query", json={"operations": list(operations), **fields})
        assert answer.status_code == 200, answer.text
        results: list[dict[str, Any]] = answer.json()["results"]
        return results


@pytest.fixture
def alice(served: ServedGateway) -> Client:
    return Client(served, ALICE)


def home_of(client: Client) -> str:
    return str(client.send("GET", "/api/v1/info").json()["home"])


def test_every_row_of_the_tables_has_its_code() -> None:
    assert set(HANDLERS) == {capability.name for capability in CAPABILITIES}
    assert set(RUN) == set(OPERATIONS)


def test_the_published_life_of_a_job(served: ServedGateway, alice: Client, backend: FakeBackend) -> None:
    user = alice.send("PUT", "/api/v1/user/create").json()
    assert set(user) >= {"_id", "email", "home", "message", "name"}
    assert user["message"] == "Success: Create user in database."
    body = {
        "job_name": "demo",
        "ntasks_per_node": 2,
        "partition": "mc",
        "image": "docker://x/y:1",
        "executable_cmd": "run a 'b c'",
    }
    jobid = alice.send("POST", "/api/v1/job/create", json=body).json()["jobid"]
    assert len(jobid) == 24
    listed = alice.send("GET", "/api/v1/job/").json()["jobs"][jobid]
    assert (listed["state"], listed["remote_folder"]) == ("CREATED", f"{user['home']}/{jobid}")
    part = {"file": ("/home/me/local.txt", b"data", "multipart/form-data")}
    assert alice.send("PUT", f"/api/v1/file/upload/{jobid}", files=part).json()["message"] == "File uploaded."
    alice.send("PUT", f"/api/v1/file/upload/{jobid}", params={"filename": "other"}, files=part)
    files = alice.send("GET", f"/api/v1/job/state/{jobid}").json()["files"]
    assert [file["name"] for file in files] == ["job.sh", "local.txt", "other"]
    assert files[1]["size"] == "4"
    assert set(files[0]) == {"group", "last_modified", "link_target", "name", "permissions", "size", "type", "user"}
    assert alice.send("GET", f"/api/v1/file/download/{jobid}", params={"filename": "local.txt"}).content == b"data"
    assert alice.send("DELETE", f"/api/v1/job/cancel/{jobid}").status_code == 409
    for _ in range(2):
        assert alice.send("PATCH", f"/api/v1/job/launch/{jobid}").json()["jobid"] == jobid
    assert len(backend.submissions) == 1
    script = backend.submissions[0].script_text.decode()
    assert """singularity run --bind "$PWD:$PWD" docker://x/y:1 run a 'b c'""" in script
    cancelled = alice.send("DELETE", f"/api/v1/job/cancel/{jobid}").json()
    assert cancelled["message"] == f"Send cancelling signal to job-{jobid}, of f7t job id=101"
    assert alice.send("DELETE", f"/api/v1/file/delete/{jobid}", params={"filename": "other"}).json() == {
        "message": "File deleted."
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"job_name": "x\n#SBATCH --uid=0"}, "job_name"),
        ({"partition": "a b"}, "partition"),
        ({"ntasks_per_node": "1; rm"}, "ntasks_per_node"),
        ({"image": "--help"}, "image"),
        ({"executable_cmd": "unbalanced '"}, "executable_cmd"),
        ({"extra": 1}, "extra"),
    ],
)
def test_job_fields_cannot_smuggle_anything_into_the_script(alice: Client, change: dict[str, Any], named: str) -> None:
    body = {"job_name": "demo", "ntasks_per_node": 1, "partition": "mc", "image": "i", "executable_cmd": "c", **change}
    answer = alice.send("POST", "/api/v1/job/create", json=body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]
    assert alice.send("GET", "/api/v1/job/").json()["jobs"] == {}


def test_a_job_of_an_unknown_machine_is_refused(alice: Client) -> None:
    answer = alice.send("POST", "/api/v1/job/create", json={"folder": "/x", "script": "y", "machine": "elsewhere"})
    assert (answer.status_code, "elsewhere" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/nowhere", {}, 404),
        ("GET", "/api/v1/job/state/not-an-id", {}, 404),
        ("POST", "/heartbeat", {}, 405),
        ("POST", "/api/v1/query", {"data": b"{"}, 400),
        ("POST", "/api/v1/query", {"data": b"[]"}, 400),
        ("POST", "/api/v1/query", {"json": {}}, 400),
        ("POST", "/api/v1/query", {"json": {"operations": [{}] * 1001}}, 413),
        ("POST", "/api/v1/job/create", {"data": b"\xff"}, 400),
        ("GET", "/api/v1/file/download/home", {}, 400),
        ("GET", "/api/v1/file/download/home", {"params": {"filename": "gone"}}, 409),
        ("GET", "/api/v1/file/download/home", {"params": {"filename": "x", "bundle": "maybe"}}, 400),
        ("PUT", "/api/v1/file/upload/home", {"data": b"x"}, 400),
        ("PUT", "/api/v1/file/upload/home", {"params": {"filename": "x", "digest": "sha-256:0"}, "data": b"x"}, 422),
        ("PUT", "/api/v1/file/upload/home", {"params": {"filename": "../x"}, "data": b"x"}, 403),
        ("PUT", "/api/v1/file/upload/home", {"params": {"filename": "/etc/x"}, "data": b"x"}, 400),
        ("PUT", "/api/v1/file/upload/home", {"params": {"filename": "a\0b"}, "data": b"x"}, 400),
        ("PUT", "/api/v1/file/upload/software", {"params": {"filename": "x"}, "data": b"x"}, 403),
        ("PUT", "/api/v1/file/upload/home", {"files": {"other": b"x"}}, 400),
        (
            "PUT",
            "/api/v1/file/upload/home",
            {
                "params": {"filename": "x"},
                "data": b"nonsense",
                "headers": {"Content-Type": "multipart/form-data; boundary=b"},
            },
            400,
        ),
    ],
)
def test_every_error_is_json_and_says_what_to_do(
    alice: Client, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    home_of(alice)
    answer = alice.send(method, path, **options)
    assert answer.status_code == status, answer.text
    fields = answer.json()
    assert set(fields) >= {"error", "code", "retryable", "request_id"}
    assert fields["error"]
    assert fields["request_id"] == answer.headers["X-Request-Id"]
    assert "Traceback" not in answer.text


def test_operations_run_in_order_each_with_its_own_result(alice: Client) -> None:
    home = home_of(alice)
    operations = [
        {"op": "mkdir", "path": f"{home}/a"},
        {"op": "mkdir", "path": f"{home}/a"},
        {"op": "stat", "path": f"{home}/a"},
        {"op": "nonsense"},
        {"op": "stat"},
        {"op": "stat", "path": f"{home}/a", "extra": 1},
        {"op": "stat", "path": 7},
    ]
    results = alice.query(*operations)
    assert [result["ok"] for result in results] == [True, False, True, False, False, False, False]
    assert results[1]["error"]["errno"] == "EEXIST"
    assert len(alice.query(*operations, stop_on_error=True)) == 1


def test_a_piece_of_a_file(alice: Client) -> None:
    home_of(alice)
    whole = bytes(range(256)) * 5000
    url = "/api/v1/file/download/home"
    alice.send("PUT", "/api/v1/file/upload/home", params={"filename": "f"}, data=whole)
    alice.send("PUT", "/api/v1/file/upload/home", params={"filename": "empty"}, data=b"")

    def piece(name: str = "f", **params: int) -> bytes:
        answer = alice.send("GET", url, params={"filename": name, **params})
        assert answer.status_code == 200, answer.text
        assert int(answer.headers["Content-Length"]) == len(answer.content)
        if "length" in params and params["length"] <= 1024 * 1024:
            assert answer.headers["Repr-Digest"] == bundle.header_digest_of(answer.content)
        return answer.content

    assert piece() == whole
    assert piece(offset=0, length=3) == whole[:3]
    assert piece(offset=1000, length=300_000) == whole[1000:301_000]
    assert piece(offset=1, length=1_200_000) == whole[1:1_200_001]
    assert piece(offset=1_279_990) == whole[-10:]
    assert piece(offset=1_279_990, length=100) == whole[-10:]
    assert piece(length=2_000_000) == whole
    for beyond in (1_280_000, 10**17):
        assert piece(offset=beyond) == piece(offset=beyond, length=5) == b""
    assert piece(length=0) == piece("empty") == piece("empty", offset=3, length=5) == b""
    for wrong in ({"offset": -1}, {"length": "x"}):
        assert alice.send("GET", url, params={"filename": "f", **wrong}).status_code == 400
    assert alice.send("GET", url, params={"filename": ".", "length": 1}).json()["errno"] == "EISDIR"


def test_a_page_in_a_users_folder_does_not_run_in_a_browser(alice: Client) -> None:
    home_of(alice)
    alice.send("PUT", "/api/v1/file/upload/home", params={"filename": "evil.html"}, data=b"<script>alert(1)</script>")
    answer = alice.send("GET", "/api/v1/file/download/home", params={"filename": "evil.html"})
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Disposition"].startswith("attachment")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_name_that_is_not_utf8_stays_what_it_is(alice: Client) -> None:
    home = home_of(alice)
    path = "/api/v1/file/upload/home?filename=odd-%FF%FE"
    assert alice.send("PUT", path, data=b"x").status_code == 200
    assert sorted(os.listdir(os.fsencode(home))) == [b".marketplace-hpc", b"odd-\xff\xfe"]
    assert alice.query({"op": "list", "path": home})[0]["result"]["entries"][0]["name"] == "odd-\udcff\udcfe"


def test_a_folder_comes_and_goes_as_a_bundle(alice: Client) -> None:
    home_of(alice)
    entries = [(bundle.Entry("", "directory", 0o755), None), (bundle.Entry("empty", "directory", 0o700), None)]
    params = {"filename": "deep/er/tree", "bundle": "true", "parents": "true"}
    answer = alice.send(
        "PUT", "/api/v1/file/upload/home", params=params, data=b"".join(bundle.write(item for item in entries))
    )
    assert answer.json()["entries"] == 2
    params = {"filename": "deep", "bundle": "true"}
    content = alice.send("GET", "/api/v1/file/download/home", params=params).content
    left = [content]
    received = [entry.path for entry, _ in bundle.Reader(lambda _: left.pop() if left else b"")]
    assert received == ["", "er", "er/tree", "er/tree/empty"]


def test_the_pages_for_people(served: ServedGateway) -> None:
    anybody = Client(served, None)
    front = anybody.send("GET", "/")
    assert "HPC gateway" in front.text
    assert 'href="docs"' in front.text
    page = anybody.send("GET", "/docs").text
    assert all(capability.name in page for capability in CAPABILITIES)
    document = anybody.send("GET", "/openapi.json").json()
    found = {operation["operationId"] for path in document["paths"].values() for operation in path.values()}
    assert found == {capability.name for capability in CAPABILITIES}
    upload = document["paths"]["/api/v1/file/upload/{jobid}"]["put"]["parameters"]
    assert [parameter["name"] for parameter in upload] == [
        "jobid",
        "filename",
        "digest",
        "mode",
        "overwrite",
        "into",
        "parents",
        "bundle",
        "total",
        "offset",
        "restart",
        "encoding",
        "force",
    ]


def test_the_first_thing_that_a_new_user_does_may_be_anything(served: ServedGateway, tmp_path: Path) -> None:
    home = served.gateway.settings.roots[0].path_for("bob")
    made = Client(served, BOB).query({"op": "mkdir", "path": f"{home}/folder"})
    assert made == [{"ok": True, "result": {}}]
