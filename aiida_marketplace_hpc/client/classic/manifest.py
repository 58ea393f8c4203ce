"""The list of everything in a job's folder that the job script leaves at its end.

Names of files may hold anything but NUL bytes, which therefore end the fields; base64 keeps them whole on their way.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass

from aiida_marketplace_hpc.client.classic.tree import Entry, InJob, Tree

_KINDS = {"f": "file", "d": "directory", "l": "symlink"}


@dataclass(frozen=True)
class Manifest:
    """A manifest as it was written.

    :param text: base64.
    """

    text: bytes

    def tree(self, jobid: str, piece: int) -> Tree:
        """Make the tree of the folder.

        :param piece: bytes of a piece in which the script handed out what the gateway does not.
        :raises ValueError: it is damaged.
        """
        tree = Tree()
        try:
            fields = base64.b64decode(self.text, validate=True).split(b"\0")
        except binascii.Error as exc:
            raise ValueError("it is not base64") from exc
        if fields[-2:] != [b"Z", b""]:
            raise ValueError("it is cut off")
        texts = iter([field.decode("utf-8", "surrogateescape") for field in fields[:-2]])
        try:
            for letter in texts:
                if letter == "E":
                    kinds, mode, size, time, path, target = (next(texts) for _ in range(6))
                    tree[path] = Entry(
                        _KINDS.get(kinds[0], "other"),
                        int(mode, 8),
                        int(size),
                        float(time),
                        target if kinds[0] == "l" else None,
                        _KINDS.get(kinds[1], "other") if kinds[1] not in "NL?" else None,
                        InJob(jobid, path, exact=kinds[0] == "f") if kinds[0] in "fl" else None,
                    )
                elif letter == "R":
                    kind, mode, size, time, path, digest, number = (next(texts) for _ in range(7))
                    _retrieved(tree, jobid, piece, (kind, mode, size, time, path, digest, number))
                else:
                    raise ValueError(f"there is no record {letter!r}")
        except (StopIteration, RuntimeError, IndexError) as exc:
            raise ValueError("it is cut off") from exc
        return tree


def _retrieved(tree: Tree, jobid: str, piece: int, record: tuple[str, ...]) -> None:
    kind, mode, size, time, path, digest, number = record
    pieces: tuple[str, ...] = ()
    if number:
        count = math.ceil(int(size) / piece)
        pieces = tuple(f"mphpc-out-{number}-{index:06}" for index in range(count))
    content = InJob(jobid, path, digest or None, bool(number), pieces, exact=size != "") if kind == "f" else None
    found = tree.get(path)
    if found is not None and found.kind == "symlink":
        # The link stays what it is; what it leads to is now known.
        tree[path] = found.leading_to(_KINDS[kind], int(size or 0), int(mode, 8), content)
    elif found is None or kind == "f":
        tree[path] = Entry(
            _KINDS[kind], int(mode, 8), int(size or (found.size if found else 0)), float(time), content=content
        )
