"""The ``#SBATCH`` lines of a job script, read as sbatch reads them.

sbatch looks at the lines before the first one that is neither blank nor a comment, takes the words of those that start with
``#SBATCH``, and gives all of them together to getopt: an option's value may stand on the next directive line, long names may
be abbreviated, the last of several equal options wins. What sbatch would refuse here is refused in its words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_MAGIC_WORDS = (b"#SBATCH", b"#SLURM")
_BLANKS = " \t\n\v\f\r"

_VALUE_NAMES = """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
    container-id context core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
    distribution error exclude export export-file extra extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node
    gpus-per-socket gpus-per-task gres gres-flags hint input job-name kill-on-invalid-dep licenses mail-type mail-user
    mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist nodes ntasks ntasks-per-core
    ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output partition power prefer priority profile qos
    reservation segment signal sockets-per-node switches thread-spec threads-per-core time time-min tmp
    tres-per-task uid wait-all-nodes wckey wrap
"""
_OPTIONAL = frozenset({"exclusive", "get-user-env", "nice", "no-kill", "propagate"})
_FLAG_NAMES = """
    contiguous help hold ignore-pbs no-requeue overcommit oversubscribe parsable quiet reboot requeue spread-job
    test-only usage use-min-nodes verbose version wait
"""
_REQUIRED = frozenset(_VALUE_NAMES.split())
_ALIASES = {"tasks-per-node": "ntasks-per-node", "cluster": "clusters", "share": "oversubscribe"}
OPTION_NAMES = _REQUIRED | _OPTIONAL | frozenset(_FLAG_NAMES.split())
"""The long names of sbatch's options, without dashes."""
_NAMES = OPTION_NAMES | _ALIASES.keys()

_SHORT = {
    "A": "account",
    "B": "extra-node-info",
    "C": "constraint",
    "D": "chdir",
    "F": "nodefile",
    "G": "gpus",
    "H": "hold",
    "J": "job-name",
    "L": "licenses",
    "M": "clusters",
    "N": "nodes",
    "O": "overcommit",
    "Q": "quiet",
    "S": "core-spec",
    "V": "version",
    "W": "wait",
    "a": "array",
    "b": "begin",
    "c": "cpus-per-task",
    "d": "dependency",
    "e": "error",
    "h": "help",
    "i": "input",
    "k": "no-kill",
    "m": "distribution",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "s": "oversubscribe",
    "t": "time",
    "v": "verbose",
    "w": "nodelist",
    "x": "exclude",
}


class DirectiveError(ValueError):
    """sbatch would refuse the script for its directives; the message is sbatch's."""


@dataclass(frozen=True)
class Directives:
    """What a job script says to sbatch.

    :param lines: every comment line above the first command, verbatim, the interpreter line left out. sbatch reads only the
        ``#SBATCH`` lines among them, but it translates ``#PBS`` and ``#BSUB``, and plugins of a site read words of their own.
    :param options: the options by their long names without dashes; a flag's value is empty. Of a heterogeneous job only the
        options of the first component.
    :param heterogeneous: whether further components follow.
    """

    lines: tuple[bytes, ...]
    options: Mapping[str, str]
    heterogeneous: bool = False

    @property
    def time_limit(self) -> int | None:
        """Seconds of ``--time``; ``None``: not set or unlimited.

        :raises DirectiveError: if it is no time.
        """
        text = self.options.get("time")
        if text is None:
            return None
        try:
            # Slurm reads a limit of zero as the wish for none.
            return parse_duration(text) or None
        except ValueError:
            raise DirectiveError("Invalid --time specification") from None


def parse_directives(script: bytes) -> Directives:
    """Read the directives of a job script.

    :raises DirectiveError: if sbatch would refuse them: an open quote, a word that is no option, an option without its value.
    """
    lines: list[bytes] = []
    words: list[str] = []
    heterogeneous = False
    for number, line in enumerate(script.split(b"\n"), start=1):
        stripped = line.strip(_BLANKS.encode())
        if stripped and not stripped.startswith(b"#"):
            break
        if not stripped or (number == 1 and line.startswith(b"#!")):
            continue
        lines.append(line)
        if heterogeneous or not line.startswith(_MAGIC_WORDS):
            continue
        text = line.decode("utf-8", "surrogateescape")
        text = text[len("#SBATCH") if line.startswith(b"#SBATCH") else len("#SLURM") :]
        if re.match(r"\s*(packjob|hetjob)(\s|$)", text, re.IGNORECASE):
            heterogeneous = True
            continue
        words.extend(_split(text, number))
    return Directives(tuple(lines), _read_options(words), heterogeneous)


def _split(text: str, number: int) -> Iterator[str]:
    """Split one directive line into words, with sbatch's own rules for quotes, backslashes and comments."""
    position, end = 0, len(text)
    while True:
        while position < end and text[position] in _BLANKS:
            position += 1
        if position < end and text[position] == ":":
            raise DirectiveError(f"line {number}: Unexpected `:` in [{text[position:]}]")
        word: list[str] = []
        quote = ""
        while position < end and (quote or text[position] not in _BLANKS):
            character = text[position]
            if character == "\\":
                word.append(text[position + 1 : position + 2])
                position += 2
                continue
            if quote:
                if character == quote:
                    quote = ""
                else:
                    word.append(character)
            elif character in "\"'":
                quote = character
            elif character == "#":
                break
            else:
                word.append(character)
            position += 1
        if quote:
            raise DirectiveError(f"line {number}: Unmatched `{quote}` in [{text}]")
        # As in sbatch, an empty word ends the line as a comment does.
        if not any(word):
            return
        yield "".join(word)


def _read_options(words: list[str]) -> dict[str, str]:
    """Do what getopt_long does with the words of all directive lines."""
    options: dict[str, str] = {}
    rest = iter(words)
    unjudged = ""
    for word in rest:
        if unjudged and not word.startswith("-"):
            options[unjudged] = word
            unjudged = ""
            continue
        unjudged = ""
        if word == "--":
            break
        if word.startswith("--"):
            name, separator, value = word[2:].partition("=")
            name = _full_name(name)
            if name in _REQUIRED and not separator:
                value = _next_value(rest, f"option '--{name}' requires an argument")
            elif name not in _NAMES and not separator:
                unjudged = name
            options[name] = value
        elif word.startswith("-") and word != "-":
            _read_short_options(word[1:], rest, options)
        else:
            raise DirectiveError(f"Invalid directive found in batch script: {word}")
    for word in rest:
        raise DirectiveError(f"Invalid directive found in batch script: {word}")
    return options


def _read_short_options(letters: str, rest: Iterator[str], options: dict[str, str]) -> None:
    for index, letter in enumerate(letters):
        name = _SHORT.get(letter)
        if name is None:
            raise DirectiveError(f"invalid option -- '{letter}'")
        attached = letters[index + 1 :]
        if name in _REQUIRED:
            options[name] = attached or _next_value(rest, f"option requires an argument -- '{letter}'")
            return
        if name in _OPTIONAL:
            options[name] = attached
            return
        options[name] = ""


def _next_value(rest: Iterator[str], complaint: str) -> str:
    for word in rest:
        return word
    raise DirectiveError(complaint)


def _full_name(name: str) -> str:
    """Complete an abbreviated long option.

    A name that is not in this table, or could be several, is kept as it is: sbatch knows which options it has and judges.
    """
    if name not in _NAMES:
        candidates = {_ALIASES.get(known, known) for known in _NAMES if known.startswith(name)}
        name = candidates.pop() if len(candidates) == 1 else name
    return _ALIASES.get(name, name)


_DAYS = re.compile(r"(\d+)-(\d*)(?::(\d+))?(?::(\d+))?")
_CLOCK = re.compile(r"\d+(?::\d+){0,2}")


def parse_duration(text: str) -> int | None:
    """Read a duration as Slurm writes and reads them.

    The forms are ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``, ``days-hours:minutes`` and
    ``days-hours:minutes:seconds``.

    :returns: seconds; ``None`` if it is unlimited.
    :raises ValueError: if the text is none of them.
    """
    text = text.strip()
    if text.upper() in {"UNLIMITED", "INFINITE", "-1"}:
        return None
    if match := _DAYS.fullmatch(text):
        days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not _CLOCK.fullmatch(text):
        raise ValueError(f"not a duration: {text!r}")
    parts = [int(part) for part in text.split(":")]
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)
