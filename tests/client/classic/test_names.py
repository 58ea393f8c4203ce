"""Names that survive the way to a classic gateway, and paths that are working directories."""

from __future__ import annotations

import hashlib
import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.utils import secure_filename

from aiida_marketplace_hpc.client.classic.names import (
    CANCEL,
    JOB_SCRIPT,
    can_be_asked_for,
    is_ours,
    is_plain,
    piece_name,
    working_directory,
)
from aiida_marketplace_hpc.gateway.classic.firecrest import is_forbidden


@given(st.binary())
def test_pieces_have_names_that_no_server_changes(content: bytes) -> None:
    name = piece_name(hashlib.sha256(content).hexdigest())
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)
    assert len(name) <= 100
    assert secure_filename(name) == name
    assert is_ours(name)


@given(st.one_of(st.text(st.characters(codec="utf-8"), max_size=120), st.text("aB3._-", max_size=8)))
def test_a_plain_name_is_one_that_no_server_changes(name: str) -> None:
    if is_plain(name):
        assert secure_filename(name) == name
        assert not is_forbidden(name)


@pytest.mark.parametrize("name", [JOB_SCRIPT, CANCEL, "STOP", "a.b-c_d", "x", "x" * 100])
def test_these_are_plain(name: str) -> None:
    assert is_plain(name)
    assert secure_filename(name) == name


@pytest.mark.parametrize("name", ["_x", "x_", ".x", "x.", "-x", "a b", "a..b", "ä", "", "x" * 101])
def test_these_are_not(name: str) -> None:
    assert not is_plain(name)


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_what_can_be_asked_for_is_not_forbidden(path: str) -> None:
    if can_be_asked_for(path):
        assert not is_forbidden(path)
        assert ".." not in path.split("/")


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../b", "a//b", "a;b", "new\nline", "quo'te", "not utf-8 \udcff", "", "a/"]
)
def test_these_cannot_be_asked_for(path: str) -> None:
    assert not can_be_asked_for(path)


@given(st.uuids(), st.text(max_size=20))
def test_working_directories_are_known_by_their_paths(number: uuid.UUID, rest: str) -> None:
    text = str(number)
    base = f"/home/me/aiida/{text[:2]}/{text[2:4]}/{text[4:]}"
    assert working_directory(base) == (base, "")
    assert working_directory(f"{base}/{rest}") == (base, rest)


@pytest.mark.parametrize(
    "path", ["/", "/home/me/aiida", "/home/me/aiida/ab/cd", f"/home/me/lost+found/{uuid.UUID(int=5)}"]
)
def test_other_paths_are_none(path: str) -> None:
    assert working_directory(path) is None
