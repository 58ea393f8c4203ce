"""AiiDA calculations with many small files: with ours, and with ``core.ssh_async`` and ``core.direct`` on the same machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiida_marketplace_hpc.testing.aiida_profile import FAST, AiidaProfile
from aiida_marketplace_hpc.testing.gateway import ServedRequest
from benchmarks.files import WrongResult
from benchmarks.measure import OURS, Contestant, Count, Pace, Results, Row, in_turns
from benchmarks.stage import Stage, Way

THEIRS = "core.ssh_async and core.direct"
POLL = 1
"""Seconds between AiiDA's polls of a job, for both sides."""
_OWN_FILES = 4
"""What AiiDA moves besides: the script, its folder ``.aiida``, and what the scheduler caught of standard output and error."""
_REQUESTS = "requests"
_POLLS = "repeated polls"


@dataclass(frozen=True)
class Load:
    """What a calculation carries, and how many are run at once through the daemon."""

    inputs: int = 50
    outputs: int = 20
    at_once: int = 20


def measure_calculations(
    stage: Stage, ways: Sequence[Way], load: Load, pace: Pace, results: Results, say: Callable[[str], None]
) -> None:
    """Run calculations one at a time with ``engine.run``, and many at once through the daemon."""
    root = Path(__file__).parents[1]
    with AiidaProfile(stage.home, options=FAST, import_path=[root], env=stage.token) as profile:
        computers = [_computer(stage, way, name) for way in ways for name in (OURS, THEIRS)]
        profile.python(SET_UP, json.dumps(computers))
        profile.start_daemon()
        for way in ways:
            for work, script, number in (
                ("once, engine.run", _RUN, 1),
                (f"{load.at_once} at once, daemon, 1 worker", _SUBMIT, load.at_once),
            ):
                work = f"calculation with {load.inputs} inputs and {load.outputs} retrieved files, {work}"
                say(f"{work}, {way.label} ms")
                sides = {name: _calculated(profile, stage, way, name, script, load, number) for name in (OURS, THEIRS)}
                found = in_turns(sides, pace, say)
                results.rows.append(Row(work, way.round_trip, found[OURS], found[THEIRS], THEIRS, 1.0))
                aim = number * (load.inputs + load.outputs + _OWN_FILES + 10)
                results.counts.append(Count(work, way.round_trip, found[_REQUESTS], found[_POLLS], aim))


def _label(name: str, way: Way) -> str:
    return f"{'ours' if name == OURS else 'theirs'}{way.label.replace('.', '_')}"


def _computer(stage: Stage, way: Way, name: str) -> dict[str, Any]:
    """What AiiDA is told about one side, reached by one way."""
    ours = name == OURS
    label = _label(name, way)
    parameters = {"url": way.gateway} if ours else {"host": way.ssh_host, "use_login_shell": False}
    return {
        "label": label,
        "hostname": "gateway" if ours else way.ssh_host,
        "transport": "marketplace_hpc" if ours else "core.ssh_async",
        "scheduler": "marketplace_hpc" if ours else "core.direct",
        "work_dir": str((stage.remote if ours else stage.ssh) / "aiida" / label),
        "parameters": {**parameters, "safe_interval": 0.0},
        "poll": POLL,
    }


def _calculated(
    profile: AiidaProfile, stage: Stage, way: Way, name: str, script: str, load: Load, number: int
) -> Contestant:
    parameters = {"label": _label(name, way), "inputs": load.inputs, "outputs": load.outputs, "number": number}

    def contestant(_: int) -> Mapping[str, float]:
        before = len(stage.gateway.requests())
        said = profile.python(script, json.dumps(parameters), timeout=3600)
        answer: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
        if answer["whole"] != number:
            raise WrongResult(
                f"{answer['whole']} of {number} calculations on {parameters['label']} were as they should"
            )
        if name != OURS:
            return {name: answer["seconds"]}
        served = stage.gateway.requests()[before:]
        polls = _repeated_polls(served) if number == 1 else 0
        return {name: answer["seconds"], _REQUESTS: len(served) - polls, _POLLS: polls}

    return contestant


def _repeated_polls(served: Sequence[ServedRequest]) -> int:
    """How often one calculation was asked about in vain.

    After the submission one poll sees its end and one question is for its accounting; the rest depends on how long it took.
    """
    capabilities = [request.capability for request in served]
    return max(0, capabilities[capabilities.index("newTransformation") :].count("query") - 2)


SET_UP = """\
import json, sys
from aiida import orm

for wanted in json.loads(sys.argv[1]):
    computer = orm.Computer(
        label=wanted["label"], hostname=wanted["hostname"], transport_type=wanted["transport"],
        scheduler_type=wanted["scheduler"], workdir=wanted["work_dir"],
    ).store()
    computer.set_default_mpiprocs_per_machine(1)
    computer.set_minimum_job_poll_interval(wanted["poll"])
    computer.configure(**wanted["parameters"])
    orm.InstalledCode(computer=computer, label="bash", filepath_executable="/usr/bin/bash").store()
"""

_COMMON = """\
import json, sys, time
from aiida import orm
from aiida.engine import run_get_node, submit
from benchmarks.many_files import ManyFiles

wanted = json.loads(sys.argv[1])
code = orm.load_code(f"bash@{wanted['label']}")
inputs = {"code": code, "sent": orm.Int(wanted["inputs"]).store(), "fetched": orm.Int(wanted["outputs"]).store()}

def is_whole(node):
    names = node.outputs.retrieved.list_object_names() if node.is_finished_ok else []
    return sum(name.startswith("output-") for name in names) == wanted["outputs"]
"""

_RUN = (
    _COMMON
    + """
started = time.perf_counter()
_, node = run_get_node(ManyFiles, **inputs)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "whole": int(is_whole(node))}))
"""
)

_SUBMIT = (
    _COMMON
    + """
started = time.perf_counter()
pks = [submit(ManyFiles, **inputs).pk for _ in range(wanted["number"])]
ended = {"or": [{"==": state} for state in ("finished", "excepted", "killed")]}
query = orm.QueryBuilder().append(
    ManyFiles, filters={"id": {"in": pks}, "attributes.process_state": ended}, project="id"
)
while query.count() < len(pks) and time.perf_counter() - started < 3000:
    time.sleep(0.2)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "whole": sum(is_whole(orm.load_node(pk)) for pk in pks)}))
"""
)
