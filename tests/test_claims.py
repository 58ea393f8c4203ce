"""What is read of a token, whoever has made it."""

from __future__ import annotations

import base64

import pytest

from aiida_marketplace_hpc.claims import claims_of, holder, moment


def token(claims: str) -> str:
    return f"e30.{base64.urlsafe_b64encode(claims.encode()).decode().rstrip('=')}.c2ln"


def test_a_token_says_whose_it_is_and_when_it_ends() -> None:
    claims = claims_of(token('{"exp": 17, "preferred_username": "alice", "sub": "1"}'))
    assert (moment(claims, "exp"), holder(claims)) == (17.0, "alice")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "a.b.c",
        "a.b",
        token("[1]"),
        token("{"),
        token("[" * 100_000),
        "a.\N{SNOWMAN}.c",
        "a." + "A" * 5 + ".c",
    ],
)
def test_of_anything_else_nothing_is_known(text: str) -> None:
    claims = claims_of(text)
    assert (claims, moment(claims, "exp"), holder(claims)) == ({}, None, "")


@pytest.mark.parametrize("value", ["true", '"17"', "null", "[]", "NaN", "Infinity", "1" + "0" * 400])
def test_what_is_no_time_is_none(value: str) -> None:
    assert moment(claims_of(token(f'{{"exp": {value}}}')), "exp") is None
