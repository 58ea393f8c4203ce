"""Files that are kept on the cluster after a calculation, in every mode, and brought back.

AiiDA ends a calculation well whose compression failed, so it is the stash node and the archive that count. What is kept is
compared with what aiida-core's ``core.local`` keeps on this machine, and archives are read with ``tar``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from contents import contents
from sites import LABEL, Installation, Site

pytestmark = [
    pytest.mark.services,
    pytest.mark.parametrize("site", ["local", "slurm"], indirect=True, scope="session"),
]

ARCHIVES = {"tar": b"", "tar.gz": b"\x1f\x8b", "tar.bz2": b"BZh", "tar.xz": b"\xfd7zXZ"}
"""The compressed modes, each with how such a file begins (a plain archive begins with a name)."""
MODES = ["copy", *ARCHIVES]
LINE = (
    "mkdir -p out/sub/deep out/empty many/a many/b; printf one >one.txt; printf deep >out/sub/deep/c.dat; : >out/nothing; "
    "printf x >'out/blank $x.txt'; printf u >out/ü.txt; printf '#!/bin/sh\\n' >out/tool; chmod 755 out/tool; "
    "ln -s sub/deep/c.dat out/link; ln -s sub out/linked; ln -s nowhere out/dangling; "
    "printf 1 >many/a/1.dat; printf 2 >many/b/2.dat; printf 3 >many/b/3.log; printf not >not.txt"
)
# The pattern comes first: aiida-core's own transports forget what stands before one.
KEPT = ["many/*/*.dat", "out", "one.txt"]


@pytest.fixture(scope="module")
def sources(installation: Installation, localhost: str) -> dict[str, str]:
    """A finished calculation on the cluster and one on this machine, by the label of the computer: their UUIDs."""
    uuids: dict[str, str] = installation.run(
        f"nodes = [start(orm.load_code('bash@' + label), {LINE!r}) for label in ('cluster', 'localhost')]\n"
        "finished(*nodes)\n"
        "print(json.dumps({node.computer.label: node.uuid for node in nodes}))"
    )
    return uuids


@pytest.fixture(scope="module")
def targets(site: Site, localhost: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where things are kept: on the cluster in the other root, in a folder that no other gateway's users have."""
    return {LABEL: f"{site.scratch}/kept-{uuid4()}", localhost: str(tmp_path_factory.mktemp("kept"))}


def stashing(mode: str, target: str, kept: list[str], **more: Any) -> dict[str, Any]:
    options = {"stash_mode": mode, "target_base": target, "source_list": kept, **more}
    return options if mode == "copy" else {"dereference": False, **options}


def unpacked(site: Site, label: str, archive: str, place: Path) -> dict[str, str | None]:
    """What ``tar`` finds in an archive, without the three folders that each path in it begins with."""
    unpack = ["tar", "--strip-components=3", "-xf", archive, "-C"]
    if label == LABEL:
        machine = site.gateway.machine
        folder = machine.make_directory("unpacked")
        machine.run([*unpack, folder], check=True)
        return site.tree(folder)
    folder = str(place / Path(archive).name)
    Path(folder).mkdir()
    subprocess.run([*unpack, folder], check=True)
    return contents(folder)


def test_each_mode_keeps_the_same_as_core_local(
    installation: Installation, site: Site, targets: dict[str, str], tmp_path: Path
) -> None:
    # What core.local puts into an archive does not depend on how it is compressed.
    stash = {
        label: {mode: stashing(mode, target, KEPT) for mode in (MODES if label == LABEL else MODES[:2])}
        for label, target in targets.items()
    }
    kept = installation.run(
        f"nodes = {{label + ' ' + mode: start(orm.load_code('bash@' + label), {LINE!r},"
        f" metadata={{'options': {{'stash': options}}}}) for label, modes in {stash!r}.items()"
        " for mode, options in modes.items()}\n"
        "finished(*nodes.values())\n"
        "said = {}\n"
        "for name, node in nodes.items():\n"
        "    if 'remote_stash' in node.outputs:\n"
        "        kept = node.outputs.remote_stash\n"
        "        said[name] = [type(kept).__name__, kept.stash_mode.value, kept.target_basepath, list(kept.source_list),"
        " node.uuid]\n"
        "    else:\n"
        "        said[name] = report(node)\n"
        "print(json.dumps(said))"
    )
    found: dict[str, dict[str, Any]] = {}
    for label, target in targets.items():
        found[label] = {}
        for mode in stash[label]:
            kind, said_mode, path, source_list, uuid = kept[f"{label} {mode}"]
            assert (said_mode, source_list) == (mode, KEPT)
            if mode == "copy":
                assert kind == "RemoteStashFolderData"
                assert path == f"{target}/{uuid[:2]}/{uuid[2:4]}/{uuid[4:]}"
                found[label][mode] = site.tree(path) if label == LABEL else contents(path)
            else:
                assert kind == "RemoteStashCompressedData"
                assert path == f"{target}/{uuid}.{mode}"
                found[label][mode] = unpacked(site, label, path, tmp_path)
                if label == LABEL:
                    start = site.gateway.machine.outside(path).read_bytes()[:8]
                    assert start.startswith(ARCHIVES[mode] or uuid[:2].encode())
    reference = found["localhost"]
    for mode, tree in found[LABEL].items():
        assert tree == reference["copy" if mode == "copy" else "tar"], mode
        assert tree["out/sub/deep/c.dat"] == "deep"
        assert tree["out/blank $x.txt"] == "x"
        assert tree["out/tool"] == "*#!/bin/sh\n"
        assert tree["out/link"] == "-> sub/deep/c.dat"
        assert tree["out/dangling"] == "-> nowhere"
        assert tree["out/empty"] is None
        assert tree["many/b/2.dat"] == "2"
        assert tree["one.txt"] == "one"
        assert not {"not.txt", "many/b/3.log", "_aiidasubmit.sh"} & set(tree)


def test_links_are_followed_and_what_is_missing_is_told(
    installation: Installation, site: Site, targets: dict[str, str], tmp_path: Path
) -> None:
    target = f"{targets[LABEL]}/special"
    options = {
        "followed": stashing("tar.gz", target, ["out/link", "out/linked"], dereference=True),
        "skipped": stashing("copy", target, ["one.txt", "gone.txt"]),
        "swallowed": stashing("tar", target, ["one.txt", "gone.txt"]),
        "copy that fails": stashing("copy", target, ["one.txt", "gone.txt"], fail_on_missing=True),
        "archive that fails": stashing("tar.xz", target, ["one.txt", "gone.txt"], fail_on_missing=True),
    }
    said = installation.run(
        f"nodes = {{name: start(code, {LINE!r}, metadata={{'options': {{'stash': stash}}}})"
        f" for name, stash in {options!r}.items()}}\n"
        "wait(*nodes.values())\n"
        "print(json.dumps({name: [node.exit_status, node.exit_message, node.outputs.remote_stash.target_basepath"
        " if 'remote_stash' in node.outputs else None] for name, node in nodes.items()}))"
    )
    status, _, path = said["followed"]
    assert status == 0
    tree = unpacked(site, LABEL, path, tmp_path)
    assert tree["out/link"] == "deep"
    assert tree["out/linked/deep/c.dat"] == "deep"
    status, _, path = said["skipped"]
    assert status == 0
    assert site.tree(path) == {"one.txt": "one"}
    assert said["swallowed"] == [0, None, None]
    for name in ("copy that fails", "archive that fails"):
        status, message, path = said[name]
        assert status not in (0, None)
        assert "gone.txt" in message
        assert path is None
    # Nothing half done is left: two stashes, and the folder that the failed copy is removed from.
    assert [name for name in site.tree(target) if name.endswith(".part")] == []
    assert [name for name in site.tree(target) if name.endswith((".tar", ".tar.xz"))] == []


@pytest.mark.parametrize("mode", MODES)
def test_a_calculation_of_its_own_keeps_and_brings_back(
    installation: Installation, site: Site, sources: dict[str, str], targets: dict[str, str], mode: str
) -> None:
    """``core.stash`` on the folder of a calculation long finished, ``core.unstash`` to a new folder and to the old one."""
    machine = site.gateway.machine
    kept = ["out", "one.txt"]
    options = stashing(mode, f"{targets[LABEL]}/later", kept)
    kind, path, source = installation.run(
        "from aiida.plugins import CalculationFactory\n"
        f"source = orm.load_node({sources[LABEL]!r}).outputs.remote_folder\n"
        "metadata = {'computer': orm.load_computer('cluster'),"
        f" 'options': {{'resources': {{'num_machines': 1}}, 'stash': {options!r}}}}}\n"
        "node = finished(submit(CalculationFactory('core.stash'), source_node=source, metadata=metadata))\n"
        "kept = node.outputs.remote_stash\n"
        "print(json.dumps([kept.pk, kept.target_basepath, source.get_remote_path()]))"
    )
    assert machine.exists(path)
    before = {name: text for name, text in site.tree(source).items() if name.split("/")[0] in kept}
    machine.run(["sh", "-c", 'rm -r "$1/out" && printf changed >"$1/one.txt"', "sh", source], check=True)
    new = installation.run(
        "from aiida.plugins import CalculationFactory\n"
        f"kept = orm.load_node({kind})\n"
        "def back(where):\n"
        f"    options = {{'unstash_target_mode': where, 'source_list': {kept!r}}}\n"
        "    metadata = {'computer': orm.load_computer('cluster'), 'options': {'resources': {'num_machines': 1},"
        " 'unstash': options}}\n"
        "    return submit(CalculationFactory('core.unstash'), source_node=kept, metadata=metadata)\n"
        "new, old = back('NewRemoteData'), back('OriginalPlace')\n"
        "finished(new, old)\n"
        "print(json.dumps(new.outputs.remote_folder.get_remote_path()))"
    )
    assert before["out/sub/deep/c.dat"] == "deep"
    for folder in (new, source):
        assert {n: text for n, text in site.tree(folder).items() if n.split("/")[0] in kept} == before, folder


def test_a_code_of_the_users_keeps_and_brings_back(
    installation: Installation, site: Site, sources: dict[str, str], targets: dict[str, str]
) -> None:
    """The mode for tape and the like: AiiDA writes down what to keep, a job does it."""
    program = (
        f"#!{sys.executable} -I\n"
        "import json, os, shutil, sys\n"
        "said = json.load(sys.stdin)\n"
        "os.makedirs(said['target_base'], exist_ok=True)\n"
        "for name in said['source_list']:\n"
        "    source = os.path.join(said['source_path'], name)\n"
        "    shutil.copytree(source, os.path.join(said['target_base'], name), symlinks=True)\n"
        "print('kept', *said['source_list'])\n"
    )
    target = f"{targets[LABEL]}/own"
    keep = {"stash_mode": "submit_custom_code", "target_base": target, "source_list": ["many"]}
    bring = {"unstash_target_mode": "NewRemoteData", "source_list": ["many"]}
    kind, printed, new = installation.run(
        "import pathlib, tempfile\n"
        "from aiida.plugins import CalculationFactory\n"
        "with tempfile.TemporaryDirectory() as path:\n"
        f"    (pathlib.Path(path) / 'keep.py').write_text({program!r})\n"
        "    own = orm.PortableCode(label='keep', filepath_files=path, filepath_executable='keep.py').store()\n"
        "def run(name, **inputs):\n"
        "    options = {'resources': {'num_machines': 1}, 'withmpi': False, **inputs.pop('options')}\n"
        "    metadata = {'computer': orm.load_computer('cluster'), 'options': options}\n"
        "    return finished(submit(CalculationFactory(name), code=own, metadata=metadata, **inputs))\n"
        f"source = orm.load_node({sources[LABEL]!r}).outputs.remote_folder\n"
        f"kept = run('core.stash', source_node=source, options={{'stash': {keep!r}}})\n"
        f"back = run('core.unstash', source_node=kept.outputs.remote_stash, options={{'unstash': {bring!r}}})\n"
        "print(json.dumps([type(kept.outputs.remote_stash).__name__, repository(kept.outputs.retrieved)['aiida.out'],"
        " back.outputs.remote_folder.get_remote_path()]))"
    )
    assert (kind, printed) == ("RemoteStashCustomData", "kept many\n")
    expected = {"many", "many/a", "many/b", "many/a/1.dat", "many/b/2.dat", "many/b/3.log"}
    assert set(site.tree(target)) == expected
    assert expected < set(site.tree(new))


@pytest.mark.services
@pytest.mark.timeout(600)
def test_an_archive_that_takes_longer_than_a_request_may(
    installation: Installation, site: Site, targets: dict[str, str]
) -> None:
    """What does not shrink takes xz long: half a minute of work for the gateway or more, and one archive in the end."""
    stash = stashing("tar.xz", f"{targets[LABEL]}/large", ["large"])
    line = "mkdir large; head -c 50331648 /dev/urandom >large/noise; sha256sum <large/noise"
    path, digest, said = installation.run(
        f"node = start(code, {line!r}, metadata={{'options': {{'stash': {stash!r}}}}})\n"
        "wait(node, seconds=500)\n"
        "kept = node.outputs.remote_stash.target_basepath if 'remote_stash' in node.outputs else None\n"
        "print(json.dumps([kept, repository(node.outputs.retrieved)['stdout.txt'], report(node)]))"
    )
    machine = site.gateway.machine
    assert path is not None, said
    assert said == []
    unpack = 'tar -xOf "$1" --wildcards "*/large/noise" | sha256sum'
    assert machine.run(["sh", "-c", unpack, "sh", path], check=True).stdout == digest
    machine.run(["rm", "-r", f"{targets[LABEL]}/large"], check=True)
