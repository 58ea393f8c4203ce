"""The FirecREST for tests answers as the real one does.

The list of calls is made to the double and, where ``FIRECREST_V2`` names a file of JSON about a real one (``url``, ``token``,
``system``, ``home``), to that one, too; the answers are compared.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aiida_marketplace_hpc.testing.firecrest_jobs import Processes
from aiida_marketplace_hpc.testing.firecrest_v2 import FirecrestDouble
from aiida_marketplace_hpc.testing.machine import Machine
from aiida_marketplace_hpc.testing.oidc import OidcProvider

Json = dict[str, Any]
_VARIABLE = "FIRECREST_V2"


class Server:
    """One of the two, with bare HTTP."""

    def __init__(self, url: str, token: str, system: str, home: str) -> None:
        self.client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30)
        self.system, self.home = system, home

    def ops(self, method: str, what: str, **options: Any) -> httpx.Response:
        return self.client.request(method, f"/filesystem/{self.system}/ops/{what}", **options)

    def jobs(self, method: str, id: str = "", **options: Any) -> httpx.Response:
        return self.client.request(method, f"/compute/{self.system}/jobs{id}", **options)


@pytest.fixture
def provider() -> Iterator[OidcProvider]:
    with OidcProvider() as provider:
        yield provider


@pytest.fixture
def double(provider: OidcProvider) -> Iterator[FirecrestDouble]:
    with Machine() as machine, FirecrestDouble(machine, Processes(machine), provider) as double:
        yield double


@pytest.fixture
def server(double: FirecrestDouble, provider: OidcProvider) -> Iterator[Server]:
    server = Server(double.url, provider.issue("alice"), double.system, double.machine.home)
    yield server
    server.client.close()


@pytest.fixture
def real() -> Iterator[Server | None]:
    path = os.environ.get(_VARIABLE)
    if path is None:
        yield None
        return
    about = json.loads(Path(path).read_text())
    server = Server(about["url"], about["token"], about.get("system", "cluster"), about["home"])
    yield server
    server.client.close()


def test_the_answers_are_those_of_the_real_one(server: Server, real: Server | None) -> None:
    expected = conversation(server)
    assert expected["mkdir"][0] == 201
    assert expected["checksum of a name with a blank"][0] == 500
    if real is not None:
        assert conversation(real) == expected


def conversation(server: Server) -> dict[str, Any]:
    """A list of calls, and what of their answers is the same on every machine."""
    top = f"{server.home}/rig-{time.time_ns()}"
    said: dict[str, Any] = {}

    def note(name: str, answer: httpx.Response, keep: Callable[[Any], Any] = lambda body: None) -> httpx.Response:
        kind = answer.headers.get("content-type", "")
        body = answer.json() if kind.startswith("application/json") and answer.content else None
        message = body["message"] if isinstance(body, dict) and "message" in body else None
        said[name] = (answer.status_code, _plain(message, top) if message else keep(body))
        return answer

    def sent(name: str, content: bytes = b"hello\n", folder: str = top) -> httpx.Response:
        return server.ops("POST", "upload", params={"path": folder}, files={"file": (name, content)})

    def put(what: str, path: str, target: str = "", **more: Any) -> httpx.Response:
        return server.ops("POST", what, json={"sourcePath": path, **({"targetPath": target} if target else {}), **more})

    note("systems", server.client.get("/status/systems"), lambda body: body["systems"][0]["name"])
    note(
        "without a token", httpx.get(f"{server.client.base_url}/compute/x/jobs", headers={"Authorization": "Bearer x"})
    )
    note("mkdir", put("mkdir", top), lambda body: body["output"]["type"])
    note("mkdir again", put("mkdir", top))
    note("mkdir with parents", put("mkdir", top, parent=True), lambda body: body["output"]["type"])
    note("mkdir nowhere", put("mkdir", f"{top}/x/y"))
    for name in ("a.txt", "a b.txt", "ü.txt", ".hidden", "back\\slash", "percent%20", "$HOME", "semi;colon"):
        note(f"upload {name}", sent(name))
    note("upload with a quotation mark", sent('q"uote'))
    note("upload with an apostrophe", sent("it's"))
    note("upload nowhere", sent("x", folder=f"{top}/nowhere"))
    note("upload too much", sent("big", bytes(5 * 1024 * 1024 + 1)))
    note("upload as much as goes", sent("big", bytes(5 * 1024 * 1024)))
    note("download too much", server.ops("GET", "download", params={"path": f"{top}/big"}))
    sent("big", bytes(3_932_157))
    note("download as much as goes", server.ops("GET", "download", params={"path": f"{top}/big"}))
    got = server.ops("GET", "download", params={"path": f"{top}/a.txt"})
    said["download"] = got.status_code, got.content
    note("download a folder", server.ops("GET", "download", params={"path": top}))
    note("symlink", put("symlink", "a.txt", linkPath=f"{top}/link"), lambda body: body["output"]["linkTarget"])
    note("symlink again", put("symlink", "a.txt", linkPath=f"{top}/link"))
    put("symlink", ".", linkPath=f"{top}/around")
    put("mkdir", f"{top}/sub")
    sent("below", folder=f"{top}/sub")

    def names(body: Any) -> Any:
        return [
            (one["name"].replace(top, "TOP"), one["type"], one["linkTarget"], one["size"] if one["type"] == "-" else "")
            for one in body["output"]
        ]

    for name, path in (
        ("", top),
        (" with a slash", f"{top}/"),
        (" of a file", f"{top}/a.txt"),
        (" of a link", f"{top}/link"),
        (" of a link to a folder", f"{top}/around"),
        (" through it", f"{top}/around/"),
    ):
        note(f"ls{name}", server.ops("GET", "ls", params={"path": path, "showHidden": True}), names)
    note("ls of all", server.ops("GET", "ls", params={"path": f"{top}/", "recursive": True}), names)
    note("ls of a file as a folder", server.ops("GET", "ls", params={"path": f"{top}/a.txt/"}))
    note("ls of nothing", server.ops("GET", "ls", params={"path": f"{top}/nothing"}))
    note("stat", server.ops("GET", "stat", params={"path": f"{top}/a.txt"}), lambda body: body["output"]["mode"])
    note(
        "stat of a link", server.ops("GET", "stat", params={"path": f"{top}/link"}), lambda body: body["output"]["size"]
    )
    follow = {"path": f"{top}/link", "dereference": True}
    note("stat through a link", server.ops("GET", "stat", params=follow), lambda body: body["output"]["size"])
    note("stat of nothing", server.ops("GET", "stat", params={"path": f"{top}/nothing"}))
    note("stat below a file", server.ops("GET", "stat", params={"path": f"{top}/a.txt/x"}))
    note(
        "checksum",
        server.ops("GET", "checksum", params={"path": f"{top}/a.txt"}),
        lambda body: body["output"]["checksum"],
    )
    note("checksum of a folder", server.ops("GET", "checksum", params={"path": top}))
    note("checksum of a name with a blank", server.ops("GET", "checksum", params={"path": f"{top}/a b.txt"}))
    note(
        "chmod",
        server.ops("PUT", "chmod", json={"path": f"{top}/a.txt", "mode": "640"}),
        lambda body: body["output"]["permissions"],
    )
    note("compress", put("compress", f"{top}/.", f"{server.home}/rig.tar.gz"))
    note("compress nothing", put("compress", f"{top}/nothing/.", f"{server.home}/no.tar.gz"))
    note("compress a file as a folder", put("compress", f"{top}/a.txt/.", f"{server.home}/no.tar.gz"))
    put("mkdir", f"{top}/unpacked")
    note("extract", put("extract", f"{server.home}/rig.tar.gz", f"{top}/unpacked"))
    note("extract nowhere", put("extract", f"{server.home}/rig.tar.gz", f"{top}/nowhere"))
    note("extract no archive", put("extract", f"{top}/a.txt", f"{top}/unpacked"))
    note("ls of what was extracted", server.ops("GET", "ls", params={"path": f"{top}/unpacked"}), names)
    note("rm", server.ops("DELETE", "rm", params={"path": f"{top}/unpacked"}))
    note("rm of nothing", server.ops("DELETE", "rm", params={"path": f"{top}/unpacked"}))
    note("no such system", server.client.get("/compute/nowhere/jobs"))

    def submitted(script: str, folder: str = top) -> httpx.Response:
        return server.jobs("POST", json={"job": {"working_directory": folder, "script": script}})

    note("submit what is no script", submitted("echo\n"))
    ran = submitted("#!/bin/sh\n#SBATCH --job-name=rig\necho ran\nexit 3\n").json()["jobId"]
    held = submitted("#!/bin/sh\n#SBATCH --hold\necho\n").json()["jobId"]

    def settled(id: str) -> Json:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            found = server.jobs("GET", f"/{id}")
            job: Json = found.json()["jobs"][0] if found.status_code == 200 else {}
            # What slurmctld has not told slurmdbd to the end has no partition.
            if job and job["partition"] and job["status"]["state"] not in ("PENDING", "RUNNING", "COMPLETING"):
                return job
            time.sleep(0.05)
        raise AssertionError(f"job {id} does not end")

    job = settled(ran)
    said["a job that failed"] = (
        job["name"],
        job["status"],
        job["workingDirectory"] == top,
        sorted(set(job) - {"tasks"}),
    )
    job = next(one for one in server.jobs("GET").json()["jobs"] if one["jobId"] == held)
    said["a job that waits"] = job["status"], job["time"]["start"], job["time"]["end"], job["workingDirectory"] == top
    note("metadata", server.jobs("GET", f"/{held}/metadata"), lambda body: body["jobs"][0]["script"])
    note("cancel", server.jobs("DELETE", f"/{held}"))
    said["a job that was cancelled"] = re.sub(r"\d+", "N", settled(held)["status"]["state"])
    for name, id in (("a job that has ended", ran), ("a job that never was", "99999999")):
        note(f"cancel {name}", server.jobs("DELETE", f"/{id}"))
    note("a job that never was", server.jobs("GET", "/99999999"))
    note("metadata of a job that never was", server.jobs("GET", "/99999999/metadata"))
    server.ops("DELETE", "rm", params={"path": top})
    return said


def _plain(message: str, top: str) -> str:
    """A message without what differs from machine to machine: paths, ids, the form of quotation marks."""
    message = re.sub(r"[‘’`]", "'", message.replace(top, "TOP"))
    message = re.sub(r"/\S*?/home/", "HOME/", message)
    return re.sub(r"\b\d{1,7}\b(?=:? (Job|Terminating)|\n)", "N", message)


def test_a_token_needs_half_a_minute_to_live(double: FirecrestDouble, provider: OidcProvider) -> None:
    answers = []
    for lifetime in (20, 60):
        token = provider.issue("alice", lifetime=lifetime)
        answers.append(
            httpx.get(f"{double.url}/status/systems", headers={"Authorization": f"Bearer {token}"}).status_code
        )
    assert answers == [401, 200]
