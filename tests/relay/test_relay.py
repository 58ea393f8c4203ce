"""The relay between a real RabbitMQ and a real gateway, and what is killed in between."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
import pytest

from aiida_marketplace_hpc.gateway.relay_messages import queue_name
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine, RigError, wait_until
from aiida_marketplace_hpc.testing.rabbitmq import RabbitMq
from aiida_marketplace_hpc.testing.relay import BrokerClient, RelayProcess

QUEUE = "c0ee3889-0b97-4083-8a7b-a1a807848437:7861589027953859"

pytestmark = pytest.mark.services

PUBLISHED = {"job_name": "j", "ntasks_per_node": 1, "partition": "p", "image": "i", "executable_cmd": "c"}
JSON = {"content-type": "application/json"}


def platform_of(broker: RabbitMq, gateway: GatewayProcess) -> BrokerClient:
    return BrokerClient(broker.url, QUEUE, {"authorization": f"Bearer {gateway.token}"})


def folder_with_script(platform: BrokerClient, name: str, script: str) -> str:
    """Make a folder with a job script in it, and say where it is."""
    query = {"filename": f"{name}/run.sh", "parents": "true"}
    assert platform.ask("PUT", "api/v1/file/upload/home", query, script).status == 200
    home = platform.ask("GET", "api/v1/info").json["home"]
    return f"{home}/{name}"


def launched(folder: str) -> str:
    return json.dumps({"folder": folder, "script": "run.sh", "launch": True})


def wait_for_end(platform: BrokerClient, jobid: str) -> str:
    """The state in which a job ended."""
    deadline = time.monotonic() + 30
    while True:
        answer = platform.ask("GET", f"api/v1/job/state/{jobid}")
        job = answer.json["job"]
        if job["state"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            return str(job["state"])
        if time.monotonic() > deadline:
            raise RigError(f"the job does not end: {job}")


def test_all_nine_capabilities(platform: BrokerClient) -> None:
    beat = platform.ask("GET", "heartbeat").json
    assert beat["message"] == "HPC-gateway-App : application running."
    # The relay marks what it hands on, and nobody else does it in its place.
    faked = platform.ask("GET", "heartbeat", headers={"X-Marketplace-Hpc-Relay": "5"}).json
    assert beat["route"] == faked["route"] == {"text_only": True, "answer_limit": 1024 * 1024}
    assert platform.ask("PUT", "api/v1/user/create").json["message"].startswith("Success")
    jobid = platform.ask("POST", "api/v1/job/create", body=json.dumps(PUBLISHED), headers=JSON).json["jobid"]

    form = '--x\r\nContent-Disposition: form-data; name="file"; filename="/home/me/a"\r\n\r\nnaïve €\r\n--x--\r\n'
    kind = {"content-type": "multipart/form-data; boundary=x"}
    uploaded = platform.ask("PUT", f"api/v1/file/upload/{jobid}", {"filename": "in put"}, form, kind)
    assert uploaded.json["message"] == "File uploaded."
    downloaded = platform.ask("GET", f"api/v1/file/download/{jobid}", {"filename": "in put"})
    assert (downloaded.status, downloaded.body) == (200, "naïve €")
    files = platform.ask("GET", f"/api/v1/job/state/{jobid}").json["files"]
    assert [file["name"] for file in files] == ["in put", "job.sh"]
    assert platform.ask("DELETE", f"api/v1/file/delete/{jobid}", {"filename": "in put"}).json == {
        "message": "File deleted."
    }
    script = platform.ask("PUT", f"api/v1/file/upload/{jobid}", {"filename": "job.sh"}, "#!/bin/sh\nsleep 60\n")
    assert script.status == 200
    assert platform.ask("PATCH", f"api/v1/job/launch/{jobid}").json["jobid"] == jobid
    assert "cancelling signal" in platform.ask("DELETE", f"api/v1/job/cancel/{jobid}").json["message"]
    assert wait_for_end(platform, jobid) == "CANCELLED"


def test_its_log_has_the_ids_of_the_gateways_and_no_secret(
    broker: RabbitMq, hidden_gateway: GatewayProcess, cluster_machine: Machine
) -> None:
    options = ["--client-id", "logged", "--log-format", "json", "--timeout", "1"]
    secret = {"MARKETPLACE_HPC_RELAY_CLIENT_SECRET": "s3cret"}
    queue = queue_name("logged", "s3cret")
    with (
        RelayProcess(cluster_machine, broker.url, hidden_gateway.url, *options, env=secret) as relay,
        BrokerClient(broker.url, queue, {"authorization": f"Bearer {hidden_gateway.token}"}) as platform,
    ):
        own = platform.ask("GET", "api/v1/info", {"x": "hidden"}, headers={"x-request-id": "of-the-client"})
        new = platform.ask("GET", "api/v1/job/state/nothing")
        hidden_gateway.pause()
        try:
            late = platform.ask("GET", "heartbeat")
        finally:
            hidden_gateway.resume()
        platform.wait(platform.send_raw(b"not json"))
        relay.terminate()
        assert relay.wait() == 0
        said = relay.log
    lines = [json.loads(line) for line in said.splitlines() if not line.startswith("relaying to ")]
    asked = [line for line in lines if "status" in line]
    assert [(line["capability"], line["path"], line["status"]) for line in asked] == [
        ("getInfo", "/api/v1/info", 200),
        ("getTransformationState", "/api/v1/job/state/nothing", 404),
        ("heartbeat", "/heartbeat", 504),
    ]
    ids = [line["request_id"] for line in asked]
    assert ids == ["of-the-client", new.json["request_id"], late.json["request_id"]]
    assert {name.lower(): text for name, text in own.headers.items()}["x-request-id"] == "of-the-client"
    assert {(line["queue"], line["redelivered"]) for line in asked} == {("the queue of logged", False)}
    assert asked[2]["duration"] >= 1
    assert [line["level"] for line in lines if line.get("message", "").startswith("rejected")] == ["warning"]
    known = {one.request_id: one.status for one in hidden_gateway.requests()}
    assert (known[ids[0]], known[ids[1]]) == (200, 404)
    for unsaid in ("s3cret", queue, broker.password, hidden_gateway.token, "hidden"):
        assert unsaid not in said


def test_errors_of_the_gateway_come_back(platform: BrokerClient) -> None:
    assert platform.ask("GET", "api/v1/job/state/nothing").status == 404
    assert platform.ask("GET", "api/v1/info", headers={"authorization": "Bearer wrong"}).status == 401
    assert platform.ask("GET", "no/such/path").json["code"] == "not_found"


def test_binary_content_survives_as_base64(platform: BrokerClient) -> None:
    content = bytes(range(256)) * 100
    query = {"filename": "binary", "encoding": "base64"}
    text = base64.b64encode(content).decode()
    assert platform.ask("PUT", "api/v1/file/upload/home", query, text).status == 200
    assert base64.b64decode(platform.ask("GET", "api/v1/file/download/home", query).body) == content
    plain = platform.ask("GET", "api/v1/file/download/home", {"filename": "binary"})
    assert (plain.status, plain.json["code"]) == (501, "not_supported")
    assert platform.ask("PUT", "api/v1/file/upload/home", {"filename": "large"}, "x" * 2**20 + "y").status == 200
    assert platform.ask("GET", "api/v1/file/download/home", {"filename": "large"}).status == 413


def test_poison_is_rejected_and_the_next_is_served(platform: BrokerClient) -> None:
    for poison in (b"", b"\xff", b"not json", b"[]", b"{}", b'{"endpoint": "../x", "method": "GET"}'):
        answer = platform.wait(platform.send_raw(poison))
        assert (answer.status, answer.json["code"]) == (400, "invalid_request")
    good = json.dumps({"endpoint": "heartbeat", "method": "GET"}).encode()
    platform.send_raw(b"not json", reply_to="")
    platform.send_raw(good, reply_to="")
    platform.send_raw(good, reply_to=QUEUE)  # The answer would be the next request.
    platform.send_raw(good, reply_to="a-queue-that-is-gone")
    assert platform.ask("GET", "heartbeat").status == 200
    assert platform.waiting() == 0


def test_a_gateway_that_is_down_or_hangs(platform: BrokerClient, hidden_gateway: GatewayProcess) -> None:
    hidden_gateway.pause()
    try:
        sent = [platform.send("GET", "heartbeat") for _ in range(4)]
        late = [platform.wait(one) for one in sent]
    finally:
        hidden_gateway.resume()
    assert {(answer.status, answer.json["retryable"]) for answer in late} == {(504, True)}
    hidden_gateway.stop()
    try:
        assert platform.ask("GET", "heartbeat").status == 503
    finally:
        hidden_gateway.start()
    assert platform.ask("GET", "heartbeat").status == 200


def _handed_on(gateway: GatewayProcess) -> int:
    """How many connections to a gateway are open."""
    port = urlsplit(gateway.url).port
    ours = [one for one in psutil.net_connections("tcp") if one.raddr and one.raddr.port == port]
    return len([one for one in ours if one.status == psutil.CONN_ESTABLISHED])


def test_it_finishes_what_is_under_way_before_it_ends(
    platform: BrokerClient, relay: RelayProcess, hidden_gateway: GatewayProcess
) -> None:
    hidden_gateway.pause()
    try:
        # More than it takes at once: what it has not taken waits for the next relay.
        sent = [platform.send("GET", "heartbeat") for _ in range(6)]
        wait_until(lambda: platform.waiting() == 2, within=10, failure=lambda: "the relay does not take four")
        # What the broker has delivered and nobody has looked at yet is given back, and would come to the next one.
        wait_until(lambda: _handed_on(hidden_gateway) == 4, within=10, failure=lambda: "four are not handed on")
        relay.terminate()
        wait_until(lambda: platform.takers() == 0, within=5, failure=lambda: "the relay still takes requests")
    finally:
        hidden_gateway.resume()
    assert relay.wait() == 0
    assert all(platform.wait(one).status == 200 for one in sent[:4])
    assert platform.waiting() == 2
    relay.start()
    assert all(platform.wait(one).status == 200 for one in sent[4:])


def test_a_relay_that_is_killed_while_jobs_are_submitted_runs_each_once(
    platform: BrokerClient, relay: RelayProcess, hidden_gateway: GatewayProcess
) -> None:
    folders = [folder_with_script(platform, f"killed-{n}", "#!/bin/sh\necho ran >> count\n") for n in range(12)]
    sent = [platform.send("POST", "api/v1/job/create", body=launched(one), headers=JSON) for one in folders]
    created = [platform.send("POST", "api/v1/job/create", body=json.dumps(PUBLISHED), headers=JSON) for _ in range(4)]
    platform.wait(sent[0])
    for times in range(3):
        relay.kill()
        relay.start()
        platform.wait(sent[times + 1])
    jobids = [platform.wait(one).json["jobid"] for one in sent[4:]]
    for jobid in jobids:
        assert wait_for_end(platform, jobid) == "COMPLETED"
    assert len({platform.wait(one).json["jobid"] for one in created}) == 4
    for n in range(12):
        # Whose answer came before is under way, or has ended.
        again = platform.ask("POST", "api/v1/job/create", body=launched(folders[n]), headers=JSON).json["jobid"]
        assert wait_for_end(platform, again) == "COMPLETED"
        assert platform.ask("GET", "api/v1/file/download/home", {"filename": f"killed-{n}/count"}).body == "ran\n"


def test_a_request_that_is_delivered_again_creates_one_job(
    platform: BrokerClient, relay: RelayProcess, hidden_gateway: GatewayProcess
) -> None:
    before = set(platform.ask("GET", "api/v1/job/").json["jobs"])
    hidden_gateway.pause()
    try:
        sent = platform.send("POST", "api/v1/job/create", body=json.dumps(PUBLISHED), headers=JSON)
        wait_until(lambda: platform.waiting() == 0, within=10, failure=lambda: "the relay does not take it")
        relay.kill()  # The request has reached the gateway, or will; nobody hears the answer.
    finally:
        hidden_gateway.resume()
    relay.start()
    jobid = platform.wait(sent).json["jobid"]
    assert set(platform.ask("GET", "api/v1/job/").json["jobs"]) - before == {jobid}
    wait_until(lambda: ", delivered again -> 200" in relay.log, within=5, failure=lambda: relay.log)


def test_a_broker_that_is_killed_and_started_again(
    broker: RabbitMq, relay: RelayProcess, hidden_gateway: GatewayProcess
) -> None:
    with platform_of(broker, hidden_gateway) as platform:
        folder = folder_with_script(platform, "broker", "#!/bin/sh\necho ran >> count\n")
        platform.send("POST", "api/v1/job/create", body=launched(folder), headers=JSON)
        ready = relay.times_ready
        broker.kill()
    broker.start()
    relay.wait_ready(ready + 1)
    with platform_of(broker, hidden_gateway) as platform:
        jobid = platform.ask("POST", "api/v1/job/create", body=launched(folder), headers=JSON).json["jobid"]
        assert wait_for_end(platform, jobid) == "COMPLETED"
        count = platform.ask("GET", "api/v1/file/download/home", {"filename": "broker/count"})
        assert count.body == "ran\n"


def test_a_queue_that_is_deleted_is_declared_again(platform: BrokerClient, relay: RelayProcess) -> None:
    ready = relay.times_ready
    platform.delete_queue()
    relay.wait_ready(ready + 1)
    assert platform.ask("GET", "heartbeat").status == 200


def test_a_wrong_password_is_said_without_repeating_it(broker: RabbitMq, hidden_gateway: GatewayProcess) -> None:
    wrong = broker.url.replace(broker.password, "guessed-wrong")
    relay = RelayProcess(broker.machine, wrong, hidden_gateway.url, "--queue", "q")
    with pytest.raises(RigError, match="refuses the name, the password") as refused:
        relay.start()
    relay.close()
    assert "guessed-wrong" not in str(refused.value)


def test_the_broker_is_spoken_to_with_tls(
    cluster_machine: Machine, hidden_gateway: GatewayProcess, certificate: Path, broker: RabbitMq
) -> None:
    cafile = f"{cluster_machine.make_directory('relay')}/ca.pem"
    cluster_machine.write(cafile, certificate.read_bytes())
    with RabbitMq(cluster_machine, certificate) as secured:
        trusting = ["--queue", "q", "--cafile", cafile]
        with (
            RelayProcess(cluster_machine, secured.tls_url, hidden_gateway.url, *trusting),
            BrokerClient(secured.url, "q") as platform,
        ):
            assert platform.ask("GET", "heartbeat").status == 200
        distrustful = RelayProcess(cluster_machine, secured.tls_url, hidden_gateway.url, "--queue", "q")
        try:
            with pytest.raises(RigError, match="CERTIFICATE_VERIFY_FAILED"):
                distrustful.start(within=4)
            assert distrustful.times_ready == 0
        finally:
            distrustful.close()
