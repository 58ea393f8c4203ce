"""The FirecREST v1 double, asked by pyfirecrest's own client for that version."""

from __future__ import annotations

import hashlib
import io
import logging
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import firecrest
import pytest
import requests
from firecrest.v1 import Firecrest

from aiida_marketplace_hpc.testing.firecrest_v1 import CLIENT, SECRET, FirecrestV1
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

MIB = 1024 * 1024
SCRIPT = '#!/bin/bash\n#SBATCH --job-name=double\necho hello; [ -z "$1" ]\n'


@pytest.fixture(scope="module")
def double() -> Iterator[FirecrestV1]:
    logging.getLogger("firecrest").setLevel(logging.CRITICAL + 1)
    with FirecrestV1() as double:
        yield double


@pytest.fixture
def client(double: FirecrestV1) -> Firecrest:
    client = Firecrest(double.url, firecrest.ClientCredentialsAuth(CLIENT, SECRET, double.token_url))
    client.polling_sleep_times = [0.02] * 500
    client.set_api_version("1.16.0")
    return client


def _header(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The error header of an answer, as pyfirecrest reports it."""
    with pytest.raises(firecrest.FirecrestException) as caught:
        call(*arguments, **options)
    response = caught.value.responses[-1]
    return next((name for name in response.headers if name.lower().startswith("x-")), str(response.status_code)).lower()


def test_it_says_what_there_is(double: FirecrestV1, client: Firecrest) -> None:
    assert {service["status"] for service in client.all_services()} == {"available"}
    assert client.service("compute")["status_code"] == 200
    assert client.all_systems() == [{"system": "cluster", "status": "available", "description": "System ready"}]
    assert client.system("cluster")["status"] == "available"
    assert client.parameters()["utilities"][0] == {"name": "UTILITIES_MAX_FILE_SIZE", "value": "5", "unit": "MB"}
    assert client.whoami() == client.whoami("cluster")


def test_files_go_there_and_back(client: Firecrest, tmp_path: Path) -> None:
    folder = str(tmp_path / "a" / "b")
    client.mkdir("cluster", folder, p=True)
    client.simple_upload("cluster", io.BytesIO(b"\x00\xff" * 100), folder, "in.bin")
    fetched = io.BytesIO()
    client.simple_download("cluster", f"{folder}/in.bin", fetched)
    assert fetched.getvalue() == b"\x00\xff" * 100
    assert client.checksum("cluster", f"{folder}/in.bin") == hashlib.sha256(b"\x00\xff" * 100).hexdigest()
    assert client.stat("cluster", f"{folder}/in.bin")["size"] == 200
    client.chmod("cluster", f"{folder}/in.bin", "600")
    assert stat.S_IMODE(client.stat("cluster", f"{folder}/in.bin")["mode"]) == 0o600
    client.mv("cluster", f"{folder}/in.bin", f"{folder}/out.bin")
    client.copy("cluster", f"{folder}/out.bin", f"{folder}/.hidden")
    client.symlink("cluster", f"{folder}/out.bin", f"{folder}/link")
    listed = {row["name"]: row for row in client.list_files("cluster", folder)}
    assert set(listed) == {"out.bin", "link"}
    assert (listed["link"]["type"], listed["link"]["link_target"]) == ("l", f"{folder}/out.bin")
    assert (listed["out.bin"]["size"], listed["out.bin"]["permissions"]) == ("200", "rw-------")
    assert {row["name"] for row in client.list_files("cluster", folder, show_hidden=True)} == {*listed, ".hidden"}
    client.compress("cluster", folder, str(tmp_path / "b.tar.gz"), fail_on_timeout=True)
    client.mkdir("cluster", str(tmp_path / "copy"))
    client.extract("cluster", str(tmp_path / "b.tar.gz"), str(tmp_path / "copy"), fail_on_timeout=True)
    assert (tmp_path / "copy" / "b" / "out.bin").read_bytes() == fetched.getvalue()
    client.simple_delete("cluster", folder)
    assert client.list_files("cluster", str(tmp_path / "a")) == []


def test_uploads_are_renamed_as_the_version_does(double: FirecrestV1, client: Firecrest, tmp_path: Path) -> None:
    def upload(*names: str) -> set[str]:
        for name in names:
            client.simple_upload("cluster", io.BytesIO(b"x"), str(tmp_path), name)
        found = {path.name for path in tmp_path.iterdir()}
        client.simple_delete("cluster", str(tmp_path))
        tmp_path.mkdir()
        return found

    assert upload("sub/dir/in.txt", "a b", ".hidden", "../../x") == {"sub_dir_in.txt", "a_b", "hidden", "x"}
    double.file_names = "raw"
    try:
        assert upload("a b", ".hidden") == {"a b", ".hidden"}
        assert _header(client.simple_upload, "cluster", io.BytesIO(b"x"), str(tmp_path), "sub/x") == "x-invalid-path"
    finally:
        double.file_names = "secure"


def test_names_with_blanks_are_listed_as_the_version_does(
    double: FirecrestV1, client: Firecrest, tmp_path: Path
) -> None:
    for name in ("one two", "and one two"):
        (tmp_path / name).write_text("")

    def listed() -> set[tuple[str, str]]:
        return {(row["name"], row["link_target"]) for row in client.list_files("cluster", str(tmp_path))}

    assert listed() == {("one", ""), ("and", "two")}
    double.listing = "quoted"
    try:
        assert listed() == {("one two", ""), ("and one two", "")}
    finally:
        double.listing = "split"
    (tmp_path / "a $").write_text("")
    assert _header(client.list_files, "cluster", str(tmp_path)) == "500"


def test_what_is_refused_is_refused_by_its_header(client: Firecrest, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    assert _header(client.list_files, "cluster", missing) == "x-invalid-path"
    assert _header(client.simple_download, "cluster", missing, io.BytesIO()) == "x-not-found"
    assert _header(client.checksum, "cluster", str(tmp_path)) == "x-a-directory"
    assert _header(client.mkdir, "cluster", str(tmp_path)) == "x-exists"
    assert _header(client.simple_delete, "cluster", missing) == "x-invalid-path"
    assert _header(client.list_files, "elsewhere", missing) == "x-machine-does-not-exist"
    assert _header(client.poll_active, "elsewhere") == "x-machine-does-not-exists"
    assert _header(client.list_files, "cluster", f"{tmp_path}/a;b") == "400"
    assert _header(client.submit, "cluster", script_remote_path=missing) == "x-invalid-path"


def test_there_is_a_limit_to_sizes(client: Firecrest, tmp_path: Path) -> None:
    client.simple_upload("cluster", io.BytesIO(b"x" * (5 * MIB - 2000)), str(tmp_path), "most")
    assert _header(client.simple_upload, "cluster", io.BytesIO(b"x" * 5 * MIB), str(tmp_path), "more") == "413"
    (tmp_path / "large").write_bytes(b"x" * (5 * MIB + 1))
    assert _header(client.simple_download, "cluster", str(tmp_path / "large"), io.BytesIO()) == "x-size-limit"


def test_a_command_that_takes_too_long_is_ended(double: FirecrestV1, client: Firecrest, tmp_path: Path) -> None:
    double.command_delay, double.command_timeout = 5.0, 0.1
    try:
        assert _header(client.list_files, "cluster", str(tmp_path)) == "x-timeout"
    finally:
        double.command_delay, double.command_timeout = 0.0, 5.0


def test_a_cluster_may_be_down(double: FirecrestV1, client: Firecrest, tmp_path: Path) -> None:
    double.down = True
    try:
        assert _header(client.list_files, "cluster", str(tmp_path)) == "x-machine-not-available"
        assert client.system("cluster")["status"] == "not available"
    finally:
        double.down = False


def test_only_its_own_tokens_are_accepted(double: FirecrestV1) -> None:
    def ask(token: str) -> int:
        return requests.get(f"{double.url}/tasks", headers={"Authorization": f"Bearer {token}"}, timeout=10).status_code

    assert (ask(double.issue()), ask("wrong")) == (200, 401)
    double.token_lifetime = -1.0
    try:
        assert ask(double.issue()) == 401
    finally:
        double.token_lifetime = 300.0
    form = {"grant_type": "client_credentials", "client_id": CLIENT, "client_secret": "wrong"}
    assert requests.post(double.token_url, data=form, timeout=10).status_code == 401


def _ended(client: Firecrest, jobid: int) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = client.poll("cluster", [str(jobid)])
        if records and records[0]["state"] not in ("PENDING", "RUNNING"):
            found: dict[str, Any] = records[0]
            return found
        time.sleep(0.05)
    raise AssertionError("the job does not end")


def test_a_job_runs_and_each_submission_is_one(client: Firecrest, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(SCRIPT)
    first = client.submit("cluster", script_remote_path=str(tmp_path / "job.sh"))
    second = client.submit("cluster", script_remote_path=str(tmp_path / "job.sh"))
    assert first["jobid"] != second["jobid"]
    record = _ended(client, first["jobid"])
    assert (record["state"], record["name"], record["jobid"]) == ("COMPLETED", "double", str(first["jobid"]))
    _ended(client, second["jobid"])
    assert Path(first["job_file_out"]).read_text() == "hello\n"
    assert client.poll_active("cluster") == []


def test_living_jobs_are_listed_with_their_files(client: Firecrest, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("#!/bin/bash\necho begun; until [ -e go ]; do sleep 0.05; done\n")
    jobid = client.submit("cluster", script_remote_path=str(tmp_path / "job.sh"))["jobid"]
    deadline = time.monotonic() + 30
    while True:
        [row] = client.poll_active("cluster", [jobid], page_size=10, page_number=0)
        if row["job_data_out"] or time.monotonic() > deadline:  # type: ignore[typeddict-item]
            break
    assert (row["jobid"], row["job_file"]) == (str(jobid), str(tmp_path / "job.sh"))  # type: ignore[typeddict-item]
    assert row["job_data_out"] == "begun\n"  # type: ignore[typeddict-item]
    (tmp_path / "go").touch()
    _ended(client, jobid)


def test_calls_fail_on_demand(double: FirecrestV1, client: Firecrest, tmp_path: Path) -> None:
    double.fail("POST /utilities/mkdir", status=None, carried_out=True)
    with pytest.raises(requests.RequestException):
        client.mkdir("cluster", str(tmp_path / "made"))
    assert (tmp_path / "made").is_dir()
    double.fail("POST /utilities/mkdir", status=400, headers={"X-Timeout": "x"})
    assert _header(client.mkdir, "cluster", str(tmp_path / "not")) == "x-timeout"
    double.fail("GET /compute/acct", task=("400", "Machine is not available"))
    with pytest.raises(firecrest.FirecrestException):
        client.poll("cluster", ["1"])
    assert not (tmp_path / "not").exists()
    double.faults.clear()


def test_a_script_is_brought_along_or_made_for_a_transfer(client: Firecrest, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("copied")
    brought = client.submit("cluster", script_str=SCRIPT)
    copied = client.submit_copy_job("cluster", str(tmp_path / "a"), str(tmp_path / "b"), job_name="copy")
    assert _ended(client, brought["jobid"])["state"] == "COMPLETED"
    assert _ended(client, copied["jobid"])["name"] == "copy"
    assert (tmp_path / "b").read_text() == "copied"
    assert not Path(brought["job_file"]).is_relative_to(Path.home())


def test_a_job_can_be_cancelled_also_when_it_has_ended(client: Firecrest, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("#!/bin/bash\nsleep 600\n")
    job = client.submit("cluster", script_remote_path=str(tmp_path / "job.sh"))
    assert [row["jobid"] for row in client.poll_active("cluster", [job["jobid"]])] == [str(job["jobid"])]
    client.cancel("cluster", job["jobid"])
    assert _ended(client, job["jobid"])["state"].startswith("CANCELLED")
    client.cancel("cluster", job["jobid"])


@pytest.mark.services
def test_jobs_of_a_real_slurm(slurm_cluster: SlurmCluster) -> None:
    machine = slurm_cluster.machine
    with FirecrestV1(slurm_cluster) as double:
        client = Firecrest(double.url, firecrest.ClientCredentialsAuth(CLIENT, SECRET, double.token_url))
        client.polling_sleep_times = [0.05] * 500
        client.set_api_version("1.16.0")
        folder = f"{machine.home}/firecrest-v1"
        client.mkdir("cluster", folder)
        client.simple_upload("cluster", io.BytesIO(SCRIPT.encode()), folder, "job.sh")
        assert client.whoami("cluster") == machine.user
        assert client.list_files("cluster", folder)[0]["user"] == machine.user
        jobs = [client.submit("cluster", script_remote_path=f"{folder}/job.sh") for _ in range(2)]
        assert jobs[0]["jobid"] != jobs[1]["jobid"]
        assert jobs[0]["job_file_out"].endswith(f"slurm-{jobs[0]['jobid']}.out")
        for job in jobs:
            slurm_cluster.wait_for(str(job["jobid"]))
        records = client.poll("cluster", [str(job["jobid"]) for job in jobs])
        assert [record["state"] for record in records] == ["COMPLETED", "COMPLETED"]
        client.simple_upload("cluster", io.BytesIO(b"#!/bin/bash\nsleep 600\n"), folder, "long.sh")
        long = client.submit("cluster", script_remote_path=f"{folder}/long.sh")
        assert [row["name"] for row in client.poll_active("cluster", [long["jobid"]])] == ["long.sh"]
        client.cancel("cluster", long["jobid"])
        slurm_cluster.wait_for(str(long["jobid"]), "CANCELLED")
        client.cancel("cluster", long["jobid"])
        assert _header(client.submit, "cluster", script_remote_path=f"{folder}/missing") == "x-invalid-path"
        client.simple_upload("cluster", io.BytesIO(b"no script"), folder, "wrong.sh")
        assert _header(client.submit, "cluster", script_remote_path=f"{folder}/wrong.sh") == "200"


def test_a_task_may_take_its_time(double: FirecrestV1, client: Firecrest) -> None:
    double.task_delay = 0.3
    try:
        before = double.requests["GET /tasks"]
        assert client.poll_active("cluster") == []
        assert double.requests["GET /tasks"] > before + 3
    finally:
        double.task_delay = 0.0


def test_large_files_go_by_the_object_store(client: Firecrest, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.write_bytes(b"y" * (6 * MIB))
    (tmp_path / "there").mkdir()
    upload = client.external_upload("cluster", str(source), str(tmp_path / "there"))
    upload.finish_upload()
    deadline = time.monotonic() + 30
    while upload.in_progress:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (tmp_path / "there" / "large").read_bytes() == source.read_bytes()
    client.set_api_version("1.13.0")
    download = client.external_download("cluster", str(tmp_path / "there" / "large"))
    download.finish_download(str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    download.invalidate_object_storage_link()
