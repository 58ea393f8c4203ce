"""The format in which files travel: whole and verified, or refused."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiida_marketplace_hpc.bundle import Entry, Reader, write
from aiida_marketplace_hpc.errors import IntegrityError

names = st.text(min_size=1).map(lambda text: text.replace("/", "_"))
files = st.tuples(names, st.binary(max_size=2000))


def packed(contents: list[tuple[str, bytes]]) -> bytes:
    entries = [(Entry(name, "file", 0o644, len(content)), io.BytesIO(content)) for name, content in contents]
    return b"".join(write(entries))


def unpacked(data: bytes, piece: int) -> list[tuple[str, bytes]]:
    stream = io.BytesIO(data)
    return [(entry.path, b"".join(chunks)) for entry, chunks in Reader(lambda size: stream.read(min(size, piece)))]


@given(contents=st.lists(files, max_size=5), piece=st.integers(1, 5000))
def test_what_goes_in_comes_out(contents: list[tuple[str, bytes]], piece: int) -> None:
    assert unpacked(packed(contents), piece) == contents


@given(contents=st.lists(files, min_size=1, max_size=3), data=st.data())
def test_no_truncation_goes_unnoticed(contents: list[tuple[str, bytes]], data: st.DataObject) -> None:
    whole = packed(contents)
    with pytest.raises(IntegrityError):
        unpacked(whole[: data.draw(st.integers(0, len(whole) - 1))], 4096)


@given(content=st.binary(min_size=1, max_size=500), data=st.data())
def test_no_changed_byte_of_a_file_goes_unnoticed(content: bytes, data: st.DataObject) -> None:
    whole = bytearray(packed([("a", content)]))
    start = whole.index(b'"size"')
    start = whole.index(b"\n", start) + 1
    position = start + data.draw(st.integers(0, len(content) - 1))
    whole[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError):
        unpacked(bytes(whole), 4096)


def test_names_that_are_not_utf8_survive() -> None:
    name = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert unpacked(packed([(name, b"x")]), 100) == [(name, b"x")]


def test_a_file_that_shrinks_while_it_is_sent_is_no_bundle() -> None:
    with pytest.raises(IntegrityError):
        b"".join(write([(Entry("a", "file", 0o644, 10), io.BytesIO(b"short"))]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>a proxy's page</html>\n",
        b"marketplace-hpc-bundle/1\nnonsense\n",
        b"marketplace-hpc-bundle/1\n[]\n",
        b'marketplace-hpc-bundle/1\n{"path": 1, "type": "file"}\n{"end": 1}\n',
        b'marketplace-hpc-bundle/1\n{"path": "a", "type": "device"}\n{"end": 1}\n',
        b'marketplace-hpc-bundle/1\n{"path": "a", "type": "file", "size": -1}\n{"end": 1}\n',
        b'marketplace-hpc-bundle/1\n{"end": 1}\n',
        b"marketplace-hpc-bundle/1\n" + b"x" * 200_000,
    ],
)
def test_anything_malformed_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        unpacked(data, 4096)


def test_the_limit_counts_what_stands_around_the_content() -> None:
    entries = [(Entry(f"{number:03}", "file"), io.BytesIO()) for number in range(100)]
    stream = b"".join(write(iter(entries), limit=1000))
    assert 1000 < len(stream) < 1000 + 300
    reader = Reader(io.BytesIO(stream).read)
    assert 5 < len(list(reader)) < 50
    assert reader.more
