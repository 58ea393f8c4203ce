"""Calculations in portions, a kill in each of them while one of its submissions is under way, and the account at the end."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.aiida_profile import FAST, AiidaProfile
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import ProcessEntry, wait_until
from aiida_marketplace_hpc.testing.slurm import SlurmCluster
from aiida_marketplace_hpc.testing.slurm_faults import SlurmFault, SlurmFaults
from tests.integration.sites import LABEL, SYSTEM, Installation, Site, publish_plugins
from tests.soak.account import Account, Calculation, Record
from tests.soak.victims import held_sbatch, is_alive, kill, submitter, uuid_of

WORKERS = 2
_PLUGINS = Path(__file__).parents[1] / "integration"
_OPTIONS = {**FAST, "logging.aiida_loglevel": "INFO"}
"""At this level the daemon's log says which worker submits what."""
_STILL = 120.0
"""Seconds without any change after which AiiDA is taken to have lost a task of its own."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Blow:
    """One kind of kill, at a submission that is under way.

    :param moment: ``hang-before``: sbatch was called and has not reached Slurm; ``hang-after``: Slurm has the job, and nobody
        has been told its id.
    :param sbatch: sbatch is killed as well, as when the whole machine goes down.
    :param late: sbatch goes on only when the gateway has given it up and submitted again: the one race in which Slurm gets two
        jobs, the second of which ends before the script.
    """

    gateway: bool
    worker: bool
    moment: Literal["hang-before", "hang-after"]
    sbatch: bool = False
    late: bool = False

    def __str__(self) -> str:
        parts = {"gateway": self.gateway, "worker": self.worker, "sbatch": self.sbatch}
        when = "before" if self.moment == "hang-before" else "after"
        names = " and ".join(name for name, struck in parts.items() if struck)
        return f"{names}, {when} Slurm had the job{', which it gets late' if self.late else ''}"


BLOWS = (
    Blow(gateway=True, worker=False, moment="hang-after"),
    Blow(gateway=False, worker=True, moment="hang-before"),
    Blow(gateway=True, worker=False, moment="hang-before", sbatch=True),
    Blow(gateway=False, worker=True, moment="hang-after"),
    Blow(gateway=True, worker=False, moment="hang-before"),
    Blow(gateway=True, worker=True, moment="hang-after"),
    Blow(gateway=True, worker=True, moment="hang-before"),
)
LATE = Blow(gateway=True, worker=False, moment="hang-before", late=True)


@dataclass(frozen=True)
class Plan:
    """How long a soak is.

    :param calculations: how many there are.
    :param kills: how often somebody is killed while a submission is under way.
    :param late: how many more submissions reach Slurm only after the gateway has given them up and submitted again.
    :param seed: of everything that is left to chance.
    :param patience: seconds that the calculations have to end after the last kill.
    """

    calculations: int
    kills: int
    late: int
    seed: int
    patience: float = 600.0

    def blows(self) -> list[Blow]:
        """The blows: all kinds in turns, in an order that is left to chance."""
        blows = [*(BLOWS[number % len(BLOWS)] for number in range(self.kills)), *[LATE] * self.late]
        random.Random(self.seed).shuffle(blows)
        return blows

    def portions(self) -> list[range]:
        """The numbers of the calculations that are submitted for each blow."""
        parts = self.kills + self.late
        bounds = [self.calculations * number // parts for number in range(parts + 1)]
        return [range(first, last) for first, last in itertools.pairwise(bounds)]


@dataclass
class Kills:
    """Who was killed: how often, and how often with a submission under way."""

    done: Counter[str] = field(default_factory=Counter)
    in_flight: Counter[str] = field(default_factory=Counter)
    blows: Counter[str] = field(default_factory=Counter)

    def table(self) -> list[tuple[str, str]]:
        """The figures, for people."""
        rows = [
            (f"kill -9 of {name}", f"{times}, {self.in_flight[name]} of them with a submission in flight")
            for name, times in sorted(self.done.items())
        ]
        return [*rows, *((f"- {blow}", str(times)) for blow, times in sorted(self.blows.items()))]


class Soak:
    """Gateway, Slurm and an AiiDA installation with a daemon, under attack.

    :param slurm: the Slurm that the jobs run on; those of others may have run on it before, but none may during the soak.
    :param profile: not yet started; see :func:`set_up`.
    """

    def __init__(
        self, slurm: SlurmCluster, gateway: GatewayProcess, faults: SlurmFaults, profile: AiidaProfile, say: Say
    ) -> None:
        self.slurm = slurm
        self.gateway = gateway
        self.faults = faults
        self.profile = profile
        self.installation = Installation(profile, Site(gateway, slurm, faults))
        self.kills = Kills()
        self.resumed = 0
        self.repairs = 0
        self._say = say
        self._executed = slurm.machine.make_directory("executed", user=slurm.user)
        self._of_others = {row["JobIDRaw"] for row in self._accounted()}
        self._pks: dict[str, int] = {}
        self._late: dict[str, tuple[SlurmFault, ProcessEntry]] = {}

    def run(self, plan: Plan) -> Account:
        """Do all of it, and count."""
        self._say(
            f"seed {plan.seed}: {plan.calculations} calculations, {plan.kills} + {plan.late} blows at submissions in flight"
        )
        dice = random.Random(plan.seed)
        addend = dice.randrange(10**6)
        for blow, portion in zip(plan.blows(), plan.portions(), strict=True):
            if dice.random() < 0.2:
                self._strike_at_random(dice)
            self._all_there()
            self._release_late()
            self._strike(blow, portion, addend, dice)
        self._finish(plan.patience)
        return self._count(plan, addend)

    def table(self) -> list[tuple[str, str]]:
        """What happened on the way, for people."""
        helped = [
            ("paused by AiiDA, resumed by `verdi process play`", str(self.resumed)),
            ("tasks lost by AiiDA, `verdi process repair`", str(self.repairs)),
        ]
        return [*self.kills.table(), *helped]

    def keep(self, folder: Path) -> None:
        """Copy all logs, the ledger and AiiDA's database to a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gateway.log").write_text(self.gateway.log)
        ignore = shutil.ignore_patterns("*.sock", "*.soc")
        for name, place in (
            ("gateway-state", self.slurm.machine.outside(self.gateway.state)),
            ("slurm", self.slurm.logs),
            ("aiida", self.profile.path / ".aiida"),
        ):
            # Sockets cannot be copied, and what changes meanwhile is no loss.
            with contextlib.suppress(shutil.Error):
                shutil.copytree(place, folder / name, dirs_exist_ok=True, ignore=ignore)

    # Killing

    def _strike(self, blow: Blow, portion: range, addend: int, dice: random.Random) -> None:
        """Kill while sbatch is held up for one of the calculations of a portion."""
        fault = self.faults.inject("sbatch", blow.moment)
        self._submit(portion, addend)
        fault.wait_for_hit(within=120)
        sbatch = held_sbatch(self.slurm.machine, besides={entry.pid for _, entry in self._late.values()})
        uuid = uuid_of(sbatch)
        struck = []
        # The later the release, the more often the same submission is asked for again meanwhile.
        hold, restart_first = dice.uniform(0, 4), dice.random() < 0.5
        if blow.worker:
            waiting = submitter(self.profile, self._pks[uuid])
            kill(waiting or self.profile.workers()[0])
            struck.append(self._note("a daemon worker", waiting is not None))
        if blow.gateway:
            self.gateway.kill()
            struck.append(self._note("the gateway", True))
        if blow.sbatch:
            kill(sbatch.pid)
        if blow.gateway and restart_first:
            self.gateway.start()
        time.sleep(hold)
        if blow.late:
            self._late[uuid] = fault, sbatch
        else:
            fault.release()
        if not self.gateway.running:
            self.gateway.start()
        self.kills.blows[str(blow)] += 1
        self._say(f"{portion.stop} submitted; killed {' and '.join(struck)} ({blow}), calculation {uuid}")

    def _release_late(self) -> None:
        """Let those go on that the gateway has given up."""
        if self._late:
            jobs = {job["client_ref"]: job for job in self._ledger().values()}
            for uuid in [uuid for uuid in self._late if jobs[uuid]["state"] != "SUBMITTING"]:
                fault, sbatch = self._late.pop(uuid)
                fault.release()
                wait_until(
                    lambda pid=sbatch.pid: not is_alive(pid),  # type: ignore[misc]
                    within=30,
                    failure=lambda: "an sbatch that was released does not end",
                )
                self._say(f"a late submission of calculation {uuid} has reached Slurm")

    def _strike_at_random(self, dice: random.Random) -> None:
        """Kill somebody, whatever they do now."""
        time.sleep(dice.uniform(0, 2))
        if dice.random() < 0.5:
            self.gateway.kill()
            self.gateway.start()
            name = self._note("the gateway", False)
        else:
            kill(dice.choice(self.profile.workers()))
            name = self._note("a daemon worker", False)
        self._say(f"killed {name} at a random instant")

    def _note(self, name: str, in_flight: bool) -> str:
        self.kills.done[name] += 1
        self.kills.in_flight[name] += in_flight
        return f"{name}{'' if in_flight else ' (no submission of its own in flight)'}"

    def _all_there(self) -> None:
        """Wait until the daemon has replaced the workers that were killed."""
        wait_until(
            lambda: len(self.profile.workers()) == WORKERS,
            within=60,
            failure=lambda: f"{len(self.profile.workers())} of {WORKERS} workers run\n{self.profile.daemon_log()}",
        )

    # Calculating

    def _submit(self, numbers: range, addend: int) -> None:
        wanted = {"numbers": [*numbers], "addend": addend, "folder": self._executed}
        found: dict[str, int] = self.installation.run(f"wanted = json.loads({json.dumps(wanted)!r})\n{_SUBMIT}")
        self._pks |= found

    def _finish(self, patience: float) -> None:
        """Wait until all calculations have ended, and help as a user would, with AiiDA's own commands."""
        deadline = time.monotonic() + patience
        last: list[Any] = []
        changed = time.monotonic()
        while True:
            self._release_late()
            rows = self._rows()
            open_rows = [row for row in rows if row["state"] not in ("finished", "excepted", "killed")]
            if not (open_rows or self._late) or time.monotonic() > deadline:
                return
            if rows != last:
                self._say(f"{len(open_rows)} calculations have not ended")
                last, changed = rows, time.monotonic()
            if paused := [str(row["pk"]) for row in open_rows if row["paused"]]:
                self._say(f"paused by AiiDA, resumed: {paused}")
                self.resumed += len(paused)
                self.installation.verdi("process", "play", *paused, timeout=120)
            elif time.monotonic() - changed > _STILL:
                self._say(f"nothing moves; `verdi process repair`: {[row['pk'] for row in open_rows]}")
                self.repairs += 1
                self.installation.stop_daemon()
                self._say(self.installation.verdi("process", "repair", "--force", timeout=120))
                self.installation.start_daemon(WORKERS)
                changed = time.monotonic()
            time.sleep(2)

    # Counting

    def _count(self, plan: Plan, addend: int) -> Account:
        calculations = [
            Calculation(int(row["label"]), row["uuid"], row["state"], row["exit_status"], row["sum"], row["job_id"])
            for row in self._rows()
        ]
        return Account(plan.calculations, addend, self._executions(), calculations, self._ledger(), self._records())

    def _ledger(self) -> dict[str, dict[str, Any]]:
        """The gateway's jobs, by id."""
        with HpcGateway(self.gateway.url, token_source=StaticToken(self.gateway.token)) as client:
            jobs: dict[str, dict[str, Any]] = client.job_states(list(client.list_jobs()))["jobs"]
        return jobs

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.installation.run(_ROWS)
        return rows

    def _executions(self) -> dict[int, int]:
        """How many lines the scripts have left, by the number of the calculation."""
        counted = self.slurm.machine.run(["grep", "-rc", "", self._executed]).stdout.splitlines()
        pairs = (line.rpartition("/")[2].split(":") for line in counted)
        return {int(number): int(lines) for number, lines in pairs}

    def _accounted(self) -> list[Mapping[str, str]]:
        """All jobs that Slurm's accounting has."""
        columns = "JobIDRaw,State,ExitCode,Start,End,WorkDir"
        argv = ("sacct", "-X", "-n", "-P", "--starttime=now-2days", "--allusers", f"--format={columns}")
        lines = self.slurm.run(*argv, check=True).stdout.splitlines()
        return [dict(zip(columns.split(","), line.split("|"), strict=True)) for line in lines]

    def _records(self) -> Sequence[Record]:
        """What Slurm's accounting has about the jobs since :meth:`__init__`, once none of them lives any more."""
        rows: list[Mapping[str, str]] = []

        def whole() -> bool:
            rows[:] = self._accounted()
            known = self.slurm.run("squeue", "--noheader", "--states=all", "--format=%A", check=True).stdout.split()
            return {*known} <= {row["JobIDRaw"] for row in rows} and all(row["End"] != "Unknown" for row in rows)

        wait_until(whole, within=60, poll=1, failure=lambda: f"jobs that do not end: {rows}")
        return [
            Record(row["JobIDRaw"], row["State"], row["ExitCode"], row["Start"][:1].isdigit(), row["WorkDir"])
            for row in rows
            if row["JobIDRaw"] not in self._of_others
        ]


@contextlib.contextmanager
def set_up(slurm: SlurmCluster, folder: Path, say: Say) -> Iterator[Soak]:
    """Bring up gateway, installation and daemon, and end them.

    :param folder: for AiiDA's files; exists.
    """
    machine = slurm.machine
    faults = SlurmFaults(machine)
    roots = {"scratch": f"{machine.scratch}/{{username}}", "system": f"{SYSTEM}:ro"}
    (folder / "plugins").mkdir()
    plugins = publish_plugins(folder / "plugins")
    with contextlib.ExitStack() as stack:
        environment = {**slurm.env, **faults.env}
        gateway = stack.enter_context(GatewayProcess(machine, backend="slurm", roots=roots, env=environment))
        imports = [_PLUGINS, plugins]
        profile = stack.enter_context(AiidaProfile(folder / "aiida", options=_OPTIONS, import_path=imports))
        soak = Soak(slurm, gateway, faults, profile, say)
        stack.callback(soak.installation.close)
        soak.installation.set_up()
        soak.installation.start_daemon(WORKERS)
        yield soak


_SUBMIT = """\
made = {}
for number in wanted["numbers"]:
    # Some last longer than others, so that jobs are found waiting, running and ended.
    lines = [f'echo "$SLURM_JOB_ID" >> {wanted["folder"]}/{number}', f"sleep {number % 4}"]
    options = {"prepend_text": "\\n".join(lines)}
    node = submit(
        ArithmeticAdd, x=orm.Int(number), y=orm.Int(wanted["addend"]), code=code,
        metadata={"label": str(number), "options": options},
    )
    made[node.uuid] = node.pk
print(json.dumps(made))
"""

_ROWS = f"""\
on_cluster = {{"label": {LABEL!r}}}
jobs = orm.QueryBuilder().append(orm.Computer, filters=on_cluster, tag="computer")
jobs.append(orm.CalcJobNode, with_computer="computer", project=[
    "id", "uuid", "label", "attributes.process_state", "attributes.exit_status", "attributes.paused", "attributes.job_id",
])
sums = orm.QueryBuilder().append(orm.CalcJobNode, tag="job", project="id")
sums.append(orm.Int, with_incoming="job", edge_filters={{"label": "sum"}}, project="attributes.value")
found, names = dict(sums.all()), ("pk", "uuid", "label", "state", "exit_status", "paused", "job_id")
print(json.dumps([{{**dict(zip(names, row, strict=True)), "sum": found.get(row[0])}} for row in jobs.all()]))
"""
