"""aiida-shell's jobs, and monitors that look at a running job's files and stop it, through the daemon on each backend."""

from __future__ import annotations

import pytest
from sites import Installation, Site

from aiida_marketplace_hpc.testing.machine import RigError

pytestmark = [
    pytest.mark.services,
    pytest.mark.parametrize("site", ["local", "slurm"], indirect=True, scope="session"),
]

SHELL = (
    "from aiida_shell import launch_shell_job\n"
    "def launch(command, arguments=None, options=None, **more):\n"
    "    metadata = {'computer': orm.load_computer('cluster'), 'options': options or {}}\n"
    "    return launch_shell_job(command, arguments=arguments, metadata=metadata, submit=True, **more)[1]\n"
)


def working_in(site: Site, folder: str) -> int:
    """How many processes on the cluster have this working directory."""
    script = 'ls -l /proc/[0-9]*/cwd 2>/dev/null | grep -c -- "-> $1$"'
    return int(site.gateway.machine.run(["sh", "-c", script, "sh", folder]).stdout)


def test_a_shell_job_by_path_by_name_and_by_code(installation: Installation, site: Site) -> None:
    """The three ways to name a command without asking the cluster where it is."""
    said = installation.run(
        SHELL + "by_path = launch('/usr/bin/printf', ['by path'], resolve_command=False)\n"
        "by_name = launch('printf', ['by name'], resolve_command=False)\n"
        # The code is known from now on: there is nothing to resolve.
        "again = launch('/usr/bin/printf', ['again'])\n"
        "where = {'computer': orm.load_computer('cluster'), 'filepath_executable': '/usr/bin/cat'}\n"
        "code = orm.InstalledCode(label='cat', **where).store()\n"
        "by_code = launch(code, ['{a}'], nodes={'a': orm.SinglefileData.from_string('by code', 'a.txt')})\n"
        "nodes = finished(by_path, by_name, again, by_code)\n"
        "print(json.dumps([[node.outputs.stdout.get_content(), str(node.inputs.code.filepath_executable)]"
        " for node in nodes]))"
    )
    assert said == [
        ["by path", "/usr/bin/printf"],
        ["by name", "printf"],
        ["again", "/usr/bin/printf"],
        ["by code", "/usr/bin/cat"],
    ]


def test_what_a_shell_job_says_that_wants_to_resolve_its_command(installation: Installation, site: Site) -> None:
    for command in ("date", "/usr/bin/date"):
        with pytest.raises(RigError) as refused:
            installation.run(SHELL + f"launch({command!r})")
        [said] = [line for line in str(refused.value).splitlines() if line.startswith("NotImplementedError")]
        assert f'which "{command}"' in said
        assert "launch_shell_job(..., resolve_command=False)" in said


def test_a_chain_of_shell_jobs(installation: Installation, site: Site) -> None:
    """Files and folders in, files and patterns out, the folder of one job copied or linked for the next, a parser."""
    said = installation.run(
        SHELL + "first = finished(launch('/usr/bin/split', ['-l1', '{lines}', 'part_'], resolve_command=False,"
        " outputs=['part_*'], nodes={'lines': orm.SinglefileData.from_string('one\\ntwo\\n', 'lines.txt')}))\n"
        "remote = first.outputs.remote_folder\n"
        "def parser(dirpath):\n"
        "    from aiida import orm\n"
        "    return {'length': orm.Int(len((dirpath / 'stdout').read_text()))}\n"
        "there = {'nodes': {'before': remote}, 'filenames': {'before': 'there'}}\n"
        "copied, named, linked = finished(\n"
        "    launch(code, ['-c', 'cat part_aa part_ab deep/x.txt'], parser=parser,"
        " nodes={'before': remote, 'tree': folder({'deep/x.txt': 'three'})}),\n"
        "    launch(code, ['-c', 'cat there/part_ab; echo more >there/part_ab'], **there),\n"
        "    launch(code, ['-c', 'cat there/part_aa'], options={'use_symlinks': True}, **there))\n"
        "print(json.dumps([first.outputs.part_aa.get_content(), first.outputs.part_ab.get_content(),"
        " copied.outputs.stdout.get_content(), copied.outputs.length.value, named.outputs.stdout.get_content(),"
        " linked.outputs.stdout.get_content(), remote.get_remote_path(), linked.get_remote_workdir()]))"
    )
    *texts, before, linked = said
    assert texts == ["one\n", "two\n", "one\ntwo\nthree", 13, "two\n", "one\n"]
    assert site.tree(before)["part_ab"] == "two\n"
    assert site.tree(linked)["there"] == f"-> {before}"


def test_a_shell_job_that_fails(installation: Installation, site: Site) -> None:
    status, message = installation.run(
        SHELL + "node = wait(launch('/usr/bin/cat', ['gone'], resolve_command=False))\n"
        "print(json.dumps([node.exit_status, node.exit_message]))"
    )
    assert status == 400
    assert "No such file" in message


def test_a_monitor_stops_a_job_for_what_its_file_says(installation: Installation, site: Site) -> None:
    # It would go on for ten minutes.
    line = "for n in $(seq 1 3000); do echo $n >>heat; sleep 0.2; done; echo never >>heat"
    facts, seen = installation.run(
        "limit = orm.Dict({'entry_point': 'test.too_hot', 'kwargs': {'limit': 3.0, 'name': 'heat'}})\n"
        f"node = wait(start(code, {line!r}, {{'retrieve_list': ['heat']}}, monitors={{'hot': limit}}))\n"
        "print(json.dumps([facts(node), repository(node.outputs.retrieved)['heat']]))"
    )
    assert (facts["state"], facts["status"]) == ("finished", 150)
    assert "it is too hot: heat is over 3" in facts["message"]
    assert facts["detailed"]["job"]["state"] == "CANCELLED"
    if site.slurm is not None:
        accounted = site.accounted(facts["detailed"]["job"]["scheduler_id"])
        assert accounted["State"].startswith("CANCELLED")
    assert 3 < int(seen.split()[-1]) < 3000
    assert working_in(site, facts["workdir"]) == 0


def test_a_monitor_that_looks_with_everything_there_is(installation: Installation, site: Site) -> None:
    files = {"sandbox": {"in/a.txt": "12345", "in/b.txt": ""}}
    line = "touch started; until test -e go; do sleep 0.1; done"
    begun = installation.run(
        "monitors = {'look': orm.Dict({'entry_point': 'test.listing'}),"
        " 'cool': orm.Dict({'entry_point': 'test.too_hot', 'kwargs': {'limit': 3.0, 'name': 'never_there'}})}\n"
        f"node = start(code, {line!r}, {files!r}, monitors=monitors)\n"
        "deadline = time.monotonic() + 60\n"
        "while not (seen := orm.load_node(node.pk).base.extras.get('seen', None)) and time.monotonic() < deadline:\n"
        "    time.sleep(0.05)\n"
        "print(json.dumps([node.pk, node.get_remote_workdir(), seen]))"
    )
    pk, folder, seen = begun
    assert working_in(site, folder) > 0
    site.gateway.machine.write(f"{folder}/go", "")
    assert seen["glob"] == [f"{folder}/in/a.txt", f"{folder}/in/b.txt"]
    assert {"in", "started", "_aiidasubmit.sh"} <= set(seen["names"])
    assert (seen["size"], oct(seen["mode"])[-3:-1], seen["user"]) == (5, "64", "alice")
    status, said = installation.run(
        f"node = finished(orm.load_node({pk}))\nprint(json.dumps([node.exit_status, report(node)]))"
    )
    assert status == 0
    assert [line for line in said if "Traceback" in line] == []
