"""What of FirecREST v1 shows through the published gateway: names, characters, sizes and listings. Nothing here does anything.

Sources: FirecREST 1.13.0 (``src/utilities/utilities.py``, ``src/common/cscs_api_common.py``) and pyfirecrest 1.2.0.
"""

from __future__ import annotations

import re
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

HEADER = "<class 'firecrest.FirecrestException.HeaderException'>"
"""What the published gateway calls a refusal that came with a header of FirecREST's own, such as ``X-Invalid-Path``."""
PLAIN = "<class 'firecrest.FirecrestException.FirecrestException'>"
"""What it calls any other."""

_FORBIDDEN = re.compile(r"[<>|;\"'&\\()\x00-\x1f`]")
_BREAKING = re.compile(r"[\"\x00-\x1a\x1c-\x1f]")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_BOUNDARY = 32
"""Bytes that requests takes for a boundary."""


def is_forbidden(path: str) -> bool:
    """Whether FirecREST refuses a path for what it is: empty, or with a character that its shell commands could not bear."""
    return not path or _FORBIDDEN.search(path) is not None


def posted(name: str) -> str:
    """The name of an upload as it reaches FirecREST: the published gateway's HTTP client (urllib3 1.26) has written out what
    would break a form.
    """
    return _BREAKING.sub(lambda match: f"%{ord(match[0]):02X}", name)


def secure_filename(name: str) -> str:
    """The name under which FirecREST up to 1.13.0 stores an upload (Werkzeug's ``secure_filename``).

    Folders become part of the name, blanks underscores; what is not ASCII, and dots in front, is left out. What is left may be
    nothing at all.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")
    joined = "_".join(plain.replace("/", " ").split())
    return _UNSAFE.sub("", joined).strip("._")


def form_size(folder: str, filename: str, content: int) -> int:
    """The bytes of the form in which the published gateway hands an upload on: it is what FirecREST's limit counts.

    :param content: the size of the file.
    """
    fields = (
        f'Content-Disposition: form-data; name="targetPath"\r\n\r\n{folder}',
        f'Content-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n',
    )
    around = sum(len(f"--{field}\r\n".encode("utf-8", "surrogateescape")) + _BOUNDARY + 2 for field in fields)
    return around + content + len("----\r\n") + _BOUNDARY


def listed(entries: Sequence[Mapping[str, Any]], *, split: bool) -> list[dict[str, str]]:
    """Entries of a folder as FirecREST lists them: from ``ls -l``, without hidden ones.

    :param entries: as :class:`~aiida_marketplace_hpc.gateway.files.Files` lists them, with ``user`` and ``group`` by name.
    :param split: read names as FirecREST does: of one with blanks only the first word is left, and the third is taken for what
        a link points to.
    :raises IndexError: if ``split`` finds half a line, where there is a blank and a dollar sign in a name.
    """
    found: list[dict[str, str]] = []
    for entry in entries:
        if entry["name"].startswith("."):
            continue
        permissions = stat.filemode(entry["mode"])
        row = {
            "group": entry["group"],
            "last_modified": datetime.fromtimestamp(entry["mtime"]).strftime("%Y-%m-%dT%H:%M:%S"),
            "link_target": entry.get("target", ""),
            "name": entry["name"],
            "permissions": permissions[1:],
            "size": str(entry["size"]),
            "type": permissions[0],
            "user": entry["user"],
        }
        found.extend(_split(row) if split else [row])
    return found


def _split(row: Mapping[str, str]) -> list[dict[str, str]]:
    """Write a row as a line of ``ls``, whose end FirecREST marks with a dollar sign, and read it as FirecREST does."""
    name = f"{row['name']} -> {row['link_target']}" if row["type"] == "l" else row["name"]
    before = " ".join(
        (row["type"] + row["permissions"], "1", row["user"], row["group"], row["size"], row["last_modified"])
    )
    rows = []
    for line in f"{before} {name}".replace("\n", "$").split("$"):
        words = line.split()
        rows.append(
            {
                "group": words[3],
                "last_modified": words[5],
                "link_target": words[8] if len(words) > 8 else "",
                "name": words[6],
                "permissions": words[0][1:],
                "size": words[4],
                "type": words[0][0],
                "user": words[2],
            }
        )
    return rows
