"""What of FirecREST shows through, beside the libraries that it comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.utils import secure_filename as werkzeugs

from aiida_marketplace_hpc.gateway.classic.firecrest import form_size, is_forbidden, listed, posted, secure_filename
from aiida_marketplace_hpc.gateway.files import Files
from aiida_marketplace_hpc.gateway.names import group_name, user_name
from aiida_marketplace_hpc.gateway.roots import Root, Roots
from aiida_marketplace_hpc.testing.firecrest_v1_utilities import split_listing


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_names_become_what_werkzeug_makes_of_them(name: str) -> None:
    assert secure_filename(name) == werkzeugs(name)


@pytest.mark.parametrize("name", ["x", "a b", "sub/dir/in.txt", "a%20b"])
def test_the_size_of_a_form_is_that_of_the_client_that_posts_it(name: str) -> None:
    prepared = requests.Request(
        "POST", "http://localhost", data={"targetPath": "/home/me/job"}, files={"file": (name, b"x" * 1000)}
    ).prepare()
    assert isinstance(prepared.body, bytes)
    assert form_size("/home/me/job", posted(name), 1000) == len(prepared.body)


def test_what_would_break_a_form_is_written_out() -> None:
    assert posted('a"b\nc') == "a%22b%0Ac"
    assert not is_forbidden(posted('a"b\nc'))
    assert is_forbidden('a"b')
    assert is_forbidden("")
    assert not is_forbidden("a [1]/b $%*?{}~!#=+@:,.^-_")


def test_listings_are_those_of_ls(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("12345")
    (tmp_path / "two words").write_text("")
    (tmp_path / "three words more").write_text("")
    (tmp_path / "folder").mkdir(mode=0o2750)
    (tmp_path / "link").symlink_to("plain")
    (tmp_path / "other link").symlink_to("two words")
    (tmp_path / ".hidden").write_text("")
    said = subprocess.run(
        ["ls", "-l", "--time-style=+%Y-%m-%dT%H:%M:%S", "--", str(tmp_path)],
        capture_output=True,
        text=True,
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        check=True,
    ).stdout
    entries = Files(Roots([Root("home", str(tmp_path))])).listing(str(tmp_path))
    for entry in entries:
        entry["user"], entry["group"] = user_name(entry["uid"]), group_name(entry["gid"])
    found = listed(entries, split=True)
    expected = split_listing(said)
    for row in expected:
        if row["type"] == "d":  # What a folder takes is no matter of its content.
            row["size"] = next(one["size"] for one in found if one["name"] == row["name"])
    assert found == expected
    whole = {row["name"]: row["link_target"] for row in listed(entries, split=False)}
    assert whole["three words more"] == ""
    assert whole["other link"] == "two words"
