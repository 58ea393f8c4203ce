"""Text that somebody else has written, made visible: no letter of it does anything but be seen.

Escaping for HTML is done by the templates. Here goes what HTML lets through: control characters (those that a terminal obeys
among them), those that turn the direction of the text around or have no shape, and bytes that are no text at all.
"""

from __future__ import annotations

import os
import re
import unicodedata
from typing import BinaryIO

WINDOW = 64 * 1024
"""Bytes of a file's end that are shown."""
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of Unicode whose characters have no shape of their own."""
_SUSPECT = re.compile(r"[^ -~\n\t]")


def text(content: str) -> str:
    """Several lines, with tabs."""
    return _SUSPECT.sub(lambda found: _shown(found[0]), content)


def word(content: object) -> str:
    """A name or a short remark, on one line."""
    return text(str(content)).replace("\n", "\\n").replace("\t", "\\t")


def _shown(letter: str) -> str:
    """A letter as a programmer would write it, if it cannot be seen: in letters that every font has."""
    if unicodedata.category(letter) not in _UNSEEN:
        return letter
    if 0xDC80 <= ord(letter) <= 0xDCFF:  # Stands for a byte of a file's name that is no UTF-8.
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


def tail(file: BinaryIO, size: int, window: int = WINDOW) -> tuple[str, int]:
    """The end of a file, and how many bytes were left out before it. However long a line is, no more is read.

    :param size: of the file, in bytes.
    """
    start = max(0, size - window)
    content = os.pread(file.fileno(), size - start, start)
    if start:
        # Not from the middle of a line, if one begins here, nor from that of a character.
        line = content.find(b"\n") + 1
        skipped = line or next((at for at, byte in enumerate(content[:4]) if byte & 0xC0 != 0x80), 0)
        content, start = content[skipped:], start + skipped
    decoded = content.decode("utf-8", "backslashreplace").replace("\r\n", "\n").replace("\r", "\n")
    return text(decoded), start
