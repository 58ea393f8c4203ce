"""What AiiDA does with files before, while and after a calculation runs, through the daemon, on each backend.

Where AiiDA itself decides what becomes of a list, the same calculation also runs on this machine with aiida-core's own
``core.local`` transport, and both must leave the same files.
"""

from __future__ import annotations

from typing import Any

import pytest
from sites import LABEL, Installation, Site

pytestmark = [
    pytest.mark.services,
    pytest.mark.parametrize("site", ["local", "slurm"], indirect=True, scope="session"),
]

OF_SCHEDULER = {"_aiidasubmit.sh", "_scheduler-stdout.txt", "_scheduler-stderr.txt"}
"""Files that are in every working directory but differ between schedulers."""


@pytest.fixture(scope="module")
def parents(installation: Installation, localhost: str) -> dict[str, str]:
    """A finished calculation on the cluster and one on this machine, by the label of the computer: their UUIDs.

    Their working directories have the folder ``out`` with files, folders, links and odd names.
    """
    line = (
        "mkdir -p out/sub/deep out/empty; cd out; printf one >one.txt; printf a >a.dat; printf b >b.dat; "
        "printf deep >sub/deep/c.dat; printf x >'sub/blank $x.txt'; printf u >ü.txt; : >nothing.txt; "
        "printf '#!/bin/sh\\n' >tool; chmod 755 tool; ln -s one.txt link; ln -s sub linked; ln -s nowhere dangling"
    )
    uuids: dict[str, str] = installation.run(
        f"line = {line!r}\n"
        "nodes = [start(orm.load_code('bash@' + label), line) for label in ('cluster', 'localhost')]\n"
        "finished(*nodes)\n"
        "print(json.dumps({node.computer.label: node.uuid for node in nodes}))"
    )
    return uuids


def on_both(
    installation: Installation,
    parents: dict[str, str],
    line: str,
    files: dict[str, Any],
    *,
    nodes: str = "",
    said: str = "None",
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a calculation on the cluster and on this machine.

    :param nodes: the input nodes beside ``parent``, as the keyword arguments of ``dict``.
    :param said: an expression in which ``node`` is the calculation.
    :return: for each computer's label the working directory and what was said.
    """
    metadata = {"options": options or {}}
    answers: dict[str, Any] = installation.run(
        "def begin(label, uuid):\n"
        f"    nodes = dict(parent=orm.load_node(uuid).outputs.remote_folder, {nodes})\n"
        f"    return start(orm.load_code('bash@' + label), {line!r}, {files!r}, nodes=nodes, metadata={metadata!r})\n"
        f"nodes = [begin(label, uuid) for label, uuid in {parents!r}.items()]\n"
        "finished(*nodes)\n"
        f"print(json.dumps({{node.computer.label: [node.get_remote_workdir(), {said}] for node in nodes}}))"
    )
    return answers


def work_folders(installation: Installation, site: Site, answers: dict[str, Any]) -> dict[str, dict[str, str | None]]:
    """What is in the working directories of :func:`on_both`, but for what differs between computers by nature.

    Links into the parent's folder are told by what they say after ``out``.
    """
    here = answers["localhost"][0]
    found: dict[str, dict[str, str | None]] = {
        LABEL: site.tree(answers[LABEL][0]),
        "localhost": installation.run(f"print(json.dumps(contents({here!r})))"),
    }
    guards = [name for name in found[LABEL] if name.startswith(".marketplace-hpc-")]
    assert len(guards) == 1  # The file by which the job script runs once, and nothing else of ours.
    found[LABEL].pop(guards[0])
    for tree in found.values():
        for name, text in list(tree.items()):
            if name in OF_SCHEDULER or name.startswith(".aiida/"):
                tree[name] = ""
            elif text is not None and text.startswith("-> /"):
                tree[name] = "-> …/" + text.split("/out/")[-1]
    return found


def test_what_is_uploaded_copied_and_linked(installation: Installation, site: Site, parents: dict[str, str]) -> None:
    files = {
        "folders": ["hollow/er", "into", "linked_into", "into_folder"],
        "sandbox": {
            "in/deep/a b.txt": "from the depth",
            "in/secret.txt": "not for the database",
            "excluded/x.txt": "x",
            "replaced.txt": "of the sandbox",
            "ü 'q\".txt": "odd",
            ".hidden": "h",
        },
        "provenance_exclude_list": ["in/secret.txt", "./excluded"],
        "local_copy_list": [
            ["single", "file.txt", "renamed.txt"],
            ["single", "file.txt", "made/for/it.txt"],
            ["single", "file.txt", "replaced.txt"],
            ["tree", "", "whole"],
            ["tree", "sub", "part"],
            ["tree", "sub/x.txt", "x.txt"],
            ["tree", "sub", "into_folder"],
            ["tree", ".", "."],
        ],
        "remote_copy_list": [
            ["parent", "out/one.txt", "one.txt"],
            ["parent", "out/one.txt", "into"],
            ["parent", "out/sub", "copied"],
            ["parent", "out/sub", "into"],
            ["parent", "out/*.dat", "into"],
            ["parent", "out/[lt]*", "into"],
            ["parent", "out/empty", "empty"],
            ["parent", "out/missing.txt", "missing.txt"],
            ["parent", "out/missing*", "into"],
        ],
        "remote_symlink_list": [
            ["parent", "out/one.txt", "links/deep/one"],
            ["parent", "out/sub", "links/sub"],
            ["parent", "out/*", "linked_into"],
            ["parent", "out/*.dat", "."],
        ],
    }
    answers = on_both(
        installation,
        parents,
        "cat links/deep/one links/sub/deep/c.dat a.dat linked_into/b.dat into/link >read.txt; printf - >>into/one.txt",
        files,
        nodes="single=orm.SinglefileData.from_string('single', 'file.txt'), "
        "tree=folder({'top.txt': 'top', 'sub/x.txt': 'x', 'sub/below/y.txt': 'y', 'sub/nothing': ''})",
        said="[sorted(node.base.repository.list_object_names()), sorted(repository(node)), report(node)]",
    )
    found = work_folders(installation, site, answers)
    there = found[LABEL]
    assert there == found["localhost"]
    assert set(there) >= OF_SCHEDULER
    # What a reader would expect, so that not both are wrong in the same way.
    expected = {
        "in/deep/a b.txt": "from the depth",
        "ü 'q\".txt": "odd",
        ".hidden": "h",
        "hollow/er": None,
        "renamed.txt": "single",
        "made/for/it.txt": "single",
        "replaced.txt": "single",
        "whole/sub/below/y.txt": "y",
        "part/below/y.txt": "y",
        "x.txt": "x",
        "into_folder/x.txt": "x",
        "top.txt": "top",
        "one.txt": "one",
        "into/one.txt": "one-",
        "copied/deep/c.dat": "deep",
        "into/a.dat": "a",
        "into/tool": "*#!/bin/sh\n",
        "into/link": "one",
        "linked_into/link": "-> …/link",
        "empty": None,
        "links/deep/one": "-> …/one.txt",
        "linked_into/dangling": "-> …/dangling",
        "a.dat": "-> …/a.dat",
        "read.txt": "onedeepabone",
    }
    assert {name: there.get(name, "(is missing)") for name in expected} == expected
    assert "missing.txt" not in there
    (names, stored, said), reference = answers[LABEL][1], answers["localhost"][1]
    assert [names, stored] == reference[:2]
    assert "in/deep/a b.txt" in stored
    assert not {"in/secret.txt", "excluded/x.txt"} & set(stored)
    [warning] = [line for line in said if "Unable to copy" in line]
    assert "out/missing.txt" in warning
    assert "NOT Stopping" in warning
    # The parent's file is its own: what was copied was changed.
    assert site.tree(parent_folder(installation, parents))["out/one.txt"] == "one"


def parent_folder(installation: Installation, parents: dict[str, str]) -> str:
    return str(installation.run(f"print(json.dumps(orm.load_node({parents[LABEL]!r}).get_remote_workdir()))"))


def test_what_is_retrieved(installation: Installation, site: Site, parents: dict[str, str]) -> None:
    line = (
        "mkdir -p a/b/c a/empty; printf 1 >a/1.dat; printf 2 >a/b/2.dat; printf 3 >a/b/c/3.dat; printf 4 >4.dat; "
        "printf 5 >a/b/5.log; printf 6 >'a/6 $x.txt'; ln -s 4.dat link; ln -s b a/linked; mkdir d e f g; printf done"
    )
    files = {
        "retrieve_list": [
            "4.dat",
            "a/b",
            "link",
            "missing.txt",
            "a/missing*",
            "a/*.txt",
            ["a/b/c/3.dat", "whole", 4],
            ["a/b/c/3.dat", ".", 1],
            ["a/b/c/3.dat", "cut", 2],
            ["4.dat", "renamed.txt", 0],
            ["a/*/*.dat", "star", None],
            ["a/*/*.dat", "star2", 2],
            ["a/**/c", "tree", None],
            ["[de]", ".", 1],
            ["a/b/5*", ".", 0],
            ["a/linked/c", "through", 2],
            ["a", "everything", 1],
        ],
        "retrieve_temporary_list": ["a/b/*.log", ["a/b/c/*", "temporary", None], "a/b/c"],
    }
    answers = on_both(
        installation,
        parents,
        line,
        files,
        options={"parser_name": "test.files", "additional_retrieve_list": ["a/1.dat"]},
        said="[folders(node.outputs.retrieved), repository(node.outputs.retrieved),"
        " node.outputs.temporary.get_dict()['files'],"
        " node.base.attributes.get('retrieve_list'), node.base.attributes.get('retrieve_temporary_list')]",
    )
    assert answers[LABEL][1] == answers["localhost"][1]
    kept_folders, kept, temporary, *_ = answers[LABEL][1]
    expected = {
        "stdout.txt": "done",
        "4.dat": "4",
        "link": "4",
        "b/2.dat": "2",
        "b/c/3.dat": "3",
        "6 $x.txt": "6",
        "whole/a/b/c/3.dat": "3",
        "cut/c/3.dat": "3",
        "renamed.txt": "4",
        "star/a/b/2.dat": "2",
        "star2/b/2.dat": "2",
        "1.dat": "1",
    }
    assert {name: kept.get(name, "(is missing)") for name in expected} == expected
    assert not [name for name in kept if "missing" in name]
    assert temporary["5.log"] == "5"
    assert temporary["temporary/a/b/c/3.dat"] == "3"
    assert not [name for name in kept if name.startswith("temporary")]
    assert "d" in kept_folders


def test_a_portable_code(installation: Installation, site: Site) -> None:
    """A code that AiiDA brings along: its files lie in the working directory, where those of the calculation join them."""
    answers = installation.run(
        "import pathlib, tempfile\n"
        "with tempfile.TemporaryDirectory() as path:\n"
        "    top = pathlib.Path(path)\n"
        "    (top / 'bin').mkdir(); (top / 'data' / 'deep').mkdir(parents=True)\n"
        '    script = \'#!/bin/sh\\ncat data/deep/table.txt "$(dirname "$0")/part.txt"; echo ran >>data/log\\n\'\n'
        "    (top / 'bin' / 'run.sh').write_text(script)\n"
        "    (top / 'bin' / 'part.txt').write_text('beside the program')\n"
        "    (top / 'data' / 'deep' / 'table.txt').write_text('a table, ')\n"
        "    (top / 'data' / 'raw').write_bytes(bytes(range(256)))\n"
        "    portable = orm.PortableCode(label='portable', filepath_files=top, filepath_executable='bin/run.sh').store()\n"
        "files = {'sandbox': {'data/own.txt': 'of the calculation', 'bin.txt': 'beside'}}\n"
        "nodes = [start(portable, files=files, metadata={'computer': orm.load_computer(label)})"
        " for label in ('cluster', 'localhost')]\n"
        "finished(*nodes)\n"
        "print(json.dumps({node.computer.label: [node.get_remote_workdir(),"
        " repository(node.outputs.retrieved)['stdout.txt']] for node in nodes}))"
    )
    folder, printed = answers[LABEL]
    assert printed == "a table, beside the program"
    found = work_folders(installation, site, answers)
    tree = found[LABEL]
    assert tree == found["localhost"]
    assert (tree["bin/run.sh"] or "").startswith("*#!/bin/sh")
    assert tree["bin/part.txt"] == "beside the program"
    assert tree["data/log"] == "ran\n"
    assert tree["bin.txt"] == "beside"
    machine = site.gateway.machine
    assert machine.run(["stat", "-c", "%a", f"{folder}/bin/run.sh"], check=True).stdout == "755\n"
    digest = "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"
    assert machine.run(["sha256sum", f"{folder}/data/raw"], check=True).stdout.startswith(digest)


def test_an_upload_that_breaks_off_is_repeated_beside_lost_and_found(
    installation: Installation, site: Site, parents: dict[str, str]
) -> None:
    machine = site.gateway.machine
    # The file, not a folder above it: what cannot be looked at is not there, and AiiDA goes on without it.
    blocked = f"{parent_folder(installation, parents)}/out/sub/deep/c.dat"
    machine.run(["chmod", "000", blocked], check=True)
    begun = (
        f"parent = orm.load_node({parents[LABEL]!r}).outputs.remote_folder\n"
        "files = {'sandbox': {'in/a.txt': 'a'}, 'remote_copy_list': [['parent', 'out/sub/deep/c.dat', 'c.dat']]}\n"
        "node = start(code, 'cat c.dat in/a.txt', files, nodes={'parent': parent})\n"
        "deadline = time.monotonic() + 60\n"
        "while not any('Stopping' in line for line in report(node)) and time.monotonic() < deadline:\n"
        "    time.sleep(0.02)\n"
        "print(json.dumps([node.pk, node.uuid]))"
    )
    try:
        pk, uuid = installation.run(begun)
    finally:
        machine.run(["chmod", "644", blocked], check=True)
    printed, said, folder = installation.run(
        f"node = finished(orm.load_node({pk}))\n"
        "print(json.dumps([repository(node.outputs.retrieved)['stdout.txt'], report(node), node.get_remote_workdir()]))"
    )
    assert printed == "deepa"
    moves = [line for line in said if "moving the entire folder" in line]
    assert moves
    lost = f"{site.home}/aiida/lost+found"
    kept = [name for name in site.tree(lost) if name.startswith(uuid) and "/" not in name]
    assert len(kept) == len(moves)
    for name in kept:
        tree = site.tree(f"{lost}/{name}")
        assert tree["in/a.txt"] == "a"
        assert "_aiidasubmit.sh" in tree
        assert "c.dat" not in tree
        assert "stdout.txt" not in tree
    assert site.tree(folder)["c.dat"] == "deep"


def test_remote_data(installation: Installation, site: Site) -> None:
    """A folder on the cluster as AiiDA's own class for it shows, measures and removes it."""
    node = (
        "node = finished(start(code, 'mkdir -p d/e empty; printf 12345 >d/e/five; ln -s d/e/five link; ln -s d to_d'))\n"
        "remote = node.outputs.remote_folder\n"
    )
    said = installation.run(
        node + "import pathlib, tempfile\n"
        "with tempfile.TemporaryDirectory() as path:\n"
        "    remote.getfile('d/e/five', path + '/here')\n"
        "    got = pathlib.Path(path, 'here').read_text()\n"
        "    try:\n"
        "        remote.getfile('gone', path + '/gone')\n"
        "    except OSError as exc:\n"
        "        missing = str(exc)\n"
        "    left = sorted(name.name for name in pathlib.Path(path).iterdir())\n"
        "try:\n"
        "    remote.listdir('gone')\n"
        "except OSError as exc:\n"
        "    no_folder = str(exc)\n"
        "entries = {entry['name']: [entry['isdir'], entry['attributes'].st_size] for entry in"
        " remote.listdir_withattributes('d/e')}\n"
        "folders = sorted(entry['name'] for entry in remote.listdir_withattributes() if entry['isdir'])\n"
        "sizes = [remote.get_size_on_disk(pathlib.Path('d/e'), return_bytes=True),"
        " remote.get_size_on_disk(pathlib.Path('d/e/five'), method='stat', return_bytes=True)]\n"
        "before = [remote.is_empty, remote.is_cleaned, orm.RemoteData(remote_path=remote.get_remote_path() + '/empty',"
        " computer=remote.computer).store().is_empty]\n"
        "listed = sorted(remote.listdir())\n"
        "remote._clean()\n"
        "after = [remote.is_empty, remote.is_cleaned]\n"
        "remote._clean()\n"
        "print(json.dumps([node.get_remote_workdir(), got, missing, left, no_folder, entries, folders, sizes, before,"
        " listed, after]))"
    )
    path, got, missing, left, no_folder, entries, folders, sizes, before, listed, after = said
    assert (got, left) == ("12345", ["here"])
    assert "does not exist or has been deleted" in missing
    assert "does not exist, is not a directory or has been deleted" in no_folder
    assert entries == {"five": [False, 5]}
    assert folders == [".aiida", "d", "empty", "to_d"]
    assert sizes == [[5, "stat"], [5, "stat"]]
    assert before == [False, False, True]
    assert {"d", "empty", "link", "to_d", ".aiida", "_aiidasubmit.sh", "stdout.txt"} < set(listed)
    assert after == [True, True]
    assert not site.gateway.machine.exists(path)


def test_verdi_looks_at_a_calculation_and_cleans_up(installation: Installation, site: Site) -> None:
    line = "mkdir out; printf inside >out/x.txt; printf 12345 >five"
    files = {"sandbox": {"in/a.txt": "a"}, "retrieve_list": ["out"]}
    pk, remote, path = installation.run(
        f"node = finished(start(code, {line!r}, {files!r}))\n"
        "print(json.dumps([str(node.pk), str(node.outputs.remote_folder.pk), node.get_remote_workdir()]))"
    )
    commands = {
        "remote files": ["data", "core.remote", "ls", remote],
        "one folder": ["data", "core.remote", "ls", "-l", "-p", "out", remote],
        "one file": ["data", "core.remote", "cat", remote, "five"],
        "size": ["data", "core.remote", "size", remote, "-p", "out"],
        "remotecat": ["calcjob", "remotecat", pk, "out/x.txt"],
        "inputls": ["calcjob", "inputls", pk],
        "inputls folder": ["calcjob", "inputls", pk, "in"],
        "inputcat": ["calcjob", "inputcat", pk, "in/a.txt"],
        "outputls": ["calcjob", "outputls", pk],
        "outputls folder": ["calcjob", "outputls", pk, "out"],
        "outputcat": ["calcjob", "outputcat", pk, "out/x.txt"],
    }
    # In one process: the commands, not fourteen starts of AiiDA.
    said = installation.run(
        "from aiida.cmdline.commands.cmd_verdi import verdi\n"
        "from click.testing import CliRunner\n"
        "run = lambda words: CliRunner().invoke(verdi, ['-p', 'test', *words], catch_exceptions=False)\n"
        f"done = {{name: run(words) for name, words in {commands!r}.items()}}\n"
        "print(json.dumps({name: [result.exit_code, result.output] for name, result in done.items()}))"
    )
    assert {name: code for name, (code, _) in said.items() if code} == {}
    output = {name: text for name, (_, text) in said.items()}
    words = {name: set(text.split()) for name, text in output.items()}
    assert {"out", "five", "in", "_aiidasubmit.sh"} <= words["remote files"]
    assert output["one folder"].startswith("-rw")
    assert output["one folder"].split()[-1] == "x.txt"
    assert output["one file"] == "12345"
    assert output["remotecat"] == output["outputcat"] == "inside"
    assert "in" in words["inputls"]
    assert output["inputls folder"] == "a.txt\n"
    assert output["inputcat"] == "a"
    assert {"out", "stdout.txt"} <= words["outputls"]
    assert output["outputls folder"] == "x.txt\n"
    # aiida-core tries `du`, says once that it does not work, and adds the files' sizes up itself.
    assert "obtained via `stat`: 6.00 B" in output["size"]
    assert output["size"].count("Problem executing `du`") == 1
    assert len(output["size"].splitlines()) <= 4
    gone = installation.profile.verdi("calcjob", "remotecat", pk, "gone", env=installation.token, check=False)
    assert gone.returncode != 0
    assert "does not exist" in gone.stderr + gone.stdout
    assert "Traceback" not in gone.stderr + gone.stdout
    assert "1 remote folders cleaned" in installation.verdi("calcjob", "cleanworkdir", "-f", pk)
    assert not site.gateway.machine.exists(path)
    assert installation.run(f"print(json.dumps(orm.load_node({remote}).is_cleaned))") is True
    assert "all 6 tests succeeded" in installation.verdi("computer", "test", LABEL)


def test_transfer_calculations_put_and_get(installation: Installation, site: Site, parents: dict[str, str]) -> None:
    put, got, links = installation.run(
        "from aiida.plugins import CalculationFactory\n"
        "Transfer = CalculationFactory('core.transfer')\n"
        "cluster = {'computer': orm.load_computer('cluster')}\n"
        f"parent = orm.load_node({parents[LABEL]!r}).outputs.remote_folder\n"
        "here = folder({'a.txt': 'a', 'sub/b.txt': 'b', 'sub/deep/c.txt': 'c'})\n"
        "both = {'here': here, 'there': parent}\n"
        "def said(retrieve):\n"
        "    return orm.Dict({'retrieve_files': retrieve, 'local_files': [('here', 'a.txt', 'from_here/a.txt'),"
        " ('here', 'sub', 'sub')], 'remote_files': [('there', 'out/one.txt', 'one.txt'), ('there', 'out/sub', 'tree')],"
        " 'symlink_files': [('there', 'out/a.dat', 'a.dat'), ('there', 'out/sub', 'links/sub')]})\n"
        "put = submit(Transfer, instructions=said(False), source_nodes=both, metadata=cluster)\n"
        "get = submit(Transfer, instructions=said(True), source_nodes=both, metadata=cluster)\n"
        "finished(put, get)\n"
        "print(json.dumps([put.outputs.remote_folder.get_remote_path(), repository(get.outputs.retrieved),"
        " parent.get_remote_path()]))"
    )
    tree = site.tree(put)
    assert tree["from_here/a.txt"] == "a"
    assert tree["sub/deep/c.txt"] == "c"
    assert tree["one.txt"] == "one"
    assert tree["tree/deep/c.dat"] == "deep"
    assert tree["a.dat"] == f"-> {links}/out/a.dat"
    assert tree["links/sub"] == f"-> {links}/out/sub"
    expected = {"a.txt": "a", "sub/b.txt": "b", "one.txt": "one", "tree/deep/c.dat": "deep", "a.dat": "a"}
    assert {name: got.get(name, "(is missing)") for name in expected} == expected


def test_another_root_and_the_texts_around_a_job(installation: Installation, site: Site) -> None:
    """A computer as users set one up: work on scratch, module lines before, a launcher, odd values in variables."""
    mpirun = "srun --ntasks={tot_num_mpiprocs}" if site.slurm else "env RANKS={tot_num_mpiprocs}"
    setup = ["--label", "scratch", "--hostname", "gateway", "--work-dir", site.gateway.roots["scratch"] + "/runs"]
    setup += ["--transport", "marketplace_hpc", "--scheduler", "marketplace_hpc", "--mpirun-command", mpirun]
    setup += ["--prepend-text", "export ORDER=computer\nexport QUOTED='it is \"so\"'"]
    setup += ["--append-text", "echo computer >>after.txt"]
    installation.verdi("computer", "setup", "-n", *setup)
    installation.verdi("computer", "configure", "marketplace_hpc", "scratch", "-n", "--url", site.gateway.url)
    metadata = {
        "options": {
            "resources": {"num_machines": 1, "num_mpiprocs_per_machine": 2},
            "withmpi": True,
            "prepend_text": "export ORDER=$ORDER,option",
            "append_text": "echo option >>after.txt",
            "environment_variables": {"MINE": "a b $HOME 'c'"},
            "custom_scheduler_commands": "#SBATCH --nice=1",
            "max_wallclock_seconds": 600,
            "mpirun_extra_params": ["--label"] if site.slurm else ["MORE=1"],
        }
    }
    line = 'echo "$ORDER|$QUOTED|$MINE|$RANKS$MORE$SLURM_NTASKS"'
    folder, printed, script = installation.run(
        "code = orm.InstalledCode(label='bash2', computer=orm.load_computer('scratch'),"
        " filepath_executable='/usr/bin/bash', prepend_text='export ORDER=$ORDER,code',"
        " append_text='echo code >>after.txt').store()\n"
        f"node = finished(start(code, {line!r}, metadata={metadata!r}))\n"
        "print(json.dumps([node.get_remote_workdir(), repository(node.outputs.retrieved)['stdout.txt'],"
        " repository(node)['_aiidasubmit.sh']]))"
    )
    assert folder.startswith(f"{site.scratch}/runs/")
    said = "computer,code,option|it is \"so\"|a b $HOME 'c'|"
    if site.slurm:
        assert sorted(printed.splitlines()) == [f"0: {said}2", f"1: {said}2"]
    else:
        assert printed == f"{said}21\n"
    assert site.tree(folder)["after.txt"] == "option\ncode\ncomputer\n"
    assert "#SBATCH --nice=1" in script
