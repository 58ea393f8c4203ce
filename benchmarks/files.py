"""Moving files: one large one against curl and SFTP, many small ones against SFTP."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from aiida_marketplace_hpc.testing.machine import RigError
from benchmarks.clients import Worker, curl, sha256sum
from benchmarks.measure import OURS, Contestant, Pace, Results, Row, in_turns
from benchmarks.stage import Stage, Way

MIB = 1024 * 1024
SSH = "core.ssh_async"
VERIFIED = "curl and nginx, sha256sum of the result"
UNVERIFIED = "curl and nginx, nothing verified"
BOTH_ENDS = "curl and nginx, sha256sum at both ends"
_BLOCK = 1024

Say = Callable[[str], None]


class WrongResult(RigError):
    """What was moved did not arrive as it was."""


def measure_large(stage: Stage, size: int, pace: Pace, results: Results, say: Say) -> None:
    """Move a file of ``size`` bytes up and down."""
    source = stage.local / "large"
    with source.open("wb") as file:
        left = size
        while left:
            file.write(os.urandom(min(MIB, left)))
            left -= min(MIB, left)
    amount = f"{size / MIB / 1024:g} GiB" if size >= MIB * 1024 else f"{size / MIB:g} MiB"
    for way in stage.ways:
        with stage.ours(way) as ours, stage.theirs(way) as theirs:
            for worker, folder in ((ours, stage.remote), (theirs, stage.ssh)):
                worker.do("makedirs", path=str(folder))
            up = {
                OURS: _sent(ours, source, stage.remote / "large", OURS),
                VERIFIED: _curl_up(way, source, stage.web / "large"),
                SSH: _sent(theirs, source, stage.ssh / "large", SSH),
            }
            down = {
                OURS: _fetched(ours, stage.remote / "large", stage.local / "ours", OURS, size),
                VERIFIED: _curl_down(way, stage.web / "large", stage.local / "curl"),
                SSH: _fetched(theirs, stage.ssh / "large", stage.local / "theirs", SSH, size),
            }
            for direction, contestants in (("up", up), ("down", down)):
                work = f"one file of {amount} {direction}"
                say(f"{work}, {way.label} ms")
                found = in_turns(contestants, pace, say)
                for against, aim in ((VERIFIED, 0.8), (BOTH_ENDS, None), (UNVERIFIED, None), (SSH, 1.0)):
                    results.rows.append(Row(work, way.round_trip, found[OURS], found[against], against, aim))
    for path in (source, *(stage.local / name for name in ("ours", "curl", "theirs"))):
        path.unlink()
    for folder in (stage.remote, stage.web, stage.ssh):
        (folder / "large").unlink()


def _fresh(*paths: Path) -> None:
    """Remove what an earlier round has left, and let the disk come to rest, outside of what is timed."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    os.sync()


def _expect(path: Path, size: int) -> None:
    if path.stat().st_size != size:
        raise WrongResult(f"{path} has {path.stat().st_size} bytes instead of {size}")


def _sent(worker: Worker, source: Path, target: Path, name: str) -> Contestant:
    def contestant(_: int) -> Mapping[str, float]:
        _fresh(target)
        seconds = worker.do("put_file", local=str(source), remote=str(target))
        _expect(target, source.stat().st_size)
        return {name: seconds}

    return contestant


def _fetched(worker: Worker, source: Path, target: Path, name: str, size: int) -> Contestant:
    def contestant(_: int) -> Mapping[str, float]:
        _fresh(target)
        seconds = worker.do("get_file", remote=str(source), local=str(target))
        _expect(target, size)
        return {name: seconds}

    return contestant


def _curl_up(way: Way, source: Path, target: Path) -> Contestant:
    def contestant(_: int) -> Mapping[str, float]:
        _fresh(target)
        moved = curl("--upload-file", str(source), f"{way.web}/{target.name}")
        verified = moved + sha256sum(target)
        return {UNVERIFIED: moved, VERIFIED: verified, BOTH_ENDS: verified + sha256sum(source)}

    return contestant


def _curl_down(way: Way, source: Path, target: Path) -> Contestant:
    def contestant(_: int) -> Mapping[str, float]:
        _fresh(target)
        moved = curl("--output", str(target), f"{way.web}/{source.name}")
        verified = moved + sha256sum(target)
        return {UNVERIFIED: moved, VERIFIED: verified, BOTH_ENDS: verified + sha256sum(source)}

    return contestant


def measure_small(stage: Stage, count: int, pace: Pace, results: Results, say: Say) -> None:
    """Move ``count`` files of 1 KiB up and down, as a tree and one by one."""
    source = stage.local / "small"
    source.mkdir()
    names = [f"file-{number:04}" for number in range(count)]
    for name in names:
        (source / name).write_bytes(os.urandom(_BLOCK))
    for way in stage.ways:
        with stage.ours(way) as ours, stage.theirs(way) as theirs:
            sides = ((OURS, ours, stage.remote), (SSH, theirs, stage.ssh))
            for _, worker, folder in sides:
                worker.do("makedirs", path=str(folder))
            for what, send, fetch in (("as a tree", _tree_up, _tree_down), ("one by one", _each_up, _each_down)):
                up = {name: send(worker, source, folder / "small", name) for name, worker, folder in sides}
                down = {
                    name: fetch(worker, folder / "small", stage.local / "again", name, names)
                    for name, worker, folder in sides
                }
                for direction, contestants in (("up", up), ("down", down)):
                    work = f"{count} files of 1 KiB {what} {direction}"
                    say(f"{work}, {way.label} ms")
                    found = in_turns(contestants, pace, say)
                    results.rows.append(Row(work, way.round_trip, found[OURS], found[SSH], SSH, 1.0))
            for _, _, folder in sides:
                shutil.rmtree(folder / "small")
    shutil.rmtree(source)
    shutil.rmtree(stage.local / "again")


def _expect_all(folder: Path, count: int) -> None:
    found = [path for path in folder.iterdir() if path.stat().st_size == _BLOCK]
    if len(found) != count:
        raise WrongResult(f"{folder} has {len(found)} whole files instead of {count}")


def _tree_up(worker: Worker, source: Path, target: Path, name: str) -> Contestant:
    def contestant(_: int) -> Mapping[str, float]:
        _fresh(target)
        seconds = worker.do("put_tree", local=str(source), remote=str(target))
        _expect_all(target, len(os.listdir(source)))
        return {name: seconds}

    return contestant


def _tree_down(worker: Worker, source: Path, target: Path, name: str, names: list[str]) -> Contestant:
    def contestant(_: int) -> Mapping[str, float]:
        _fresh(target)
        seconds = worker.do("get_tree", remote=str(source), local=str(target))
        _expect_all(target, len(names))
        return {name: seconds}

    return contestant


def _each_up(worker: Worker, source: Path, target: Path, name: str) -> Contestant:
    def contestant(_: int) -> Mapping[str, float]:
        _fresh(target)
        worker.do("makedirs", path=str(target))
        seconds = worker.do("put_each", local=str(source), remote=str(target))
        _expect_all(target, len(os.listdir(source)))
        return {name: seconds}

    return contestant


def _each_down(worker: Worker, source: Path, target: Path, name: str, names: list[str]) -> Contestant:
    def contestant(_: int) -> Mapping[str, float]:
        _fresh(target)
        target.mkdir()
        seconds = worker.do("get_each", remote=str(source), local=str(target), names=names)
        _expect_all(target, len(names))
        return {name: seconds}

    return contestant
