"""Which paths are working directories, and which names survive the way to a classic gateway.

What is uploaded is never called by its own name there: servers make ``sub_dir_in.txt`` of ``sub/dir/in.txt`` and ``hidden`` of
``.hidden``, refuse many characters, and say that all is well. A piece of a file is called by the digest of its bytes, which
also makes sending it twice the same as sending it once.
"""

from __future__ import annotations

import re

RESERVED = "mphpc-"
"""How the names of all files begin that are ours."""
JOB_SCRIPT = "job.sh"
"""The script that a classic gateway submits."""
CANCEL = "mphpc-cancel"
"""A job that finds this file ends before user code, or as soon as it sees it."""
END = "mphpc-end"
START = "mphpc-start"
MANIFEST = "mphpc-manifest-"
_PIECE = "mphpc-piece-"

_WORKING = re.compile(
    r"(/(?:.*/)?[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{4}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:/(.*))?", re.DOTALL
)
# Dots and underscores at either end are taken off by servers that make names "secure".
_PLAIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,98}[A-Za-z0-9-])?")
# FirecREST refuses these in any path; what is not UTF-8 does not survive the web.
_FORBIDDEN = re.compile(r"[<>|;\"'&\\\[\]()`\x00-\x1f\x7f\ud800-\udfff]")


def working_directory(path: str) -> tuple[str, str] | None:
    """Split an absolute path into the working directory that it lies in and the rest; ``None`` if it lies in none.

    AiiDA makes the last three segments of a working directory of the calculation's UUID.
    """
    match = _WORKING.fullmatch(path)
    return None if match is None else (match[1], match[2] or "")


def piece_name(digest: str) -> str:
    """The name of the bytes with a hexadecimal SHA-256 digest."""
    return f"{_PIECE}{digest}"


def is_ours(path: str) -> bool:
    """Whether a path relative to a job's folder is one of our own files there."""
    first = path.partition("/")[0]
    return first.startswith(RESERVED) or path == JOB_SCRIPT


def is_plain(name: str) -> bool:
    """Whether a file keeps this name when it is uploaded, whatever the server does to names."""
    return _PLAIN.fullmatch(name) is not None and ".." not in name


def can_be_asked_for(path: str) -> bool:
    """Whether a classic gateway takes a path relative to a job's folder in a download or a removal."""
    parts = path.split("/")
    return not _FORBIDDEN.search(path) and not any(part in ("", ".", "..") for part in parts) and path.isprintable()
