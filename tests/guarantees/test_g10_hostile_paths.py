"""G10: whatever a path looks like, on every file route and operation: nothing of another user's home, of the gateway's own
files or of what lies outside the roots is read or changed.

Names are made of what leads astray; the home is full of links that do, too. On the backend ``local``, and (service) through a
gateway as its operator runs it on a real Slurm. Folders that are swapped for links meanwhile come last.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import requests
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.gateway.backends.local import LocalBackend
from aiida_marketplace_hpc.protocol import CAPABILITIES, OPERATIONS
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.served import ServedGateway
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

CANARY = "belongs to bob alone " * 377
"""As long as nothing else here, so that its size tells that it was looked at."""
FILE_ROUTES = {"createDataset", "getDataset", "deleteDataset", "listFiles"}
FILE_OPERATIONS = {name for name in OPERATIONS if not name.startswith("jobs.")}


DEEP = "l/" * 8
"""Below so many folders lies everything: a gateway that lets a name climb does no harm to the machine that tests it."""
DESTRUCTIVE = {"remove", "rename", "chmod"}


@dataclass
class Site:
    """A gateway, the folder in which its roots and what surrounds them are, and a shell on the machine where that is."""

    url: str
    token: str
    world: str
    alice: str
    bob: str
    shell: Callable[[str], str]

    def prepare(self) -> None:
        """Bob's file, one outside of all roots, and the state of both."""
        self.shell(
            f"set -e; cd {self.world}; mkdir outside {self.bob}/sub; printf %s '{CANARY}' >outside/canary; "
            f"cp outside/canary {self.bob}/canary; cp outside/canary {self.bob}/sub/canary; chmod 755 {self.bob}/canary"
        )
        self.clean()
        self.before = self.state()
        self.secrets = [CANARY.encode(), self.shell(f"cat {self.alice}/.marketplace-hpc/owner").strip().encode()]

    def clean(self) -> None:
        """Alice's home as it is at the beginning: a folder, an archive, and links that lead astray."""
        self.shell(
            f"set -e; cd {self.alice}; find . -mindepth 1 -maxdepth 1 ! -name .marketplace-hpc -exec rm -rf {{}} +; "
            "mkdir folder; echo own >folder/own; tar cf archive.tar folder; "
            f"ln -s {self.bob} to-bob; ln -s {self.bob}/canary to-canary; ln -s .. up; ln -s {self.world} root; "
            "ln -s up/bob chain; ln -s ../../outside out; ln -s loop loop; ln -s .marketplace-hpc private"
        )

    def state(self) -> str:
        """All that must stay as it is."""
        listed = "find . -printf '%p %y %m %T@ %s\\n' | sort"
        return self.shell(
            f"set -e; cd {self.bob}; {listed}; cat canary sub/canary; cd {self.world}/outside; {listed}; cat canary; "
            f"cd {self.world}/software; {listed}; cat {self.alice}/.marketplace-hpc/owner"
        )

    def may_destroy(self, path: str) -> bool:
        """Whether nothing but this test would suffer if a gateway followed the path."""
        return not path.startswith("/") or path.startswith(f"{self.world}/")

    def send(self, method: str, path: str, params: dict[str, Any] | None = None, **options: Any) -> requests.Response:
        # File names need not be UTF-8.
        query = urlencode(params or {}, quote_via=lambda text, *_: quote(in_bytes(str(text))))
        answer = requests.request(
            method,
            f"{self.url}{path}?{query}",
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=30,
            **options,
        )
        assert answer.status_code != 500, (method, path, params, answer.text)
        for secret in self.secrets:
            assert secret not in answer.content, (method, path, params)
        return answer

    def query(self, operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answer = self.send("POST", "/api/v1/query", data=json.dumps({"operations": operations}))
        results: list[dict[str, Any]] = answer.json()["results"]
        return results


def in_bytes(name: str) -> bytes:
    """A name that need not be a possible one."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def local_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    world = folder / DEEP / "world"
    (world / "software").mkdir(parents=True)
    (world / "software" / "own").write_text("a program")

    def shell(script: str) -> str:
        return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout

    with ServedGateway(
        folder,
        LocalBackend(folder / "local", slots=1),
        home=f"{world}/home/{{username}}",
        root=(f"software={world}/software:ro",),
        dev_token={"alice": "token-of-alice", "bob": "token-of-bob"},
        requests_per_second=0,
    ) as served:
        served.gateway.keep = replace(served.gateway.keep, patience=0.01)  # So that nobody waits for an upload here.
        yield site_of(served.url, {"alice": "token-of-alice", "bob": "token-of-bob"}, str(world), shell)


@pytest.fixture(scope="module")
def slurm_site(slurm_cluster: SlurmCluster) -> Iterator[Site]:
    machine = slurm_cluster.machine
    base = machine.make_directory("site", user=machine.user)
    world = f"{base}/{DEEP}world"

    def shell(script: str) -> str:
        return machine.run(["sh", "-c", script], user=machine.user, check=True).stdout

    shell(f"mkdir -p {world}/software; echo a program >{world}/software/own")
    with GatewayProcess(
        machine,
        backend="slurm",
        env=slurm_cluster.env,
        home=f"{world}/home/{{username}}",
        roots={"software": f"{world}/software:ro"},
        options=["--requests-per-second", "0"],
    ) as gateway:
        yield site_of(gateway.url, gateway.tokens, world, shell)


def site_of(url: str, tokens: Mapping[str, str], world: str, shell: Callable[[str], str]) -> Site:
    for token in tokens.values():
        headers = {"Authorization": f"Bearer {token}"}
        assert requests.get(f"{url}/api/v1/info", headers=headers, timeout=20).ok
    site = Site(url, tokens["alice"], world, f"{world}/home/alice", f"{world}/home/bob", shell)
    site.prepare()
    return site


# Names


NAMES = [
    "../bob/canary",
    "folder/../../bob/canary",
    "to-bob/canary",
    "to-canary",
    "to-canary/",
    "up/bob/canary",
    "chain/canary",
    "chain/../bob/canary",
    "root/home/bob/canary",
    "./../bob/canary",
    "to-bob/../bob/canary",
    "{bob}/canary",
    "//{bob}/canary",
    "{alice}/../bob/canary",
    "%2e%2e/bob/canary",
    "..%2fbob%2fcanary",
    "..\\bob\\canary",
    "../bob/canary/",
    "../bob/canary\n",
    "../bob/canary\0",
    "\udcff/../../bob/canary",
    "\u202e../bob/canary",
    "\uff0e\uff0e/bob/canary",
    "out/canary",
    "loop",
    "loop/x",
    "private/owner",
    ".marketplace-hpc/owner",
    "./.marketplace-hpc/owner",
    "folder/../.marketplace-hpc/owner",
    ".marketplace-hpc-x",
    "x" * 300,
    "d/" * 3000,
    "..",
    "up",
    "root",
    "../bob/*",
    "to-bob/**",
    "*/canary",
    "?o-bob/[c]anary",
    "~bob/canary",
    "$HOME/canary",
    "folder;cat ../bob/canary",
    "-rf",
    "",
    ".",
    "/",
    "/..",
]
SEGMENTS = [
    *("..", ".", "", "folder", "own", "to-bob", "to-canary", "up", "root", "chain", "out", "loop", "private"),
    *(
        "bob",
        "alice",
        "home",
        "outside",
        "canary",
        "sub",
        ".marketplace-hpc",
        "owner",
        "unfinished",
        "*",
        "**",
        "?",
        "[!x]*",
    ),
    *("%2e%2e", "\0", "\n", "\udcff", "x" * 256, "\u2025", "..;", "...", " ..", ".. ", "{bob}", "{alice}"),
]
names = st.one_of(
    st.sampled_from(NAMES),
    st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=6).map("/".join),
    st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=5).map(lambda parts: "{world}/" + "/".join(parts)),
    st.text(st.characters(codec=None, exclude_categories=[]), max_size=20),
)


def try_everything(site: Site, name: str) -> None:
    """Use a name in every place in which a path can stand."""
    name = name.replace("{bob}", site.bob).replace("{alice}", site.alice).replace("{world}", site.world)
    site.clean()
    for path in {name, f"{site.alice}/{name}"}:
        check(site, operations(site, path))
    routes(site, name)
    for body in ({"folder": name, "script": "canary"}, {"folder": f"{site.alice}/{name}", "script": "canary"}):
        assert not site.send("POST", "/api/v1/job/create", data=json.dumps({**body, "launch": True})).ok, body
    site.send("POST", "/api/v1/job/create", data=json.dumps({"folder": f"{site.alice}/folder", "script": name}))
    assert site.state() == site.before, name


def operations(site: Site, path: str) -> list[dict[str, Any]]:
    """Every operation with the path in each of its fields; what reads comes before what removes."""
    own = f"{site.alice}/folder/own"
    made = f"{site.alice}/made"
    mine = {"source": own, "sources": [own], "target": made, "root_dir": site.alice, "format": "tar", "mode": 0o700}
    asked: list[dict[str, Any]] = []
    for name in sorted(FILE_OPERATIONS, key=DESTRUCTIVE.__contains__):
        operation = OPERATIONS[name]
        if name in DESTRUCTIVE and not site.may_destroy(path):
            continue
        fields: dict[str, Any] = {key: mine.get(key, own) for key in operation.required}
        switches: list[dict[str, Any]] = [{}]
        for switch in (
            "follow",
            "recursive",
            "dereference",
            "attributes",
            "parents",
            "directory",
            "exact",
            "missing_ok",
        ):
            if switch in operation.optional:
                switches.append({switch: True})
        for where in {"path", "pattern", "target", "sources", "root_dir"} & {*operation.required}:
            value = [path] if where == "sources" else path
            asked += [{"op": name, **fields, where: value, **switch} for switch in switches]
        if name == "compress":
            asked.append({"op": name, **fields, "sources": [path], "root_dir": os.path.dirname(path) or "/"})
        if name == "extract":
            asked.append({"op": name, "path": f"{site.alice}/archive.tar", "target": path})
    return asked


def check(site: Site, asked: list[dict[str, Any]]) -> None:
    for operation, result in zip(asked, site.query(asked), strict=True):
        if not result["ok"]:
            assert result["error"]["code"] != "server_fault", (operation, result)
            continue
        for found in found_in(result["result"]):
            assert found.get("size") != len(CANARY), (operation, found)
            path = found.get("path", site.alice)
            assert path == site.alice or path.startswith((f"{site.alice}/", f"{site.world}/software")), (
                operation,
                found,
            )
            assert not path.startswith(f"{site.alice}/.marketplace-hpc/"), (operation, found)


def found_in(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield result
    if isinstance(result.get("entries"), list):
        yield from result["entries"]
    yield from ({"path": path} for path in result.get("paths", []))


def routes(site: Site, name: str) -> None:
    folder = b"".join(bundle.write(iter([(bundle.Entry("", "directory", 0o755), None)])))
    content = b"overwritten"
    digest = f"sha-256:{hashlib.sha256(content).hexdigest()}"
    for root in ("home", "software"):
        for params in (
            {},
            {"bundle": "true"},
            {"bundle": "true", "dereference": "false"},
            {"bundle": "true", "after": name},
        ):
            site.send("GET", f"/api/v1/file/download/{root}", {"filename": name, **params})
        site.send("GET", f"/api/v1/file/list/{root}", {"filename": name})
        for params in ({"into": "canary"}, {"parents": "true"}):
            site.send("PUT", f"/api/v1/file/upload/{root}", {"filename": name, **params}, data=content)
    upload = "/api/v1/file/upload/home"
    site.send("PUT", upload, {"filename": name, "bundle": "true", "force": "true"}, data=folder)
    site.send("PUT", upload, {"filename": "folder", "into": name}, data=content)
    site.send("PUT", upload, {"filename": name, "total": len(content), "digest": digest})
    with suppress(UnicodeEncodeError, ValueError):
        site.send("PUT", upload, files={"file": (name, content)})
    site.send("PUT", upload, {"filename": "unpacked", "bundle": "true"}, data=hostile_bundle(name, content))
    if site.may_destroy(name):
        for root in ("home", "software"):
            site.send("DELETE", f"/api/v1/file/delete/{root}", {"filename": name})


def hostile_bundle(name: str, content: bytes) -> bytes:
    body = bundle.MAGIC + bundle.Entry("", "directory", 0o755).to_line()
    body += bundle.Entry("link", "symlink", target="../../bob").to_line()
    body += bundle.Entry(name, "file", 0o644, len(content)).to_line() + content
    return body + b'\n{"digest": "%s"}\n{"end": 3}\n' % bundle.digest_of(content).encode()


def test_every_file_route_and_operation_is_tried() -> None:
    """A new one fails here until it is."""
    assert {row.name for row in CAPABILITIES if any(one.name == "filename" for one in row.parameters)} == FILE_ROUTES
    site = Site("", "", "/world", "/world/home/alice", "/world/home/bob", str)
    asked = operations(site, "x")
    assert {operation["op"] for operation in asked} == FILE_OPERATIONS
    paths = {"path", "pattern", "target", "sources", "root_dir"}
    tried = {(operation["op"], field) for operation in asked for field in paths if operation.get(field) in ("x", ["x"])}
    assert tried == {(name, field) for name in FILE_OPERATIONS for field in paths & {*OPERATIONS[name].required}}


_checks = [HealthCheck.function_scoped_fixture]


@settings(max_examples=8, deadline=None, suppress_health_check=_checks)
@given(name=names)
@example(name="../bob/canary")
@example(name="chain/canary")
@example(name="to-canary")
@example(name="private/owner")
@example(name="\ud800/\0")
def test_no_name_leads_out(local_site: Site, name: str) -> None:
    try_everything(local_site, name)


@pytest.mark.services
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:40])
def test_no_name_of_the_list_leads_out(local_site: Site, name: str) -> None:
    try_everything(local_site, name)


@pytest.mark.services
@settings(max_examples=30, deadline=None, suppress_health_check=_checks)
@given(name=names)
def test_no_name_leads_out_on_slurm(slurm_site: Site, name: str) -> None:
    try_everything(slurm_site, name)


# Races


AT_FDCWD, RENAME_EXCHANGE = -100, 2


@pytest.fixture
def swapped(local_site: Site) -> Iterator[Path]:
    """A folder of Alice's that is Bob's home every other moment, by a link; both have the same names in them."""
    local_site.clean()
    home = Path(local_site.alice)
    (home / "swapped" / "sub").mkdir(parents=True)
    (home / "swapped" / "canary").write_text("own")
    (home / "swapped" / "sub" / "canary").write_text("own")
    (home / "link").symlink_to(local_site.bob)
    names = os.fsencode(home / "swapped"), os.fsencode(home / "link")
    stop = threading.Event()
    exchange = ctypes.CDLL(None, use_errno=True).renameat2

    def swap() -> None:
        while not stop.is_set():
            assert exchange(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0

    swapping = threading.Thread(target=swap)
    swapping.start()
    yield home / "swapped"
    stop.set()
    swapping.join()


def test_a_folder_that_becomes_a_link_meanwhile_leads_nowhere(local_site: Site, swapped: Path) -> None:
    site = local_site
    home = site.alice
    folder = b"".join(bundle.write(iter([(bundle.Entry("", "directory", 0o755), None)])))
    outcomes = set()
    for number in range(15):
        asked = [
            {"op": "stat", "path": f"{swapped}/canary", "follow": True},
            {"op": "checksum", "path": f"{swapped}/canary"},
            {"op": "list", "path": home, "recursive": True, "follow": True},
            {"op": "glob", "pattern": f"{home}/*/canary", "attributes": True},
            {"op": "usage", "path": str(swapped)},
            {"op": "copy", "path": str(swapped), "target": f"{home}/copies/{number}", "dereference": True},
            {"op": "copy", "path": f"{swapped}/canary", "target": f"{home}/copy", "dereference": True},
            {"op": "mkdir", "path": f"{swapped}/made{number}"},
            {"op": "symlink", "path": f"{swapped}/link{number}", "target": "x"},
            {"op": "chmod", "path": f"{swapped}/canary", "mode": 0o600},
            {"op": "rename", "path": f"{home}/folder/own", "target": f"{swapped}/own{number}"},
            {"op": "rename", "path": f"{swapped}/own{number}", "target": f"{home}/folder/own"},
            {
                "op": "compress",
                "sources": [f"{home}/*"],
                "target": f"{home}/all.tar",
                "root_dir": home,
                "format": "tar",
            },
            {"op": "extract", "path": f"{home}/archive.tar", "target": f"{swapped}/unpacked"},
            {"op": "remove", "path": f"{swapped}/sub", "recursive": True},
            {"op": "remove", "path": f"{swapped}/canary"},
            {"op": "remove", "path": f"{home}/copies", "recursive": True},
            {"op": "mkdir", "path": f"{home}/copies", "exist_ok": True},
        ]
        check(site, asked)
        for params in ({}, {"bundle": "true"}):
            site.send("GET", "/api/v1/file/download/home", {"filename": "swapped/canary", **params})
            site.send("GET", "/api/v1/file/download/home", {"filename": "swapped", **params})
        answer = site.send("PUT", "/api/v1/file/upload/home", {"filename": "swapped/canary"}, data=b"own")
        outcomes.add(answer.status_code)
        site.send("PUT", "/api/v1/file/upload/home", {"filename": "swapped/sub", "bundle": "true"}, data=folder)
        site.send("PUT", "/api/v1/file/upload/home", {"filename": "swapped/sub/canary"}, data=b"own")
        site.send("DELETE", "/api/v1/file/delete/home", {"filename": "swapped/sub"})
        packed = Path(home, "all.tar")
        assert not packed.exists() or CANARY.encode() not in packed.read_bytes()
    assert site.state() == site.before
    assert {200, 403} <= outcomes  # Else nothing was swapped while it counted.
