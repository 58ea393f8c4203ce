"""Token sources: what they give, what they refuse, and that nothing they say contains a token."""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from pathlib import Path

import pytest

from aiida_marketplace_hpc.client.auth import (
    CommandToken,
    FileToken,
    StaticToken,
    TokenSource,
)
from aiida_marketplace_hpc.errors import ConfigurationError, TokenUnavailable


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("first\n")
    path.chmod(0o600)
    return path


def test_environment_is_read_for_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    source = TokenSource.parse("env:SOME_TOKEN")
    monkeypatch.setenv("SOME_TOKEN", " one ")
    assert source.token() == "one"
    monkeypatch.setenv("SOME_TOKEN", "two")
    assert source.token() == "two"


def test_missing_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_TOKEN", raising=False)
    with pytest.raises(TokenUnavailable, match=r"SOME_TOKEN.*set it"):
        TokenSource.parse("env:SOME_TOKEN").token()


@pytest.mark.parametrize("value", ["two words", "line\nbreak", "caf\u00e9", "nul\x01"])
def test_what_is_not_a_token_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SOME_TOKEN", value)
    with pytest.raises(TokenUnavailable) as raised:
        TokenSource.parse("env:SOME_TOKEN").token()
    assert value not in str(raised.value)


def test_file_is_read_again_when_it_changes(token_file: Path) -> None:
    source = TokenSource.parse(f"file:{token_file}")
    assert source.token() == "first"
    replacement = token_file.with_suffix(".new")
    replacement.write_text("later\n")
    replacement.chmod(0o600)
    os.replace(replacement, token_file)
    assert source.token() == "later"


def test_file_that_others_can_read_is_refused_with_the_remedy(token_file: Path) -> None:
    source = FileToken(str(token_file))
    assert source.token() == "first"
    token_file.chmod(0o640)
    with pytest.raises(TokenUnavailable, match=f"chmod 600 {token_file}"):
        source.token()


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_file_is_refused(token_file: Path, content: str) -> None:
    token_file.write_text(content)
    with pytest.raises(TokenUnavailable, match="is empty"):
        FileToken(str(token_file)).token()


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenUnavailable, match=r"nothing cannot be read: No such file"):
        FileToken(str(tmp_path / "nothing")).token()
    with pytest.raises(TokenUnavailable, match="is not a file"):
        FileToken(str(tmp_path)).token()


def test_relative_file_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="absolute"):
        TokenSource.parse("file:token")


def test_home_is_expanded(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(token_file.parent))
    assert TokenSource.parse("file:~/token").token() == "first"


def test_command_is_run_without_a_shell(tmp_path: Path) -> None:
    script = tmp_path / "give token"
    script.write_text(f"#!{sys.executable}\nimport sys\nprint(len(sys.argv), sys.argv[1], sep='-')\n")
    script.chmod(0o700)
    assert TokenSource.parse(f"command:'{script}' '$HOME;|x'").token() == "2-$HOME;|x"


def test_command_is_used_again_for_a_minute(tmp_path: Path) -> None:
    now = 0.0
    (tmp_path / "token").write_text("one")
    source = CommandToken(f"cat {tmp_path}/token", clock=lambda: now)
    assert source.token() == "one"
    (tmp_path / "token").write_text("two")
    now = 59.0
    assert source.token() == "one"
    now = 61.0
    assert source.token() == "two"


def test_command_that_gives_a_jwt_is_used_until_its_end(tmp_path: Path) -> None:
    now = 0.0

    def jwt(end: float) -> str:
        claims = base64.urlsafe_b64encode(json.dumps({"exp": end}).encode()).decode().rstrip("=")
        return f"e30.{claims}.c2ln"

    (tmp_path / "token").write_text(jwt(1000 + 3600))
    source = CommandToken(f"cat {tmp_path}/token", clock=lambda: now, wall_clock=lambda: 1000 + now)
    first = source.token()
    # One that has expired, as far as our clock can tell.
    (tmp_path / "token").write_text(jwt(1000))
    now = 3539.0
    assert source.token() == first
    now = 3541.0
    second = source.token()
    assert second != first
    (tmp_path / "token").write_text("opaque")
    now += 9.0
    assert source.token() == second
    now += 2.0
    assert source.token() == "opaque"
    (tmp_path / "token").write_text("later")
    now += 61.0
    assert source.token() == "later"


def test_refused_token_of_a_command_is_not_used_again(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("one")
    source = CommandToken(f"cat {tmp_path}/token")
    assert source.token() == "one"
    (tmp_path / "token").write_text("two")
    source.forget("another")
    assert source.token() == "one"
    source.forget("one")
    assert source.token() == "two"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("sh -c 'echo s3cret; exit 3'", "exit code 3"),
        ("true", "printed nothing"),
        ("/nonexistent/s3cret-helper", "cannot be run: No such file"),
        ("sh -c 'echo s3cret s3cret'", "not a token"),
    ],
)
def test_failing_command_is_named_without_arguments_or_output(command: str, says: str) -> None:
    with pytest.raises(TokenUnavailable, match=says) as raised:
        TokenSource.parse(f"command:{command}").token()
    assert "s3cret" not in str(raised.value).replace("/nonexistent/s3cret-helper", "")


def test_slow_command_is_given_up() -> None:
    source = TokenSource.parse("command:sleep 30")
    began = time.monotonic()
    with pytest.raises(TokenUnavailable, match="sleep … gave no token within"):
        source.token(within=0.1)
    assert time.monotonic() - began < 5


def test_failing_command_is_not_run_again_by_everybody_who_waited(tmp_path: Path) -> None:
    now = 0.0
    source = CommandToken(f"sh -c 'echo x >> {tmp_path}/runs; exit 1'", clock=lambda: now)
    for _ in range(3):
        with pytest.raises(TokenUnavailable, match="exit code 1"):
            source.token()
    assert (tmp_path / "runs").read_text() == "x\n"
    now = 6.0
    with pytest.raises(TokenUnavailable):
        source.token()
    assert (tmp_path / "runs").read_text() == "x\nx\n"


def test_command_that_asks_is_not_answered() -> None:
    saved, (reading, writing) = os.dup(0), os.pipe()
    try:
        os.dup2(reading, 0)
        with pytest.raises(TokenUnavailable, match="printed nothing"):
            TokenSource.parse("command:head -c 1").token(within=5)
    finally:
        os.dup2(saved, 0)
        for descriptor in (saved, reading, writing):
            os.close(descriptor)


def test_login_is_a_source() -> None:
    assert repr(TokenSource.parse("login:platform")) == "<LoginToken login:platform>"


@pytest.mark.parametrize("text", ["eyJhbGciOi.s3cret", "s3cret:x", "env:", "env:eyJ.s3cret", "command:'s3cret", ""])
def test_malformed_source_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        TokenSource.parse(text)
    assert "s3cret" not in str(raised.value)


def test_no_repr_shows_a_token() -> None:
    source = StaticToken("s3cret")
    assert source.token() == "s3cret"
    assert "s3cret" not in repr(source)
    assert repr(TokenSource.parse("command:echo s3cret")) == "<CommandToken command:echo …>"
