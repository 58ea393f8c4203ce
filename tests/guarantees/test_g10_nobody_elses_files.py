"""G10: nobody reaches another user's jobs or files, or a path outside the roots, through the gateway.

Over HTTP, on every file route and every operation, with a second user's home beside and a canary in it. (What the walk does
with each kind of link is in ``tests/gateway/test_files.py``, who may use what in ``test_g10_who_may_use_what.py``.)
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.protocol import OPERATIONS
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway

CANARY = b"belongs to bob alone"


class Attacker:
    """Alice, who tries every way to Bob's canary."""

    def __init__(self, served: ServedGateway) -> None:
        self._url = served.url
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {TOKENS[ALICE]}"

    def close(self) -> None:
        self._session.close()

    def send(self, method: str, path: str, **options: Any) -> requests.Response:
        return self._session.request(method, self._url + path, timeout=20, **options)

    def query(self, operation: dict[str, Any]) -> dict[str, Any]:
        answer = self.send("POST", "/api/v1/query", json={"operations": [operation]})
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()["results"][0]
        return result


@pytest.fixture
def attacker(served: ServedGateway) -> Iterator[Attacker]:
    attacker = Attacker(served)
    yield attacker
    attacker.close()


@pytest.fixture
def homes(served: ServedGateway, attacker: Attacker) -> tuple[Path, Path]:
    """Alice's and Bob's; hers is full of links that lead astray."""
    alice = Path(attacker.send("GET", "/api/v1/info").json()["home"])
    headers = {"Authorization": f"Bearer {TOKENS[BOB]}"}
    bob = Path(requests.get(f"{served.url}/api/v1/info", headers=headers, timeout=20).json()["home"])
    (bob / "canary").write_bytes(CANARY)
    (alice / "folder").mkdir()
    (alice / "to-bob").symlink_to(bob)
    (alice / "to-canary").symlink_to(bob / "canary")
    (alice / "up").symlink_to("..")
    (alice / "root").symlink_to("/")
    (alice / "chain").symlink_to("up/bob")
    return alice, bob


def hostile_names(bob: Path) -> list[str]:
    """Names relative to Alice's home."""
    return [
        "../bob/canary",
        "folder/../../bob/canary",
        "to-bob/canary",
        "to-canary",
        "up/bob/canary",
        "chain/canary",
        f"root{bob}/canary",
        "./../bob/canary",
        "folder/./../../bob/canary",
        "to-bob/../bob/canary",
        str(bob / "canary"),
        "//etc/passwd",
        "%2e%2e/bob/canary",
        "..\\bob\\canary",
        "../bob/canary/",
        "../bob/canary\n",
        "a\0b",
        "x" * 300,
        "/".join(["d"] * 3000),
        "..",
        "up",
        "root",
    ]


def assert_untouched(bob: Path) -> None:
    assert (bob / "canary").read_bytes() == CANARY
    assert sorted(os.listdir(bob)) == [".marketplace-hpc", "canary"]
    assert os.listdir(bob / ".marketplace-hpc") == ["owner"]


def test_no_name_leads_out_on_any_file_route(attacker: Attacker, homes: tuple[Path, Path]) -> None:
    _, bob = homes
    entries = [(bundle.Entry("", "directory", 0o755), None)]
    folder = b"".join(bundle.write(item for item in entries))
    for name in hostile_names(bob):
        for params in ({}, {"bundle": "true"}, {"bundle": "true", "dereference": "false"}):
            answer = attacker.send("GET", "/api/v1/file/download/home", params={"filename": name, **params})
            assert answer.status_code >= 400, (name, params)
            assert CANARY not in answer.content
        assert attacker.send("GET", "/api/v1/file/list/home", params={"filename": name}).status_code >= 400, name
        for params in ({}, {"into": "canary"}, {"parents": "true"}, {"overwrite": "false"}):
            attacker.send("PUT", "/api/v1/file/upload/home", params={"filename": name, **params}, data=b"overwritten")
            attacker.send(
                "PUT", "/api/v1/file/upload/home", params={"filename": name, "bundle": "true", **params}, data=folder
            )
        attacker.send(
            "PUT", "/api/v1/file/upload/home", params={"filename": "folder", "into": name}, data=b"overwritten"
        )
        assert_untouched(bob)


def test_no_delete_removes_anything_of_bobs(attacker: Attacker, homes: tuple[Path, Path]) -> None:
    alice, bob = homes
    for name in hostile_names(bob):
        if name not in ("to-canary", "up", "root"):  # Those are Alice's own links, which she may remove.
            attacker.send("DELETE", "/api/v1/file/delete/home", params={"filename": name})
        assert_untouched(bob)
    assert attacker.send("DELETE", "/api/v1/file/delete/home", params={"filename": "to-bob"}).status_code == 200
    assert not (alice / "to-bob").is_symlink()
    assert_untouched(bob)


def test_no_member_of_a_bundle_leads_out(attacker: Attacker, homes: tuple[Path, Path]) -> None:
    _, bob = homes
    content = b"overwritten"
    for name in [*hostile_names(bob), "link/canary"]:
        body = bundle.MAGIC + bundle.Entry("", "directory", 0o755).to_line()
        body += bundle.Entry("link", "symlink", target=str(bob)).to_line()
        body += bundle.Entry(name, "file", 0o644, len(content)).to_line() + content
        body += b'\n{"digest": "%s"}\n{"end": 3}\n' % bundle.digest_of(content).encode()
        params = {"filename": "unpacked", "bundle": "true"}
        attacker.send("PUT", "/api/v1/file/upload/home", params=params, data=body)
        assert_untouched(bob)


def test_no_operation_leads_out(attacker: Attacker, homes: tuple[Path, Path]) -> None:
    alice, bob = homes
    switched_on = {"follow": True, "attributes": True, "directory": True, "exact": False, "dereference": True}
    for name in hostile_names(bob):
        if "\\" in name:
            continue  # An odd name, but one of her own: whatever is done with it stays in her home.
        path = name if name.startswith("/") else f"{alice}/{name}"
        for operation, switches in itertools.product(OPERATIONS.values(), ({}, switched_on)):
            if operation.name.startswith("jobs."):
                continue
            own_link = name in ("to-canary", "up", "root")
            if own_link and operation.name in ("remove", "rename"):
                continue
            fields = {
                "path": path,
                "target": f"{alice}/stolen",
                "pattern": path,
                "mode": 0o777,
                "recursive": True,
                "sources": [path],
                "root_dir": "/" if name.startswith("/") else str(alice),
                "format": "tar",
            }
            fields |= switches
            allowed = {*operation.required, *operation.optional}
            result = attacker.query({"op": operation.name, **{key: fields[key] for key in fields if key in allowed}})
            if operation.name == "glob":
                answered = result.get("result", {})
                found = [*answered.get("paths", []), *(entry["path"] for entry in answered.get("entries", []))]
                assert not any(Path(match).name == "canary" for match in found), (name, found)
            elif operation.name == "stat" and own_link and not switches:
                assert result["result"]["type"] == "symlink"
            elif operation.name == "realpath":  # Of what does not exist, the answer is a name of her own.
                assert not result["ok"] or result["result"]["path"].startswith(f"{alice}/")
                assert not result["ok"] or Path(name).name != "canary" or "%" in name
            elif operation.name not in ("mkdir", "symlink"):
                assert not result["ok"], (operation.name, name)
            if "target" in operation.required and operation.name != "symlink":
                own = {
                    "path": f"{alice}/folder",
                    "sources": [f"{alice}/folder"],
                    "root_dir": str(alice),
                    "format": "tar",
                }
                given = {key: own[key] for key in operation.required if key != "target"}
                attacker.query({"op": operation.name, **given, "target": path})
            assert_untouched(bob)
            stolen = alice / "stolen"
            assert not stolen.exists() or stolen.is_symlink()
            (alice / "folder").mkdir(exist_ok=True)
            shutil.rmtree(alice / "%2e%2e", ignore_errors=True)  # Her own, by an odd name.


def test_a_link_that_leads_out_says_nothing_about_where(attacker: Attacker, homes: tuple[Path, Path]) -> None:
    alice, bob = homes
    (alice / "to-nothing").symlink_to(bob / "nothing")
    for operation in (
        {"op": "list", "path": str(alice), "follow": True},
        {"op": "glob", "pattern": f"{alice}/*", "attributes": True},
    ):
        entries = attacker.query(operation)["result"]["entries"]
        links = [entry for entry in entries if entry["type"] == "symlink"]
        assert len(links) == 6
        assert {entry["leads_to"] for entry in links} == {None}


def test_a_job_cannot_be_made_of_somebody_elses_folder(attacker: Attacker, homes: tuple[Path, Path]) -> None:
    alice, bob = homes
    (bob / "canary").chmod(0o755)
    for folder, script in ((str(bob), "canary"), (f"{alice}/to-bob", "canary"), (str(alice), "to-canary")):
        answer = attacker.send("POST", "/api/v1/job/create", json={"folder": folder, "script": script, "launch": True})
        assert answer.status_code == 403, answer.text
    for script in ("../bob/canary", "/etc/passwd", "..", ""):
        answer = attacker.send("POST", "/api/v1/job/create", json={"folder": str(alice), "script": script})
        assert answer.status_code >= 400
    assert attacker.send("GET", "/api/v1/job/").json()["jobs"] == {}
