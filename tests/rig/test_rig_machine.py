"""The machine on which the cluster's side runs, and the processes on it."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from aiida_marketplace_hpc.testing.machine import (
    Machine,
    RigError,
    TreeEntry,
    ensure_user,
    free_ports,
    marked_with,
    process_table,
    wait_until,
)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


def test_directories_belong_to_whom_they_should(machine: Machine) -> None:
    machine.write(f"{machine.home}/alice/deep/file", "content", user=machine.user, mode=0o640)
    machine.run(["ln", "-s", "file", f"{machine.home}/alice/deep/link"], user=machine.user, check=True)

    assert machine.read_text(f"{machine.home}/alice/deep/file") == "content"
    assert machine.exists(f"{machine.home}/alice")
    assert not machine.exists(f"{machine.home}/bob")
    tree = machine.tree(machine.home)
    assert tree["alice/deep/file"] == TreeEntry("f", 0o640, 7)
    assert tree["alice/deep/link"].target == "file"
    if os.geteuid() == 0:
        assert machine.run(["touch", f"{machine.software}/file"], user=machine.user).returncode == 1


def test_nothing_of_the_tests_environment_gets_in(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MP_ACCESS_TOKEN", "secret")
    said = machine.run(["env"], user=machine.user, env={"GIVEN": "yes"}).stdout.splitlines()
    assert "GIVEN=yes" in said
    assert not [line for line in said if "secret" in line]


def test_a_failing_command_says_why(machine: Machine) -> None:
    with pytest.raises(RigError, match="No such file"):
        machine.read_text(f"{machine.path}/missing")


def test_close_ends_what_went_to_the_background() -> None:
    with Machine() as machine:
        # The middle process ends: the last one has no parent left that would lead to it.
        machine.run(["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & setsid sleep 1000 >/dev/null 2>&1 &"])
        mark = machine.environment()["MPHPC_RIG"]
        wait_until(lambda: len(marked_with("MPHPC_RIG", mark)) == 2, within=5, failure=lambda: "they do not start")
        path = machine.path
    assert marked_with("MPHPC_RIG", mark) == set()
    assert not os.path.exists(path)


def test_free_ports_are_free_and_below_the_ephemeral_range() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(1024 < port < 32768 for port in ports)
    for port in ports:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_the_process_table_has_this_process() -> None:
    entry = next(entry for entry in process_table() if entry.pid == os.getpid())
    assert entry.parent == os.getppid()
    assert entry.command()[0] == sys.argv[0] or "python" in entry.command()[0]
    assert entry.environment()["PATH"]


def test_waiting_ends_with_the_reason() -> None:
    started = time.monotonic()
    with pytest.raises(RigError, match="still not"):
        wait_until(lambda: False, within=0.05, failure=lambda: "still not")
    assert time.monotonic() - started < 5


def test_the_account_may_be_made_again(cluster_user: str) -> None:
    assert ensure_user(cluster_user) == cluster_user
