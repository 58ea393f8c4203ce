"""What is shown of jobs and files, that one can cancel, and that nobody sees what is somebody else's (G10)."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from aiida_marketplace_hpc.gateway.people import pages
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, BOB, TOKENS, ServedGateway
from tests.gateway.people.visitors import Browser, MakeJob


@pytest.fixture
def alice(browser: Browser) -> Browser:
    browser.sign_in()
    return browser


def folder_of(served: ServedGateway, job: str) -> Path:
    found = served.gateway.ledger.get(job)
    assert found is not None
    return Path(found.folder)


def test_ones_own_jobs_are_listed_newest_first(alice: Browser, make_job: MakeJob) -> None:
    assert "no jobs" in alice.get("/").text
    jobs = [make_job(f"folder-{number}") for number in range(3)]
    make_job("of-bob", user=BOB)
    text = alice.get("/").text
    places = [text.index(f"jobs/{job}") for job in reversed(jobs)]
    assert places == sorted(places)
    assert text.count('<tr role="row">') == 4
    assert "queued" in text
    assert "fake" in text


def test_many_jobs_are_on_several_pages(alice: Browser, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.people.views.PAGE", 2)
    jobs = [make_job(f"folder-{number}", launch=False) for number in range(3)]
    first, second, third = (alice.get(f"/?page={number}").text for number in (1, 2, 3))
    assert [job in first for job in jobs] == [False, True, True]
    assert [job in second for job in jobs] == [True, False, False]
    assert ('href="./?page=2"' in first, 'href="./?page=1"' in second, "Older" in second) == (True, True, False)
    assert "no further jobs" in third
    for odd in ("0", "-1", "x", "9" * 30, "²"):
        assert alice.get(f"/?page={odd}").text == alice.get("/").text


def test_a_job_is_shown_with_its_facts_files_and_accounting(
    served: ServedGateway, alice: Browser, make_job: MakeJob, backend: FakeBackend
) -> None:
    job = make_job()
    (folder_of(served, job) / "slurm-101.out").write_text("line 1\nline 2\n")
    (folder_of(served, job) / "below").mkdir()
    (folder_of(served, job) / "link").symlink_to("run.sh")
    (folder_of(served, job) / "dead").symlink_to("nowhere")
    backend.run("101")
    running = alice.get(f"/jobs/{job}").text
    for part in (
        "running",
        "node1",
        "run.sh",
        "below",
        "link to",
        "nowhere",
        "line 1\nline 2\n",
        "follow it",
        "14 bytes",
    ):
        assert part in running, part
    assert f'href="../jobs/{job}/files/below"' in running
    assert '/tail/slurm-101.out"' in running
    assert "/dead" not in running
    backend.end("101", JobState.FAILED, 3)
    ended = alice.get(f"/jobs/{job}").text
    for part in ("failed", "<dt>Exit code</dt><dd>3</dd>", "JobID", "FAILED"):
        assert part in ended, part
    assert "Cancel" not in ended


def test_a_job_whose_folder_has_gone_is_still_shown(served: ServedGateway, alice: Browser, make_job: MakeJob) -> None:
    job = make_job()
    folder = folder_of(served, job)
    folder.rename(folder.with_name("elsewhere"))
    answer = alice.get(f"/jobs/{job}")
    assert (answer.status_code, "No such file" in answer.text) == (200, True)


def test_a_file_is_downloaded_and_never_shown_by_the_browser(
    served: ServedGateway, alice: Browser, make_job: MakeJob
) -> None:
    job = make_job()
    content = b"<script>alert(1)</script>" * 100_000
    (folder_of(served, job) / "below").mkdir()
    (folder_of(served, job) / "below" / "page.html").write_bytes(content)
    answer = alice.get(f"/jobs/{job}/files/below/page.html")
    assert answer.content == content
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Disposition"] == "attachment; filename*=UTF-8''page.html"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    listed = alice.get(f"/jobs/{job}/files/below").text
    assert f'href="../../../jobs/{job}/files/below/page.html"' in listed
    assert alice.get(f"/jobs/{job}/files/gone").status_code == 409


def test_a_tail_grows_while_the_job_runs(
    served: ServedGateway, alice: Browser, make_job: MakeJob, backend: FakeBackend
) -> None:
    job = make_job()
    backend.run("101")
    output = folder_of(served, job) / "out"
    output.write_text("one\n")
    page = f"/jobs/{job}/tail/out"
    first = alice.get(page).text
    output.write_text("one\ntwo\n")
    second = alice.get(page).text
    assert ("one\n</pre>" in first, "one\ntwo\n</pre>" in second) == (True, True)
    refresh = '<meta http-equiv="refresh"'
    assert refresh in first
    assert "?still" in first
    still = alice.get(f"{page}?still").text
    assert (refresh in still, "Follow it" in still) == (False, True)
    backend.end("101")
    assert refresh not in alice.get(page).text


def test_a_job_is_cancelled_once_by_a_form_of_this_session(
    served: ServedGateway, alice: Browser, make_job: MakeJob, backend: FakeBackend
) -> None:
    job = make_job()
    token = alice.token_on("/")
    stranger = Browser(served)
    stranger.sign_in(BOB)
    for form in ({}, {"token": ""}, {"token": "x" * 43}, {"token": stranger.token_on("/")}):
        assert alice.post(f"/jobs/{job}/cancel", **form).status_code == 403
    assert alice.get(f"/jobs/{job}/cancel").status_code == 405
    assert backend.cancelled == []
    answer = alice.post(f"/jobs/{job}/cancel", token=token)
    assert (answer.status_code, answer.headers["Location"]) == (303, f"../../jobs/{job}")
    assert backend.cancelled == ["101"]
    assert "This job is <span" in alice.get(f"/jobs/{job}").text
    assert "cancelled" in alice.get(f"/jobs/{job}").text
    # A form of an earlier session is as good as none.
    alice.post("/sign-out", token=token)
    alice.sign_in()
    assert alice.post(f"/jobs/{job}/cancel", token=token).status_code == 403


def test_a_job_that_was_never_launched_can_be_ended(alice: Browser, make_job: MakeJob) -> None:
    job = make_job(launch=False)
    assert alice.post(f"/jobs/{job}/cancel", token=alice.token_on("/")).status_code == 303
    assert "cancelled before it was launched" in alice.get(f"/jobs/{job}").text


def test_nobody_sees_what_is_somebody_elses(
    served: ServedGateway, alice: Browser, make_job: MakeJob, backend: FakeBackend
) -> None:
    job = make_job("secret-folder", user=BOB)
    (folder_of(served, job) / "out").write_text("the secret")
    token = alice.token_on("/")
    none = "a" * 24
    for path in ("", "/files/out", "/files/", "/tail/out"):
        answer, missing = alice.get(f"/jobs/{job}{path}"), alice.get(f"/jobs/{none}{path}")
        assert (answer.status_code, missing.status_code) == (404, 404)
        assert "secret" not in answer.text
    assert alice.post(f"/jobs/{job}/cancel", token=token).status_code == 404
    assert backend.cancelled == []
    signed_out = Browser(served)
    for path in ("", "/files/out", "/tail/out"):
        assert signed_out.get(f"/jobs/{job}{path}").status_code == 401
    assert signed_out.post(f"/jobs/{job}/cancel", token=token).status_code == 401


def test_no_path_leads_out_of_the_folder_of_the_job(
    served: ServedGateway, alice: Browser, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job()
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    (folder_of(served, job) / "link").symlink_to(secret)
    (folder_of(served, job).parent / "beside").write_text("the secret")
    for way in ("files", "tail"):
        for path in (
            "link",
            "%2e%2e/beside",
            "..%2fbeside",
            "x/..%2f..%2fbeside",
            "%2fetc%2fpasswd",
            str(secret).replace("/", "%2F"),
            "run.sh%00",
            "%00",
            ".marketplace-hpc",
        ):
            # Sent as it is: a browser would have resolved the dots.
            url = f"{served.url}/jobs/{job}/{way}/{path}"
            request = requests.Request("GET", url, cookies=alice.session.cookies).prepare()
            request.url = url
            answer = alice.session.send(request, timeout=20, allow_redirects=False)
            assert answer.status_code in (400, 403, 404, 409), (way, path)
            assert "the secret" not in answer.text
            assert "root:" not in answer.text


def test_the_name_of_a_root_is_no_job(alice: Browser, make_job: MakeJob) -> None:
    make_job()
    assert alice.get("/jobs/home/files/work/run.sh").status_code == 404


def test_there_is_a_word_for_every_state() -> None:
    assert set(pages.STATES) == set(JobState)


def test_times_and_sizes_are_for_people() -> None:
    spans = {0.4: "0 s", 59: "59 s", 61: "1 min 01 s", 3720: "1 h 02 min", 2 * 86400 + 3 * 3600: "2 d 03 h"}
    assert {seconds: pages.duration(seconds) for seconds in spans} == spans
    assert pages.duration(None) == ""
    sizes = {0: "0 bytes", 1: "1 byte", 1023: "1023 bytes", 1024: "1.0 KiB", 1536: "1.5 KiB", 5 * 2**40: "5.0 TiB"}
    assert {number: pages.size(number) for number in sizes} == sizes
    assert "2026-01-02 03:04:05 UTC" in pages.moment("2026-01-02T03:04:05.678+00:00")
    assert pages.moment(pages.since_epoch(1e17)) == ""


def test_every_page_is_put_together_for_everybody(alice: Browser, make_job: MakeJob) -> None:
    """Language, title, one heading of the first level, a skip link, labels, captions and scopes."""
    job = make_job()
    seen = [alice.get(path).text for path in ("/", f"/jobs/{job}", f"/jobs/{job}/files/", f"/jobs/{job}/tail/run.sh")]
    alice.session.cookies.clear()
    seen += [alice.get(path).text for path in ("/", "/sign-in", f"/jobs/{job}")]
    for text in seen:
        assert '<html lang="en">' in text
        assert (text.count("<h1>"), text.count("<main"), text.count("<title>")) == (1, 1, 1)
        assert 'class="skip" href="#content"' in text
        assert text.count("<table") == text.count("<caption>")
        assert text.count("<th ") == text.count("<th scope=")
        assert text.count("<label for=") == text.count('<input id="')
        assert "onclick" not in text
        assert "<script" not in text


def test_a_token_is_never_asked_for_in_an_address(browser: Browser) -> None:
    assert TOKENS[ALICE] not in browser.get(f"/sign-in?access={TOKENS[ALICE]}").text
    assert browser.get(f"/sign-in?access={TOKENS[ALICE]}").status_code == 200
    assert browser.secret == ""
