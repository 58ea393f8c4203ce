"""What the client finds out about the way to a gateway, what it sends there, and what it never does."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.body import SMALLEST, BodyLimit
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.client.info import INFO_AGE
from aiida_marketplace_hpc.errors import FileError, IntegrityError, NotSupported, Phase, Unavailable
from aiida_marketplace_hpc.protocol import BY_NAME, CAPABILITIES, EXTENSIONS
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.faults import CutAnswer, CutRequest, FlipInAnswer, LoseAnswer, Refuse
from aiida_marketplace_hpc.testing.platform import APP_ID, Platform, offers_of_table
from aiida_marketplace_hpc.testing.relay import RelayInProcess
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from tests.client.fake_gateway import APP_ID as FAKE_APP
from tests.client.fake_gateway import FakeGateway

MIB = 1024 * 1024
JOB = {"job_name": "j", "ntasks_per_node": 1, "partition": "p", "image": "i", "executable_cmd": "c"}
NINE = [row.name for row in CAPABILITIES if row.published and row.registered]
Make = Callable[..., HpcGateway]


def client(platform: Platform, **options: object) -> HpcGateway:
    return HpcGateway(platform.url, app_id=APP_ID, token_source=StaticToken(TOKENS[ALICE]), **options)  # type: ignore[arg-type]


def asked(platform: Platform) -> list[str]:
    return [request.path.rpartition("/")[2] for request in platform.proxy.requests]


@pytest.fixture
def nine(served: ServedGateway) -> Iterator[Platform]:
    with Platform(served.url, only_published=True, undeclared="refuse", max_body=MIB) as platform:
        yield platform


# What is found out


def test_the_way_is_found_out_once(nine: Platform, served: ServedGateway) -> None:
    gateway = client(nine)
    assert gateway.extensions() == set(EXTENSIONS)
    home = gateway.info()["home"]
    assert gateway.ask("stat", path=home)["type"] == "directory"
    with pytest.raises(FileError):
        gateway.ask("stat", path=f"{home}/gone")
    gateway.cancel_job(gateway.create_job(JOB), unlaunched=True)
    assert asked(nine) == [APP_ID, "heartbeat", *["newTransformation"] * 5]
    assert [line["capability"] for line in served.requests()] == [
        "heartbeat",
        "getInfo",
        "query",
        "query",
        "newTransformation",
        "deleteTransformation",
    ]


def test_what_needs_no_addition_is_sent_as_published(nine: Platform, tmp_path: Path) -> None:
    gateway = client(nine)
    (tmp_path / "run.sh").write_text("#!/bin/sh\n")
    home = gateway.create_user()["home"]
    gateway.put_file(tmp_path / "run.sh", f"{home}/run.sh")
    jobid = gateway.submit(home, "run.sh")["jobid"]
    gateway.check_job_state(jobid)
    gateway.launch_job(jobid)
    gateway.cancel_job(jobid)
    assert asked(nine)[-5:] == [
        "newTransformation",
        "newTransformation",
        "getTransformationState",
        "updateTransformation",
        "deleteTransformation",
    ]
    published = {parameter.name for name in NINE for parameter in BY_NAME[name].parameters if parameter.published}
    for request in nine.proxy.requests:
        names = {pair.partition("=")[0] for pair in request.query.split("&") if pair}
        assert names <= published


def test_a_published_gateway_is_asked_for_its_heartbeat_and_nothing_else(fake: FakeGateway, client_of: Make) -> None:
    fake.classic = True
    fake.application = {"capabilities": [{"name": name} for name in NINE]}
    gateway = client_of(fake.url, app_id=FAKE_APP)
    assert gateway.extensions() == frozenset()
    with pytest.raises(NotSupported, match="classic"):
        gateway.info()
    with pytest.raises(NotSupported):
        gateway.query([{"op": "stat", "path": "/"}])
    assert fake.capabilities() == ["heartbeat"]
    assert fake.jobs == {}


def test_a_platform_that_does_not_say_what_is_on_offer_is_tried(
    nine: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nine, "application", lambda: {"name": "an app"})
    gateway = client(nine)
    assert gateway.extensions() == set(EXTENSIONS)
    assert asked(nine) == [APP_ID, "getInfo", "heartbeat", "newTransformation"]


def test_with_all_capabilities_on_offer_there_is_no_envelope(served: ServedGateway, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff")
    with Platform(served.url, undeclared="refuse") as platform:
        gateway = client(platform)
        home = gateway.info()["home"]
        gateway.put_file(tmp_path / "a", f"{home}/a")
        assert gateway.download_file("home", "a") == b"\xff"
        assert asked(platform) == [APP_ID, "getInfo", "createDataset", "getDataset"]
        assert all("encoding" not in request.query for request in platform.proxy.requests)


def test_a_single_capability_that_is_not_on_offer_rides_in_the_envelope(served: ServedGateway) -> None:
    with Platform(served.url, undeclared="refuse") as platform:
        del platform.offers["query"]
        gateway = client(platform)
        assert gateway.ask("jobs.active") == {"jobs": []}
        assert asked(platform) == [APP_ID, "getInfo", "newTransformation"]


def test_an_app_that_is_registered_anew_is_noticed(served: ServedGateway, tmp_path: Path) -> None:
    now = [0.0]
    (tmp_path / "a").write_bytes(os.urandom(1000))
    with Platform(served.url, undeclared="refuse") as platform:
        gateway = client(platform, clock=lambda: now[0])
        home = gateway.info()["home"]
        platform.offers = offers_of_table(published=True)
        # A refusal by the platform, which is no word of the gateway's.
        gateway.put_file(tmp_path / "a", f"{home}/a")
        assert gateway.ask("stat", path=f"{home}/a")["size"] == 1000
        assert asked(platform)[-1] == "newTransformation"
        platform.offers = offers_of_table()
        now[0] = INFO_AGE + 1
        assert gateway.ask("stat", path=f"{home}/a")["size"] == 1000
        assert asked(platform)[-3:] == [APP_ID, "getInfo", "query"]


def test_an_app_that_offers_less_is_noticed_without_a_refusal(served: ServedGateway, tmp_path: Path) -> None:
    now = [0.0]
    (tmp_path / "a").write_bytes(os.urandom(1000))
    with Platform(served.url, undeclared="drop") as platform:
        gateway = client(platform, clock=lambda: now[0])
        gateway.application()
        now[0] = INFO_AGE / 2
        home = gateway.info()["home"]
        platform.offers = offers_of_table(published=True)
        now[0] = INFO_AGE + 1  # What the gateway said is used for some time yet, but no longer what the platform said.
        (tmp_path / "folder").mkdir()
        gateway.put_tree(tmp_path / "folder", f"{home}/folder")
        # Of an upload whose parameters are dropped, this would be a file.
        assert Path(home, "folder").is_dir()
        assert asked(platform)[-4:] == [APP_ID, "heartbeat", "newTransformation", "newTransformation"]


def test_a_refusal_of_the_gateways_own_is_no_reason_to_ask_again(nine: Platform) -> None:
    gateway = client(nine)
    gateway.info()
    before = len(nine.proxy.requests)
    with pytest.raises(FileError):
        gateway.download_file("home", "gone")
    assert len(nine.proxy.requests) == before + 1


def test_a_long_list_goes_in_pieces_where_bodies_are_small(nine: Platform) -> None:
    gateway = client(nine)
    home = gateway.info()["home"]
    long = [{"op": "stat", "path": f"{home}/{'x' * 200}/{number:0800}"} for number in range(1000)]
    assert long[0]["path"] != long[1]["path"]
    errors = gateway.query([*long, {"op": "mkdir", "path": f"{home}/made"}])
    assert [getattr(error, "path", "") for error in errors[:-1]] == [operation["path"] for operation in long]
    assert errors[-1] == {}
    stopped = gateway.query([{"op": "mkdir", "path": f"{home}/more"}, *long], stop_on_error=True)
    assert [isinstance(one, FileError) for one in stopped] == [False, True]
    assert {request.status for request in nine.proxy.requests} == {200, 413}


# What breaks on the way


def test_an_upload_goes_on_where_it_broke_off(nine: Platform, served: ServedGateway, tmp_path: Path) -> None:
    gateway = client(nine, sleep=lambda _: None)
    (tmp_path / "large").write_bytes(os.urandom(3 * MIB + 17))
    home = gateway.info()["home"]
    # One body is refused as too large; then each question how much is held is followed by a body.
    for fault, number in ((CutRequest(after=400_000), 2), (LoseAnswer(), 4)):
        requests = itertools.count()
        nine.proxy.inject(fault, only=lambda _, requests=requests, number=number: next(requests) == number)
    gateway.put_file(tmp_path / "large", f"{home}/large")
    assert Path(home, "large").read_bytes() == (tmp_path / "large").read_bytes()
    whole = (3 * MIB + 17) * 4 / 3
    sent = sum(request.body for request in nine.proxy.requests if request.status != 413)
    assert sum(bool(request.faults) for request in nine.proxy.requests) == 2
    assert whole < sent < whole + MIB


@pytest.mark.parametrize("fault", [LoseAnswer(), CutAnswer(after=500_000), FlipInAnswer(at=300_000)])
def test_a_download_goes_on_where_it_broke_off(
    nine: Platform, served: ServedGateway, tmp_path: Path, fault: object
) -> None:
    gateway = client(nine, sleep=lambda _: None)
    home = Path(gateway.info()["home"])
    (home / "large").write_bytes(os.urandom(9 * MIB))
    nine.proxy.inject(fault, only=lambda request: request.path.endswith("newTransformation"))  # type: ignore[arg-type]
    gateway.get(f"{home}/large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == (home / "large").read_bytes()
    lengths = [int(line["query"].partition("length=")[2].partition("&")[0]) for line in served.requests()[2:]]
    assert set(lengths) == {4 * MIB}
    assert len(lengths) == 4


def test_what_is_not_to_be_repeated_is_not_repeated_in_the_envelope(nine: Platform) -> None:
    gateway = client(nine, sleep=lambda _: None)
    home = Path(gateway.info()["home"])
    (home / "a").write_text("a")
    nine.proxy.inject(LoseAnswer(), only=lambda request: request.path.endswith("newTransformation"))
    before = len(nine.proxy.requests)
    with pytest.raises(Unavailable):
        gateway.delete_file("home", "a", force=True)
    assert len(nine.proxy.requests) == before + 1
    nine.proxy.inject(LoseAnswer(), only=lambda request: request.path.endswith("newTransformation"))
    assert gateway.ask("usage", path=str(home))["entries"] >= 1


def test_where_the_way_cannot_be_found_out_nothing_was_asked(nine: Platform, served: ServedGateway) -> None:
    gateway = client(nine, sleep=lambda _: None)
    jobid = gateway.create_job(JOB)
    nine.proxy.inject(Refuse(503), times=None, only=lambda request: request.path.endswith("heartbeat"))
    with pytest.raises(Unavailable) as caught:
        gateway.cancel_job(jobid, unlaunched=True)
    # Else it would be taken for the gateway's word that the job is to end.
    assert caught.value.phase is Phase.NOT_SENT
    nine.proxy.clear()
    assert gateway.cancel_job(jobid, unlaunched=True)["state"] == "CANCELLED"


def test_an_answer_without_a_file_in_it_is_no_file(
    nine: Platform, served: ServedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.app.enclosed", lambda stream: stream)
    gateway = client(nine, sleep=lambda _: None)
    home = Path(gateway.info()["home"])
    (home / "a.json").write_text('{"content": "?"}')
    with pytest.raises((IntegrityError, Unavailable)):
        gateway.read_range(f"{home}/a.json", 0, 100)


# Where only text survives


@pytest.fixture
def relayed(served: ServedGateway) -> Iterator[Platform]:
    with Platform(served.url, undeclared="refuse") as platform:
        platform.messages = RelayInProcess(served.url, 2 * MIB)
        yield platform


def test_files_travel_as_base64_by_themselves(relayed: Platform, served: ServedGateway, tmp_path: Path) -> None:
    gateway = client(relayed)
    assert gateway.info()["route"] == {"text_only": True, "answer_limit": 2 * MIB}
    home = Path(gateway.info()["home"])
    content = os.urandom(4 * MIB + 1)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "large").write_bytes(content)
    for number in range(300):
        (tmp_path / "in" / f"{number}").write_bytes(b"")
    (tmp_path / "in" / "caf\udce9").write_bytes(b"\xff\0")
    gateway.put_tree(tmp_path / "in", f"{home}/in")
    gateway.get(f"{home}/in", tmp_path / "out")
    for name in ("sub/large", "caf\udce9", "299"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert gateway.read_range(f"{home}/in/sub/large", 100, 2 * MIB) == content[100 : 100 + 2 * MIB]
    assert gateway.download_file("home", "in/sub/large") == content
    assert gateway.upload_file("home", "zoë ☂", tmp_path / "out" / "299")["size"] == 0
    assert all(request.status == 200 for request in relayed.proxy.requests)
    lines = [line for line in served.requests() if line["capability"] in ("createDataset", "getDataset")]
    assert all("encoding=base64" in line["query"] for line in lines)


def test_a_name_that_is_no_text_travels_in_the_envelope(
    relayed: Platform, served: ServedGateway, tmp_path: Path
) -> None:
    gateway = client(relayed)
    home = os.fsencode(gateway.info()["home"])
    (tmp_path / "a").write_bytes(b"\xff")
    gateway.put_file(tmp_path / "a", os.fsdecode(home + b"/caf\xe9"))
    assert Path(os.fsdecode(home), "caf\udce9").read_bytes() == b"\xff"
    assert gateway.download_file("home", "caf\udce9") == b"\xff"
    gateway.delete_file("home", "caf\udce9")
    assert asked(relayed)[2:] == ["newTransformation"] * 3
    assert [line["capability"] for line in served.requests()][1:] == ["createDataset", "getDataset", "deleteDataset"]
    assert all(request.status == 200 for request in relayed.proxy.requests)


def test_where_only_the_nine_pass_as_text_the_envelope_is_text(served: ServedGateway, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(os.urandom(2 * MIB))
    with Platform(served.url, only_published=True, undeclared="refuse", max_body=MIB) as platform:
        platform.messages = RelayInProcess(served.url, 2 * MIB)
        gateway = client(platform)
        home = gateway.info()["home"]
        gateway.put_file(tmp_path / "a", f"{home}/a")
        gateway.get(f"{home}/a", tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
        assert {request.status for request in platform.proxy.requests} == {200, 413}
    assert "encoding" not in served.access_log.read_text()


def test_a_gateway_says_it_for_a_relay_that_does_not(tmp_path: Path) -> None:
    with ServedGateway(tmp_path, FakeBackend(), text_only=True) as served:
        gateway = HpcGateway(served.url, token_source=StaticToken(TOKENS[ALICE]))
        home = gateway.info()["home"]
        (tmp_path / "a").write_bytes(b"\xff" * 10)
        gateway.put_file(tmp_path / "a", f"{home}/a")
        assert gateway.download_file("home", "a") == b"\xff" * 10
        assert gateway.read_range(f"{home}/a", 2, 3) == b"\xff" * 3
        assert ["encoding=base64" in line["query"] for line in served.requests()] == [False, True, True, True]


def test_text_that_is_no_base64_is_no_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.routes.files.encoded", lambda stream: stream)
    with ServedGateway(tmp_path, FakeBackend(), text_only=True) as served:
        gateway = HpcGateway(served.url, token_source=StaticToken(TOKENS[ALICE]), sleep=lambda _: None)
        home = Path(gateway.info()["home"])
        (home / "a").write_bytes(b"\xff" * 10)
        with pytest.raises(IntegrityError, match="not base64"):
            gateway.download_file("home", "a")


def test_limits_fit_the_way_and_keep_what_was_learnt() -> None:
    limit = BodyLimit(proxied=True)
    limit.suit(coded=True, answer_limit=16 * MIB)
    assert (limit.size, limit.segment, limit.answer, limit.piece) == (4 * MIB, 4 * MIB, 4 * MIB, MIB)
    assert limit.refused(4 * MIB)
    limit.suit(coded=True, answer_limit=16 * MIB)
    assert limit.size == limit.smallest
    # A body of that size, coded and with what stands around it, fits where 1 MiB does.
    assert limit.smallest * 4 // 3 <= SMALLEST < MIB
    limit.suit(coded=True, answer_limit=MIB)
    assert limit.answer is not None
    assert (limit.answer + 256 * 1024 + 64 * 1024) * 4 / 3 < MIB
    limit.suit(coded=True, answer_limit=1)
    assert limit.answer == 1
    limit.suit(coded=False)
    assert (limit.size, limit.answer, limit.piece) == (8 * MIB, 8 * MIB, None)
