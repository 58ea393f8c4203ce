"""Parts of files: from the beginning, from the end, and as they grow."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiida_marketplace_hpc.cli.shell import reading
from aiida_marketplace_hpc.cli.shell.reading import Growing, first_lines, last_lines, pieces


class File:
    """A file that counts what is read of it."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = content
        self.asked: list[tuple[int, int]] = []

    def __call__(self, offset: int, length: int) -> bytes:
        piece = self.content[offset : offset + length]
        self.asked.append((offset, len(piece)))
        return piece


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that every border is met."""
    monkeypatch.setattr(reading, "_FIRST", 3)
    monkeypatch.setattr(reading, "_PIECE", 7)
    monkeypatch.setattr(reading, "_KEPT", 10)


CONTENT = st.lists(st.sampled_from([b"\n", b"a", b"bc", b"long line", b"\0"]), max_size=40).map(b"".join)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(300))
def test_lines_are_those_of_the_whole_file(seed: int) -> None:
    chance = random.Random(seed)
    content = b"".join(chance.choices([b"\n", b"a", b"bc", b"long line", b"\n\n"], k=chance.randrange(40)))
    expected = content.splitlines(keepends=True)
    for count in (0, 1, 2, 5, 100):
        assert b"".join(first_lines(File(content), count)) == b"".join(expected[:count])
        assert b"".join(last_lines(File(content), len(content), count)) == b"".join(
            expected[len(expected) - count :] if count < len(expected) else expected
        )
    start, end = sorted(chance.randrange(len(content) + 2) for _ in range(2))
    assert b"".join(pieces(File(content), start, end)) == content[start:end]
    assert b"".join(pieces(File(content))) == content


@given(CONTENT, CONTENT)
def test_what_is_added_is_shown_once(before: bytes, added: bytes) -> None:
    file, growing = File(before), Growing()
    assert b"".join(piece or b"!" for piece in growing.news(file, len(before), 1.0)) == before
    file.content += added
    assert b"".join(piece or b"!" for piece in growing.news(file, len(file.content), 2.0)) == added


def test_nothing_new_reads_nothing() -> None:
    file, growing = File(b"x" * 1000), Growing()
    list(growing.news(file, 1000, 1.0))
    file.asked.clear()
    assert list(growing.news(file, 1000, 1.0)) == []
    assert file.asked == []
    file.content += b"yz"
    assert list(growing.news(file, 1002, 2.0)) == [b"yz"]
    assert file.asked == [(1000 - 64, 66)]
    file.asked.clear()
    assert list(growing.news(file, 1002, 3.0)) == []  # Touched.
    assert file.asked == [(1002 - 64, 64)]


@pytest.mark.parametrize(
    "now", [b"", b"short", b"another of the same len", b"another one that is longer than the one before"]
)
def test_another_file_is_shown_from_its_beginning(now: bytes) -> None:
    file, growing = File(b"the first of the files."), Growing()
    list(growing.news(file, len(file.content), 1.0))
    file.content = now
    first, *rest = growing.news(file, len(now), 2.0)
    assert first is None
    assert b"".join(piece or b"!" for piece in rest) == now
    file.content += b"more"
    assert list(growing.news(file, len(file.content), 3.0)) == [b"more"]
