"""What a job script says of its job, read from the names of the files in the job's folder.

The listing is all that a classic gateway answers about a job, so the names carry the facts: ``mphpc-lock`` (a copy took the
job), ``mphpc-started-ID``, ``mphpc-beat-SECONDS`` (grows while the job lives), ``mphpc-ending-STATE`` (why it is about to
end, with ``-CODE`` once that is known) and ``mphpc-ended-STATE-CODE-FROM-TO-PIECES``, which alone means that it has ended.
Where a listing is refused for the odd name of some other file, ``mphpc-end`` says the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiida_marketplace_hpc.client.classic.names import CANCEL, RESERVED

STATES = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "UNPREPARED"})
"""How a job script says that it ended; UNPREPARED: before AiiDA's script, as its folder could not be made."""

_STARTED = re.compile(r"mphpc-started-([A-Za-z0-9-]+)")
_BEAT = re.compile(r"mphpc-beat-([0-9]+(?:\.[0-9]+)?)")
_ENDING = re.compile(r"mphpc-ending-([A-Z_]+)(?:-([0-9]+))?")
_PIECE = re.compile(r"mphpc-manifest-[0-9]+")
_ENDED = re.compile(r"mphpc-ended-([A-Z_]+)-([0-9]+)-([0-9]+)-([0-9]+)-([0-9]+)")


@dataclass(frozen=True)
class End:
    """How a job ended.

    :param state: one of :data:`STATES`.
    :param code: the exit status as shells have it: above 128 mostly a signal's number and 128.
    :param began: seconds since the epoch, by the cluster's clock; as is ``ended``.
    :param pieces: of how many pieces the manifest is made.
    """

    state: str
    code: int
    began: int
    ended: int
    pieces: int
    scheduler_id: str = ""
    reason: str = ""

    @property
    def exit_code(self) -> int | None:
        return None if self.signal else self.code

    @property
    def signal(self) -> int | None:
        return self.code - 128 if 128 < self.code <= 128 + 64 else None


@dataclass(frozen=True)
class Records:
    """What a listing says.

    :param taken: a copy of the job has taken the lock, and so has begun.
    :param ending: the state that it is about to end in, and its exit code if that is known.
    :param pieces: how many pieces of a manifest there are.
    :param beat: seconds between two heartbeats; ``None``: there was none yet.
    :param beats: what changes with each of them.
    :param cancelled: a cancellation lies there.
    """

    taken: bool = False
    scheduler_id: str = ""
    ending: str = ""
    end: End | None = None
    beat: float | None = None
    beats: str = ""
    cancelled: bool = False
    ending_code: int = 128 + 9
    pieces: int = 0


def read_records(files: Iterable[Mapping[str, Any]]) -> Records:
    """Read the published list of the files in a job's folder."""
    taken = cancelled = False
    scheduler_id = ending = beats = ""
    beat, end = None, None
    code, pieces = 128 + 9, 0
    for file in files:
        name = str(file.get("name", ""))
        if not name.startswith(RESERVED):
            continue
        if name == "mphpc-lock":
            taken = True
        elif name == CANCEL:
            cancelled = True
        elif match := _STARTED.fullmatch(name):
            scheduler_id = match[1]
        elif match := _BEAT.fullmatch(name):
            beat, beats = float(match[1]), str(file.get("size"))
        elif (match := _ENDING.fullmatch(name)) and match[1] in STATES:
            ending = match[1]
            code = int(match[2]) if match[2] else code
        elif _PIECE.fullmatch(name):
            pieces += 1
        elif (match := _ENDED.fullmatch(name)) and match[1] in STATES:
            end = End(match[1], int(match[2]), int(match[3]), int(match[4]), int(match[5]))
    if end is not None:
        end = End(end.state, end.code, end.began, end.ended, end.pieces, scheduler_id)
    return Records(taken, scheduler_id, ending, end, beat, beats, cancelled, code, pieces)


def read_end(text: bytes) -> End:
    """Read the file ``mphpc-end``.

    :raises ValueError: it is none, or is being written.
    """
    state, code, began, ended, pieces, scheduler_id, reason = text.decode("utf-8", "replace").split("\n")[:7]
    if text.count(b"\n") < 7:
        raise ValueError("it is not whole")
    if state not in STATES:
        raise ValueError(f"{state!r} is no state of a job")
    return End(state, int(code), int(began), int(ended), int(pieces), scheduler_id, reason)
