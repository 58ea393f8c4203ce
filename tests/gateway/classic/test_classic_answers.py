"""The published contract, row by row, against a classic gateway that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import requests
from classic_asker import JOB, Asker, eventually

from aiida_marketplace_hpc.errors import Unavailable
from aiida_marketplace_hpc.gateway.backends.local import LocalBackend
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway

HEADER = "<class 'firecrest.FirecrestException.HeaderException'>"
PLAIN = "<class 'firecrest.FirecrestException.FirecrestException'>"
UNKNOWN = "0" * 24


def _json(answer: requests.Response) -> tuple[int, dict[str, Any]]:
    """Status and body; the body must look as Flask 2.0 writes it."""
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, Any] = answer.json()
    written = json.dumps(body, indent=2, sort_keys=True, separators=(", ", ": ")) + "\n"
    assert answer.content == written.encode("ascii")
    return answer.status_code, body


def _page(answer: requests.Response) -> int:
    """The status of an answer in HTML, in which nothing is told about the program."""
    assert answer.headers["content-type"].startswith("text/html")
    assert "Traceback" not in answer.text
    if answer.status_code == 500:
        assert len(answer.content) == 141
    return answer.status_code


# ---- who asks ---------------------------------------------------------------------------------------------------------

MISSING = {"data": None, "error": "Unauthorized", "message": "Authentication Token is missing!"}
INVALID = {"data": None, "error": "Unauthorized", "message": "Invalid Authentication token!"}


@pytest.mark.parametrize(
    ("header", "expected"), [(None, MISSING), (f"Bearer  {TOKENS[ALICE]}", MISSING), ("Bearer wrong-token", INVALID)]
)
def test_who_has_no_good_token_gets_the_published_401(
    classic: ServedGateway, header: str | None, expected: dict[str, Any]
) -> None:
    headers = {} if header is None else {"Authorization": header}
    for path in ("/api/v1/job/", f"/api/v1/job/state/{UNKNOWN}", f"/api/v1/file/list/{UNKNOWN}"):
        assert _json(requests.get(f"{classic.url}{path}", headers=headers, timeout=10)) == (401, expected)


def test_the_word_before_the_token_does_not_matter(classic: ServedGateway) -> None:
    for header in (f"Basic {TOKENS[ALICE]}", f"Bearer {TOKENS[ALICE]} and more"):
        answer = requests.put(f"{classic.url}/api/v1/user/create", headers={"Authorization": header}, timeout=10)
        assert answer.status_code == 200


def test_a_header_of_one_word_is_an_uncaught_error(classic: ServedGateway) -> None:
    for header in (TOKENS[ALICE], ""):
        assert _page(requests.get(f"{classic.url}/api/v1/job/", headers={"Authorization": header}, timeout=10)) == 500


def test_an_identity_provider_that_does_not_answer_is_a_401(
    classic: ServedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identify(token: str) -> None:
        raise Unavailable("nobody answers")

    monkeypatch.setattr(classic.gateway.authenticator, "identify", identify)
    headers = {"Authorization": "Bearer some-other-token"}
    status, body = _json(requests.get(f"{classic.url}/api/v1/job/", headers=headers, timeout=10))
    assert (status, body["data"], body["error"]) == (401, None, "nobody answers")
    assert re.fullmatch(r"Connection error to .* failed\.", body["message"])


# ---- what succeeds ----------------------------------------------------------------------------------------------------


def test_the_heartbeat_needs_no_token(classic: ServedGateway) -> None:
    answer = requests.get(f"{classic.url}/heartbeat", timeout=10)
    assert _json(answer) == (200, {"message": "HPC-gateway-App : application running."})
    assert _page(requests.get(f"{classic.url}/", timeout=10)) == 200


def test_a_user_is_made_once(ask: Asker) -> None:
    status, user = _json(ask("PUT", "/api/v1/user/create"))
    assert status == 200
    assert re.fullmatch("[0-9a-f]{24}", user["_id"])
    assert (user["email"], user["name"]) == (ALICE, "alice.a")
    assert user["message"] == "Success: Create user in database."
    assert user["home"].endswith("/alice_a")
    assert set(user) == {"_id", "email", "home", "message", "name"}
    assert _json(ask("PUT", "/api/v1/user/create")) == (200, user)


def test_a_job_is_made_with_its_script_in_a_folder_of_its_own(ask: Asker) -> None:
    home = ask("PUT", "/api/v1/user/create").json()["home"]
    status, created = _json(ask("POST", "/api/v1/job/create", json={**JOB, "email": "somebody@else.org"}))
    assert status == 200
    assert set(created) == {"jobid"}
    jobid = created["jobid"]
    assert re.fullmatch("[0-9a-f]{24}", jobid)
    shown = _json(ask("GET", "/api/v1/job/"))[1]["jobs"][jobid]
    assert set(shown) == {"_id", "remote_folder", "state", "user_id"}
    assert (shown["_id"], shown["state"]) == (jobid, "CREATED")
    assert re.fullmatch(re.escape(home) + "/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", shown["remote_folder"])
    assert set(ask.files(jobid)) == {"job.sh"}
    script = ask.download(jobid, "job.sh").text
    assert script.startswith('#!/bin/bash -l\n#SBATCH --job-name="a"\n#SBATCH --mail-type=ALL\n')
    assert f"#SBATCH --mail-user={ALICE}\n" in script
    assert script.endswith('\nsingularity run --bind "$PWD:$PWD" c.sif hello\n')


def test_a_state_is_a_listing(ask: Asker) -> None:
    jobid = ask.new_job()
    ask.upload(jobid, ".hidden", b"")
    folder = ask.folder(jobid)
    (folder / "b").mkdir()
    (folder / "b" / "deep").touch()
    (folder / ".never-shown").touch()
    (folder / "a link").symlink_to("b/deep")
    status, state = _json(ask("GET", f"/api/v1/job/state/{jobid}"))
    assert status == 200
    assert state == _json(ask("GET", f"/api/v1/file/list/{jobid}"))[1]
    assert state["message"] == "Files in the job folder."
    assert [row["name"] for row in state["files"]] == ["a", "b", "hidden", "job.sh"]
    script = state["files"][-1]
    assert set(script) == {"group", "last_modified", "link_target", "name", "permissions", "size", "type", "user"}
    assert (script["type"], script["permissions"], script["link_target"]) == ("-", "rw-r--r--", "")
    assert script["size"] == str((folder / "job.sh").stat().st_size)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", script["last_modified"])
    assert [row["type"] for row in state["files"]] == ["l", "d", "-", "-"]


def test_each_launch_is_a_job(ask: Asker) -> None:
    jobid = ask.new_job(b"#!/bin/sh\necho $SLURM_JOB_ID >> ran\n")
    for _ in range(2):
        assert _json(ask("PATCH", f"/api/v1/job/launch/{jobid}")) == (200, {"jobid": jobid})
    eventually(lambda: len(ask.text(jobid, "ran").splitlines()) == 2)
    first, second = sorted(map(int, ask.text(jobid, "ran").split()))
    assert {f"slurm-{first}.out", f"slurm-{second}.out"} <= set(ask.files(jobid))
    shown = ask("GET", "/api/v1/job/").json()["jobs"][jobid]
    assert (shown["state"], shown["f7t_job_id"]) == ("ACTIVATED", second)


def test_a_job_runs_the_script_that_is_there(ask: Asker) -> None:
    jobid = ask.new_job(b"#!/bin/bash\n#SBATCH --output=said\necho $0 $PWD; [[ yes = y* ]]\n")
    ask("PATCH", f"/api/v1/job/launch/{jobid}")
    folder = ask.folder(jobid)
    eventually(lambda: ask.text(jobid, "said"))
    assert ask.text(jobid, "said") == f"{folder}/job.sh {folder}\n"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    ask.upload(jobid, "job.sh", b"#!/bin/sh\n#SBATCH --output=said\necho again\n")
    ask("PATCH", f"/api/v1/job/launch/{jobid}")
    # Slurm empties the output of a job that is submitted again.
    eventually(lambda: ask.text(jobid, "said") == "again\n")


def test_the_last_launch_is_cancelled(ask: Asker) -> None:
    jobid = ask.new_job(b"#!/bin/sh\necho $$ > pid\nexec sleep 600\n")
    ask("PATCH", f"/api/v1/job/launch/{jobid}")
    eventually(lambda: ask.text(jobid, "pid"))
    number = ask("GET", "/api/v1/job/").json()["jobs"][jobid]["f7t_job_id"]
    said = f"Send cancelling signal to job-{jobid}, of f7t job id={number}"
    assert _json(ask("DELETE", f"/api/v1/job/cancel/{jobid}")) == (200, {"message": said})
    pid = int(ask.text(jobid, "pid"))
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert ask("GET", "/api/v1/job/").json()["jobs"][jobid]["state"] == "ACTIVATED"
    gone = {"error": "unable to cancel job in machine cluster.", "except_type": PLAIN}
    eventually(lambda: _json(ask("DELETE", f"/api/v1/job/cancel/{jobid}")) == (600, gone))


def test_a_download_says_what_kind_of_file_it_is(ask: Asker) -> None:
    jobid = ask.new_job()
    folder = ask.folder(jobid)
    (folder / "sub").mkdir()
    for name, kind, disposition in (
        ("a.txt", "text/plain; charset=utf-8", "inline; filename=a.txt"),
        ("p.html", "text/html; charset=utf-8", "inline; filename=p.html"),
        ("no-kind", "application/octet-stream", "inline; filename=no-kind"),
        ("sub/f", "application/octet-stream", 'inline; filename="sub/f"'),
    ):
        (folder / name).write_bytes(b"\x00content")
        answer = ask.download(jobid, name)
        assert (answer.status_code, answer.content) == (200, b"\x00content")
        assert (answer.headers["content-type"], answer.headers["content-disposition"]) == (kind, disposition)
        assert (answer.headers["content-length"], answer.headers["cache-control"]) == ("8", "no-cache")
    head = ask("HEAD", f"/api/v1/file/download/{jobid}?filename=a.txt")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "8")


def test_a_packed_file_is_declared_to_be_packed_on_the_way(ask: Asker) -> None:
    jobid = ask.new_job()
    ask.upload(jobid, "x.tar.gz", b"not packed")
    answer = ask(
        "GET", f"/api/v1/file/download/{jobid}?filename=x.tar.gz", headers={"Accept-Encoding": "identity"}, stream=True
    )
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.raw.read(decode_content=False) == b"not packed"


def test_a_piece_comes_with_the_status_of_the_whole(ask: Asker) -> None:
    jobid = ask.new_job()
    ask.upload(jobid, "a.txt", b"0123456789")
    path = f"/api/v1/file/download/{jobid}?filename=a.txt"
    for wanted, content, said in (("2-4", b"234", "2-4"), ("7-", b"789", "7-9"), ("-2", b"89", "8-9")):
        answer = ask("GET", path, headers={"Range": f"bytes={wanted}"})
        assert (answer.status_code, answer.content) == (200, content)
        assert answer.headers["content-range"] == f"bytes {said}/10"
    for wanted in ("20-", "0-1,3-4"):
        status, body = _json(ask("GET", path, headers={"Range": f"bytes={wanted}"}))
        assert (status, body["error"]) == (500, "unable to download file.")


def test_uploads_get_the_names_that_firecrest_gives(ask: Asker) -> None:
    jobid = ask.new_job()
    done = (200, {"message": "File uploaded."})
    assert _json(ask.upload(jobid, "sub/in.txt", b"1")) == done
    assert _json(ask.upload(jobid, "sub_in.txt", b"2")) == done
    # Without the parameter, the part's own name counts, which is a whole path.
    assert _json(ask("PUT", f"/api/v1/file/upload/{jobid}", files={"file": ("/home/me/b c", b"3")})) == done
    assert set(ask.files(jobid)) == {"job.sh", "sub_in.txt", "home_me_b_c"}
    assert ask.download(jobid, "sub_in.txt").content == b"2"
    assert ask.download(jobid, "sub/in.txt").status_code == 500


def test_whole_folders_are_deleted(ask: Asker) -> None:
    jobid = ask.new_job()
    folder = ask.folder(jobid)
    (folder / "d" / "e").mkdir(parents=True)
    (folder / "f").touch()
    for name in ("d", "f"):
        answer = ask("DELETE", f"/api/v1/file/delete/{jobid}", params={"filename": name})
        assert _json(answer) == (200, {"message": "File deleted."})
    assert set(ask.files(jobid)) == {"job.sh"}


# ---- what fails -------------------------------------------------------------------------------------------------------


def test_without_a_user_there_are_no_jobs(tmp_path: Path) -> None:
    with ServedGateway(tmp_path, LocalBackend(tmp_path / "spool"), classic=True) as served:
        ask = Asker(served.url, TOKENS[BOB])
        expected = (500, {"error": "We can not find your are registered."})
        assert _json(ask("GET", "/api/v1/job/")) == expected
        assert _json(ask("POST", "/api/v1/job/create", json=JOB)) == expected
        ask("PUT", "/api/v1/user/create")
        assert _json(ask("GET", "/api/v1/job/")) == (200, {"jobs": {}})
        blocked = Path(served.gateway.homes._templates[0].path_for("bob"))
        blocked.rename(tmp_path / "elsewhere")
        blocked.touch()
        status, body = _json(ask("PUT", "/api/v1/user/create"))
        assert (status, body) == (501, {"error": f"mkdir {blocked} on local fail.", "except_type": HEADER})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"json": {"job_name": "a"}}, "<class 'TypeError'>"),
        ({"json": {**JOB, "more": 1}}, "<class 'TypeError'>"),
        ({"json": {**JOB, "partition": "a\n#SBATCH --uid=0"}}, "<class 'ValueError'>"),
        ({"data": "{", "headers": {"Content-Type": "application/json"}}, 400),
        ({"data": "", "headers": {"Content-Type": "application/json"}}, 400),
        ({"data": json.dumps(JOB), "headers": {"Content-Type": "text/plain"}}, 500),
        ({"json": [1]}, 500),
        ({}, 500),
    ],
    ids=["missing", "unknown", "injected", "malformed", "empty", "other type", "no object", "nothing"],
)
def test_what_makes_no_job(ask: Asker, options: dict[str, Any], expected: str | int) -> None:
    ask("PUT", "/api/v1/user/create")
    answer = ask("POST", "/api/v1/job/create", **options)
    if isinstance(expected, int):
        assert _page(answer) == expected
    else:
        failure = {"error": "unable to create job in machine cluster.", "except_type": expected}
        assert _json(answer) == (400, failure)


def test_what_cannot_be_launched_or_cancelled(ask: Asker) -> None:
    jobid = ask.new_job(b"no script\n")
    launch, cancel = f"/api/v1/job/launch/{jobid}", f"/api/v1/job/cancel/{jobid}"
    assert _json(ask("DELETE", cancel)) == (505, {"error": f"Job {jobid} not launched yet."})
    failure = {"error": "unable to submit job in machine cluster.", "except_type": PLAIN}
    assert _json(ask("PATCH", launch)) == (600, failure)
    ask("DELETE", f"/api/v1/file/delete/{jobid}?filename=job.sh")
    assert _json(ask("PATCH", launch)) == (600, {**failure, "except_type": HEADER})


def test_what_is_not_there_cannot_be_downloaded_listed_or_deleted(ask: Asker) -> None:
    jobid = ask.new_job()
    folder = ask.folder(jobid)
    (folder / "d").mkdir()
    download, delete = f"/api/v1/file/download/{jobid}", f"/api/v1/file/delete/{jobid}"
    assert _json(ask("GET", download)) == (500, {"error": "Please provide the filename to download."})
    assert _json(ask("DELETE", delete)) == (500, {"error": "Please provide the filename to delete."})
    for name in ("missing", "d", "."):
        failure = {"debug": f"filename: {name}", "error": "unable to download file.", "except_type": HEADER}
        assert _json(ask.download(jobid, name)) == (500, failure)
    failure = {"error": "unable to delete file.", "except_type": HEADER}
    assert _json(ask("DELETE", f"{delete}?filename=missing")) == (500, failure)
    (folder / "a $").touch()
    listing = {"error": "unable to list files to job folder.", "except_type": PLAIN}
    assert _json(ask("GET", f"/api/v1/file/list/{jobid}")) == (500, listing)
    folder.rename(folder.with_name(f"{folder.name}-gone"))
    assert _json(ask("GET", f"/api/v1/job/state/{jobid}")) == (500, {**listing, "except_type": HEADER})
    status, body = _json(ask.upload(jobid, "x", b"1"))
    assert (status, body) == (500, {"error": "unable to upload file to job folder.", "except_type": HEADER})


@pytest.mark.parametrize("name", ["a;b", "a&b", "a(b", "a<b", "a\\b", "a`b", "a'b"])
def test_some_characters_are_in_no_name(ask: Asker, name: str) -> None:
    jobid = ask.new_job()
    for answer in (
        ask.upload(jobid, name, b"1"),
        ask.download(jobid, name),
        ask("DELETE", f"/api/v1/file/delete/{jobid}", params={"filename": name}),
    ):
        status, body = _json(answer)
        assert (status, body["except_type"]) == (500, PLAIN)


def test_an_upload_needs_a_part_of_the_right_name(ask: Asker) -> None:
    path = f"/api/v1/file/upload/{ask.new_job()}?filename=x"
    for options in ({"files": {"other": ("a", b"1")}}, {"data": b"abc"}, {}, {"files": {"file": (None, b"1")}}):
        assert _page(ask("PUT", path, **options)) == 500


def test_what_is_too_large(ask: Asker, classic: ServedGateway) -> None:
    jobid = ask.new_job()
    limit = 5 * 1024 * 1024
    folder = ask.folder(jobid)
    # What counts is the form in which it reaches FirecREST: two parts, with this folder's path in the first.
    around = len(f"""--{"-" * 32}\r\nContent-Disposition: form-data; name="targetPath"\r\n\r\n{folder}\r\n""")
    around += len(f"""--{"-" * 32}\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n\r\n""")
    around += len(f"""--{"-" * 32}--\r\n""")
    assert ask.upload(jobid, "x", b"x" * (limit - around)).status_code == 200
    refused = {"error": "unable to upload file to job folder.", "except_type": PLAIN}
    assert _json(ask.upload(jobid, "x", b"y" * (limit - around + 1))) == (500, refused)
    assert ask.download(jobid, "x").content == b"x" * (limit - around)
    (folder / "y").write_bytes(b"y" * limit)
    assert len(ask.download(jobid, "y").content) == limit
    (folder / "y").write_bytes(b"y" * (limit + 1))
    assert _json(ask.download(jobid, "y"))[1]["except_type"] == PLAIN


@pytest.mark.parametrize("jobid", [UNKNOWN, "xyz", "0" * 23])
def test_a_job_that_is_none_is_an_uncaught_error(ask: Asker, jobid: str) -> None:
    for method, path in (
        ("GET", "job/state"),
        ("PATCH", "job/launch"),
        ("DELETE", "job/cancel"),
        ("GET", "file/list"),
        ("GET", "file/download"),
        ("DELETE", "file/delete"),
    ):
        assert _page(ask(method, f"/api/v1/{path}/{jobid}?filename=x")) == 500
    assert _page(ask.upload(jobid, "x", b"1")) == 500


def test_what_was_never_implemented_is_an_uncaught_error(ask: Asker) -> None:
    jobid = ask.new_job()
    for method, path in (
        ("DELETE", f"/api/v1/job/delete/{jobid}"),
        ("GET", "/api/v1/file/"),
        ("GET", "/api/v1/image/"),
        ("POST", "/api/v1/image/pull"),
    ):
        assert _page(ask(method, path)) == 500
    assert set(ask.files(jobid)) == {"job.sh"}


def test_there_is_nothing_else(ask: Asker) -> None:
    for method, path in (("GET", "/api/v1/info"), ("POST", "/api/v1/query"), ("GET", "/docs"), ("GET", "/metrics")):
        assert _page(ask(method, path)) == 404
    wrong = ask("POST", "/heartbeat")
    assert (_page(wrong), set(wrong.headers["allow"].split(", "))) == (405, {"GET", "HEAD", "OPTIONS"})
    moved = ask("GET", "/api/v1/job?a=b")
    assert (_page(moved), moved.headers["location"]) == (308, "/api/v1/job/?a=b")


# ---- what can be set --------------------------------------------------------------------------------------------------


def test_later_versions_keep_names(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"classic_file_names": "raw", "classic_listing": "whole", "classic_file_limit": 0.001}
    with ServedGateway(tmp_path, LocalBackend(tmp_path / "spool"), classic=True, **settings) as served:
        ask = Asker(served.url)
        jobid = ask.new_job()
        for name in ("a b c", ".hidden", "α.txt"):
            assert ask.upload(jobid, name, b"1").status_code == 200
            assert ask.download(jobid, name).content == b"1"
        assert set(ask.files(jobid)) == {"a b c", "job.sh", "α.txt"}
        assert ask.upload(jobid, "sub/x", b"1").status_code == 500
        (ask.folder(jobid) / "sub").mkdir()
        assert ask.upload(jobid, "sub/x", b"1").status_code == 200
        assert ask.upload(jobid, "large", b"1" * 1048).status_code == 500


def test_an_operation_may_take_too_long(classic: ServedGateway, ask: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    jobid = ask.new_job()
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.classic.folder.monotonic", iter(range(0, 1000, 6)).__next__)
    listing = {"error": "unable to list files to job folder.", "except_type": HEADER}
    assert _json(ask("GET", f"/api/v1/file/list/{jobid}")) == (500, listing)
    assert ask.upload(jobid, "x", b"1").status_code == 500
    monkeypatch.undo()
    assert set(ask.files(jobid)) == {"job.sh"}
