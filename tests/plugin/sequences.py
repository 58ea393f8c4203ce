"""Random sequences of operations on a small world of names, for the comparison of two transports."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.plugin.comparison import Side

NAMES = ("a", "b", "c", ".h", "d e\n'\"ü", "-r")
PATTERNS = ("*", "?", "[ab]", "[!a]*", ".*", "*e*", "**")
FILE_MODES = (0o644, 0o600, 0o755)
FOLDER_MODES = (0o755, 0o700, 0o770)


@dataclass(frozen=True)
class Where:
    """A path below one of the folders of a side: ``remote``, ``other``, ``local``; or, without one, just words."""

    base: str
    path: str

    def on(self, side: Side) -> str:
        """Write it for one side."""
        return f"{getattr(side, self.base)}/{self.path}" if self.base else self.path

    def __repr__(self) -> str:
        return f"{self.base.upper()}/{self.path}" if self.base else repr(self.path)


@dataclass(frozen=True)
class Thing:
    """What is there before the first operation."""

    kind: str
    where: Where
    mode: int = 0
    content: str = ""
    target: Where = field(default=Where("", ""))

    def make(self, side: Side) -> None:
        """Make it, and the folders on the way, unless something is in the way."""
        path = Path(self.where.on(side))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.kind == "folder":
                path.mkdir()
            elif self.kind == "file":
                with path.open("x") as file:
                    file.write(self.content)
            else:
                path.symlink_to(self.target.on(side))
                return
            path.chmod(self.mode)
        except OSError:
            return


@dataclass(frozen=True)
class Step:
    """One operation."""

    method: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, side: Side) -> Any:
        """Do it on one side."""
        arguments = [argument.on(side) if isinstance(argument, Where) else argument for argument in self.arguments]
        result = getattr(side.transport, self.method)(*arguments, **dict(self.options))
        if self.method in ("listdir", "glob"):
            return sorted(result)
        if self.method == "listdir_withattributes":
            return sorted((entry["name"], entry["isdir"], entry["attributes"].st_mode) for entry in result)
        return result

    def paths(self, side: Side) -> tuple[str, ...]:
        """The paths among its arguments."""
        return tuple(argument.on(side) for argument in self.arguments if isinstance(argument, Where))

    def __repr__(self) -> str:
        options = [f"{name}={value}" for name, value in self.options]
        return f"{self.method}({', '.join([*map(repr, self.arguments), *options])})"


def clear(side: Side) -> None:
    """Remove what an example left."""
    for folder in (side.remote, side.other, side.local):
        shutil.rmtree(folder.parent)


names = st.sampled_from((*("a", "b", "c") * 3, *NAMES))
relative = st.builds(
    lambda parts, slash: "/".join(parts) + ("/" if slash else ""),
    st.integers(0, 9).flatmap(lambda n: st.lists(names, min_size=1, max_size=1 if n < 5 else 2 if n < 8 else 3)),
    st.sampled_from((False,) * 9 + (True,)),
)
bases = st.sampled_from(("remote", "remote", "remote", "other"))
remote = st.builds(Where, bases, relative)
local = st.builds(Where, st.just("local"), relative)
_patterned = st.lists(names | st.sampled_from(PATTERNS), min_size=1, max_size=3).map("/".join)
remote_pattern = st.builds(Where, bases, _patterned)
local_pattern = st.builds(Where, st.just("local"), _patterned)
targets = st.one_of(
    st.builds(Where, st.just(""), st.sampled_from((*NAMES, *(f"../{name}" for name in NAMES), ".", "a/b"))), remote
)
local_targets = st.one_of(
    st.builds(Where, st.just(""), st.sampled_from((*NAMES, *(f"../{name}" for name in NAMES), ".", "a/b"))), local
)


def _things(where: st.SearchStrategy[Where], targets: st.SearchStrategy[Where]) -> st.SearchStrategy[Thing]:
    return st.one_of(
        st.builds(Thing, st.just("file"), where, st.sampled_from(FILE_MODES), st.sampled_from(("", "one", "two\n"))),
        st.builds(Thing, st.just("folder"), where, st.sampled_from(FOLDER_MODES)),
        st.builds(Thing, st.just("link"), where, target=targets),
    )


things = st.lists(_things(remote, targets), max_size=8).flatmap(
    lambda there: st.lists(_things(local, local_targets), max_size=6).map(lambda here: [*there, *here])
)


def _step(method: str, *arguments: st.SearchStrategy[Any], **options: st.SearchStrategy[Any]) -> Any:
    chosen = st.fixed_dictionaries({}, optional=options).map(lambda found: tuple(sorted(found.items())))
    return st.builds(Step, st.just(method), st.tuples(*arguments), chosen)


_switch = st.booleans()
_transfer = {"dereference": _switch, "overwrite": _switch}

steps = st.one_of(
    *(_step(method, remote) for method in ("isdir", "isfile", "path_exists", "get_mode", "normalize")),
    *(_step(method, remote) for method in ("listdir", "listdir_withattributes", "rmdir", "remove", "rmtree")),
    _step("glob", remote_pattern),
    _step("listdir", remote, pattern=st.sampled_from(PATTERNS)),
    _step("mkdir", remote, ignore_existing=_switch),
    _step("makedirs", remote, ignore_existing=_switch),
    _step("rename", remote, remote),
    _step("symlink", targets, remote),
    _step("symlink", remote_pattern, remote),
    _step("chmod", remote, st.sampled_from(FOLDER_MODES)),
    *(_step(method, remote, remote, dereference=_switch) for method in ("copy", "copyfile", "copytree")),
    _step("copy", remote_pattern, remote),
    *(_step(method, local, remote, **_transfer) for method in ("put", "puttree")),
    _step("putfile", local, remote, overwrite=_switch),
    _step("put", local_pattern, remote, ignore_nonexisting=_switch, **_transfer),
    *(_step(method, remote, local, **_transfer) for method in ("get", "gettree")),
    _step("getfile", remote, local, overwrite=_switch),
    _step("get", remote_pattern, local, ignore_nonexisting=_switch, **_transfer),
)
