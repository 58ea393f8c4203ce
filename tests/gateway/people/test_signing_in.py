"""Signing in with a development token, signing out, and what a browser keeps meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from aiida_marketplace_hpc.gateway.members import Members
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway
from tests.gateway.people.visitors import SESSION, Browser, MakeJob


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    """One for the tests that change nothing of it."""
    with ServedGateway(tmp_path_factory.mktemp("gateway"), FakeBackend()) as served:
        yield served


def test_somebody_signs_in_and_out(browser: Browser) -> None:
    assert "Sign in" in browser.get("/").text
    answer = browser.sign_in()
    assert answer.status_code == 200
    assert 'http-equiv="refresh" content="0; url=./"' in answer.text
    assert ALICE in browser.get("/").text
    secret = browser.secret
    out = browser.post("/sign-out", token=browser.token_on("/"))
    assert (out.status_code, out.headers["Location"]) == (303, "./")
    assert browser.secret == ""
    assert ALICE not in browser.get("/").text
    browser.secret = secret  # Somebody has kept a copy.
    assert ALICE not in browser.get("/").text


def test_a_wrong_token_is_refused(browser: Browser) -> None:
    answer = browser.post("/sign-in", token=browser.token_on("/sign-in"), access="<b>nobody's</b>")
    assert answer.status_code == 401
    assert "not accepted" in answer.text
    assert "nobody" not in answer.text
    assert browser.secret == ""


def test_a_form_of_another_page_signs_nobody_in(served: ServedGateway, browser: Browser) -> None:
    """Else a page of somebody else's could sign a visitor in as that person."""
    assert browser.post("/sign-in", access=TOKENS[ALICE]).status_code == 403
    assert browser.post("/sign-in", token="x", access=TOKENS[ALICE]).status_code == 403
    foreign = Browser(served).token_on("/sign-in")
    browser.get("/sign-in")
    assert browser.post("/sign-in", token=foreign, access=TOKENS[ALICE]).status_code == 403
    assert browser.secret == ""


def test_nobody_is_signed_out_by_another_page(served: ServedGateway, browser: Browser) -> None:
    browser.sign_in()
    assert browser.post("/sign-out").status_code == 403
    other = Browser(served)
    other.sign_in(BOB)
    assert browser.post("/sign-out", token=other.token_on("/")).status_code == 403
    assert browser.get("/sign-out").status_code == 405
    assert ALICE in browser.get("/").text


def test_a_session_that_the_browser_brought_is_never_made_good(served: ServedGateway, browser: Browser) -> None:
    """Whoever has put a cookie into somebody's browser must not be that person afterwards."""
    planted = "A" * 43
    browser.session.cookies.set(SESSION, planted, domain="127.0.0.1", path="/")
    browser.sign_in()
    assert browser.secret != planted
    thief = Browser(served)
    thief.secret = planted
    assert ALICE not in thief.get("/").text


def test_signing_in_again_ends_the_session_before(served: ServedGateway, browser: Browser) -> None:
    attacker = Browser(served)
    attacker.sign_in(BOB)
    planted = attacker.secret
    victim = Browser(served)
    victim.session.cookies.set(SESSION, planted, domain="127.0.0.1", path="/")
    # Signed in as somebody else already, the browser is sent on; the form is sent all the same.
    victim.session.cookies.clear()
    token = victim.token_on("/sign-in")
    victim.session.cookies.set(SESSION, planted, domain="127.0.0.1", path="/")
    assert victim.post("/sign-in", token=token, access=TOKENS[ALICE]).status_code == 200
    assert victim.secret != planted
    assert ALICE in victim.get("/").text
    assert BOB not in attacker.get("/").text


def cookies_of(answer: requests.Response) -> dict[str, set[str]]:
    """The attributes of each cookie that an answer sets."""
    found = {}
    for line in answer.raw.headers.getlist("Set-Cookie"):
        first, *attributes = [part.strip() for part in line.split(";")]
        found[first.partition("=")[0]] = {part.lower() for part in attributes}
    return found


def test_scripts_and_other_sites_get_no_cookie(browser: Browser) -> None:
    attempt = cookies_of(browser.get("/sign-in"))
    assert attempt == {"mphpc-sign-in": {"httponly", "path=/", "samesite=lax", "max-age=600"}}
    set_by = cookies_of(browser.sign_in())
    assert set_by["mphpc-session"] == {"httponly", "path=/", "samesite=strict"}
    assert "max-age=0" in set_by["mphpc-sign-in"]


def test_with_tls_a_cookie_is_for_this_host_alone_and_never_sent_in_the_clear(
    tmp_path: Path, backend: FakeBackend
) -> None:
    options = {"trusted_proxy": ("127.0.0.1",), "allow_dev_tokens": True}
    with ServedGateway(tmp_path, backend, **options) as served:
        headers = {"X-Forwarded-Proto": "https"}
        [(name, attributes)] = cookies_of(requests.get(f"{served.url}/sign-in", headers=headers, timeout=20)).items()
    assert name == "__Host-mphpc-sign-in"
    assert {"secure", "path=/", "httponly"} <= attributes
    assert not [one for one in attributes if one.startswith("domain")]
    folder = tmp_path / "second"
    with ServedGateway(folder, backend, page_url="https://gateway.example.org") as served:
        assert set(cookies_of(Browser(served).get("/sign-in"))) == {"__Host-mphpc-sign-in"}


def test_who_was_on_the_way_to_a_job_gets_there(browser: Browser, make_job: MakeJob) -> None:
    job = make_job()
    refused = browser.get(f"/jobs/{job}")
    assert refused.status_code == 401
    assert f'href="../sign-in?job={job}"' in refused.text
    assert f'content="0; url=./jobs/{job}"' in browser.sign_in(job=job).text
    # A click on a link at another site comes without the session; one on the page that it leads to, with it.
    again = browser.get(f"/sign-in?job={job}")
    assert (again.status_code, again.headers["Location"]) == (303, f"./jobs/{job}")


@pytest.mark.parametrize("where", ["//evil.example", "https://evil.example", "../x", "a" * 24 + "/..", "%0d%0aX: y"])
def test_nobody_is_sent_to_another_site(browser: Browser, where: str) -> None:
    answer = browser.sign_in(job=where)
    assert 'content="0; url=./"' in answer.text
    again = browser.get(f"/sign-in?job={where}")
    assert again.headers["Location"] == "./"
    assert "X" not in again.headers


def test_no_token_is_in_a_page_an_address_the_log_or_the_database(
    served: ServedGateway, browser: Browser, make_job: MakeJob
) -> None:
    job = make_job()
    answers = [browser.sign_in(), *(browser.get(path) for path in ("/", f"/jobs/{job}", f"/jobs/{job}/tail/run.sh"))]
    assert all(answer.status_code == 200 for answer in answers)
    assert not [answer.url for answer in answers if TOKENS[ALICE] in answer.text + answer.url]
    assert not [answer.url for answer in answers[1:] if browser.secret in answer.text]
    log = served.access_log.read_text()
    database = b"".join(path.read_bytes() for path in served.gateway.settings.state.glob("ledger.sqlite*"))
    for secret in (TOKENS[ALICE], browser.secret):
        assert secret not in log
        assert secret.encode() not in database


def test_the_log_has_who_did_what(served: ServedGateway, browser: Browser, make_job: MakeJob) -> None:
    job = make_job()
    browser.sign_in()
    browser.post(f"/jobs/{job}/cancel", token=browser.token_on("/"))
    browser.post(f"/jobs/{job}/cancel", token="x")
    lines = [(line["user"], line["path"], line["status"], line["outcome"]) for line in served.requests()]
    assert (ALICE, "/sign-in", 200, "ok") in lines
    assert lines[-2:] == [(ALICE, f"/jobs/{job}/cancel", 303, "ok"), (ALICE, f"/jobs/{job}/cancel", 403, "forbidden")]


def test_whoever_is_blocked_is_out_at_once(tmp_path: Path, backend: FakeBackend) -> None:
    with ServedGateway(tmp_path, backend) as served:
        browser = Browser(served)
        browser.sign_in()
        [user] = served.gateway.ledger.users()
        Members(served.gateway.ledger).block(user)
        assert browser.get("/").status_code == 403
        assert browser.get("/").status_code == 200  # The session is over.
        assert ALICE not in browser.get("/").text
        before = browser.secret
        answer = browser.sign_in()
        assert (answer.status_code, browser.secret) == (403, before)


def test_a_session_is_over_with_the_token_that_it_came_of(tmp_path: Path, backend: FakeBackend) -> None:
    with ServedGateway(tmp_path, backend) as served:
        browser = Browser(served)
        browser.sign_in()
        secret = browser.secret
    for tokens, stays in ((TOKENS, True), ({BOB: TOKENS[BOB]}, False)):
        with ServedGateway(tmp_path, backend, dev_token=tokens, account="shared") as served:
            browser = Browser(served)
            browser.secret = secret
            assert (ALICE in browser.get("/").text) is stays


def test_programs_need_their_token_all_the_same(browser: Browser) -> None:
    browser.sign_in()
    assert browser.get("/api/v1/info").status_code == 401
    assert browser.post("/api/v1/query").status_code == 401


def test_the_limits_of_a_user_hold_on_the_page(tmp_path: Path, backend: FakeBackend) -> None:
    with ServedGateway(tmp_path, backend, requests_per_second=0.2) as served:
        browser = Browser(served)
        browser.sign_in()
        answers = [browser.get("/") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert "ask less often" in answers[-1].text


def test_a_form_is_small_and_a_form(browser: Browser) -> None:
    browser.sign_in()
    assert browser.post("/sign-out", token="x" * 40_000).status_code == 413
    odd = browser.session.post(f"{browser.served.url}/sign-out", json={"token": "x"}, timeout=20)
    assert odd.status_code == 403


def test_without_pages_there_is_only_what_the_gateway_is(tmp_path: Path, backend: FakeBackend) -> None:
    with ServedGateway(tmp_path, backend, pages=False) as served:
        browser = Browser(served)
        front = browser.get("/")
        assert (front.status_code, "This is an HPC gateway" in front.text, "sign-in" in front.text) == (
            200,
            True,
            False,
        )
        for path in ("/sign-in", "/jobs/" + "a" * 24):
            assert browser.get(path).status_code == 404
