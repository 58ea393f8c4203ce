"""The client's commands: what they print, how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.client.retry import RetryPolicy
from tests.client.fake_gateway import APP_ID, FakeGateway, drop, reply

Run = Callable[..., Result]
PUBLISHED = [
    *("--job-name", "a"),
    *("--ntasks-per-node", "2"),
    *("--partition", "p"),
    *("--image", "i"),
    *("--executable-cmd", "c"),
]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeGateway]:
    server = FakeGateway(tmp_path / "cluster")
    yield server
    server.close()


@pytest.fixture
def run(fake: FakeGateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(RetryPolicy, "__init__", _without_waiting(RetryPolicy.__init__))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **environment: str) -> Result:
        settings = {"MP_HOST": fake.url, "MP_ACCESS_TOKEN": "good", "MP_APP_ID": "", **environment}
        return CliRunner().invoke(main, [str(argument) for argument in arguments], env=settings)

    return run


def _without_waiting(init: Callable[..., None]) -> Callable[..., None]:
    def patched(self: RetryPolicy, **options: float) -> None:
        init(self, **{**options, "first_delay": 0.0})

    return patched


def good(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def test_help_imports_neither_aiida_nor_requests() -> None:
    code = (
        "import sys\nfrom aiida_marketplace_hpc.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('aiida', 'requests', 'fastapi', 'tabulate', 'tqdm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "doctor" in done.stdout
    assert "gateway" in done.stdout


def test_unknown_command_is_a_usage_error(run: Run) -> None:
    assert run("frobnicate").exit_code == 2


def test_commands_and_options_complete() -> None:
    complete = BashComplete(main, {}, "marketplace-hpc", "_MARKETPLACE_HPC_COMPLETE")
    assert {found.value for found in complete.get_completions([], "l")} == {"login", "logout", "logins"}
    assert [found.value for found in complete.get_completions(["job"], "r")] == ["run"]
    assert [found.value for found in complete.get_completions(["job", "run"], "--inp")] == ["--input"]


def test_heartbeat_and_user(run: Run, fake: FakeGateway) -> None:
    assert good(run("heartbeat", MP_ACCESS_TOKEN="")) == "HPC-gateway-App : application running.\n"
    assert str(fake.home) in good(run("user", "create"))


def test_options_stand_before_or_after_the_command(run: Run, fake: FakeGateway) -> None:
    for arguments in (
        ("--url", fake.url, "--token-source", "command:echo good", "--json", "user", "create"),
        ("user", "create", "--url", fake.url, "--token-source", "command:echo good", "--json"),
        (
            "--json",
            "--url",
            "http://nowhere.invalid",
            "user",
            "create",
            "--url",
            fake.url,
            "--token-source",
            "env:OTHER",
        ),
    ):
        assert json.loads(good(run(*arguments, MP_HOST="", MP_ACCESS_TOKEN="", OTHER="good")))["username"] == "ada"


def test_the_proxy_is_used_when_an_app_is_named(run: Run, fake: FakeGateway) -> None:
    good(run("user", "create", MP_APP_ID=APP_ID))
    good(run("user", "create", "--app-id", APP_ID))
    assert all(seen.target.startswith("/api/applications/proxy/") for seen in fake.seen)


def test_a_job_from_a_folder(run: Run, fake: FakeGateway) -> None:
    (fake.home / "run").mkdir()
    created = run("job", "create", "--folder", fake.home / "run", "--script", "job.sh", "--launch", "--client-ref", "u")
    jobid = good(created).strip()
    assert fake.submissions == [jobid]
    assert fake.jobs[jobid]["client_ref"] == "u"
    assert "QUEUED" in good(run("job", "state", jobid))
    assert "RUNNING" in good(run("job", "show", jobid))
    assert jobid in good(run("job", "list"))
    assert jobid in good(run("job", "list", "--active"))
    assert good(run("job", "cancel", jobid)) == f"{jobid} CANCELLED\n"
    assert jobid not in good(run("job", "list", "--active"))


def test_a_job_from_an_image(run: Run, fake: FakeGateway) -> None:
    jobid = json.loads(good(run("--json", "job", "create", *PUBLISHED)))["jobid"]
    assert fake.seen[-1].json["ntasks_per_node"] == 2
    assert good(run("job", "launch", jobid)) == f"{jobid} QUEUED\n"
    launched = json.loads(good(run("--json", "job", "create", *PUBLISHED, "--launch")))
    assert fake.submissions == [jobid, launched["jobid"]]


@pytest.mark.parametrize(
    "arguments",
    [[], ["--folder", "/x"], ["--script", "x"], ["--folder", "/x", "--script", "y", *PUBLISHED], PUBLISHED[2:]],
)
def test_half_a_job_is_a_usage_error(run: Run, fake: FakeGateway, arguments: list[str]) -> None:
    assert run("job", "create", *arguments).exit_code == 2
    assert fake.seen == []


def test_unknown_jobs_are_an_error_beside_the_known(run: Run, fake: FakeGateway) -> None:
    jobid = good(run("job", "create", *PUBLISHED)).strip()
    result = run("job", "state", jobid, "nothing")
    assert result.exit_code == 1
    assert "CREATED" in result.stdout
    assert "you have no job nothing" in result.stderr
    result = run("--json", "job", "state", jobid, "nothing")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["unknown"] == ["nothing"]
    result = run("--json", "job", "state", "nothing")
    assert json.loads(result.stdout)["code"] == "not_found"


def test_through_the_proxy_active_jobs_are_listed(run: Run, fake: FakeGateway) -> None:
    jobid = good(run("job", "create", *PUBLISHED)).strip()
    result = run("job", "list", MP_APP_ID=APP_ID)
    assert jobid in good(result)
    assert "Through the MarketPlace" in result.stderr


def test_files_by_absolute_path(run: Run, fake: FakeGateway, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("content")
    assert good(run("file", "upload", "in.txt", fake.home)) == f"{fake.home}/in.txt\n"
    good(run("file", "upload", "in.txt", f"{fake.home}/a/b.txt", "--parents"))
    listed = good(run("file", "list", fake.home))
    assert "in.txt" in listed
    assert "a/" in listed
    assert good(run("file", "download", f"{fake.home}/a", "-o", "out")) == "out\n"
    assert (tmp_path / "out" / "b.txt").read_text() == "content"
    assert good(run("file", "download", f"{fake.home}/a/b.txt")) == "b.txt\n"
    assert json.loads(good(run("--json", "file", "delete", f"{fake.home}/a"))) == {"message": "File deleted."}
    assert not (fake.home / "a").exists()


def test_files_of_a_root_and_of_a_job(run: Run, fake: FakeGateway, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("content")
    jobid = good(run("job", "create", *PUBLISHED)).strip()
    for where in ("home", jobid):
        good(run("file", "upload", "in.txt", where))
        good(run("file", "upload", "in.txt", where, "other name"))
        assert "other name" in good(run("file", "list", where))
        assert good(run("file", "download", where, "other name", "-o", "back")) == "back\n"
        assert (tmp_path / "back").read_text() == "content"
        good(run("file", "delete", where, "in.txt"))
        assert "in.txt" not in good(run("file", "list", where))
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    good(run("file", "upload", "folder", jobid))
    assert (fake.home / jobid / "folder" / "sub").is_dir()
    assert "sub" in good(run("file", "list", jobid, "folder"))


def test_force_is_sent_only_where_it_is_given(run: Run, fake: FakeGateway, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("content")
    (tmp_path / "folder").mkdir()
    for options, sent in ((["--force"], ["true"] * 2), ([], [None] * 2)):
        good(run("file", "upload", "in.txt", fake.home, *options))
        good(run("file", "upload", "folder", fake.home, *options))
        good(run("file", "delete", "home", "in.txt", *options))
        assert [seen.parameters.get("force") for seen in fake.named("createDataset")[-2:]] == sent
        assert fake.named("query")[-1].json["operations"][0].get("force") == (True if options else None)
        jobid = good(run("job", "create", *PUBLISHED)).strip()
        good(run("file", "upload", "in.txt", jobid))
        good(run("file", "delete", jobid, "in.txt", *options))
        assert fake.named("deleteDataset")[-1].parameters.get("force") == sent[0]


def test_files_of_a_classic_gateway(run: Run, fake: FakeGateway, tmp_path: Path) -> None:
    fake.classic = True
    (tmp_path / "in.txt").write_text("content")
    jobid = good(run("job", "create", *PUBLISHED)).strip()
    assert good(run("file", "upload", "in.txt", jobid)) == "File uploaded.\n"
    assert "in.txt" in good(run("file", "list", jobid, MP_APP_ID=APP_ID))
    good(run("file", "download", jobid, "in.txt", "-o", "back"))
    assert (tmp_path / "back").read_text() == "content"
    assert run("file", "download", jobid, "in.txt", "-o", "back", "--no-overwrite").exit_code == 1


def test_a_root_as_a_whole_is_not_deleted(run: Run, fake: FakeGateway) -> None:
    for arguments in (["home"], [fake.home], ["home", "."]):
        assert run("file", "delete", *arguments).exit_code == 2
    assert fake.named("deleteDataset") == []
    assert not any(seen.json["operations"][0]["op"] == "remove" for seen in fake.named("query"))
    assert run("file", "list", fake.home, "x").exit_code == 2


def test_names_do_not_command_the_terminal(run: Run, fake: FakeGateway) -> None:
    (fake.home / "a\x1b[31m\nb").write_text("")
    (fake.home / os.fsdecode(b"n\xff")).write_text("")
    listed = good(run("file", "list", "home"))
    assert "\x1b" not in listed
    assert "n\\udcff" in listed
    assert len(json.loads(good(run("--json", "file", "list", "home")))["files"]) == 2


# How a failure ends


def test_exit_codes_and_messages(run: Run, fake: FakeGateway, tmp_path: Path) -> None:
    result = run("job", "launch", "nothing")
    assert result.exit_code == 1
    request_id = fake.seen[-1].headers["X-Request-Id"]
    assert result.stderr == f"Error: you have no job nothing [request {request_id}]\n"
    assert run("file", "list", "/etc").exit_code == 1
    assert run("user", "create", MP_HOST="ftp://x").exit_code == 2
    assert run("user", "create", MP_HOST="").exit_code == 2
    assert run("user", "create", "--token-source", "login:/").exit_code == 2
    assert run("user", "create", "--token-source", "login:x", XDG_STATE_HOME=str(tmp_path)).exit_code == 4
    assert run("user", "create", MP_HOST="http://127.0.0.1:1").exit_code == 3
    assert run("user", "create", MP_ACCESS_TOKEN="bad").exit_code == 4
    assert run("user", "create", MP_ACCESS_TOKEN="").exit_code == 4
    fake.faults.extend([reply("<html>", 502)] * 5)
    assert run("user", "create").exit_code == 1
    fake.faults.extend([drop] * 5)
    assert run("user", "create").exit_code == 3


def test_local_errors_have_no_traceback(run: Run, fake: FakeGateway) -> None:
    (fake.home / "f").write_text("")
    result = run("file", "download", "home", "f", "-o", "missing/folder/f")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: No such file or directory: ")


def test_json_says_errors_as_one_document(run: Run, fake: FakeGateway) -> None:
    result = run("--json", "job", "launch", "nothing")
    document = json.loads(result.stdout)
    assert (document["code"], document["request_id"]) == ("not_found", fake.seen[-1].headers["X-Request-Id"])
    assert json.loads(run("--json", "user", "create", MP_ACCESS_TOKEN="").stdout)["code"] == "token_unavailable"


# doctor


def test_doctor_checks_everything(run: Run, fake: FakeGateway) -> None:
    printed = good(run("doctor"))
    assert "✗" not in printed
    for word in ("address", "token", "connection", "gateway", "user", "folder home", "folder software", "scheduler"):
        assert f"✓ {word}: " in printed
    assert "fake (none, without accounting)" in printed
    assert os.listdir(fake.home) == []
    assert "good" not in printed.replace("a good", "")
    document = json.loads(good(run("--json", "doctor")))
    assert document["ok"] is True


@pytest.mark.parametrize(
    ("environment", "failed", "code"),
    [
        ({"MP_HOST": "nonsense"}, "address", 2),
        ({"MP_ACCESS_TOKEN": ""}, "token", 4),
        ({"MP_HOST": "http://127.0.0.1:1"}, "connection", 3),
        ({"MP_ACCESS_TOKEN": "bad"}, "gateway", 4),
    ],
)
def test_doctor_stops_where_it_makes_no_sense_to_go_on(
    run: Run, environment: dict[str, str], failed: str, code: int
) -> None:
    result = run("--json", "doctor", **environment)
    assert result.exit_code == code
    checks = json.loads(result.stdout)["checks"]
    (bad,) = [check for check in checks if check["good"] is False]
    assert bad["name"] == failed
    assert bad["text"]
    assert all(check["good"] is None for check in checks[checks.index(bad) + 1 :])


def test_doctor_goes_on_after_a_folder_that_cannot_be_written(run: Run, fake: FakeGateway) -> None:
    refused = reply(
        '{"error": "Disk quota exceeded", "code": "file_error", "errno": "EDQUOT"}', 409, "application/json"
    )
    fake.faults.extend([None, None, None, refused])
    result = run("doctor")
    assert result.exit_code == 1
    assert "✗ folder home: Disk quota exceeded" in result.stdout
    assert "✓ scheduler" in result.stdout


def test_doctor_says_that_a_client_is_too_old(run: Run, fake: FakeGateway) -> None:
    info = {**fake.getInfo(None), "oldest_client": "99.0"}  # type: ignore[arg-type]
    fake.faults.extend([None, reply(json.dumps(info), content_type="application/json")])
    result = run("doctor")
    assert result.exit_code == 2
    assert "from version 99.0 on" in result.stdout


def test_doctor_on_a_classic_gateway_says_what_it_is(run: Run, fake: FakeGateway) -> None:
    fake.classic = True
    result = run("doctor")
    assert result.exit_code == 1
    assert "classic gateway" in result.stdout


def test_a_computer_needs_a_profile(run: Run) -> None:
    for command in ("reconcile", "resume"):
        result = run("--json", "computer", command, "cluster")
        assert result.exit_code == 2, result.output
        assert json.loads(result.stdout)["code"] == "configuration"
        assert "config.json does not exist" in result.stderr
