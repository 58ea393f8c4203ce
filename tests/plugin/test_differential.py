"""The same operations on aiida-core's local transport and on ours: the same trees, results and exception types."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiida.transports.plugins.local import LocalTransport
from aiida.transports.transport import Transport

from aiida_marketplace_hpc.gateway.roots import PRIVATE
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport

Case = Callable[[Transport, str, str], Any]
"""Does something with a transport, given a folder on the remote side and one on the local side."""


def seed(folder: Path) -> None:
    """What each side starts from."""
    (folder / "d" / "sub").mkdir(parents=True)
    (folder / "d" / "empty").mkdir()
    (folder / "d" / "a.txt").write_text("a")
    (folder / "d" / "sub" / "b.txt").write_text("b")
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


def tree(folder: Path) -> dict[str, tuple[str, object, int]]:
    """Everything below a folder: type, content or target, permission bits."""
    found: dict[str, tuple[str, object, int]] = {}
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root, name)
            relative = str(path.relative_to(folder))
            if relative.split("/")[0] == PRIVATE:
                continue
            mode = stat.S_IMODE(path.lstat().st_mode)
            if path.is_symlink():
                found[relative] = ("link", os.readlink(path), 0)
            elif path.is_dir():
                found[relative] = ("folder", None, mode)
            else:
                found[relative] = ("file", path.read_bytes(), mode)
    return found


CASES: dict[str, Case] = {
    "isdir": lambda t, r, h: [t.isdir(f"{r}/{n}") for n in ("d", "f", "todir", "tofile", "gone", "f/x", "d/link", "")],
    "isfile": lambda t, r, h: [t.isfile(f"{r}/{n}") for n in ("d", "f", "todir", "tofile", "gone", "f/x", "d/linkdir")],
    "path_exists": lambda t, r, h: [t.path_exists(f"{r}/{n}") for n in ("d", "f", "gone", "f/x", "todir/a.txt")],
    "listdir": lambda t, r, h: sorted(t.listdir(f"{r}/d")),
    "listdir of a link": lambda t, r, h: sorted(t.listdir(f"{r}/todir")),
    "listdir pattern": lambda t, r, h: sorted(t.listdir(r, "*.dat")),
    "listdir pattern without match": lambda t, r, h: t.listdir(r, "*.none"),
    "listdir of a file": lambda t, r, h: t.listdir(f"{r}/f"),
    "listdir of nothing": lambda t, r, h: t.listdir(f"{r}/gone"),
    "glob": lambda t, r, h: sorted(t.glob(f"{r}/*.dat")),
    "glob in two levels": lambda t, r, h: sorted(t.glob(f"{r}/*/*.txt")),
    "glob hides hidden": lambda t, r, h: sorted(t.glob(f"{r}/d/*")),
    "glob of hidden": lambda t, r, h: sorted(t.glob(f"{r}/d/.h*")),
    "glob without magic": lambda t, r, h: [t.glob(f"{r}/f"), t.glob(f"{r}/gone")],
    "glob of a set": lambda t, r, h: sorted(t.glob(f"{r}/[gh].dat")),
    "get_mode": lambda t, r, h: t.get_mode(f"{r}/f"),
    "get_attribute size": lambda t, r, h: t.get_attribute(f"{r}/f").st_size,
    "get_attribute of nothing": lambda t, r, h: t.get_attribute(f"{r}/gone"),
    "mkdir": lambda t, r, h: t.mkdir(f"{r}/new"),
    "mkdir existing": lambda t, r, h: t.mkdir(f"{r}/d"),
    "mkdir existing ignored": lambda t, r, h: t.mkdir(f"{r}/d", ignore_existing=True),
    "mkdir on a file ignored": lambda t, r, h: t.mkdir(f"{r}/f", ignore_existing=True),
    "mkdir without parent": lambda t, r, h: t.mkdir(f"{r}/gone/new"),
    "makedirs": lambda t, r, h: t.makedirs(f"{r}/x/y/z"),
    "makedirs existing": lambda t, r, h: t.makedirs(f"{r}/d/sub"),
    "makedirs existing ignored": lambda t, r, h: t.makedirs(f"{r}/d/sub", ignore_existing=True),
    "rmdir": lambda t, r, h: t.rmdir(f"{r}/e"),
    "rmdir of a full folder": lambda t, r, h: t.rmdir(f"{r}/d"),
    "rmdir of a file": lambda t, r, h: t.rmdir(f"{r}/f"),
    "rmdir of nothing": lambda t, r, h: t.rmdir(f"{r}/gone"),
    "rmtree": lambda t, r, h: t.rmtree(f"{r}/d"),
    "rmtree of a file": lambda t, r, h: t.rmtree(f"{r}/f"),
    "rmtree of nothing": lambda t, r, h: t.rmtree(f"{r}/gone"),
    "remove": lambda t, r, h: t.remove(f"{r}/f"),
    "remove a link": lambda t, r, h: t.remove(f"{r}/tofile"),
    "remove a folder": lambda t, r, h: t.remove(f"{r}/e"),
    "remove nothing": lambda t, r, h: t.remove(f"{r}/gone"),
    "rename": lambda t, r, h: t.rename(f"{r}/f", f"{r}/renamed"),
    "rename a folder": lambda t, r, h: t.rename(f"{r}/d", f"{r}/renamed"),
    "rename nothing": lambda t, r, h: t.rename(f"{r}/gone", f"{r}/renamed"),
    "rename onto a file": lambda t, r, h: t.rename(f"{r}/f", f"{r}/g.dat"),
    "rename onto a folder": lambda t, r, h: t.rename(f"{r}/f", f"{r}/e"),
    "rename without a name": lambda t, r, h: t.rename("", f"{r}/x"),
    "chmod": lambda t, r, h: t.chmod(f"{r}/f", 0o755),
    "chmod through a link": lambda t, r, h: t.chmod(f"{r}/tofile", 0o711),
    "chmod of nothing": lambda t, r, h: t.chmod(f"{r}/gone", 0o755),
    "chmod without a name": lambda t, r, h: t.chmod("", 0o755),
    "symlink": lambda t, r, h: t.symlink("f", f"{r}/new"),
    "symlink to nothing": lambda t, r, h: t.symlink("gone", f"{r}/new"),
    "symlink onto a file": lambda t, r, h: t.symlink("f", f"{r}/g.dat"),
    "symlink of a pattern": lambda t, r, h: t.symlink(f"{r}/*.none", f"{r}/e"),
    "symlink to a pattern": lambda t, r, h: t.symlink(f"{r}/*.dat", f"{r}/e*"),
    "normalize": lambda t, r, h: [t.normalize(f"{r}/d/../f"), t.normalize(f"{r}/todir/sub"), t.normalize(f"{r}/gone")],
    "copy a file": lambda t, r, h: t.copy(f"{r}/f", f"{r}/new"),
    "copy a file onto a file": lambda t, r, h: t.copy(f"{r}/f", f"{r}/g.dat"),
    "copy a file into a folder": lambda t, r, h: t.copy(f"{r}/f", f"{r}/e"),
    "copy a link to a file": lambda t, r, h: t.copy(f"{r}/tofile", f"{r}/new"),
    "copy a folder": lambda t, r, h: t.copy(f"{r}/d", f"{r}/new"),
    "copy a folder dereferenced": lambda t, r, h: t.copy(f"{r}/d", f"{r}/new", dereference=True),
    "copy a folder into a folder": lambda t, r, h: t.copy(f"{r}/d", f"{r}/e"),
    "copy a folder twice": lambda t, r, h: [t.copy(f"{r}/d", f"{r}/e"), t.copy(f"{r}/d", f"{r}/e")],
    "copy a pattern": lambda t, r, h: t.copy(f"{r}/*.dat", f"{r}/e"),
    "copy a pattern onto nothing": lambda t, r, h: t.copy(f"{r}/*.dat", f"{r}/gone"),
    "copy a pattern to a pattern": lambda t, r, h: t.copy(f"{r}/*.dat", f"{r}/e*"),
    "copy nothing": lambda t, r, h: t.copy(f"{r}/gone", f"{r}/new"),
    "copy onto itself": lambda t, r, h: t.copy(f"{r}/f", f"{r}/f"),
    "copy without a name": lambda t, r, h: t.copy("", f"{r}/new"),
    "copy to no parent": lambda t, r, h: t.copy(f"{r}/f", f"{r}/gone/new"),
    "copyfile": lambda t, r, h: t.copyfile(f"{r}/f", f"{r}/new"),
    "copyfile of a link": lambda t, r, h: t.copyfile(f"{r}/tofile", f"{r}/new"),
    "copyfile of a link dereferenced": lambda t, r, h: t.copyfile(f"{r}/tofile", f"{r}/new", dereference=True),
    "copyfile of nothing": lambda t, r, h: t.copyfile(f"{r}/gone", f"{r}/new"),
    "copytree": lambda t, r, h: t.copytree(f"{r}/d", f"{r}/new"),
    "copytree of nothing": lambda t, r, h: t.copytree(f"{r}/gone", f"{r}/new"),
    "put a file": lambda t, r, h: t.put(f"{h}/f", f"{r}/new"),
    "put a file into a folder": lambda t, r, h: t.put(f"{h}/f", f"{r}/e"),
    "put a file onto a file": lambda t, r, h: t.put(f"{h}/f", f"{r}/g.dat"),
    "put a file without overwriting": lambda t, r, h: t.put(f"{h}/f", f"{r}/g.dat", overwrite=False),
    "put a folder": lambda t, r, h: t.put(f"{h}/d", f"{r}/new"),
    "put a folder into a folder": lambda t, r, h: t.put(f"{h}/d", f"{r}/e"),
    "put a folder twice": lambda t, r, h: [t.put(f"{h}/d", f"{r}/e"), t.put(f"{h}/d", f"{r}/e")],
    "put the content of a folder": lambda t, r, h: t.put(f"{h}/d/", f"{r}/e"),
    "put a folder with links": lambda t, r, h: t.put(f"{h}/d", f"{r}/new", dereference=False),
    "put a folder onto a file": lambda t, r, h: t.put(f"{h}/d", f"{r}/f"),
    "put a folder without overwriting": lambda t, r, h: t.put(f"{h}/d", f"{r}/e", overwrite=False),
    "put a pattern": lambda t, r, h: t.put(f"{h}/*.dat", f"{r}/e"),
    "put a pattern onto nothing": lambda t, r, h: t.put(f"{h}/*.dat", f"{r}/gone"),
    "put a pattern onto a file": lambda t, r, h: t.put(f"{h}/*.dat", f"{r}/f"),
    "put a pattern to a pattern": lambda t, r, h: t.put(f"{h}/*.dat", f"{r}/e*"),
    "put a pattern without match": lambda t, r, h: t.put(f"{h}/*.none", f"{r}/e"),
    "put an odd name": lambda t, r, h: t.put(f"{h}/odd \n '\" ä-name", f"{r}/e"),
    "put a dash": lambda t, r, h: t.put(f"{h}/-dash", f"{r}/e/-dash"),
    "put nothing": lambda t, r, h: t.put(f"{h}/gone", f"{r}/new"),
    "put nothing ignored": lambda t, r, h: t.put(f"{h}/gone", f"{r}/new", ignore_nonexisting=True),
    "put a relative path": lambda t, r, h: t.put("f", f"{r}/new"),
    "put to no name": lambda t, r, h: t.put(f"{h}/f", ""),
    "put to no parent": lambda t, r, h: t.put(f"{h}/f", f"{r}/gone/new"),
    "putfile": lambda t, r, h: t.putfile(f"{h}/f", f"{r}/new"),
    "putfile onto a folder": lambda t, r, h: t.putfile(f"{h}/f", f"{r}/e"),
    "putfile of a folder": lambda t, r, h: t.putfile(f"{h}/d", f"{r}/new"),
    "putfile of nothing": lambda t, r, h: t.putfile(f"{h}/gone", f"{r}/new"),
    "puttree": lambda t, r, h: t.puttree(f"{h}/d", f"{r}/deep/er/new"),
    "puttree of a file": lambda t, r, h: t.puttree(f"{h}/f", f"{r}/new"),
    "puttree of nothing": lambda t, r, h: t.puttree(f"{h}/gone", f"{r}/new"),
    "get a file": lambda t, r, h: t.get(f"{r}/f", f"{h}/new"),
    "get a file into a folder": lambda t, r, h: t.get(f"{r}/f", f"{h}/e"),
    "get a file onto a file": lambda t, r, h: t.get(f"{r}/f", f"{h}/g.dat"),
    "get a file without overwriting": lambda t, r, h: t.get(f"{r}/f", f"{h}/g.dat", overwrite=False),
    "get a link": lambda t, r, h: t.get(f"{r}/tofile", f"{h}/new"),
    "get a folder": lambda t, r, h: t.get(f"{r}/d", f"{h}/new"),
    "get a linked folder": lambda t, r, h: t.get(f"{r}/todir", f"{h}/new"),
    "get a folder into a folder": lambda t, r, h: t.get(f"{r}/d", f"{h}/e"),
    "get a folder twice": lambda t, r, h: [t.get(f"{r}/d", f"{h}/e"), t.get(f"{r}/d", f"{h}/e")],
    "get a folder with links": lambda t, r, h: t.get(f"{r}/d", f"{h}/new", dereference=False),
    "get a folder onto a file": lambda t, r, h: t.get(f"{r}/d", f"{h}/f"),
    "get a folder without overwriting": lambda t, r, h: t.get(f"{r}/d", f"{h}/e", overwrite=False),
    "get a pattern": lambda t, r, h: t.get(f"{r}/*.dat", f"{h}/e"),
    "get a pattern onto nothing": lambda t, r, h: t.get(f"{r}/*.dat", f"{h}/gone"),
    "get a pattern onto a file": lambda t, r, h: t.get(f"{r}/*.dat", f"{h}/f"),
    "get a pattern to a pattern": lambda t, r, h: t.get(f"{r}/*.dat", f"{h}/e*"),
    "get a pattern without match": lambda t, r, h: t.get(f"{r}/*.none", f"{h}/e"),
    "get nothing": lambda t, r, h: t.get(f"{r}/gone", f"{h}/new"),
    "get nothing ignored": lambda t, r, h: t.get(f"{r}/gone", f"{h}/new", ignore_nonexisting=True),
    "get to a relative path": lambda t, r, h: t.get(f"{r}/f", "new"),
    "get without a name": lambda t, r, h: t.get("", f"{h}/new"),
    "get to no parent": lambda t, r, h: t.get(f"{r}/f", f"{h}/gone/new"),
    "getfile": lambda t, r, h: t.getfile(f"{r}/f", f"{h}/new"),
    "getfile of a folder": lambda t, r, h: t.getfile(f"{r}/d", f"{h}/new"),
    "getfile of nothing": lambda t, r, h: t.getfile(f"{r}/gone", f"{h}/new"),
    "getfile onto a folder": lambda t, r, h: t.getfile(f"{r}/f", f"{h}/e"),
    "gettree": lambda t, r, h: t.gettree(f"{r}/d", f"{h}/deep/new"),
    "gettree of a file": lambda t, r, h: t.gettree(f"{r}/f", f"{h}/new"),
    "gettree of nothing": lambda t, r, h: t.gettree(f"{r}/gone", f"{h}/new"),
}


@pytest.fixture
def sides(tmp_path: Path, home: str) -> dict[str, tuple[Path, Path]]:
    """For each transport a remote and a local folder, all with the same content."""
    found = {
        "reference": (tmp_path / "reference", tmp_path / "here-reference"),
        "ours": (Path(home), tmp_path / "here-ours"),
    }
    for remote, local in found.values():
        remote.mkdir(exist_ok=True)
        local.mkdir()
        seed(remote)
        seed(local)
    return found


@pytest.fixture
def home(transport: MarketplaceHpcTransport) -> str:
    return str(transport.normalize("."))


def outcome(case: Case, transport: Transport, remote: Path, local: Path) -> tuple[Any, ...]:
    """What came of a case, in terms that are the same on both sides."""
    try:
        result: Any = case(transport, str(remote), str(local))
        problem: Any = None
    except Exception as exc:  # noqa: BLE001 - which one it is, is what is compared.
        result, problem = None, exc
    text = repr(result).replace(str(remote), "REMOTE").replace(str(local), "LOCAL")
    return text, problem, tree(remote), tree(local)


# Where aiida-core raises a bare OSError with a text, ours is the class that says what it is: still an OSError.
@pytest.mark.parametrize("name", CASES)
def test_ours_does_what_the_local_transport_does(
    name: str, transport: MarketplaceHpcTransport, sides: dict[str, tuple[Path, Path]]
) -> None:
    with LocalTransport(machine="localhost") as reference:
        expected = outcome(CASES[name], reference, *sides["reference"])
    found = outcome(CASES[name], transport, *sides["ours"])
    assert found[0] == expected[0]
    assert (found[1] is None) == (expected[1] is None), (found[1], expected[1])
    if expected[1] is not None:
        kind = OSError if type(expected[1]) in (OSError, shutil.Error) else type(expected[1])
        assert isinstance(found[1], kind), (found[1], expected[1])
    assert found[2] == expected[2]
    assert found[3] == expected[3]
