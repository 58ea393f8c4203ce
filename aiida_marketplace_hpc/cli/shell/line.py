"""A line as it is typed, as commands with words.

The rules are those of a POSIX shell as far as they go: blanks separate words, quotes and backslashes keep characters from
meaning anything, ``;`` and line ends separate commands, ``&&`` goes on only after success, ``#`` begins a comment. The
standard library's ``shlex`` splits words the same way, but forgets what was quoted: with it, ``rm 'a*'`` would remove more
than the one file that it names. There are no variables, pipes or redirections.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

_BLANK = " \t"
_PLAIN = re.compile(r"[\w@%+=:,./^{}-]", re.ASCII)
_MAGIC = "*?["
_FOREIGN = {
    "|": "there are no pipes here (but marketplace-hpc shell -c 'cat FILE' | PROGRAM)",
    "<": "there are no redirections here (put LOCAL REMOTE uploads a file)",
    ">": "there are no redirections here (get REMOTE LOCAL downloads a file)",
    "&": "nothing runs in the background here",
}

Quote = Literal["", "'", '"']


class LineError(Exception):
    """The line cannot be understood; the message says why and what to do."""


class IncompleteLine(LineError):
    """The line goes on: a quotation mark is open, or something must follow."""


class Word(str):
    """A word without its quotes.

    :ivar pattern: the shell pattern that it is, with what was quoted made literal; ``None`` for a plain word.
    :ivar tilde: whether it begins with ``~`` for the home.
    """

    pattern: str | None
    tilde: bool

    def __new__(cls, text: str, pattern: str | None = None, tilde: bool = False) -> Word:
        word = super().__new__(cls, text)
        word.pattern = pattern
        word.tilde = tilde
        return word


@dataclass
class Command:
    """One command of a line.

    :param after_success: whether it is left out when the one before failed.
    """

    words: list[Word] = field(default_factory=list)
    after_success: bool = False


@dataclass(frozen=True)
class Unfinished:
    """What the end of a line is in the middle of, to be completed.

    :param words: the command's words before this one.
    :param quote: the quotation mark that is still open.
    :param last: the word as far as it goes; empty after a blank.
    """

    words: list[Word]
    last: Word
    quote: Quote


def parse(text: str) -> list[Command]:
    """Split a line, or several, into commands; those without words are left out.

    :raises IncompleteLine: a further line is needed.
    :raises LineError: the line asks for something that is not there.
    """
    scanner = _Scanner(text)
    scanner.run()
    if scanner.quote:
        raise IncompleteLine(f"the quotation mark {scanner.quote} is not closed")
    if scanner.escaped:
        raise IncompleteLine("nothing follows the backslash at the end")
    scanner.end_word()
    last = scanner.commands[-1]
    if last.after_success and not last.words:
        raise IncompleteLine("nothing follows &&")
    return [command for command in scanner.commands if command.words]


def unfinished(text: str) -> Unfinished | None:
    """Look at a line up to the cursor; ``None`` where there is nothing to complete."""
    scanner = _Scanner(text)
    try:
        scanner.run()
    except LineError:
        return None
    if scanner.escaped or scanner.comment:
        return None
    words = list(scanner.commands[-1].words)
    return Unfinished(words, scanner.word(), scanner.quote)


def escape(text: str, quote: Quote = "") -> str:
    """Write characters so that they stand for themselves, after the quotation mark ``quote`` where one is open."""
    if quote == "'":
        return text.replace("'", "'\\''")
    if quote == '"':
        return re.sub(r'(["\\])', r"\\\1", text)
    return "".join(_escaped(character) for character in text)


def quoted(text: str) -> str:
    """Write a name so that it can be typed back, quoted only where that is needed."""
    if text and not text.startswith("~") and all(map(_is_plain, text)):
        return text
    return "'" + escape(text, "'") + "'"


def _escaped(character: str) -> str:
    if _is_plain(character):
        return character
    return "'\n'" if character == "\n" else f"\\{character}"


def _is_plain(character: str) -> bool:
    return ord(character) > 127 or _PLAIN.match(character) is not None


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self.commands = [Command()]
        self.quote: Quote = ""
        self.escaped = False
        self.comment = False
        self._begin()

    def _begin(self) -> None:
        self._characters: list[str] = []
        self._pattern: list[str] = []
        self._magic = self._tilde = self._open = False

    def word(self) -> Word:
        """The word as far as it goes."""
        pattern = "".join(self._pattern) if self._magic else None
        return Word("".join(self._characters), pattern, self._tilde)

    def end_word(self) -> None:
        if self._open:
            self.commands[-1].words.append(self.word())
        self._begin()

    def run(self) -> None:
        position = 0
        while position < len(self._text):
            position += self._take(self._text[position], self._text[position + 1 : position + 2])

    def _take(self, character: str, following: str) -> int:
        """Take a character, or two; return how many."""
        if self.comment:
            self.comment = character != "\n"
            return 0 if not self.comment else 1
        if self.escaped:
            self.escaped = False
            if character == "\n":
                return 1  # The line goes on.
            if self.quote == '"' and character not in '"\\$`':
                self._literal("\\")
            self._literal(character)
        elif character == "\\" and self.quote != "'":
            self.escaped = True
        elif self.quote:
            if character == self.quote:
                self.quote = ""
            else:
                self._literal(character)
        elif character == "'" or character == '"':
            self._open, self.quote = True, character  # type: ignore[assignment]
        elif character in _BLANK:
            self.end_word()
        elif character in ";\n\r":
            self._end_command(character)
        elif character == "&" and following == "&":
            self._end_command("&&")
            return 2
        elif character in _FOREIGN:
            raise LineError(
                f"{_FOREIGN[character]}; if {character} belongs to a name, write it in quotes: '{character}'"
            )
        elif character == "#" and not self._open:
            self.comment = True
        else:
            self._plain(character)
        return 1

    def _end_command(self, sign: str) -> None:
        self.end_word()
        empty, waiting = not self.commands[-1].words, self.commands[-1].after_success
        if empty and (sign == "&&" or (waiting and sign == ";")):
            raise LineError(f"nothing stands before {sign}")
        if not empty:
            self.commands.append(Command(after_success=sign == "&&"))

    def _plain(self, character: str) -> None:
        if character == "~" and not self._open:
            self._tilde = True
        elif self._tilde and len(self._characters) == 1 and character != "/":
            self._tilde = False  # ~somebody is a name like any other.
        self._magic = self._magic or character in _MAGIC
        self._open = True
        self._characters.append(character)
        self._pattern.append(character)

    def _literal(self, character: str) -> None:
        if self._tilde and len(self._characters) == 1:
            self._tilde = False
        self._open = True
        self._characters.append(character)
        self._pattern.append(f"[{character}]" if character in _MAGIC else character)
