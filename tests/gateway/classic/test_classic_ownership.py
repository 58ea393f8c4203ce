"""What the published gateway leaves open is closed under ``--classic``: nobody reaches what is not theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from classic_asker import JOB, Asker

from aiida_marketplace_hpc.gateway.backends.local import LocalBackend
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway


@pytest.fixture
def bob(classic: ServedGateway) -> Asker:
    return Asker(classic.url, TOKENS[BOB])


def _on_job(asker: Asker, jobid: str, filename: str = "job.sh") -> Iterator[requests.Response]:
    for method, path in (
        ("GET", "job/state"),
        ("PATCH", "job/launch"),
        ("DELETE", "job/cancel"),
        ("GET", "file/list"),
        ("GET", "file/download"),
        ("DELETE", "file/delete"),
    ):
        yield asker(method, f"/api/v1/{path}/{jobid}", params={"filename": filename})
    yield asker.upload(jobid, filename, b"#!/bin/sh\necho taken over\n")


def test_somebody_elses_job_is_like_none(ask: Asker, bob: Asker) -> None:
    jobid = ask.new_job(b"#!/bin/sh\ntrue\n")
    bob("PUT", "/api/v1/user/create")
    assert [answer.status_code for answer in _on_job(bob, jobid)] == [500] * 7
    known = {answer.content for answer in _on_job(bob, jobid)}
    assert known == {answer.content for answer in _on_job(bob, "0" * 24)}
    assert jobid not in bob("GET", "/api/v1/job/").json()["jobs"]
    assert ask.text(jobid, "job.sh") == "#!/bin/sh\ntrue\n"
    assert set(ask.files(jobid)) == {"job.sh"}


@pytest.mark.parametrize("file_names", ["secure", "raw"])
def test_a_jobs_folder_is_not_left_by_name(tmp_path: Path, file_names: Any) -> None:
    settings: dict[str, Any] = {"classic": True, "classic_file_names": file_names}
    with ServedGateway(tmp_path, LocalBackend(tmp_path / "spool"), **settings) as served:
        ask, bob = Asker(served.url), Asker(served.url, TOKENS[BOB])
        jobid, other = ask.new_job(), bob.new_job(b"#!/bin/sh\n")
        theirs, sibling = bob.folder(other), ask.folder(ask.new_job())
        before = sorted(tmp_path.joinpath("home").rglob("*"))
        for name in (
            "..",
            "../..",
            f"../{sibling.name}/job.sh",
            f"./../{sibling.name}",
            f"../../bob/{theirs.name}/job.sh",
            f"{theirs}/job.sh",
            "/etc/passwd",
            "./../../bob",
            "x/../../y",
        ):
            assert ask.download(jobid, name).status_code == 500
            assert ask("DELETE", f"/api/v1/file/delete/{jobid}", params={"filename": name}).status_code == 500
            ask.upload(jobid, name, b"taken over")
        for path in ask.folder(jobid).iterdir():
            if path.name != "job.sh":  # What the renaming of FirecREST makes of such names stays in the folder.
                path.unlink()
        assert sorted(tmp_path.joinpath("home").rglob("*")) == before
        assert theirs.joinpath("job.sh").read_bytes() == b"#!/bin/sh\n"


def test_a_link_leads_nowhere_else(ask: Asker, bob: Asker, tmp_path: Path) -> None:
    jobid, other = ask.new_job(), bob.new_job()
    (tmp_path / "secret").write_text("secret")
    folder, theirs = ask.folder(jobid), bob.folder(other)
    for name, target in (("outside", tmp_path), ("theirs", theirs), ("file", tmp_path / "secret")):
        (folder / name).symlink_to(target)
    for name in ("outside/secret", "theirs/job.sh", "file"):
        assert ask.download(jobid, name).status_code == 500
    for name in ("outside/secret", "theirs/job.sh"):
        assert ask("DELETE", f"/api/v1/file/delete/{jobid}", params={"filename": name}).status_code == 500
    assert ask.upload(jobid, "file", b"taken over").status_code == 500
    (folder / "job.sh").unlink()
    (folder / "job.sh").symlink_to(tmp_path / "secret")
    assert ask("PATCH", f"/api/v1/job/launch/{jobid}").status_code == 600
    # Removing a link removes the link.
    assert ask("DELETE", f"/api/v1/file/delete/{jobid}", params={"filename": "theirs"}).status_code == 200
    assert (tmp_path / "secret").read_text() == "secret"
    assert (theirs / "job.sh").exists()


def test_like_addresses_have_different_homes(tmp_path: Path) -> None:
    people = ("x.y@a.org", "x.y@b.org", "x_y@c.org", "../x@d.org")
    tokens = {address: f"token-of-{address}" for address in people}
    with ServedGateway(tmp_path, LocalBackend(tmp_path / "spool"), classic=True, dev_token=tokens) as served:
        homes = [Asker(served.url, token)("PUT", "/api/v1/user/create").json()["home"] for token in tokens.values()]
    assert len(set(homes)) == 4
    assert {str(Path(home).parent) for home in homes} == {str(tmp_path / "home")}


def test_who_is_not_admitted_is_not_served(tmp_path: Path) -> None:
    with ServedGateway(tmp_path, LocalBackend(tmp_path / "spool"), classic=True, allow=(ALICE,)) as served:
        assert Asker(served.url)("PUT", "/api/v1/user/create").status_code == 200
        refused = Asker(served.url, TOKENS[BOB])("PUT", "/api/v1/user/create")
        assert (refused.status_code, refused.json()["data"]) == (401, None)
        assert [path.name for path in (tmp_path / "home").iterdir()] == ["alice_a"]


def test_values_are_words_of_the_script(ask: Asker) -> None:
    ask("PUT", "/api/v1/user/create")
    fields = {**JOB, "image": "a b; touch taken-over", "executable_cmd": "say 'two words' $(touch taken-over) ; true"}
    jobid = ask("POST", "/api/v1/job/create", json=fields).json()["jobid"]
    last = ask.text(jobid, "job.sh").splitlines()[-1]
    assert last.endswith("""'a b; touch taken-over' say 'two words' '$(touch' 'taken-over)' ';' true""")
    for field in ("job_name", "partition", "ntasks_per_node"):
        injected = {**JOB, field: '1"\ntouch taken-over'}
        assert ask("POST", "/api/v1/job/create", json=injected).status_code == 400
