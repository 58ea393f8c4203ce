"""What lies in a folder under the name of a guard is read with care."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path

import pytest

from aiida_marketplace_hpc.gateway.backends.guard import parse_guard, read_guards
from aiida_marketplace_hpc.gateway.backends.slurm_commands import observe_guard
from aiida_marketplace_hpc.gateway.backends.wrapper import GUARD_PREFIX
from aiida_marketplace_hpc.gateway.submission import guard_of
from aiida_marketplace_hpc.protocol import JobState

NOON = datetime(2026, 11, 22, 12, tzinfo=timezone.utc)
WHOLE = "12\nsha-256:0\nstarted 12 2026-11-22T12:00:00 1\nended 12 2026-11-22T12:01:40 3\n"


def test_the_names_of_guards_are_known() -> None:
    assert guard_of("7").startswith(GUARD_PREFIX)


def test_reads_an_end() -> None:
    guard = parse_guard(WHOLE, NOON)
    assert guard is not None
    seen = observe_guard(guard, "/job")
    assert (seen.id, seen.state, seen.exit_code, seen.elapsed, seen.folder) == ("12", JobState.FAILED, 3, 100, "/job")
    assert (seen.started_at, seen.ended_at) == (NOON, NOON.replace(minute=1, second=40))
    assert seen.complete
    row = dict(zip(seen.columns, seen.rows[0], strict=True))
    assert (row["JobID"], row["State"], row["ExitCode"]) == ("12", "FAILED", "3:0")


def test_of_an_array_the_worst_end_counts() -> None:
    guard = parse_guard("12\nd\nstarted 12 - 2\nstarted 13 - 2\nended 13 - 0\nended 12 - 4\n", NOON)
    assert guard is not None
    seen = observe_guard(guard, "/job")
    assert (seen.state, seen.exit_code, seen.ended_at) == (JobState.FAILED, 4, NOON)


@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_half_a_note_is_no_end(length: int) -> None:
    guard = parse_guard(WHOLE[:length], NOON)
    assert guard is None or not guard.ended


@pytest.mark.parametrize(
    "text", ["", "\n", "x\n", "12", "ended 12 2026-11-22T12:01:40 3\n", "12\nd\nended 12 2026-11-22T12:01:40 3\n"]
)
def test_what_is_no_guard_or_has_no_beginning_has_not_ended(text: str) -> None:
    guard = parse_guard(text, NOON)
    assert guard is None or not guard.ended


def test_a_guard_without_notes_is_found_and_has_not_ended(tmp_path: Path) -> None:
    (tmp_path / f"{GUARD_PREFIX}7").write_text("12\nsha-256:0\n")
    (guard,) = read_guards(str(tmp_path))
    assert (guard.holder, guard.ended, guard.started_at) == ("12", False, None)
    assert observe_guard(guard, str(tmp_path)).state is JobState.RUNNING


def test_nothing_but_files_is_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(WHOLE)
    (tmp_path / f"{GUARD_PREFIX}link").symlink_to("elsewhere")
    (tmp_path / f"{GUARD_PREFIX}folder").mkdir()
    os.mkfifo(tmp_path / f"{GUARD_PREFIX}pipe")
    (tmp_path / f"{GUARD_PREFIX}bytes").write_bytes(b"\xff\n" * 10)
    assert read_guards(str(tmp_path)) == []
    assert read_guards(str(tmp_path / "missing")) == []
