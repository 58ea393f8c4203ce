"""A typed line as commands and words."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiida_marketplace_hpc.cli.shell.line import IncompleteLine, LineError, escape, parse, quoted, unfinished


def words(text: str) -> list[list[str]]:
    return [[str(word) for word in command.words] for command in parse(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  ;; \n # only a comment", []),
        ("ls -l; du", [["ls", "-l"], ["du"]]),
        ("ls;du\ncat a#b # c; d\npwd", [["ls"], ["du"], ["cat", "a#b"], ["pwd"]]),
        ("cat 'a b' \"c 'd\" e\\ f '' g\"h\"i", [["cat", "a b", "c 'd", "e f", "", "ghi"]]),
        (r"""cat "a\"b\c\\d" 'e\f' """, [["cat", 'a"b\\c\\d', "e\\f"]]),
        ("cat 'two\nlines' go\\\non", [["cat", "two\nlines", "goon"]]),
        ("cat ünï 'a;b' a\\;b", [["cat", "ünï", "a;b", "a;b"]]),
        ("cat '|' \\> \"&&\"", [["cat", "|", ">", "&&"]]),
    ],
)
def test_words(text: str, expected: list[list[str]]) -> None:
    assert words(text) == expected


def test_what_follows_only_after_success() -> None:
    commands = parse("cd a && rm b; ls && pwd &&\n\n du")
    assert [(str(command.words[0]), command.after_success) for command in commands] == [
        ("cd", False),
        ("rm", True),
        ("ls", False),
        ("pwd", True),
        ("du", True),
    ]


@pytest.mark.parametrize("text", ["cat 'a", 'cat "a', "cat a\\", "cd a &&", "cd a && # b"])
def test_lines_that_go_on(text: str) -> None:
    with pytest.raises(IncompleteLine):
        parse(text)


@pytest.mark.parametrize("text", ["cat a | grep b", "ls > a", "cat < a", "tail -f a &", "&& ls", "a && ; b", "a; && b"])
def test_what_is_not_there_says_so(text: str) -> None:
    with pytest.raises(LineError) as info:
        parse(text)
    assert not isinstance(info.value, IncompleteLine)


def test_only_what_is_not_quoted_is_a_pattern() -> None:
    (command,) = parse(r"""rm a* 'a*' "b?"c\[ 'x*'*[0-9] ~/x '~' ~ada \~ ~""")
    found = [(str(word), word.pattern, word.tilde) for word in command.words[1:]]
    assert found == [
        ("a*", "a*", False),
        ("a*", None, False),
        ("b?c[", None, False),
        ("x**[0-9]", "x[*]*[0-9]", False),
        ("~/x", None, True),
        ("~", None, False),
        ("~ada", None, False),
        ("~", None, False),
        ("~", None, True),
    ]


@given(st.lists(st.text(st.characters(exclude_characters="\0")), min_size=1))
def test_what_was_quoted_comes_back(names: list[str]) -> None:
    assert words(" ".join(["x", *map(quoted, names)])) == [["x", *names]]
    assert words(" ".join(["x", *map(shlex.quote, names)])) == [["x", *names]]


@given(st.text(st.characters(exclude_characters="\0"), min_size=1), st.sampled_from(["", "'", '"']))
def test_what_was_escaped_comes_back(name: str, quote: str) -> None:
    text = f"x {quote}{escape(name, quote)}{quote}"  # type: ignore[arg-type]
    assert words(text) == [["x", name]]
    assert parse(text)[0].words[1].pattern is None


def test_the_end_of_a_line_to_complete() -> None:
    for text, expected in [
        ("", ([], "", "")),
        ("ls", ([], "ls", "")),
        ("ls ", (["ls"], "", "")),
        ("pwd; cat a\\ b", (["cat"], "a b", "")),
        ("cat 'a b", (["cat"], "a b", "'")),
        ('put x "y', (["put", "x"], "y", '"')),
    ]:
        found = unfinished(text)
        assert found is not None
        assert (found.words, found.last, found.quote) == expected
    assert unfinished("ls # a") is None
    assert unfinished("ls a\\") is None
    assert unfinished("ls > a") is None
