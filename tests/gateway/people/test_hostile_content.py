"""What users write is shown and does nothing: markup, scripts, control characters, odd names, endless lines."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest

from aiida_marketplace_hpc.gateway.people import pages, readable
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ServedGateway
from tests.gateway.people.visitors import Browser, MakeJob

MARKUP = (
    """"><script>alert(1)</script><img src=x onerror=alert(2)>' onmouseover='alert(3)<style>*{display:none}</style>"""
)
NAMES = (
    "<script>alert(1)<",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "{{ 7*7 }}{% raw %}",
    "javascript:alert(4)",
    "harmless\u202etxt.exe",
    "line\nbreak\ttab",
    "esc\x1b[31mred\x1b]0;title\x07",
    "?query#fragment%41&amp;",
    "  blanks  ",
    os.fsdecode(b"not-utf-8-\xff\xfe"),
    "ümläut 文件",
)
TEMPLATES = Path(pages.__file__).with_name("templates")
ALLOWED = {tag for path in TEMPLATES.glob("*.j2") for tag in re.findall(r"<([a-z0-9]+)", path.read_text())} | {"time"}
"""What our own templates are made of."""


class Seen(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("href", "action", "src")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def test_no_template_has_what_must_not_come_from_a_user() -> None:
    assert {"table", "form", "pre"} <= ALLOWED
    assert not ALLOWED & {"script", "img", "iframe", "object", "embed", "svg", "link", "b"}


def assert_is_harmless(text: str) -> Seen:
    seen = Seen(text)
    assert seen.tags <= ALLOWED
    assert not {name for name in seen.attributes if name.startswith("on") or name in ("style", "src", "srcdoc")}
    assert all(address.startswith(("./", "../", "#", "docs", "openapi", "heartbeat")) for address in seen.addresses)
    # Neither a control character nor one that turns the text around is left.
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", text
    )
    return seen


@pytest.fixture
def alice(browser: Browser) -> Browser:
    browser.sign_in()
    return browser


def folder_of(served: ServedGateway, job: str) -> Path:
    found = served.gateway.ledger.get(job)
    assert found is not None
    return Path(found.folder)


def test_hostile_names_of_files_are_shown_and_lead_to_the_files(
    served: ServedGateway, alice: Browser, make_job: MakeJob
) -> None:
    job = make_job()
    for number, name in enumerate(NAMES):
        (folder_of(served, job) / name).write_text(f"content {number}")
    os.symlink(MARKUP, folder_of(served, job) / "link")
    (folder_of(served, job) / '<b onclick="x">').mkdir()
    seen = assert_is_harmless(alice.get(f"/jobs/{job}").text)
    for shown in (
        "<script>alert(1)<",
        "{{ 7*7 }}",
        "harmless\\u202etxt.exe",
        "line\\nbreak\\ttab",
        "esc\\x1b[31mred\\x1b]0;title\\x07",
    ):
        assert shown in seen.text
    assert "not-utf-8-\\xff\\xfe" in seen.text
    for number, name in enumerate(NAMES):
        path = quote(name, errors="surrogateescape")
        assert f"../jobs/{job}/files/{path}" in seen.addresses
        assert alice.get(f"/jobs/{job}/files/{path}").text == f"content {number}"
        tail = assert_is_harmless(alice.get(f"/jobs/{job}/tail/{path}").text)
        assert f"content {number}" in tail.text
    assert_is_harmless(alice.get(f"/jobs/{job}/files/{quote('<b onclick=%22x%22>', safe='%')}").text)


def test_hostile_output_is_shown_as_it_is(served: ServedGateway, alice: Browser, make_job: MakeJob) -> None:
    job = make_job()
    written = (
        f"{MARKUP}\n</pre></div><form action=https://evil.example><input name=x>\n"
        "\x1b[2J\x1b]0;owned\x07 nul:\x00 turned:\u202eevil\u2066 wide:文\r\nprogress 1%\rprogress 2%\n"
    ).encode() + b"bytes:\xff\xc3\n{{ 7*7 }}"
    (folder_of(served, job) / "slurm-101.out").write_bytes(written)
    for path in (f"/jobs/{job}", f"/jobs/{job}/tail/slurm-101.out"):
        seen = assert_is_harmless(alice.get(path).text)
        for shown in (
            MARKUP,
            "</pre></div><form action=https://evil.example>",
            "\\x1b[2J\\x1b]0;owned\\x07 nul:\\x00 turned:\\u202eevil\\u2066 wide:文\nprogress 1%\nprogress 2%\n",
            "bytes:\\xff\\xc3\n{{ 7*7 }}",
        ):
            assert shown in seen.text


def test_hostile_words_of_a_job_are_shown(alice: Browser, make_job: MakeJob, backend: FakeBackend) -> None:
    job = make_job(folder="<script>x", script="{{config}}<img src=x>\u202e.sh")
    backend._change("101", reason=MARKUP, name=MARKUP + "\x00\x1b", partition=MARKUP, native_state=MARKUP, nodes=MARKUP)
    for path in ("/", f"/jobs/{job}", f"/jobs/{job}/tail/gone"):
        seen = assert_is_harmless(alice.get(path).text)
        assert MARKUP in seen.text or "gone" in path
    backend._change("101", columns=[MARKUP], rows=[[MARKUP]])
    assert_is_harmless(alice.get(f"/jobs/{job}").text)


def test_a_line_of_100_megabytes_costs_a_page_no_more_than_its_end(
    served: ServedGateway, alice: Browser, make_job: MakeJob
) -> None:
    job = make_job()
    with (folder_of(served, job) / "slurm-101.out").open("wb") as file:
        file.truncate(100 * 1024 * 1024)  # of NUL
        file.seek(0, os.SEEK_END)
        file.write(b"the very end")
    for path, most in ((f"/jobs/{job}", 64 * 1024), (f"/jobs/{job}/tail/slurm-101.out", 384 * 1024)):
        answer = alice.get(path)
        assert "the very end" in answer.text
        assert "MiB" in answer.text
        assert len(answer.content) < most
        assert_is_harmless(answer.text)


@pytest.mark.parametrize(
    ("content", "window", "shown", "skipped"),
    [
        (b"", 10, "", 0),
        (b"abc\n", 10, "abc\n", 0),
        (b"first\nsecond\nthird\n", 10, "third\n", 13),
        ("ää".encode() * 10, 5, "ää", 36),
        (b"\x80" * 8, 4, "\\x80" * 4, 4),
    ],
)
def test_the_end_of_a_file_begins_with_a_line_or_at_least_a_character(
    tmp_path: Path, content: bytes, window: int, shown: str, skipped: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb") as file:
        assert readable.tail(file, len(content), window) == (shown, skipped)


def test_every_page_may_load_its_own_style_and_nothing_else(alice: Browser, make_job: MakeJob) -> None:
    job = make_job()
    paths = ("/", f"/jobs/{job}", f"/jobs/{job}/files/", f"/jobs/{job}/tail/run.sh", "/jobs/none", "/sign-in")
    for path in paths:
        if path == "/sign-in":
            alice.session.cookies.clear()
        answer = alice.get(path)
        style = re.search("<style>(.*?)</style>", answer.text, re.DOTALL)
        assert style is not None, path
        digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
        assert answer.headers["Content-Security-Policy"] == (
            f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        )
        assert answer.headers["Cache-Control"] == "no-store"
