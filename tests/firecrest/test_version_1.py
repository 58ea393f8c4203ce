"""FirecREST version 1: jobs, files and tokens, on the double of version 1.13.0 with processes as jobs."""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import (
    ConfigurationError,
    FileError,
    GatewayError,
    InvalidRequest,
    NotSupported,
    SubmissionRefused,
    Unavailable,
)
from aiida_marketplace_hpc.gateway.backends.firecrest_v1 import FirecrestV1Backend
from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.gateway.config_check import effective
from aiida_marketplace_hpc.gateway.firecrest.client import CallFailed, TokenRefused
from aiida_marketplace_hpc.gateway.firecrest.client_v1 import ClusterV1
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.testing.firecrest_v1 import CLIENT, SECRET, FirecrestV1
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport
from tests.firecrest.conftest import Reached
from tests.plugin.test_archives import assert_does_the_same

SUBMIT = "POST /compute/jobs/path"


@pytest.fixture(scope="module")
def shared() -> Iterator[FirecrestV1]:
    with FirecrestV1(tokens=("constant",)) as double:
        yield double


@pytest.fixture
def double(shared: FirecrestV1) -> Iterator[FirecrestV1]:
    shared.requests.clear()
    yield shared
    shared.faults.clear()
    shared.max_file_size = 5
    for row in shared._jobs.queue([]):
        shared._jobs.cancel(row["jobid"])


@dataclass
class Remote(Reached):
    """A gateway on FirecREST v1, and a client of it."""

    double: FirecrestV1

    def runs(self, jobid: str) -> None:
        """Wait until a job runs."""
        wait_until(lambda: self.job(jobid)["state"] == "RUNNING", within=30, failure=lambda: f"{self.job(jobid)}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gateway not wait as long as it does in earnest."""
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.backends.firecrest_v1.SETTLING_TIME", 1.0)
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.service._RECONCILE_INTERVAL", 0.2)
    monkeypatch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])


def settings(double: FirecrestV1, tmp_path: Path, **more: Any) -> dict[str, Any]:
    """What a gateway is told about the double."""
    tokens = {
        "firecrest_token_url": double.token_url,
        "firecrest_client_id": CLIENT,
        "firecrest_client_secret": SECRET,
    }
    return {
        "backend": "firecrest",
        "firecrest_version": 1,
        "home": f"{tmp_path}/cluster/{{username}}",
        "firecrest_url": double.url,
        "firecrest_system": double.machine,
        **({} if "firecrest_token" in more else tokens),
        **more,
    }


@pytest.fixture
def remote(double: FirecrestV1, tmp_path: Path, quick: None, request: pytest.FixtureRequest) -> Iterator[Remote]:
    more = getattr(request, "param", {})
    with ServedGateway(tmp_path, None, **settings(double, tmp_path, **more)) as served:
        client = HpcGateway(served.url, token_source="env:MP_ACCESS_TOKEN")
        yield Remote(served, client, double)
        client.close()


def test_a_job_from_its_submission_to_its_end(remote: Remote) -> None:
    folder = remote.script("job", "echo said; exit 3")
    end = remote.end_of(remote.client.submit(folder, "run.sh")["jobid"])
    assert (end["state"], end["exit_code"]) == ("FAILED", 3)
    assert Path(folder, f"slurm-{end['scheduler_id']}.out").read_text() == "said\n"
    assert remote.double.requests[SUBMIT] == 1


def test_a_job_is_cancelled(remote: Remote) -> None:
    job = remote.client.submit(remote.script("long", "sleep 60"), "run.sh")["jobid"]
    remote.runs(job)
    remote.client.cancel_job(job)
    assert remote.end_of(job)["state"] == "CANCELLED"


LOST: list[Any] = [
    {"status": None},
    {"status": 504, "own": False},
    {"task": ("400", "Machine is not available")},
    pytest.param(
        {"task": ("400", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")},
        marks=pytest.mark.services,
    ),
    # Of a failed sbatch FirecREST takes the last word for an id.
    {"task": ("200", {"result": "Job submitted", "jobid": 2})},
]


@pytest.mark.parametrize("fault", LOST)
def test_g1_a_submission_whose_answer_was_lost_is_found_again(remote: Remote, fault: dict[str, Any]) -> None:
    folder = remote.script("lost", "echo ran >> executed; exit 4")
    remote.double.fail(SUBMIT, carried_out=True, **fault)
    end = remote.end_of(remote.client.submit(folder, "run.sh")["jobid"])
    assert (end["state"], end["exit_code"]) == ("FAILED", 4)
    assert remote.double.requests[SUBMIT] == 1
    assert Path(folder, "executed").read_text() == "ran\n"


def test_g1_a_submission_that_lives_is_found_by_its_folder(remote: Remote) -> None:
    folder = remote.script("lives", "until [ -e go ]; do sleep 0.1; done")
    remote.double.fail(SUBMIT, carried_out=True, status=None)
    job = remote.client.submit(folder, "run.sh")["jobid"]
    remote.runs(job)
    assert remote.double.requests[SUBMIT] == 1
    Path(folder, "go").touch()
    assert remote.end_of(job)["state"] == "COMPLETED"


@pytest.mark.parametrize("fault", [LOST[2], pytest.param(LOST[1], marks=pytest.mark.services)])
def test_g1_a_submission_that_never_was_is_made_once_that_is_proven(remote: Remote, fault: dict[str, Any]) -> None:
    folder = remote.script("never", "echo ran >> executed")
    remote.double.fail(SUBMIT, **fault)
    assert remote.end_of(remote.client.submit(folder, "run.sh")["jobid"])["state"] == "COMPLETED"
    assert remote.double.requests[SUBMIT] == 2
    assert Path(folder, "executed").read_text() == "ran\n"


def test_g1_questions_about_a_task_that_get_lost_are_asked_again(remote: Remote) -> None:
    folder = remote.script("asked", "true")
    [cluster] = remote.gateway.sites["firecrest"].accounts.usable()
    remote.double.fail("GET /tasks/{id}", status=None, times=3)
    assert cluster.submit(folder, "#!/bin/sh\ntrue\n", "again.sh").isdecimal()


def test_g1_a_token_that_is_refused_after_the_submission_has_begun_leaves_it_in_doubt(remote: Remote) -> None:
    folder = remote.script("refused", "true")
    [cluster] = remote.gateway.sites["firecrest"].accounts.usable()
    remote.double.fail("GET /tasks/{id}", status=401, times=100)
    with pytest.raises(CallFailed) as raised:
        cluster.submit(folder, "#!/bin/sh\ntrue\n", "late.sh")
    assert raised.type is CallFailed
    assert raised.value.carried_out
    remote.double.faults.clear()
    remote.double.fail(SUBMIT, status=401, times=2)
    with pytest.raises(TokenRefused):
        cluster.submit(folder, "#!/bin/sh\ntrue\n", "never.sh")


def test_g1_nothing_is_proven_while_firecrest_does_not_answer_about_jobs(remote: Remote) -> None:
    remote.end_of(remote.client.submit(remote.script("first", "true"), "run.sh")["jobid"])
    folder = remote.script("dark", "echo ran >> executed")
    remote.double.fail(SUBMIT, carried_out=True, own=False)
    remote.double.fail("GET /compute/jobs", task=("400", "Machine is not available"), times=10_000)
    asked = remote.double.requests["GET /compute/jobs"]
    job = remote.client.submit(folder, "run.sh")["jobid"]
    wait_until(
        lambda: remote.double.requests["GET /compute/jobs"] > asked + 4, within=40, failure=lambda: "nobody asks"
    )
    assert remote.job(job)["state"] == "SUBMITTING"
    remote.double.faults.clear()
    assert remote.end_of(job)["state"] == "COMPLETED"
    assert remote.double.requests[SUBMIT] == 2
    assert Path(folder, "executed").read_text() == "ran\n"


def test_what_sbatch_refuses_is_refused_in_its_words(remote: Remote) -> None:
    folder = remote.script("refused", "true")
    remote.double.fail(SUBMIT, task=("400", "sbatch: error: invalid partition specified: nowheresbatch: error: no"))
    with pytest.raises(SubmissionRefused, match="invalid partition specified"):
        remote.client.submit(folder, "run.sh")


@pytest.mark.parametrize(
    ("name", "directive"), [("a$b", "--job-name=x"), ("plain", "--job-name=a$b"), ("plain", "--job-name=a|b")]
)
def test_what_would_break_firecrests_lists_is_refused(remote: Remote, name: str, directive: str) -> None:
    folder = remote.script("refused", "true")
    Path(folder, name).write_text(f"#!/bin/sh\n#SBATCH {directive}\ntrue\n")
    with pytest.raises((InvalidRequest, SubmissionRefused), match="FirecREST"):
        remote.client.submit(folder, name)
    assert remote.double.requests[SUBMIT] == 0


def test_g2_an_end_on_record_of_a_job_that_the_queue_has_is_not_believed(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is with one that was requeued, until the accounting knows."""
    folder = remote.script("requeued", "until [ -e go ]; do sleep 0.1; done; exit 5")
    job = remote.client.submit(folder, "run.sh")["jobid"]
    remote.runs(job)
    jobs = remote.double._jobs
    whole = jobs.accounting
    ended = {"state": "NODE_FAIL", "time_left": "2035-01-01T00:00:00", "exit_code": "1:0"}
    monkeypatch.setattr(jobs, "accounting", lambda ids: [{**row, **ended} for row in whole(ids)])
    asked = remote.double.requests["GET /compute/acct"]
    wait_until(
        lambda: remote.job(job) and remote.double.requests["GET /compute/acct"] > asked + 3,
        within=20,
        failure=lambda: f"nobody asks: {remote.gateway.watch.problem} {remote.double.requests}",
    )
    assert remote.job(job)["state"] == "RUNNING"
    monkeypatch.setattr(jobs, "accounting", whole)
    Path(folder, "go").touch()
    assert remote.end_of(job)["exit_code"] == 5


def test_g2_an_old_record_under_the_same_id_is_not_believed(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = remote.script("young", "until [ -e go ]; do sleep 0.1; done")
    old = {"partition": "debug", "name": "job.sh", "user": "x", "state": "FAILED", "time": "", "nodes": "1"}
    times = {"start_time": "2020-01-01T00:00:00", "time_left": "2020-01-01T00:10:00"}
    row = {**old, **times, "nodelist": "n1", "exit_code": "9:0"}
    jobs, backend = remote.double._jobs, remote.gateway.backend
    with monkeypatch.context() as patched:
        patched.setattr(jobs, "accounting", lambda ids: [{**row, "jobid": id} for id in ids])
        patched.setattr(jobs, "queue", lambda ids: [])
        patched.setattr(backend, "_read_guards", lambda *_: [])
        job = remote.client.submit(folder, "run.sh")["jobid"]
        asked = remote.double.requests["GET /compute/acct"]
        wait_until(
            lambda: remote.job(job) and remote.double.requests["GET /compute/acct"] > asked + 3,
            within=30,
            failure=lambda: "nobody asks",
        )
        assert not remote.job(job)["final"]
    Path(folder, "go").touch()
    assert remote.end_of(job)["state"] == "COMPLETED"


def test_g3_a_job_that_slurm_has_forgotten_has_left_a_note(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = remote.script("forgotten", "until [ -e go ]; do sleep 0.1; done; exit 7")
    job = remote.client.submit(folder, "run.sh")["jobid"]
    remote.runs(job)
    assert remote.job(job)["started_at"]
    monkeypatch.setattr(remote.double._jobs, "accounting", lambda ids: [])
    monkeypatch.setattr(remote.double._jobs, "queue", lambda ids: [])
    Path(folder, "go").touch()
    end = remote.end_of(job)
    assert (end["state"], end["exit_code"]) == ("FAILED", 7)


def test_g3_where_there_is_no_accounting_queue_and_note_tell(remote: Remote) -> None:
    words = "Slurm accounting storage is disabled"
    remote.double.fail("GET /compute/acct", task=("400", words), times=10_000)
    folder = remote.script("without", "until [ -e go ]; do sleep 0.1; done; exit 8")
    job = remote.client.submit(folder, "run.sh")["jobid"]
    remote.runs(job)
    Path(folder, "go").touch()
    end = remote.end_of(job)
    assert (end["state"], end["exit_code"]) == ("FAILED", 8)


def test_g1_g3_a_lost_ledger_learns_from_living_jobs(remote: Remote) -> None:
    folder = remote.script("ledger", "until [ -e go ]; do sleep 0.1; done")
    job = remote.client.submit(folder, "run.sh")["jobid"]
    remote.runs(job)
    backend = remote.gateway.backend
    [found] = backend.find(folder, datetime.now(timezone.utc) - timedelta(minutes=1))
    [trace] = backend.traces([found.id]).values()
    assert (trace.jobid, trace.folder) == (job, folder)
    Path(folder, "go").touch()
    remote.end_of(job)


def test_g7_a_poll_is_one_question_whatever_the_number_of_jobs(remote: Remote) -> None:
    folders = [remote.script(f"many-{number}", "until [ -e go ]; do sleep 0.1; done") for number in range(2)]
    jobs = [remote.client.submit(folder, "run.sh")["jobid"] for folder in folders]
    for job in jobs:
        remote.runs(job)
    watch = remote.gateway.watch
    with watch._round:  # Nobody else asks meanwhile.
        watch._ask()
        before = remote.double.requests.copy()
        watch._ask()
        made = remote.double.requests - before
    assert made["GET /compute/acct"] == 1
    assert made["GET /compute/jobs"] == made["GET /utilities/ls"] == 0
    for folder in folders:
        Path(folder, "go").touch()
    for job in jobs:
        remote.end_of(job)


def made(folder: Path) -> Path:
    """A local folder with what is easily lost."""
    (folder / "empty").mkdir(parents=True)
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("deep/er/a.txt", ".hidden", "-rf", "sub_dir_in.txt", "ü", "@x"):
        (folder / name).write_text(f"{name}\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o750)
    (folder / "nothing").touch()
    (folder / "large").write_bytes(bytes(range(256)) * 1024)
    (folder / "link").symlink_to("deep/er")
    (folder / "dangling").symlink_to("/no/such/thing")
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """What is in a folder: bytes and modes of files, targets of links."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
    return found


def test_g4_a_folder_goes_there_and_comes_back(remote: Remote, tmp_path: Path) -> None:
    """With a file that has to go through FirecREST's store."""
    remote.double.max_file_size = 0.0625
    local = made(tmp_path / "local")
    path = f"{remote.home}/tree"
    transfer.put_tree(remote.client, local, path, dereference=False)
    assert contents(Path(path)) == contents(local)
    transfer.get(remote.client, path, tmp_path / "back", dereference=False)
    assert contents(tmp_path / "back") == contents(local)
    assert remote.double.requests["POST /storage/xfer-external/upload"] == 1
    assert remote.double.requests["POST /storage/xfer-external/download"] == 1
    assert remote.double.requests["POST /utilities/compress"] == 0
    # Once more, over what is there; and with what the links lead to.
    (local / "dangling").unlink()
    remote.client.ask("remove", path=f"{path}/dangling")
    (local / "run.sh").write_text("#!/bin/sh\necho new\n")
    transfer.put_tree(remote.client, local, path, dereference=False)
    transfer.get(remote.client, path, tmp_path / "followed", dereference=True)
    assert (tmp_path / "followed" / "link" / "a.txt").read_text() == "deep/er/a.txt\n"
    assert (tmp_path / "followed" / "run.sh").read_text() == "#!/bin/sh\necho new\n"


def test_g4_a_file_has_its_name_when_it_is_whole(remote: Remote, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_text("new\n")
    path = Path(remote.home, "file")
    transfer.put_file(remote.client, local, str(path), mode=0o640)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new\n", 0o640)
    local.write_text("newer\n")
    files = remote.gateway.files_of(remote.gateway.ledger.users()[0])
    for fault in (
        {"route": "POST /utilities/upload", "headers": {"X-Timeout": "x"}},
        {"route": "GET /utilities/checksum", "headers": {"X-Timeout": "x"}},
        {"route": "PUT /utilities/rename", "headers": {"X-Error": "no"}},
    ):
        remote.double.fail(**fault, status=400, carried_out=fault["route"] != "PUT /utilities/rename", times=100)
        with pytest.raises(GatewayError, match="file"):
            files.write(str(path), io.BytesIO(b"newer\n").read)
        assert path.read_text() == "new\n"
        assert [one.name for one in path.parent.iterdir() if one.name.endswith(".part")] == []
        remote.double.faults.clear()
    transfer.put_file(remote.client, local, str(path))
    assert path.read_text() == "newer\n"
    folder = Path(remote.home, "folder")
    folder.mkdir()
    with pytest.raises(FileError, match="directory"):
        transfer.put_file(remote.client, local, str(folder))
    assert list(folder.iterdir()) == []


def test_operations_on_files(remote: Remote, tmp_path: Path) -> None:
    ask, home = remote.client.ask, remote.home
    folder = remote.script("files", "true")
    ask("rename", path=f"{folder}/run.sh", target=f"{folder}/other.sh")
    ask("copy", path=f"{folder}/other.sh", target=f"{folder}/copy.sh")
    ask("mkdir", path=f"{folder}/a/b", parents=True)
    ask("symlink", path=f"{folder}/a/link", target="../other.sh")
    ask("chmod", path=f"{folder}/copy.sh", mode=0o700)
    ask("copy", path=f"{folder}/a", target=f"{home}/copied")
    assert Path(home, "copied", "link").is_symlink()
    names = [entry["name"] for entry in ask("list", path=folder, recursive=True)["entries"]]
    assert names == ["a", "a/b", "a/link", "copy.sh", "other.sh"]
    assert ask("stat", path=f"{folder}/a/link")["target"] == "../other.sh"
    assert ask("checksum", path=f"{folder}/copy.sh") == ask("checksum", path=f"{folder}/a/link")
    assert abs(ask("list", path=folder)["entries"][1]["mtime"] - Path(folder, "copy.sh").stat().st_mtime) < 2
    with pytest.raises(FileError, match="File exists"):
        ask("rename", path=f"{folder}/copy.sh", target=f"{folder}/other.sh")
    with pytest.raises(NotSupported):
        ask("copy", path=folder, target=f"{home}/followed", dereference=True)
    ask("remove", path=folder, recursive=True)
    assert not Path(folder).exists()


@pytest.mark.parametrize("name", ["several sources", "extract over what is there", "extract what is no archive"])
def test_an_archive_is_made_and_unpacked_by_a_job(name: str, remote: Remote, tmp_path: Path) -> None:
    home = Path(remote.home)
    home.mkdir(parents=True, exist_ok=True)
    with MarketplaceHpcTransport(machine="firecrest", url=remote.served.url) as transport:
        assert_does_the_same(name, transport, home, tmp_path)
    assert list(Path(home, ".marketplace-hpc", "staging").iterdir()) == []


def test_a_job_that_was_killed_over_an_archive_is_told(
    remote: Remote, double: FirecrestV1, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(remote.home).mkdir(parents=True, exist_ok=True)
    Path(remote.home, "f").write_text("f")
    plain = ClusterV1.submit

    def killed(cluster: ClusterV1, folder: str, script: str, name: str) -> str:
        id = plain(cluster, folder, script.replace("\nexport", "\nsleep 60\nexport", 1), name)
        double._jobs.cancel(id)
        return id

    monkeypatch.setattr(ClusterV1, "submit", killed)
    packing = {"sources": [f"{remote.home}/f"], "root_dir": remote.home, "target": f"{remote.home}/x", "format": "tar"}
    with pytest.raises(Unavailable, match="CANCELLED"):
        remote.client.ask("compress", **packing)
    assert not Path(remote.home, "x").exists()


def test_a_removal_that_takes_long_is_continued(remote: Remote) -> None:
    folder = remote.script("long", "true")
    remote.double.fail("DELETE /utilities/rm", status=400, headers={"X-Timeout": "x"}, times=2)
    remote.double.fail("DELETE /utilities/rm", status=400, headers={"X-Timeout": "x"}, carried_out=True)
    remote.client.ask("remove", path=folder, recursive=True)
    assert not Path(folder).exists()


def test_names_that_would_not_be_taken_for_what_they_are_never_get_there(remote: Remote, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_text("x")
    home = remote.home

    def calls() -> dict[str, int]:
        return {name: count for name, count in remote.double.requests.items() if "/utilities/" in name}

    before = calls()
    for name in ("it's", "a b", "a$b", "a;b", "two\nlines", 'a"b', "a(b"):
        path = f"{home}/{name}"
        for call in (
            lambda path=path: transfer.put_file(remote.client, local, path),
            lambda path=path: remote.client.ask("stat", path=path),
            lambda path=path: remote.client.ask("remove", path=path, recursive=True),
        ):
            with pytest.raises(InvalidRequest, match="FirecREST"):
                call()  # type: ignore[no-untyped-call]
    assert calls() == before


@pytest.mark.parametrize("remote", [{"firecrest_token": "constant"}], indirect=True)
def test_a_constant_token_is_all_it_takes(remote: Remote) -> None:
    assert remote.end_of(remote.client.submit(remote.script("job", "true"), "run.sh")["jobid"])["state"] == "COMPLETED"
    assert remote.double.requests["POST /auth/token"] == 0


def test_a_token_that_was_refused_is_renewed(remote: Remote) -> None:
    remote.home  # noqa: B018
    for token in list(remote.double._tokens):
        if token != "constant":
            remote.double.revoke(token)
    assert remote.client.ask("stat", path=remote.home)["type"] == "directory"


@pytest.mark.parametrize(
    "remote", [{"account": "delegated", "firecrest_token": "", "firecrest_client_id": ""}], indirect=True
)
def test_users_tokens_are_passed_on(shared: FirecrestV1, remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shared._tokens, TOKENS[ALICE], float("inf"))
    assert remote.end_of(remote.client.submit(remote.script("job", "true"), "run.sh")["jobid"])["state"] == "COMPLETED"
    assert remote.double.requests["POST /auth/token"] == 0


@pytest.fixture
def told(tmp_path: Path) -> dict[str, Any]:
    """What a gateway is told that has a token of its own in the environment."""
    where = {"firecrest_url": "http://localhost:1", "firecrest_system": "cluster", "home": "/home/{username}"}
    return {"backend": "firecrest", "state": tmp_path, "dev_token": TOKENS, **where}


def test_a_token_from_the_published_variable_is_never_shown(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("F7T_TOKEN", "very-secret-token")
    for version in (1, 2):
        found = load({**told, "firecrest_version": version})
        assert found.firecrest_token.get_secret_value() == "very-secret-token"
        shown = {one.name: (one.value, one.origin) for one in effective(found, told, None)}
        assert shown["firecrest_token"] == ("***", "F7T_TOKEN")
        assert "very-secret" not in f"{shown} {found!r}"
        gateway = Gateway(found)
        assert isinstance(gateway.backend, FirecrestV1Backend) is (version == 1)
        gateway.backend.stop()
        gateway.ledger.close()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, "F7T_TOKEN"),
        ({"firecrest_token": "x", "firecrest_client_id": "y"}, "leave it away, or firecrest_client_id"),
        ({"firecrest_token": "x", "account": "delegated"}, "users' tokens"),
        ({"firecrest_token": "x", "firecrest_version": 3}, "firecrest_version"),
        ({"firecrest_token": "x", "firecrest_url": ""}, "firecrest_url"),
    ],
)
def test_settings_that_contradict_each_other_are_named(told: dict[str, Any], change: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        load({**told, **change})
