"""The isolated cluster: two sides that cannot see each other's files, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aiida_marketplace_hpc.testing.cluster import IsolatedCluster
from aiida_marketplace_hpc.testing.machine import process_table, wait_until

pytestmark = pytest.mark.services


def _alive(pids: set[int]) -> set[int]:
    return pids & {entry.pid for entry in process_table()}


def test_the_sides_do_not_see_each_others_files(isolated_cluster: IsolatedCluster, tmp_path: Path) -> None:
    on_the_cluster = f"{isolated_cluster.scratch}/only-inside"
    isolated_cluster.write(on_the_cluster, "inside", user=isolated_cluster.user)
    (tmp_path / "only-outside").touch()

    assert isolated_cluster.exists(on_the_cluster)
    assert not Path(isolated_cluster.path).exists()
    assert not isolated_cluster.exists(str(tmp_path / "only-outside"))
    assert isolated_cluster.outside(on_the_cluster).read_text() == "inside"


def test_commands_run_as_the_clusters_user_on_another_host(isolated_cluster: IsolatedCluster) -> None:
    script = "id -un; id -Gn; hostname; pwd"
    said = isolated_cluster.run(["sh", "-c", script], user=isolated_cluster.user, cwd=isolated_cluster.home).stdout
    user = isolated_cluster.user
    assert said.splitlines() == [user, user, "cluster", isolated_cluster.home]
    assert os.uname().nodename != "cluster"


def test_the_interpreter_and_the_package_run_inside(isolated_cluster: IsolatedCluster) -> None:
    code = "import sqlite3, ssl, aiida_marketplace_hpc.testing.machine as m; print(m.__file__)"
    said = isolated_cluster.run([sys.executable, "-c", code], user=isolated_cluster.user, check=True).stdout
    assert said.strip().endswith("machine.py")


def test_the_id_of_a_process_is_that_of_the_command(isolated_cluster: IsolatedCluster) -> None:
    child = isolated_cluster.popen(["sleep", "1000"], user=isolated_cluster.user)
    entries = {entry.pid: entry for entry in isolated_cluster.processes()}
    wait_until(
        lambda: {entry.pid: entry for entry in isolated_cluster.processes()}[child.pid].name == "sleep",
        within=5,
        failure=lambda: f"{child.pid} is {entries}",
    )
    child.kill()
    assert child.wait(timeout=5) == -signal.SIGKILL


def test_close_ends_every_process(
    isolated_cluster: IsolatedCluster,
) -> None:  # which says that clusters can be made here
    with IsolatedCluster("/srv/another/cluster") as another:
        assert not another.exists(f"{isolated_cluster.rig}/home/..//../cluster")
        # Neither the environment nor a parent leads to this one.
        another.run(["sh", "-c", "env -i setsid sleep 1000 >/dev/null 2>&1 &"], user=another.user)
        pids = {entry.pid for entry in another.processes()}
        assert len(pids) == 2
    assert _alive(pids) == set()


def test_the_death_of_the_tests_ends_every_process(isolated_cluster: IsolatedCluster) -> None:
    code = """
import os, signal
from aiida_marketplace_hpc.testing.cluster import IsolatedCluster

cluster = IsolatedCluster()
cluster.start()
cluster.popen(["sleep", "1000"], user=cluster.user)
print(*(entry.pid for entry in cluster.processes()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pids = {int(pid) for pid in done.stdout.split()}
    assert len(pids) == 2, done.stderr
    wait_until(lambda: not _alive(pids), within=10, failure=lambda: f"{_alive(pids)} live on")
