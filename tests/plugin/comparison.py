"""Do the same with two transports, and compare what came of it: results, exceptions, every file on both ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumpy.greenback_bridge import ensure_portal

from aiida_marketplace_hpc.gateway.roots import PRIVATE

Tree = dict[str, tuple[str, object, int]]
"""Of everything below a folder: type, content or target, permission bits."""

_NAMELESS = (OSError, shutil.Error, shutil.SameFileError, shutil.SpecialFileError)
"""Where aiida-core raises a bare OSError with a text, ours is the class that says what it is: still an OSError."""


@dataclass(frozen=True)
class Side:
    """A transport and the folders in which it may do things.

    :param remote: on the cluster.
    :param other: on the cluster, on another file system.
    :param local: on this machine.
    """

    transport: Any
    remote: Path
    other: Path
    local: Path

    def make(self, seeded: bool = True) -> None:
        """Make the folders and put into two of them what every hand-written case starts from."""
        for folder in (self.remote, self.other, self.local):
            folder.mkdir(parents=True)
        if seeded:
            seed(self.remote)
            seed(self.local)


@dataclass(frozen=True)
class Outcome:
    """What came of it, in terms that are the same on both sides."""

    result: str
    problem: Exception | None
    remote: Tree
    other: Tree
    local: Tree

    @property
    def trees(self) -> tuple[Tree, Tree, Tree]:
        return self.remote, self.other, self.local


def seed(folder: Path) -> None:
    """Fill a folder with a little of everything."""
    (folder / "d" / "sub").mkdir(parents=True)
    (folder / "d" / "empty").mkdir()
    (folder / "d" / "a.txt").write_text("a")
    (folder / "d" / "sub" / "b.txt").write_text("b")
    (folder / "d" / "sub").chmod(0o750)
    (folder / "d" / ".hidden").write_text("h")
    (folder / "d" / "link").symlink_to("a.txt")
    (folder / "d" / "linkdir").symlink_to("sub")
    (folder / "f").write_text("content of f")
    (folder / "f").chmod(0o640)
    (folder / "g.dat").write_text("g")
    (folder / "h.dat").write_text("h")
    (folder / "odd \n '\" ä-name").write_text("odd")
    (folder / "-dash").write_text("dash")
    (folder / "e").mkdir()
    (folder / "tofile").symlink_to("f")
    (folder / "todir").symlink_to("d")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")


def tree(folder: Path, rename: Callable[[str], str] = str) -> Tree:
    """Everything below a folder, by its path relative to it.

    :param rename: applied to the targets of links.
    """
    found: Tree = {}
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root, name)
            relative = str(path.relative_to(folder))
            if relative.split("/")[0] == PRIVATE:
                continue
            mode = stat.S_IMODE(path.lstat().st_mode)
            if path.is_symlink():
                found[relative] = ("link", rename(os.readlink(path)), 0)
            elif path.is_dir():
                found[relative] = ("folder", None, mode)
            else:
                found[relative] = ("file", path.read_bytes(), mode)
    return found


def outcome(action: Callable[[Side], Any], side: Side) -> Outcome:
    """Do something on one side."""
    try:
        result: Any = action(side)
        problem: Exception | None = None
    except Exception as exc:  # noqa: BLE001 - which one it is, is what is compared.
        result, problem = None, exc

    def anonymous(text: str) -> str:
        for name, folder in (("REMOTE", side.remote), ("OTHER", side.other), ("LOCAL", side.local)):
            text = text.replace(str(folder), name).replace(str(folder.parent), f"{name}/..")
        return text

    trees = [tree(folder, anonymous) for folder in (side.remote, side.other, side.local)]
    return Outcome(anonymous(repr(result)), problem, *trees)


def assert_same_problem(found: Exception | None, expected: Exception | None, *, precisely: bool = True) -> None:
    """Check that what was raised is what is expected, or more precisely the same.

    :param precisely: an :class:`OSError` must have the very class; else any will do.
    """
    assert (found is None) == (expected is None), (found, expected)
    if expected is not None:
        vague = type(expected) in _NAMELESS or (isinstance(expected, OSError) and not precisely)
        assert isinstance(found, OSError if vague else type(expected)), (found, expected)


def assert_same(found: Outcome, expected: Outcome, *, precisely: bool = True) -> None:
    """Compare two outcomes."""
    assert_same_problem(found.problem, expected.problem, precisely=precisely)
    assert found.result == expected.result
    assert found.remote == expected.remote
    assert found.other == expected.other
    assert found.local == expected.local


class Asynchronous:
    """A transport whose methods are carried out by their asynchronous forms, on a loop of their own."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "iglob":  # The one method without an asynchronous form.
            name = "glob"
        method = getattr(self._transport, f"{name}_async")

        def done(*args: Any, **kwargs: Any) -> Any:
            plain = [arg._transport if isinstance(arg, Asynchronous) else arg for arg in args]
            return self._loop.run_until_complete(method(*plain, **kwargs))

        return done


def on_a_loop_with_a_portal(action: Callable[[], Any]) -> Any:
    """Call synchronous code from a coroutine, as AiiDA's engine does."""

    async def main() -> Any:
        await ensure_portal()
        return action()

    return asyncio.run(main())
