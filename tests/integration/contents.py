"""Say what lies below a folder: on the cluster as a program, in AiiDA's processes as a module.

The name of each path below the folder, and for it ``None`` (a folder), ``-> target`` (a link) or the text of the file, with an
asterisk before it if its owner may execute it.
"""

from __future__ import annotations

import json
import os
import stat
import sys


def contents(folder: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(root, name)
            status = os.lstat(path)
            said: str | None = None
            if stat.S_ISLNK(status.st_mode):
                said = f"-> {os.readlink(path)}"
            elif stat.S_ISREG(status.st_mode):
                with open(path, encoding="utf-8", errors="replace") as handle:
                    said = "*" * bool(status.st_mode & stat.S_IXUSR) + handle.read()
            found[os.path.relpath(path, folder)] = said
    return found


if __name__ == "__main__":
    print(json.dumps(contents(sys.argv[1])))
