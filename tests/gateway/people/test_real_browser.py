"""The page in a real browser, by keyboard alone: signing in at an issuer on another site, watching, cancelling."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.fixtures import give_up
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.install import install
from aiida_marketplace_hpc.testing.machine import RigError, wait_until
from aiida_marketplace_hpc.testing.oidc import OidcProvider
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from tests.gateway.people.chromium import Elsewhere, Keyboard, chromium

pytestmark = pytest.mark.services

CLIENT = "the-page"
SCRIPT = """#!/bin/sh
#SBATCH --job-name=<img/src=x/onerror=canary()>
cat hostile
number=0; while test $number -lt 40; do number=$((number + 1)); echo "line $number of the output"; done
while ! test -e stop; do number=$((number + 1)); echo "line $number of the output"; sleep 0.2; done
echo "seen the end"
sleep 600
"""
HOSTILE = """</pre><script>window.canary = 1; new Image().src = '{elsewhere}/script'</script>
<img src="{elsewhere}/picture" onerror="window.canary = 2"><svg onload="window.canary = 3"></svg>
<iframe src="{elsewhere}/frame"></iframe><link rel="stylesheet" href="{elsewhere}/style">
<meta http-equiv="refresh" content="0; url={elsewhere}/refresh"><base href="{elsewhere}/base">
<form action="{elsewhere}/form"><button autofocus>x</button></form>\x1b]0;owned\x07 turned \u202earound
"""


class Program:
    """Alice's program, with a token of the provider's."""

    def __init__(self, gateway: GatewayProcess, provider: OidcProvider) -> None:
        self._url = gateway.url
        token = provider.issue("alice", email="alice@example.org")
        self._headers = {"Authorization": f"Bearer {token}"}
        self.home = str(self.send("GET", "info")["home"])

    def send(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = requests.request(method, f"{self._url}/api/v1/{path}", headers=self._headers, timeout=30, **options)
        assert answer.ok, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def write(self, name: str, content: str) -> None:
        self.send("PUT", "file/upload/home", params={"filename": name, "parents": "true"}, data=content.encode())

    def launch(self, folder: str, script: str) -> str:
        body = {"folder": f"{self.home}/{folder}", "script": script, "launch": True}
        return str(self.send("POST", "job/create", json=body)["jobid"])

    def state(self, job: str) -> str:
        return str(self.send("GET", f"job/state/{job}")["state"])


@pytest.fixture
def provider() -> Iterator[OidcProvider]:
    with OidcProvider() as provider:
        provider.clients[CLIENT] = None
        yield provider


@pytest.fixture
def gateway(gateway_factory: Callable[..., GatewayProcess], provider: OidcProvider) -> GatewayProcess:
    return gateway_factory(provider=provider, page_client=CLIENT)


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    with Elsewhere() as elsewhere:
        yield elsewhere


@pytest.fixture
def keyboard(tmp_path: Path) -> Iterator[Keyboard]:
    try:
        install("chromium")
    except RigError as exc:
        give_up(exc)
    with chromium(tmp_path) as keyboard:
        yield keyboard


def picture(keyboard: Keyboard, name: str) -> None:
    """For people who want to look: set ``MARKETPLACE_HPC_PICTURES`` to a folder."""
    folder = os.environ.get("MARKETPLACE_HPC_PICTURES")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        keyboard.driver.save_screenshot(str(Path(folder, f"{name}.png")))


def assert_fits(keyboard: Keyboard, width: int) -> None:
    """Make sure that nobody has to scroll sideways on a screen of so many pixels."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    keyboard.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page = keyboard.driver.execute_script("return document.documentElement.scrollWidth")
        assert page <= width, keyboard.driver.current_url
        picture(keyboard, f"narrow-{keyboard.driver.title[:12]}")
    finally:
        keyboard.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_person_signs_in_watches_a_job_and_cancels_it_without_a_mouse(
    gateway: GatewayProcess, provider: OidcProvider, elsewhere: Elsewhere, keyboard: Keyboard, tmp_path: Path
) -> None:
    program = Program(gateway, provider)
    name = "a<img src=x onerror='window.canary=4'>\u202eb.txt"
    program.write("<b>work</b>/hostile", HOSTILE.replace("{elsewhere}", elsewhere.url))
    program.write(f"<b>work</b>/{name}", "harmless")
    program.write("<b>work</b>/run.sh", SCRIPT)
    job = program.launch("<b>work</b>", "run.sh")
    driver = keyboard.driver

    def assert_nothing_happened() -> None:
        assert driver.execute_script("return typeof window.canary") == "undefined"
        assert elsewhere.asked == []
        assert driver.current_url.startswith(gateway.page_url)

    driver.get(gateway.page_url)
    picture(keyboard, "1-welcome")
    assert_fits(keyboard, 320)
    keyboard.use("Sign in")
    assert driver.current_url.startswith(provider.issuer)
    keyboard.press("alice", Keys.ENTER)
    # The session's cookie is sent though the way here began at another site.
    keyboard.await_text("Your jobs")
    keyboard.await_text("running")
    assert "alice@example.org" in keyboard.text
    picture(keyboard, "2-jobs")
    assert_fits(keyboard, 320)
    [cookie] = driver.get_cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/")
    assert driver.execute_script("return document.cookie") == ""
    assert_nothing_happened()

    title = driver.find_element(By.CSS_SELECTOR, "tbody a").text
    assert title.startswith("<img")
    keyboard.use(title)
    assert driver.current_url == f"{gateway.page_url}/jobs/{job}"
    keyboard.await_text("line 1 of the output")
    assert "\\u202e" in keyboard.text
    picture(keyboard, "3-job")
    assert_fits(keyboard, 320)
    assert_nothing_happened()

    keyboard.use("follow it")
    keyboard.await_text("Loaded again every 5 seconds")
    assert HOSTILE.splitlines()[0].replace("{elsewhere}", elsewhere.url) in keyboard.text
    assert "seen the end" not in keyboard.text
    program.write("<b>work</b>/stop", "")
    # Nobody touches anything: the page is loaded again by itself.
    keyboard.await_text("seen the end")
    at_the_end = (
        "const it = document.querySelector('.screen'); return [it.scrollTop, it.scrollHeight - it.clientHeight]"
    )
    assert driver.execute_script(at_the_end)[0] == 0  # The last line, as the box is filled from below.
    picture(keyboard, "4-tail")
    assert_fits(keyboard, 320)
    assert_nothing_happened()
    keyboard.use("stop that")
    assert not driver.find_elements(By.CSS_SELECTOR, "meta[http-equiv=refresh]")
    keyboard.use(title)

    keyboard.tab_to("Download a<img src=x onerror='window.canary=4'>\\u202eb.txt")
    keyboard.press(Keys.ENTER)
    downloads = tmp_path / "downloads"

    def complete() -> bool:
        return [path.read_text() for path in downloads.iterdir() if path.suffix != ".crdownload"] == ["harmless"]

    wait_until(complete, within=30, failure=lambda: f"not downloaded: {list(downloads.iterdir())}")
    assert driver.current_url == f"{gateway.page_url}/jobs/{job}"

    # A page of another site that knows the job cannot end it.
    action = f"{gateway.page_url}/jobs/{job}/cancel"
    form = f'<form method="post" action="{action}"><input name="token" value="x"><button>Go</button></form>'
    elsewhere.page = f'<link rel="icon" href="data:,">{form}'
    driver.get(elsewhere.url)
    keyboard.use("Go")
    keyboard.await_text("Please sign in")
    elsewhere.asked.clear()
    assert program.state(job) == "RUNNING"
    # Nor is the session gone: what this page leads to is asked for by the gateway's own.
    keyboard.use("Sign in")
    keyboard.await_text("This job is running")

    keyboard.tab_to("Cancel this job…")
    keyboard.press(Keys.ENTER)
    picture(keyboard, "5-cancel")
    keyboard.use("Cancel the job")
    wait_until(lambda: program.state(job) == "CANCELLED", within=30, failure=lambda: program.state(job))
    driver.refresh()
    keyboard.await_text("This job is cancelled")
    picture(keyboard, "6-cancelled")
    assert_nothing_happened()

    keyboard.use("Sign out")
    keyboard.await_text("Sign in to see your jobs")
    driver.get(f"{gateway.page_url}/jobs/{job}")
    keyboard.await_text("Please sign in")
    picture(keyboard, "7-signed-out")
    assert driver.get_cookies() == []
    ours = [step for step in keyboard.steps if step[0] == gateway.page_url]
    assert len(ours) > 30
    assert [step for step in ours if not step[2]] == []


def test_over_tls_the_browser_keeps_cookies_for_this_host_alone(
    tmp_path: Path, backend: FakeBackend, certificate: Path, keyboard: Keyboard
) -> None:
    driver = keyboard.driver
    with ServedGateway(tmp_path, backend, certfile=certificate) as served:
        driver.get(f"{served.url}/sign-in")
        [cookie] = driver.get_cookies()
        assert (cookie["name"], cookie["secure"], cookie["sameSite"]) == ("__Host-mphpc-sign-in", True, "Lax")
        keyboard.tab_to("Development token")
        keyboard.press(TOKENS[ALICE], Keys.ENTER)
        keyboard.await_text("You have no jobs on this gateway yet.")
        [cookie] = driver.get_cookies()
        assert (cookie["name"], cookie["secure"], cookie["sameSite"]) == ("__Host-mphpc-session", True, "Strict")
        assert driver.execute_script("return document.cookie") == ""
