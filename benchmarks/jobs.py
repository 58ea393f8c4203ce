"""Short calculations through AiiDA's daemon to one Slurm by two ways, and what AiiDA's engine takes by itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from aiida_marketplace_hpc.testing.aiida_profile import FAST, AiidaProfile
from benchmarks.calculations import SET_UP
from benchmarks.files import Say, WrongResult
from benchmarks.job_stage import JobStage
from benchmarks.measure import OURS, Contestant, Pace, Results, Row, in_turns

THEIRS = "core.ssh_async and core.slurm"
FLOOR = "core.local and core.direct: the engine's floor"
POLL = 1
"""Seconds between AiiDA's polls of jobs, for all sides."""
_CPU = "CPU of "


def measure_jobs(stage: JobStage, numbers: Sequence[int], pace: Pace, results: Results, say: Say) -> None:
    """Run so many ``core.arithmetic.add`` at once with one daemon worker.

    :param numbers: how many at once, one comparison each.
    """
    with stage.gateway() as gateway:
        env = {"MP_ACCESS_TOKEN": gateway.token}
        with AiidaProfile(stage.home / "jobs", options=FAST, env={**env, "HOME": str(stage.home)}) as profile:
            floor = {
                "label": "floor",
                "hostname": "localhost",
                "transport": "core.local",
                "scheduler": "core.direct",
                "work_dir": str(stage.home / "floor"),
                "parameters": {"use_login_shell": False, "safe_interval": 0.0},
                "poll": POLL,
            }
            computers = [stage.ours(gateway, "ours", POLL), stage.theirs("theirs", POLL), floor]
            profile.python(SET_UP, json.dumps(computers))
            profile.start_daemon()
            for number in numbers:
                work = f"{number} core.arithmetic.add at once, daemon, 1 worker, Slurm"
                say(work)
                sides = {OURS: "ours", THEIRS: "theirs", FLOOR: "floor"}
                contestants = {name: _calculated(profile, name, label, number) for name, label in sides.items()}
                found = in_turns(contestants, pace, say)
                results.rows.append(Row(work, 0.0, found[OURS], found[THEIRS], THEIRS, 1.25))
                results.rows.append(Row(work, 0.0, found[OURS], found[FLOOR], FLOOR))
                # Less moved by whatever else the machine does than the time that passes.
                burnt = f"{work}: processor time of the worker"
                results.rows += [
                    Row(burnt, 0.0, found[_CPU + OURS], found[_CPU + other], other) for other in (THEIRS, FLOOR)
                ]


def _calculated(profile: AiidaProfile, name: str, label: str, number: int) -> Contestant:
    def contestant(_: int) -> Mapping[str, float]:
        (worker,) = profile.workers()
        before = _processor_time(worker)
        said = profile.python(_ADD, json.dumps({"label": label, "number": number}), timeout=3600)
        answer = json.loads(said.stdout.splitlines()[-1])
        if answer["right"] != number:
            raise WrongResult(f"{answer['right']} of {number} calculations on {label} have the right result")
        return {name: answer["seconds"], _CPU + name: _processor_time(worker) - before}

    return contestant


def _processor_time(pid: int) -> float:
    """The seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


_ADD = """\
import json, sys, time
from aiida import orm
from aiida.engine import submit
from aiida.plugins import CalculationFactory

Add, wanted = CalculationFactory("core.arithmetic.add"), json.loads(sys.argv[1])
code, y = orm.load_code(f"bash@{wanted['label']}"), orm.Int(1000).store()
started = time.perf_counter()
pks = {submit(Add, x=orm.Int(x), y=y, code=code).pk: x for x in range(wanted["number"])}
ended = {"or": [{"==": state} for state in ("finished", "excepted", "killed")]}
query = orm.QueryBuilder().append(Add, filters={"id": {"in": [*pks]}, "attributes.process_state": ended}, project="id")
while query.count() < len(pks) and time.perf_counter() - started < 3000:
    time.sleep(0.2)
seconds = time.perf_counter() - started
nodes = [orm.load_node(pk) for pk in pks]
right = sum(node.is_finished_ok and node.outputs.sum.value == 1000 + pks[node.pk] for node in nodes)
print(json.dumps({"seconds": seconds, "right": right}))
"""
