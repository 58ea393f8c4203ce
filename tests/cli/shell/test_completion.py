"""What TAB offers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from aiida_marketplace_hpc.cli.shell.completion import Completion
from aiida_marketplace_hpc.cli.shell.line import parse
from aiida_marketplace_hpc.cli.shell.prompt import _PromptCompleter
from aiida_marketplace_hpc.cli.shell.session import Session
from aiida_marketplace_hpc.testing.served import ServedGateway

Complete = Callable[[str], list[str]]


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def completion(session: Session, now: list[float]) -> Completion:
    return Completion(session, lambda: now[0])


@pytest.fixture
def complete(completion: Completion) -> Complete:
    """The lines that a line can become."""

    def complete(text: str) -> list[str]:
        return [text[: len(text) - found.back] + found.text for found in completion.candidates(text)]

    return complete


@pytest.fixture(autouse=True)
def files(home: Path, here: Path) -> None:
    (home / "a folder" / "deep").mkdir(parents=True)
    (home / "a folder" / "o'clock.txt").write_text("")
    (home / "a.txt").write_text("")
    (home / ".hidden").write_text("")
    (home / "link").symlink_to("a folder")
    (home / "dangling").symlink_to("nowhere")
    (here / "local.in").write_text("")
    (here / "local").mkdir()


def test_commands_and_options(complete: Complete) -> None:
    assert complete("l") == ["lcd ", "less ", "lpwd ", "ls "]
    assert complete("pwd; mk") == ["pwd; mkdir "]
    assert complete("help he") == ["help head ", "help help "]
    assert complete("help head ") == []
    assert complete("ls --") == []
    assert complete("get --k") == ["get --keep-links "]
    assert "rm -f " in complete("rm -")
    assert complete("nothing a") == []
    assert complete("exit ") == []


def test_names_on_the_cluster(complete: Complete, home: Path) -> None:
    assert complete("cat a") == ["cat a\\ folder/", "cat a.txt "]
    assert complete("cat a\\ f") == ["cat a\\ folder/"]
    assert complete("cat 'a ") == ["cat 'a folder/"]
    assert complete('cat "a folder/o') == ['cat "a folder/o\'clock.txt" ']
    assert complete("cat 'a folder/o") == ["cat 'a folder/o'\\''clock.txt' "]
    assert complete("cat a\\ folder/") == ["cat a\\ folder/deep/", "cat a\\ folder/o\\'clock.txt "]
    assert complete("cat .h") == ["cat .hidden "]
    assert complete("ls l") == ["ls link/"]
    assert complete("cat ~/a.") == ["cat ~/a.txt "]
    assert complete("cat ~") == ["cat ~/"]
    assert complete(f"ls {home}/a.t") == [f"ls {home}/a.txt "]
    assert complete("cd ") == ["cd a\\ folder/", "cd link/"]
    assert complete("rm a.txt d") == ["rm a.txt dangling "]
    for nothing in ("cat gone/", "cat /etc/", "cat a*", "ls > a", "cat x # a"):
        assert complete(nothing) == []


def test_what_is_completed_is_the_name(complete: Complete, home: Path) -> None:
    name = os.fsdecode(b"w \"'$;&|*?[]()\\\xff\n!#~.txt")
    (home / name).write_text("")
    for beginning in ("cat w", "cat 'w", 'cat "w'):
        (line,) = complete(beginning)
        assert [str(word) for word in parse(line)[0].words] == ["cat", name]


def test_a_dangling_backslash_of_a_common_beginning_goes_on(complete: Complete, home: Path) -> None:
    (home / "p q").write_text("")
    (home / "p(r").write_text("")
    assert complete("cat p") == ["cat p\\ q ", "cat p\\(r "]
    assert complete("cat p\\") == ["cat p\\ q ", "cat p\\(r "]


def test_names_on_this_machine(complete: Complete, here: Path) -> None:
    assert complete("put lo") == ["put local.in ", "put local/"]
    assert complete("put local.in l") == ["put local.in link/", "put local.in local.in ", "put local.in local/"]
    assert complete("get a.txt lo") == ["get a.txt local.in ", "get a.txt local/"]
    assert complete("lcd l") == ["lcd local/"]
    assert complete("put gone/") == []


def test_a_folder_is_listed_once_for_a_word(
    complete: Complete, home: Path, now: list[float], served: ServedGateway
) -> None:
    complete("cat a.t")
    complete("cat a.tx")
    (home / "a.txt.gz").write_text("")
    assert complete("cat a.txt") == ["cat a.txt "]
    now[0] += 10
    assert complete("cat a.txt") == ["cat a.txt ", "cat a.txt.gz "]
    served.stop()
    assert [line["capability"] for line in served.requests()].count("query") == 2


def test_without_a_connection_nothing_is_offered(complete: Complete, served: ServedGateway) -> None:
    served.stop()
    assert complete("cat a") == []


def test_the_prompt_gets_text_and_a_harmless_name(completion: Completion, home: Path) -> None:
    (home / "z\x1b[31m").write_text("")
    (found,) = _PromptCompleter(completion).get_completions(Document("cat z"), CompleteEvent())
    assert found.text.startswith("\\\x1b") or found.text.startswith("'")
    assert "\x1b" not in found.display_text
