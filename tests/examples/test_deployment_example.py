"""The files of examples/deployment: used as they are where that is possible, checked by schema and rules where it is not."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
import yaml
from click.testing import CliRunner

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.gateway.config import Settings
from aiida_marketplace_hpc.gateway.origins import published_in, variable_of
from aiida_marketplace_hpc.gateway.relay_config import RelaySettings
from aiida_marketplace_hpc.testing.fixtures import give_up
from aiida_marketplace_hpc.testing.install import install
from aiida_marketplace_hpc.testing.machine import Machine, RigError, is_root_on_debian, wait_until
from aiida_marketplace_hpc.testing.relay import BrokerClient

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "deployment"
UNITS = ("marketplace-hpc-gateway@.service", "marketplace-hpc-relay.service")


def test_the_template_has_every_setting() -> None:
    text = (EXAMPLE / "environment.template").read_text()
    made = CliRunner().invoke(main, ["gateway", "check-config", "--template"])
    assert (made.exit_code, made.output) == (0, text)
    variables = re.findall(r"^#([A-Z_0-9]+)=$", text, re.MULTILINE)
    known = [variable_of(kind, name) for kind in (Settings, RelaySettings) for name in kind.model_fields]
    known += [one.variable for kind in (Settings, RelaySettings) for one in published_in(kind)]
    assert sorted(variables) == sorted(known)
    for variable in variables:
        assert re.search(rf"^# .+\n#{variable}=$", text, re.MULTILINE), f"{variable} is not explained"


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())
    return document


def test_the_compose_file_is_one() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(EXAMPLE / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_compose_file_names_is_there() -> None:
    services = compose()["services"]
    assert set(services) == {"database", "gateway", "proxy", "relay", "broker"}
    known = {variable_of(kind, name) for kind in (Settings, RelaySettings) for name in kind.model_fields}
    for name in ("gateway", "relay"):
        build = services[name]["build"]
        assert (EXAMPLE / build["context"] / build["dockerfile"]).samefile(EXAMPLE / "Containerfile")
        assert set(services[name]["environment"]) <= known
    json.loads(services["gateway"]["environment"]["MARKETPLACE_HPC_TRUSTED_PROXY"])
    template = services["proxy"]["volumes"][0].partition(":")[0]
    assert set(services["proxy"]["environment"]) == set(
        re.findall(r"\$\{([A-Z_]+)\}", (EXAMPLE / template).read_text())
    )
    assert services["relay"]["command"] == ["relay"]


def test_the_containerfile_keeps_to_the_rules() -> None:
    text = (EXAMPLE / "Containerfile").read_text().replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    words = [name for name, _ in steps]
    assert set(words) <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    for name, rest in steps:
        if name == "FROM":
            assert re.fullmatch(r"\S+:[\w.-]+\d[\w.-]*( AS \w+)?", rest), f"{rest} is no fixed version"
        if name == "COPY" and not rest.startswith("--from"):
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
        if name in ("ENTRYPOINT", "CMD"):
            json.loads(rest)
    assert [rest for name, rest in steps if name == "USER"] == ["${UID}"]
    assert words.index("USER") < words.index("ENTRYPOINT")
    extras = re.search(r"\.\[([a-z,]+)\]", text)
    assert extras is not None
    assert set(extras[1].split(",")) == {"gateway", "postgresql", "relay"}


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_make_sense_to_systemd(unit: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze; to enable it: sudo apt-get install systemd")
    command = Path(sys.executable).with_name("marketplace-hpc")
    text = (EXAMPLE / unit).read_text().replace("/opt/marketplace-hpc/bin/marketplace-hpc", str(command))
    assert str(command) in text
    (tmp_path / unit).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / unit)], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if unit.partition("@")[0].partition(".")[0] in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_call_commands_that_there_are(unit: str) -> None:
    calls = re.findall(r"^Exec\w+=\S+/marketplace-hpc (.*)$", (EXAMPLE / unit).read_text(), re.MULTILINE)
    assert len(calls) == 2
    for call in calls:
        done = CliRunner().invoke(main, [*call.replace("%i", "5005").split(), "--help"])
        assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def example() -> ModuleType:
    specification = importlib.util.spec_from_file_location("trial", EXAMPLE / "trial.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["trial"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trial(example: ModuleType, cluster_machine: Machine) -> Iterator[Any]:
    try:
        if is_root_on_debian():
            install("postgresql", "rabbitmq", "nginx-light")
        made = example.trial(cluster_machine)
        started = made.__enter__()
    except RigError as exc:
        give_up(exc)
    try:
        yield started
    finally:
        made.__exit__(None, None, None)


@pytest.fixture
def client(trial: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[HpcGateway]:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(trial.certificate))
    monkeypatch.setenv("MP_ACCESS_TOKEN", trial.token)
    with HpcGateway(trial.url) as client:
        yield client


@pytest.mark.services
def test_a_job_runs_through_all_of_it_while_a_gateway_is_killed(trial: Any, client: HpcGateway, tmp_path: Path) -> None:
    home = str(client.info()["home"])
    (tmp_path / "run.sh").write_text("#!/bin/sh\ncksum < large > sum\nexit 3\n")
    (tmp_path / "large").write_bytes(bytes(range(256)) * 65536 * 2)
    for name in ("run.sh", "large"):
        transfer.put_file(client, tmp_path / name, f"{home}/deployed/{name}", parents=True)
    serves = next(one for one in trial.gateways if one.requests())
    serves.kill()
    try:
        jobid = str(client.submit(f"{home}/deployed", "run.sh")["jobid"])
        wait_until(lambda: client.show_job(jobid)["final"], within=60, failure=lambda: str(client.show_job(jobid)))
    finally:
        serves.restart()
    assert client.show_job(jobid)["exit_code"] == 3
    assert str(32 * 1024**2) in serves.machine.read_text(f"{home}/deployed/sum")
    other = next(one for one in trial.gateways if one is not serves)
    assert other.requests()
    assert {one.client for one in other.requests()} == {"127.0.0.1"}


@pytest.mark.services
def test_the_form_that_was_published_passes_with_a_large_body(trial: Any, client: HpcGateway) -> None:
    client.create_user()
    url = f"{trial.url}/api/v1/file/upload/home"
    done = requests.put(
        url,
        params={"filename": "form.bin"},
        files={"file": ("form.bin", bytes(20 * 1024**2))},
        headers={"Authorization": f"Bearer {trial.token}"},
        verify=str(trial.certificate),
        timeout=60,
    )
    assert done.status_code == 200, done.text
    assert done.headers["Strict-Transport-Security"]


@pytest.mark.services
def test_what_somebody_says_about_their_address_does_not_get_through(trial: Any) -> None:
    requests.get(
        f"{trial.url}/heartbeat",
        headers={"X-Forwarded-For": "10.1.2.3", "X-Request-ID": "who-is-it"},
        verify=str(trial.certificate),
        timeout=20,
    )
    [line] = [one for gateway in trial.gateways for one in gateway.requests() if one.request_id == "who-is-it"]
    assert line.client == "127.0.0.1"


@pytest.mark.services
def test_the_broker_leads_to_the_same_jobs(trial: Any, example: ModuleType, client: HpcGateway) -> None:
    with BrokerClient(trial.broker.url, example.QUEUE, {"authorization": f"Bearer {trial.token}"}) as platform:
        listed = platform.ask("GET", "api/v1/job/")
    assert listed.status == 200
    assert set(listed.json["jobs"]) == set(client.list_jobs())
