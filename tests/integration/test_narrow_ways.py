"""AiiDA over ways that let little through: a message broker that is killed in the middle, a platform with only the nine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sites import LABEL, SYSTEM, Installation, Site, publish_plugins

from aiida_marketplace_hpc.gateway.config import Settings
from aiida_marketplace_hpc.gateway.registration import registration
from aiida_marketplace_hpc.testing.aiida_profile import AiidaProfile
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine, wait_until
from aiida_marketplace_hpc.testing.platform import APP_ID, Platform
from aiida_marketplace_hpc.testing.rabbitmq import RabbitMq
from aiida_marketplace_hpc.testing.relay import RelayProcess

pytestmark = [pytest.mark.services, pytest.mark.timeout(240)]

MIB = 1024 * 1024
SECRET = "s3cret"


@pytest.fixture(scope="module")
def site(cluster_machine: Machine) -> Iterator[Site]:
    with GatewayProcess(cluster_machine, roots={"system": f"{SYSTEM}:ro"}) as gateway:
        yield Site(gateway)


@pytest.fixture(scope="module")
def relay(broker: RabbitMq, site: Site, cluster_machine: Machine) -> Iterator[RelayProcess]:
    secret = {"MARKETPLACE_HPC_RELAY_CLIENT_SECRET": SECRET}
    with RelayProcess(
        cluster_machine, broker.url, site.gateway.url, "--client-id", APP_ID, "--timeout", "15", env=secret
    ) as relay:
        yield relay


@pytest.fixture(scope="module")
def platform(broker: RabbitMq, relay: RelayProcess) -> Iterator[Platform]:
    """A platform to which the gateway's own document says that it is behind the broker."""
    settings = Settings(registration={"broker": "https://platform.example.org"})
    document = registration(settings)
    nowhere = "http://127.0.0.1:9"
    with Platform(nowhere, document, undeclared="refuse", broker=broker.url, secret=SECRET, patience=12) as platform:
        yield platform


@pytest.fixture(scope="module")
def installation(
    site: Site,
    platform: Platform,
    aiida_installations: Callable[..., AiidaProfile],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Installation]:
    imports = [Path(__file__).parent, publish_plugins(tmp_path_factory.mktemp("plugins"))]
    with aiida_installations(import_path=imports) as profile:
        installation = Installation(profile, site)
        installation.set_up()
        configure = ["computer", "configure", "marketplace_hpc", LABEL, "--non-interactive"]
        installation.verdi(*configure, "--url", platform.url, "--app-id", APP_ID)
        installation.start_daemon()
        yield installation
        installation.close()


SUBMIT = """\
import hashlib, io, random

def random_file(seed, size):
    return orm.SinglefileData(io.BytesIO(random.Random(seed).randbytes(size)))

nodes = {"large": random_file(SEED, 20 * 1024 * 1024), "odd": random_file(-SEED, 1000)}
line = '''LINE'''
files = {
    "sandbox": {"in/a/b.txt": "naïve €\\n", "in/c.txt": "c"},
    "folders": ["in/empty"],
    "local_copy_list": [["large", nodes["large"].filename, "in/large"], ["odd", nodes["odd"].filename, "in/caf\\u00e9"]],
    "retrieve_list": ["in", "count"],
}
node = start(code, line, files, nodes=nodes)
print(json.dumps(node.pk))
"""
CHECK = """\
node = orm.load_node(PK)
kept = node.outputs.retrieved.base.repository
read = lambda path: kept.get_object_content(path, mode="rb")
sent = node.inputs.nodes
print(json.dumps({
    "large": read("in/large") == sent.large.get_content(mode="rb"),
    "odd": read("in/caf\\u00e9") == sent.odd.get_content(mode="rb"),
    "made": read("in/made") == b"\\xff\\x00",
    "text": [read("in/a/b.txt").decode(), read("count").decode()],
    "folders": folders(node.outputs.retrieved),
    "logged": report(node),
}))
"""
WORK = r"echo ran >> count; printf '\\377\\000' > in/made"


STRICT = """\
strict = orm.Computer("strict", "strict", "", "marketplace_hpc", "marketplace_hpc", code.computer.get_workdir()).store()
strict.set_minimum_job_poll_interval(0.2)
strict.set_default_mpiprocs_per_machine(1)
strict.configure(url=URL, app_id=APP, token_source="env:MP_ACCESS_TOKEN", safe_interval=0, use_login_shell=False)
bash = {"computer": strict, "filepath_executable": str(code.filepath_executable)}
print(json.dumps(orm.InstalledCode(label="bash", default_calc_job_plugin="core.arithmetic.add", **bash).store().pk))
"""
ADD = """\
added = finish(ArithmeticAdd, x=orm.Int(3), y=orm.Int(4), code=orm.load_code("bash@COMPUTER"))
print(json.dumps([added.exit_status, added.outputs.sum.value]))
"""


def submit(installation: Installation, seed: int, line: str, computer: str = LABEL) -> int:
    code = SUBMIT.replace("SEED", str(seed)).replace("LINE", line)
    return int(installation.run(f"code = orm.load_code('bash@{computer}')\n{code}"))


def check(installation: Installation, pk: int) -> None:
    (outcome,) = installation.profile.wait_for([pk], timeout=150).values()
    assert outcome.exit_status == 0
    got = installation.run(CHECK.replace("PK", str(pk)))
    assert (got["large"], got["odd"], got["made"]) == (True, True, True)
    assert got["text"] == ["naïve €\n", "ran\n"]
    assert got["folders"] == ["in", "in/a", "in/empty"]


def test_a_job_with_binary_files_and_folders(installation: Installation, platform: Platform) -> None:
    before = len(platform.proxy.requests)
    assert installation.run(ADD.replace("COMPUTER", LABEL)) == [0, 7]
    check(installation, submit(installation, 1, WORK))
    requests = platform.proxy.requests[before:]
    assert {request.status for request in requests} == {200}
    assert any("encoding=base64" in request.query for request in requests)


def test_broker_and_relay_die_during_upload_run_and_retrieval(
    installation: Installation, platform: Platform, broker: RabbitMq, relay: RelayProcess, site: Site
) -> None:
    def moved(capability: str) -> int:
        asked = [request for request in platform.proxy.requests if request.path.endswith(capability)]
        return sum(request.body if capability == "createDataset" else request.answer for request in asked)

    def wait_until_moved(capability: str, before: int) -> None:
        late = f"no {capability}"
        wait_until(lambda: moved(capability) - before > 6 * MIB, within=60, failure=lambda: late, poll=0.005)

    def die() -> None:
        broker.kill()
        relay.kill()
        broker.start()
        relay.start()

    sent, fetched = moved("createDataset"), moved("getDataset")
    pk = submit(installation, 2, f"{WORK}; until test -e go; do sleep 0.1; done")
    wait_until_moved("createDataset", sent)
    die()

    def workdir() -> str | None:
        found: str | None = installation.run(f"print(json.dumps(facts(orm.load_node({pk}))))")["workdir"]
        return found

    def running() -> bool:
        path = workdir()
        return path is not None and site.gateway.machine.exists(f"{path}/count")

    wait_until(running, within=90, failure=installation.profile.daemon_log, poll=0.3)
    die()
    site.gateway.machine.write(f"{workdir()}/go", "")
    wait_until_moved("getDataset", fetched)
    die()
    check(installation, pk)
    created = [one for one in site.gateway.requests() if one.capability == "newTransformation" and one.status == 200]
    assert len(created) >= 2
    # Each time something was lost on the way.
    assert {request.status for request in platform.proxy.requests} & {502, 504}


def test_a_platform_that_passes_only_the_nine_and_is_strict_in_every_way(
    installation: Installation, site: Site
) -> None:
    strict = {"undeclared": "refuse", "known_headers_only": True, "max_body": MIB, "refuse_chunked": True}
    with Platform(site.gateway.url, only_published=True, **strict) as platform:  # type: ignore[arg-type]
        installation.run(STRICT.replace("URL", repr(platform.url)).replace("APP", repr(APP_ID)))
        assert installation.run(ADD.replace("COMPUTER", "strict")) == [0, 7]
        check(installation, submit(installation, 3, WORK, "strict"))
        assert {request.status for request in platform.proxy.requests} == {200, 413}
        assert {request.path.rpartition("/")[2] for request in platform.proxy.requests} == {
            APP_ID,
            "heartbeat",
            "newTransformation",
        }
