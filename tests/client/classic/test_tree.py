"""Looking into a folder that is known only as a list of its entries, compared with a real one."""

from __future__ import annotations

import glob
import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from aiida_marketplace_hpc.client.classic.tree import Entry, Tree

_NAMES = st.sampled_from(["a", "b", "ab", ".h", "x y", "[a]", "a.txt"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
_TARGETS = st.one_of(_PATHS, _PATHS.map(lambda path: f"../{path}"), st.sampled_from([".", "..", "a/..", "../../x"]))
_PATTERNS = st.lists(
    st.sampled_from(["*", "a*", "?", "[ab]", ".*", "a", "b", "[!a]*", "[[]a]"]), min_size=1, max_size=3
)
_KINDS = {"file": os.path.isfile, "directory": os.path.isdir}


def _build(base: Path, made: list[tuple[str, str, str]]) -> Tree:
    """Make entries on the disk, as far as that is possible, and return what is there."""
    for kind, path, target in made:
        place = base / path
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                place.touch()
            elif kind == "directory":
                place.mkdir(exist_ok=True)
            else:
                place.symlink_to(target)
        except OSError:
            continue
    tree = Tree()
    for root, folders, files in os.walk(base):
        for name in folders + files:
            place = Path(root, name)
            path = str(place.relative_to(base))
            if place.is_symlink():
                leads_to = "directory" if place.is_dir() else "file" if place.is_file() else None
                tree[path] = Entry("symlink", target=os.readlink(place), leads_to=leads_to)
            else:
                tree[path] = Entry("directory" if place.is_dir() else "file")
    return tree


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["file", "directory", "symlink"]), _PATHS, _TARGETS), max_size=8),
    st.lists(_PATHS, max_size=4),
    st.lists(_PATTERNS.map("/".join), max_size=4),
)
def test_it_finds_what_is_there(made: list[tuple[str, str, str]], asked: list[str], patterns: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "out", "in")
        base.mkdir(parents=True)
        tree = _build(base, made)
        escaping = any(
            entry.kind == "symlink" and not os.path.realpath(base / path).startswith(f"{base}{os.sep}")
            for path, entry in tree.items()
        )
        if escaping:
            return  # What lies behind such a link is known by other means, or not at all.
        for path in asked:
            entry = tree.find(path)
            for kind, check in _KINDS.items():
                assert (entry is not None and entry.kind == kind) == check(base / path), path
            here = tree.find(path, follow=False)
            assert (here is not None) == os.path.lexists(base / path)
        for pattern in patterns:
            expected = sorted(
                os.path.relpath(found, base) for found in glob.glob(f"{glob.escape(str(base))}/{pattern}")
            )
            assert sorted(tree.glob(pattern)) == expected, pattern
