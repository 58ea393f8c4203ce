"""What ours does where it differs from aiida-core's local transport, and that the documentation says so."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from tests.plugin.comparison import Side
from tests.plugin.conftest import Pair
from tests.plugin.differences import DIFFERENCES

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "transport.md"


@pytest.fixture
def ours(pair: Pair) -> Side:
    return pair.ours


def test_the_documentation_has_the_same_list() -> None:
    rows = re.findall(r"^\| (`.*) \| (.*) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    expected = [(", ".join(f"`{name}`" for name in row.methods), row.what, row.reason) for row in DIFFERENCES]
    assert rows == expected


def test_copy_makes_no_parents(ours: Side) -> None:
    with pytest.raises(FileNotFoundError):
        ours.transport.copy(f"{ours.remote}/d", f"{ours.remote}/gone/new")
    with pytest.raises(OSError):
        ours.transport.rename(f"{ours.remote}/d", f"{ours.remote}/gone/new")
    assert not (ours.remote / "gone").exists()


def test_copy_into_itself_is_refused(ours: Side) -> None:
    for method in (ours.transport.copy, ours.transport.copytree):
        with pytest.raises(OSError):
            method(f"{ours.remote}/d", f"{ours.remote}/d/sub")
    with pytest.raises(OSError):
        ours.transport.rename(f"{ours.remote}/d", f"{ours.remote}/todir/sub/new")
    assert sorted(os.listdir(ours.remote / "d" / "sub")) == ["b.txt"]


@pytest.mark.timeout(30)
def test_links_that_lead_back_end_at_once(ours: Side) -> None:
    # With two of them, going round forty times would be forty doublings.
    for folder in (ours.remote / "e", ours.local / "e"):
        (folder / "x").symlink_to(".")
        (folder / "y").symlink_to("../e")
    for attempt in (
        lambda: ours.transport.copy(f"{ours.remote}/e", f"{ours.remote}/new", dereference=True),
        lambda: ours.transport.copytree(f"{ours.remote}/e", f"{ours.other}/new", dereference=True),
        lambda: ours.transport.get(f"{ours.remote}/e", f"{ours.local}/new"),
        lambda: ours.transport.put(f"{ours.local}/e", f"{ours.remote}/put"),
    ):
        with pytest.raises(OSError) as info:
            attempt()
        assert info.value.errno == errno.ELOOP
    ours.transport.copy(f"{ours.remote}/e", f"{ours.remote}/copied")
    assert sorted(os.listdir(ours.remote / "copied")) == ["x", "y"]


def test_a_dangling_link_can_be_renamed_and_is_never_overwritten(ours: Side) -> None:
    with pytest.raises(FileExistsError):
        ours.transport.rename(f"{ours.remote}/f", f"{ours.remote}/dangling")
    ours.transport.rename(f"{ours.remote}/dangling", f"{ours.remote}/renamed")
    assert os.readlink(ours.remote / "renamed") == "nowhere"


def test_a_link_is_removed_and_not_what_it_leads_to(ours: Side) -> None:
    for method in (
        lambda path: ours.transport.rmtree(path),
        lambda path: ours.transport.rename(path, f"{ours.remote}/x"),
    ):
        with pytest.raises(NotADirectoryError):
            method(f"{ours.remote}/todir/")
    for name in ("todir", "tofile", "dangling"):
        ours.transport.rmtree(f"{ours.remote}/{name}")
        assert not os.path.lexists(ours.remote / name)
    assert (ours.remote / "d" / "a.txt").is_file()


def test_makedirs_on_a_file_is_refused(ours: Side) -> None:
    for ignore in (False, True):
        with pytest.raises(FileExistsError):
            ours.transport.makedirs(f"{ours.remote}/f", ignore_existing=ignore)


def test_one_match_of_a_pattern_goes_into_the_folder(ours: Side) -> None:
    ours.transport.get(f"{ours.remote}/g.d*", ours.local / "e")
    assert (ours.local / "e" / "g.dat").read_text() == "g"


def test_links_are_replaced_when_a_folder_comes_again(ours: Side) -> None:
    for _ in range(2):
        ours.transport.put(ours.local / "d", ours.remote / "e", dereference=False)
        ours.transport.get(ours.remote / "d", ours.local / "e", dereference=False)
    assert os.readlink(ours.remote / "e" / "d" / "link") == os.readlink(ours.local / "e" / "d" / "link") == "a.txt"


def test_nothing_local_is_written_through_a_link_in_a_folder(ours: Side) -> None:
    (ours.local / "e" / "d").mkdir()
    (ours.local / "e" / "d" / "a.txt").symlink_to(ours.local / "g.dat")
    ours.transport.get(ours.remote / "d", ours.local / "e")
    assert (ours.local / "g.dat").read_text() == "g"
    assert not (ours.local / "e" / "d" / "a.txt").is_symlink()


def test_a_folder_with_a_link_to_nothing_is_never_taken_for_nothing(ours: Side) -> None:
    ours.transport.symlink("nowhere", f"{ours.remote}/d/bad")
    for ignore in (False, True):
        with pytest.raises(OSError):
            ours.transport.get(ours.remote / "d", ours.local / "new", ignore_nonexisting=ignore)


def test_a_file_that_cannot_be_written_is_replaced(ours: Side) -> None:
    (ours.remote / "g.dat").chmod(0o400)
    os.link(ours.remote / "g.dat", ours.remote / "second")
    ours.transport.put(ours.local / "f", ours.remote / "g.dat")
    assert (ours.remote / "g.dat").read_text() == "content of f"
    assert (ours.remote / "second").read_text() == "g"


def test_a_folder_may_have_any_name(ours: Side) -> None:
    for name in ("blank ", "a+b(c", "[x]*"):
        (ours.remote / name).mkdir()
        (ours.remote / name / "y").touch()
        assert ours.transport.listdir(f"{ours.remote}/{name}") == ["y"]
        assert ours.transport.listdir(f"{ours.remote}/{name}", "?") == ["y"]
        assert [entry["name"] for entry in ours.transport.listdir_withattributes(f"{ours.remote}/{name}", "?")] == ["y"]


def test_no_path_is_nothing(ours: Side) -> None:
    assert not ours.transport.path_exists("")


def test_a_single_download_goes_where_a_local_link_leads(ours: Side) -> None:
    ours.transport.get(ours.remote / "f", ours.local / "dangling")
    assert (ours.local / "dangling").is_symlink()
    assert (ours.local / "nowhere").read_text() == "content of f"


def test_loops_are_an_os_error(ours: Side) -> None:
    (ours.local / "circle").symlink_to("circle")
    (ours.remote / "large").write_bytes(bytes(300_000))
    for name in ("f", "large"):
        with pytest.raises(OSError):
            ours.transport.get(ours.remote / name, ours.local / "circle")
        assert (ours.local / "circle").is_symlink()
    with pytest.raises(OSError):
        ours.transport.listdir_withattributes(f"{ours.remote}/loop")
