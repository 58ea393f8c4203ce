"""How files are shown: columns, colours, sizes and times."""

from __future__ import annotations

import stat
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click

from aiida_marketplace_hpc.cli.common import printable
from aiida_marketplace_hpc.cli.shell.line import quoted

_HALF_A_YEAR = 182 * 24 * 3600
_GAP = 2


def shown_name(name: str) -> str:
    """A name as a terminal gets it: as it would be typed back, without characters that the terminal would obey."""
    return printable(quoted(name)).replace("\n", "\\n")


def coloured(text: str, mode: int) -> str:
    """The text in the colour of a folder, link or program."""
    if stat.S_ISDIR(mode):
        return click.style(text, fg="blue", bold=True)
    if stat.S_ISLNK(mode):
        return click.style(text, fg="cyan", bold=True)
    if stat.S_ISREG(mode) and mode & 0o111:
        return click.style(text, fg="green", bold=True)
    return text


def width_of(text: str) -> int:
    """The columns of a terminal that a text takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)


def columns(cells: Sequence[str], widths: Sequence[int], width: int) -> list[str]:
    """Lay out cells in as few lines as fit into ``width``, downwards first.

    :param widths: of the cells as a terminal shows them.
    """
    count = len(cells)
    for lines in range(1, count + 1):
        groups = [range(start, min(start + lines, count)) for start in range(0, count, lines)]
        each = [max(widths[index] for index in group) for group in groups]
        if sum(each) + _GAP * (len(each) - 1) <= width or lines == count:
            break
    else:
        return []
    rows: list[str] = []
    for row in range(lines):
        text = ""
        for group, wide in zip(groups, each, strict=True):
            if row < len(group):
                text += cells[group[row]] + " " * (wide - widths[group[row]] + _GAP)
        rows.append(text.rstrip())
    return rows


def size_text(size: int, human: bool) -> str:
    """A number of bytes; ``human``: with a unit (powers of 1024) and two digits or more."""
    if not human or size < 1024:
        return str(size)
    number, units = size / 1024, "KMGTPE"
    while number >= 999.5 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.1f}{units[0]}" if number < 9.95 else f"{number:.0f}{units[0]}"


def time_text(seconds: float, now: float) -> str:
    """A time of this half year to the minute, another one with its year."""
    try:
        when = datetime.fromtimestamp(seconds)
    except (ValueError, OverflowError, OSError):  # Some file systems have times that no calendar has.
        return f"{seconds:12.0f}"
    recent = abs(now - seconds) < _HALF_A_YEAR
    return f"{when:%b} {when.day:2} " + (f"{when:%H:%M}" if recent else f" {when.year}")


def long_rows(entries: Sequence[dict[str, Any]], human: bool, now: float) -> list[str]:
    """For each entry everything but its name: mode, size, time, aligned."""
    sizes = [size_text(entry["size"], human) for entry in entries]
    wide = max(map(len, sizes), default=0)
    return [
        f"{stat.filemode(entry['mode'])} {size:>{wide}} {time_text(entry['mtime'], now)}"
        for entry, size in zip(entries, sizes, strict=True)
    ]
