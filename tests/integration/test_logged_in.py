"""A daemon that lives longer than its tokens: workers share a login, and nothing is lost when it cannot be renewed."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sites import LABEL, SYSTEM, Installation, Site, publish_plugins

from aiida_marketplace_hpc.testing.aiida_profile import FAST, AiidaProfile
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine, wait_until
from aiida_marketplace_hpc.testing.oidc import OidcProvider

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]

LIFETIME = 5.0
"""Seconds that a token lives."""
LIFETIMES = 4
UNTIL_TOLD = "until test -e go; do sleep 0.1; done"
PROGRAM = str(Path(sys.executable).with_name("marketplace-hpc"))


class Provider(OidcProvider):
    """Remembers what it has issued, and approves all devices."""

    def __init__(self) -> None:
        super().__init__(lifetime=LIFETIME)
        self.issued: list[str] = []
        self.before_answer = self._approve

    def issue(self, subject: str, **options: Any) -> str:
        self.issued.append(super().issue(subject, **options))
        return self.issued[-1]

    def secrets(self) -> list[str]:
        """All tokens of all kinds so far."""
        return [*self.issued, *self._refresh]

    def _approve(self, endpoint: str) -> None:
        for code in self.user_codes():
            self.approve(code, "alice")


@dataclass
class LoggedIn(Installation):
    """An installation without a token: it has a login."""

    signed: GatewayProcess = field(kw_only=True)
    """A gateway beside the site's, that looks at signatures instead of asking the provider."""

    @property
    def token(self) -> dict[str, str]:
        return {}

    def command(self, *arguments: str) -> Any:
        """Run our own command and return its document."""
        return json.loads(self.profile.run([PROGRAM, "--json", *arguments]).stdout)

    def log_in(self) -> None:
        provider = self.site.gateway.provider
        assert provider is not None
        assert self.command("login", "here", "--issuer", provider.issuer, "--store", "file")["state"] == "good"

    def set_up(self) -> None:
        self.log_in()
        for label, gateway in ((LABEL, self.site.gateway), ("signed", self.signed)):
            made = self.command("computer", "create", label, "--url", gateway.url)
            assert made["token_source"] == "login:here"
        code = ["--label", "bash", "--computer", LABEL, "--filepath-executable", f"{SYSTEM}/bin/bash"]
        self.verdi(
            "code", "create", "core.code.installed", "-n", "--default-calc-job-plugin", "core.arithmetic.add", *code
        )
        self.run(
            "computers = [orm.load_computer(label) for label in ('cluster', 'signed')]\n"
            "for computer in computers: computer.set_minimum_job_poll_interval(0.2)\n"
            "where = {'computer': computers[1], 'filepath_executable': '/usr/bin/bash'}\n"
            "print(json.dumps(orm.InstalledCode(label='bash', **where).store().pk))"
        )


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with Provider() as provider:
        yield provider


@pytest.fixture(scope="module")
def installation(
    cluster_machine: Machine,
    provider: Provider,
    aiida_installations: Callable[..., AiidaProfile],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LoggedIn]:
    common: dict[str, Any] = {"roots": {"system": f"{SYSTEM}:ro"}, "options": ["--slots", "8"], "provider": provider}
    options = {**FAST, "transport.task_maximum_attempts": 3}
    imports = [Path(__file__).parent, publish_plugins(tmp_path_factory.mktemp("plugins"))]
    with (
        GatewayProcess(cluster_machine, auth="marketplace", **common) as gateway,
        GatewayProcess(cluster_machine, auth="oidc", **common) as signed,
        aiida_installations(options=options, import_path=imports) as profile,
    ):
        installation = LoggedIn(profile, Site(gateway, None), signed=signed)
        installation.set_up()
        installation.start_daemon(workers=2)
        yield installation
        installation.close()


def start(installation: LoggedIn, line: str, label: str = LABEL) -> int:
    return int(installation.run(f"print(json.dumps(start(orm.load_code('bash@{label}'), {line!r}).pk))"))


def facts(installation: LoggedIn, pk: int) -> dict[str, Any]:
    found: dict[str, Any] = installation.run(f"print(json.dumps(facts(orm.load_node({pk}))))")
    return found


def wait_until_running(installation: LoggedIn, pk: int) -> None:
    def running() -> bool:
        last = facts(installation, pk)["last"]
        return bool(last) and last["raw_data"].get("state") == "RUNNING"

    wait_until(running, within=60, failure=lambda: f"{facts(installation, pk)}\n{installation.profile.daemon_log()}")


def go_on(installation: LoggedIn, *pks: int) -> None:
    for pk in pks:
        installation.site.gateway.machine.write(f"{facts(installation, pk)['workdir']}/go", "")


def test_a_daemon_outlives_its_tokens(installation: LoggedIn, provider: Provider) -> None:
    gateways = (installation.site.gateway, installation.signed)
    pks = [start(installation, UNTIL_TOLD, label) for label in (LABEL, "signed") for _ in range(2)]
    for pk in pks:
        wait_until_running(installation, pk)
    before, began = provider.grants["refresh_token"], time.monotonic()
    wait_until(
        lambda: time.monotonic() - began > LIFETIMES * LIFETIME, within=60, failure=installation.profile.daemon_log
    )
    renewals, lasted = provider.grants["refresh_token"] - before, time.monotonic() - began
    go_on(installation, *pks)
    outcomes = installation.profile.wait_for(pks).values()
    assert [outcome.exit_status for outcome in outcomes] == [0] * len(pks)
    assert len(installation.profile.workers()) >= 2

    # On a busy machine a token may end on its way; the request is repeated with the next one, and nobody notices.
    refused = sum(one.status == 401 for gateway in gateways for one in gateway.requests())
    assert refused <= 2
    # Once per lifetime, however many workers there are: a token is due when a third of its life is left.
    assert LIFETIMES <= renewals <= math.ceil(lasted / (LIFETIME * 2 / 3)) + refused
    assert provider.reused == 0
    assert installation.command("doctor", "--computer", LABEL)["ok"]
    print(f"\n{renewals} renewals in {lasted:.0f} s, {sum(len(gateway.requests()) for gateway in gateways)} requests")


def test_an_outage_of_the_provider_pauses_nothing(installation: LoggedIn, provider: Provider) -> None:
    pk = start(installation, UNTIL_TOLD)
    wait_until_running(installation, pk)
    provider.outage = "unavailable"
    try:

        def undetermined() -> bool:
            return facts(installation, pk)["last"]["job_state"] == "undetermined"

        wait_until(undetermined, within=60, failure=installation.profile.daemon_log)
        last = facts(installation, pk)["last"]
        assert "identity provider" in last["raw_data"]["reason"]
        assert last["raw_data"]["last_known"]["state"] == "RUNNING"
        asked = provider.requests["token"]
        wait_until(lambda: provider.requests["token"] > asked, within=60, failure=installation.profile.daemon_log)
        assert not installation.profile.outcomes([pk])[pk].paused
    finally:
        provider.outage = None
    go_on(installation, pk)
    assert installation.profile.wait_for([pk])[pk].exit_status == 0


def test_a_dead_login_pauses_says_what_to_do_and_goes_on_after_it(installation: LoggedIn, provider: Provider) -> None:
    pk = start(installation, UNTIL_TOLD)
    wait_until_running(installation, pk)
    provider.end_logins()

    def paused() -> bool:
        return installation.profile.outcomes([pk])[pk].paused

    wait_until(paused, within=120, failure=installation.profile.daemon_log, poll=1)
    assert not installation.profile.outcomes([pk])[pk].terminated
    assert "run `marketplace-hpc login here`" in installation.verdi("process", "report", str(pk))
    (kept,) = installation.command("logins")["logins"]
    assert kept["state"].startswith("over: ")
    installation.log_in()
    assert installation.command("computer", "resume", LABEL) == {"resumed": [pk], "failed": []}
    go_on(installation, pk)
    assert installation.profile.wait_for([pk])[pk].exit_status == 0


def test_no_token_was_written_down(installation: LoggedIn, provider: Provider) -> None:
    """The login itself is the only file with one, on either side."""
    secrets = provider.secrets()
    assert len(secrets) > 20
    files = [path for path in installation.profile.path.rglob("*") if path.is_file()]
    found = {path.name for path in files for secret in secrets if secret.encode() in content(path)}
    assert found == {"here.json"}
    patterns = [word for secret in secrets for word in ("-e", secret)]
    for gateway in (installation.site.gateway, installation.signed):
        assert gateway.machine.run(["grep", "-rlF", *patterns, gateway.state]).stdout == ""
        assert not any(secret in gateway.log for secret in secrets)


def content(path: Path) -> bytes:
    """What is in a file, of a database's journal above all: it is there one moment and gone the next."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
