"""The capabilities as methods."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import aiida_marketplace_hpc
from aiida_marketplace_hpc import protocol
from aiida_marketplace_hpc.client import gateway as gateway_module
from aiida_marketplace_hpc.client.gateway import HpcGateway, Place, Root
from aiida_marketplace_hpc.client.info import INFO_AGE
from aiida_marketplace_hpc.errors import (
    ConfigurationError,
    ConnectionFailed,
    FileError,
    Forbidden,
    GatewayError,
    InvalidRequest,
    NotFound,
    NotSupported,
    ServerFault,
)
from tests.client.fake_gateway import APP_ID, FakeGateway, drop_after, reply

Make = Callable[..., HpcGateway]
PUBLISHED = {"job_name": "a", "ntasks_per_node": 1, "partition": "p", "image": "i", "executable_cmd": "c"}


@pytest.fixture(params=["direct", "proxy"])
def routed(request: pytest.FixtureRequest, fake: FakeGateway, client_of: Make) -> HpcGateway:
    """The gateway, on both routes."""
    return client_of(fake.url, app_id=APP_ID if request.param == "proxy" else "")


def test_the_class_is_public() -> None:
    assert aiida_marketplace_hpc.HpcGateway is HpcGateway


def test_the_nine(fake: FakeGateway, routed: HpcGateway, tmp_path: Path) -> None:
    local = tmp_path / "in.txt"
    local.write_text("content")
    assert routed.heartbeat() == {"message": "HPC-gateway-App : application running."}
    assert routed.create_user()["home"] == str(fake.home)
    jobid = routed.create_job(PUBLISHED)
    assert fake.seen[-1].json == PUBLISHED
    assert routed.upload_file(jobid, "in.txt", local)["size"] == 7
    assert routed.check_job_state(jobid)["files"][0]["name"] == "in.txt"
    assert routed.download_file(jobid, "in.txt") == b"content"
    assert routed.delete_file(jobid, "in.txt") == {"message": "File deleted."}
    assert routed.launch_job(jobid)["state"] == "QUEUED"
    assert routed.cancel_job(jobid)["state"] == "CANCELLED"


def test_the_nine_on_a_classic_gateway(fake: FakeGateway, routed: HpcGateway, tmp_path: Path) -> None:
    fake.classic = True
    local = tmp_path / "in put.txt"
    local.write_bytes(b"two\r\nlines \xff")
    jobid = routed.create_job(PUBLISHED)
    assert routed.upload_file(jobid, 'a"b.txt', local) == {"message": "File uploaded."}
    form = fake.named("createDataset")[0]
    assert set(form.parameters) == {"jobid", "filename"}
    assert routed.download_file(jobid, 'a"b.txt') == b"two\r\nlines \xff"
    assert set(fake.named("getDataset")[0].parameters) == {"jobid", "filename"}
    assert len(fake.named("getInfo")) <= 1


def test_launching_is_repeated_only_where_it_does_nothing_twice(fake: FakeGateway, client_of: Make) -> None:
    client = client_of(fake.url)
    jobid = client.create_job(PUBLISHED)
    client.info()
    fake.faults.append(drop_after)
    assert client.launch_job(jobid)["state"] == "QUEUED"
    assert fake.submissions == [jobid]
    fake.classic = True
    client = client_of(fake.url)
    client.extensions()
    fake.faults.append(drop_after)
    with pytest.raises(ConnectionFailed):
        client.launch_job(jobid)


def test_creating_is_repeated_only_where_it_does_nothing_twice(fake: FakeGateway, gateway: HpcGateway) -> None:
    fake.faults.append(drop_after)
    with pytest.raises(ConnectionFailed):
        gateway.create_job(PUBLISHED)
    fake.faults.append(drop_after)
    (fake.home / "run").mkdir()
    jobid = gateway.create_job({"folder": str(fake.home / "run"), "script": "job.sh"})
    assert len(fake.jobs) == 2
    assert fake.jobs[jobid]["script"] == "job.sh"


def test_submitting_is_one_request_and_runs_once(fake: FakeGateway, gateway: HpcGateway) -> None:
    (fake.home / "run").mkdir()
    fake.faults.extend([drop_after, drop_after])
    answer = gateway.submit(str(fake.home / "run"), "_aiidasubmit.sh", client_ref="uuid")
    assert answer["state"] == "QUEUED"
    assert fake.submissions == [answer["jobid"]]
    assert fake.seen[-1].json == {
        "folder": str(fake.home / "run"),
        "script": "_aiidasubmit.sh",
        "launch": True,
        "client_ref": "uuid",
    }
    assert set(fake.capabilities()) == {"newTransformation"}


def test_the_machine_is_said_for_new_jobs_and_operations(fake: FakeGateway, client_of: Make) -> None:
    client = client_of(fake.url, machine="fake")
    client.submit(str(fake.home), "job.sh")
    assert fake.seen[-1].json["machine"] == "fake"
    client.create_job({**PUBLISHED, "machine": "eiger"})
    assert fake.seen[-1].json["machine"] == "eiger"
    client.active_jobs()
    assert fake.seen[-1].json["machine"] == "fake"
    client_of(fake.url).active_jobs()
    assert "machine" not in fake.seen[-1].json


def test_an_answer_without_an_id_is_a_fault(fake: FakeGateway, gateway: HpcGateway) -> None:
    fake.faults.append(reply("{}", content_type="application/json"))
    with pytest.raises(ServerFault, match="without the id"):
        gateway.create_job(PUBLISHED)


# Settings


def test_from_environment(fake: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="MP_HOST"):
        HpcGateway.from_environment()
    monkeypatch.setenv("MP_HOST", fake.url)
    monkeypatch.setenv("MP_APP_ID", APP_ID)
    monkeypatch.setenv("MP_ACCESS_TOKEN", "good")
    with HpcGateway.from_environment() as client:
        assert client.create_user()["username"] == "ada"
        assert "good" not in repr(client)
    assert fake.seen[0].target.startswith(f"/api/applications/proxy/{APP_ID}/")


def test_making_a_client_touches_nothing() -> None:
    HpcGateway("https://hpc.invalid", token_source="file:/nonexistent")


# What the gateway is


def test_info_is_kept_for_a_while(fake: FakeGateway, client_of: Make) -> None:
    now = 0.0
    client = client_of(fake.url, clock=lambda: now)
    assert client.info()["username"] == "ada"
    now = INFO_AGE - 1
    client.info()
    assert len(fake.seen) == 1
    client.info(refresh=True)
    now = 2 * INFO_AGE
    client.info()
    assert len(fake.seen) == 3


def test_threads_share_one_request_for_info(fake: FakeGateway, gateway: HpcGateway) -> None:
    go = threading.Event()

    def wait(handler: object, answer: Callable[[], object]) -> None:
        go.wait(5)
        handler.send(answer())  # type: ignore[attr-defined]

    fake.faults.append(wait)
    names: list[str] = []
    threads = [threading.Thread(target=lambda: names.append(gateway.info()["username"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()
    assert names == ["ada"] * 8
    assert len(fake.seen) == 1


def test_a_failed_info_is_asked_again(fake: FakeGateway, gateway: HpcGateway) -> None:
    fake.faults.append(reply('{"error": "x", "code": "forbidden"}', 403, "application/json"))
    with pytest.raises(Forbidden):
        gateway.info()
    assert gateway.info()["username"] == "ada"


def test_a_classic_gateway_has_no_info(fake: FakeGateway, gateway: HpcGateway) -> None:
    fake.classic = True
    with pytest.raises(NotSupported, match=r"classic gateway.*or the url is wrong"):
        gateway.info()
    assert gateway.extensions() == frozenset()
    with pytest.raises(NotSupported):
        gateway.require("bundle")


def test_an_extension_that_is_missing_is_named(gateway: HpcGateway) -> None:
    gateway.require("bundle")
    with pytest.raises(NotSupported, match="does not offer teleport"):
        gateway.require("teleport")


def test_paths_belong_to_the_innermost_root(gateway: HpcGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = (Root("home", "/home/ada"), Root("deep", "/home/ada/deep", read_only=True), Root("all", "/scratch/"))
    monkeypatch.setattr(HpcGateway, "roots", lambda self: roots)
    assert gateway.locate("/home/ada/x/y") == Place("home", "x/y")
    assert gateway.locate("/home//ada/./x/") == ("home", "x/")
    assert gateway.locate("/home/ada/") == ("home", ".")
    assert gateway.locate("/home/ada") == ("home", ".")
    assert gateway.locate("/home/ada/deep/z") == ("deep", "z")
    assert gateway.locate("/home/ada/deeper") == ("home", "deeper")
    assert gateway.locate("/scratch/q") == ("all", "q")
    with pytest.raises(Forbidden, match=r"/home/adam .*outside.*/home/ada, /home/ada/deep \(read-only\)"):
        gateway.locate("/home/adam")
    with pytest.raises(InvalidRequest, match="absolute"):
        gateway.locate("home/ada")


def test_the_gateway_resolves_dot_dot(fake: FakeGateway, gateway: HpcGateway) -> None:
    (fake.home / "real" / "deep").mkdir(parents=True)
    (fake.home / "link").symlink_to("real/deep")
    assert gateway.place(f"{fake.home}/link/../x") == Place("home", "real/x")
    assert fake.capabilities().count("query") == 1
    assert gateway.place(Place("job", "..")) == Place("job", "..")


# Many operations


def test_query_gives_results_and_errors_in_order(fake: FakeGateway, gateway: HpcGateway) -> None:
    (fake.home / "a").write_text("x")
    operations = [{"op": "stat", "path": str(fake.home / name)} for name in ("a", "b", "a")]
    first, second, third = gateway.query(operations)
    assert isinstance(first, dict)
    assert first["size"] == 1
    assert isinstance(second, FileError)
    assert second.errno == "ENOENT"
    assert isinstance(second.to_os_error(), FileNotFoundError)
    assert second.request_id == fake.seen[0].headers["X-Request-Id"]
    assert third == first
    assert len(gateway.query(operations, stop_on_error=True)) == 2
    assert gateway.query([]) == []
    assert len(fake.seen) == 2


def test_long_queries_are_split(fake: FakeGateway, gateway: HpcGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "MAX_OPERATIONS", 2)
    operations = [{"op": "mkdir", "path": str(fake.home / name)} for name in "abbcd"]
    results = gateway.query(operations)
    assert [isinstance(result, GatewayError) for result in results] == [False, False, True, False, False]
    assert len(fake.named("query")) == 3
    assert len(gateway.query(operations, stop_on_error=True)) == 1
    assert len(fake.named("query")) == 4


@pytest.mark.parametrize("name", [operation.name for operation in protocol.OPERATIONS.values()])
def test_without_keys_queries_are_repeated_as_the_table_says(
    fake: FakeGateway, gateway: HpcGateway, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HpcGateway, "extensions", lambda self: frozenset({"query"}))
    done = reply('{"results": [{"ok": true, "result": {}}]}', content_type="application/json")

    def lost(handler: object, answer: object) -> None:
        handler.hang_up()  # type: ignore[attr-defined]

    fake.faults.extend([lost, done])
    if protocol.OPERATIONS[name].repeatable:
        assert gateway.query([{"op": name}]) == [{}]
    else:
        with pytest.raises(ConnectionFailed):
            gateway.query([{"op": name}])


def test_without_keys_one_operation_that_is_not_repeatable_spoils_the_query(
    fake: FakeGateway, gateway: HpcGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HpcGateway, "extensions", lambda self: frozenset({"query"}))
    fake.faults.append(drop_after)
    path = str(fake.home / "x")
    with pytest.raises(ConnectionFailed):
        gateway.query([{"op": "stat", "path": path}, {"op": "mkdir", "path": path}])
    assert len(fake.seen) == 1


@pytest.mark.parametrize("answer", ["{}", '{"results": []}', '{"results": [1]}', '{"results": null}'])
def test_a_query_that_is_not_answered_whole_is_a_fault(fake: FakeGateway, gateway: HpcGateway, answer: str) -> None:
    fake.faults.append(reply(answer, content_type="application/json"))
    with pytest.raises(ServerFault, match="every operation"):
        gateway.ask("stat", path="/x")


def test_ask_raises_and_leaves_out_what_is_none(fake: FakeGateway, gateway: HpcGateway) -> None:
    with pytest.raises(FileError, match="No such file"):
        gateway.ask("stat", path=str(fake.home / "nothing"), follow=None)
    assert fake.seen[0].json["operations"] == [{"op": "stat", "path": str(fake.home / "nothing")}]


# Jobs


def test_jobs(fake: FakeGateway, routed: HpcGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    jobid = routed.submit(str(fake.home), "job.sh")["jobid"]
    assert routed.show_job(jobid)["accounting"]["rows"] == [["1", "RUNNING"]]
    assert [job["jobid"] for job in routed.active_jobs()] == [jobid]
    monkeypatch.setattr(gateway_module, "MAX_JOBIDS", 1)
    before = len(fake.seen)
    states = routed.job_states([jobid, "nothing"])
    assert states["jobs"][jobid]["state"] == "QUEUED"
    assert states["unknown"] == ["nothing"]
    assert len(fake.seen) == before + 2
    with pytest.raises(NotFound):
        routed.show_job("nothing")


def test_waiting_is_bounded(fake: FakeGateway, gateway: HpcGateway) -> None:
    jobid = gateway.submit(str(fake.home), "job.sh")["jobid"]
    gateway.show_job(jobid, wait=60)
    assert fake.seen[-1].json["operations"][0]["wait"] == 10


def test_lists_that_the_proxy_does_not_offer(fake: FakeGateway, gateway: HpcGateway, client_of: Make) -> None:
    jobid = gateway.create_job(PUBLISHED)
    Path(fake.jobs[jobid]["folder"], "sub").mkdir()
    Path(fake.jobs[jobid]["folder"], "sub", "f").write_text("")
    proxied = client_of(fake.url, app_id=APP_ID)
    assert list(gateway.list_jobs()) == [jobid]
    assert [file["name"] for file in gateway.list_files(jobid, "sub")] == ["f"]
    assert [file["name"] for file in proxied.list_files(jobid)] == ["sub"]
    with pytest.raises(NotSupported, match="listJobs"):
        proxied.list_jobs()
    with pytest.raises(NotSupported, match="listFiles"):
        proxied.list_files(jobid, "sub")


def test_deleting_is_not_repeated_by_itself(fake: FakeGateway, gateway: HpcGateway) -> None:
    (fake.home / "x").write_text("")
    fake.faults.append(drop_after)
    with pytest.raises(ConnectionFailed):
        gateway.delete_file("home", "x")
    assert len(fake.seen) == 1
