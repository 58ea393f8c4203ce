"""The AiiDA installation of the tests: apart from any other, with a daemon that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from aiida_marketplace_hpc.testing.aiida_profile import AiidaProfile, ProcessOutcome
from aiida_marketplace_hpc.testing.machine import RigError, marked_with, wait_until

pytestmark = pytest.mark.services

_WORKFLOWS = """
from aiida import orm
from aiida.engine import WorkChain

class Adding(WorkChain):
    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.input("x", valid_type=orm.Int)
        spec.exit_code(410, "ODD", message="it is odd")
        spec.outline(cls.add)

    def add(self):
        return self.exit_codes.ODD if self.inputs.x.value % 2 else None
"""

_SUBMIT = """
from aiida import orm
from aiida.engine import submit
from rig_workflows import Adding

print(*(submit(Adding, x=orm.Int(x)).pk for x in (2, 3)))
"""

_SLOW_ADDRESS = """
import pathlib, time

def write_text(self, *args, write=pathlib.Path.write_text, **options):
    if self.name == "broker.sockets":
        self.touch()
        time.sleep(3)
    return write(self, *args, **options)

pathlib.Path.write_text = write_text
"""

_SAY_TOKEN = "import os; print(os.environ.get('MP_ACCESS_TOKEN'))"

Installations = Callable[..., AiidaProfile]


def test_it_is_apart_and_has_no_secrets(aiida_installations: Installations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MP_ACCESS_TOKEN", "secret")
    with aiida_installations(broker=None) as profile:
        assert str(profile.path) in profile.verdi("profile", "show").stdout
        assert profile.python(_SAY_TOKEN).stdout == "None\n"
        assert profile.python(_SAY_TOKEN, env={"MP_ACCESS_TOKEN": "given"}).stdout == "given\n"
        with pytest.raises(RigError, match="does not define a broker"):
            profile.verdi("daemon", "start")
        with pytest.raises(RigError, match="not ended after 0 s"):
            profile.wait_for([12345], timeout=0)
        path = profile.path
    assert not path.exists()


@pytest.mark.timeout(300)
def test_the_daemon_runs_test_code_and_ends(aiida_installations: Installations, tmp_path: Path) -> None:
    (tmp_path / "rig_workflows.py").write_text(_WORKFLOWS)
    with aiida_installations(import_path=[tmp_path]) as profile:
        profile.start_daemon(workers=1)
        even, odd = (int(pk) for pk in profile.python(_SUBMIT).stdout.split())
        found = profile.wait_for([even, odd], timeout=60)
        assert found[even] == ProcessOutcome(even, "finished", 0, None, False)
        assert (found[odd].exit_status, found[odd].exit_message) == (410, "it is odd")

        first = profile.workers()
        profile.kill_worker()
        wait_until(
            lambda: bool(set(profile.workers()) - set(first)), within=30, failure=lambda: "no worker comes in its place"
        )
        profile.stop_daemon()
        assert profile.workers() == []

        profile.start_daemon()
        mark = profile.environment["MPHPC_AIIDA"]
        assert len(marked_with("MPHPC_AIIDA", mark)) >= 3  # circus, broker, worker
    assert marked_with("MPHPC_AIIDA", mark) == set()


def test_a_worker_that_waits_where_no_broker_is_is_started_anew(
    aiida_installations: Installations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiida_marketplace_hpc.testing.aiida_profile._WORKER_START", 8.0)
    (tmp_path / "rig_workflows.py").write_text(_WORKFLOWS)
    (tmp_path / "sitecustomize.py").write_text(_SLOW_ADDRESS)
    with aiida_installations(import_path=[tmp_path]) as profile:
        profile.verdi("daemon", "start", "1")
        wait_until(lambda: profile.workers() != [], within=60, failure=lambda: "no worker starts")
        [lost] = profile.workers()
        profile.start_daemon()
        assert profile.workers() != [lost]
        even, _ = (int(pk) for pk in profile.python(_SUBMIT).stdout.split())
        assert profile.wait_for([even], timeout=60)[even].exit_status == 0
