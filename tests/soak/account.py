"""What is counted at the end, in four places that know nothing of each other, and whether they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

EXIT_SECOND_COPY = "75:0"
"""How Slurm's accounting words the end of a copy that found the guard taken."""


@dataclass(frozen=True)
class Calculation:
    """One calculation, as AiiDA says it.

    :param number: which of the soak's calculations it is; it is also the first summand.
    :param total: the result, ``None`` if there is none.
    """

    number: int
    uuid: str
    state: str
    exit_status: int | None
    total: int | None
    jobid: str | None


@dataclass(frozen=True)
class Record:
    """One job, as Slurm's accounting says it."""

    id: str
    state: str
    exit_code: str
    started: bool
    folder: str

    @property
    def second_copy(self) -> bool:
        """Whether it ended before user code because the guard was taken."""
        return self.exit_code == EXIT_SECOND_COPY

    @property
    def never_started(self) -> bool:
        """Whether it was cancelled before it ran."""
        return self.state.startswith("CANCELLED") and not self.started


@dataclass
class Account:
    """All that was counted.

    :param wanted: how many calculations there should be.
    :param addend: the second summand of all of them.
    :param executions: how often the script of each calculation was executed, by number: lines on the cluster's disk.
    :param ledger: the gateway's jobs, by id.
    """

    wanted: int
    addend: int
    executions: Mapping[int, int]
    calculations: Sequence[Calculation]
    ledger: Mapping[str, Mapping[str, object]]
    records: Sequence[Record]
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._executed()
        self._in_aiida()
        self._in_the_ledger()
        self._in_slurm()

    def table(self) -> list[tuple[str, str]]:
        """The figures, for people."""
        states = Counter(f"{one.state} [{one.exit_status}]" for one in self.calculations)
        right = sum(one.total == one.number + self.addend for one in self.calculations)
        ends = Counter(str(job["state"]) for job in self.ledger.values())
        return [
            ("calculations", str(self.wanted)),
            ("executed on the cluster", f"{len(self.executions)}, in all {sum(self.executions.values())} times"),
            ("AiiDA: states", _listed(states)),
            ("AiiDA: right results", str(right)),
            ("ledger: jobs", f"{len(self.ledger)} ({_listed(ends)})"),
            ("sacct: jobs that ran a script", str(len(self._ran))),
            ("sacct: second copies, ended before the script", str(sum(one.second_copy for one in self.records))),
            ("sacct: duplicates cancelled before they started", str(sum(one.never_started for one in self.records))),
        ]

    @property
    def _ran(self) -> list[Record]:
        return [one for one in self.records if not one.second_copy and not one.never_started]

    def _executed(self) -> None:
        for number in range(self.wanted):
            times = self.executions.get(number, 0)
            if times != 1:
                self.problems.append(f"calculation {number} was executed {times} times")

    def _in_aiida(self) -> None:
        if len(self.calculations) != self.wanted:
            self.problems.append(f"AiiDA has {len(self.calculations)} calculations")
        for one in self.calculations:
            if (one.state, one.exit_status) != ("finished", 0):
                self.problems.append(f"calculation {one.number} ({one.uuid}) is {one.state} [{one.exit_status}]")
            elif one.total != one.number + self.addend:
                self.problems.append(f"calculation {one.number} ({one.uuid}) has the result {one.total}")

    def _in_the_ledger(self) -> None:
        uuids = Counter(str(job["client_ref"]) for job in self.ledger.values())
        if repeated := [uuid for uuid, times in uuids.items() if times > 1]:
            self.problems.append(f"the ledger has several jobs for {', '.join(repeated)}")
        known = {one.jobid: one.uuid for one in self.calculations}
        if set(known) != set(self.ledger):
            self.problems.append(f"AiiDA and ledger differ in {sorted(map(str, set(known) ^ set(self.ledger)))}")
        for jobid, job in self.ledger.items():
            if (job["state"], job["exit_code"]) != ("COMPLETED", 0):
                self.problems.append(
                    f"job {jobid} is {job['state']} [{job['exit_code']}] in the ledger: {job['message']}"
                )
            if known.get(jobid, job["client_ref"]) != job["client_ref"]:
                self.problems.append(
                    f"job {jobid} belongs to {job['client_ref']} in the ledger, to {known[jobid]} in AiiDA"
                )

    def _in_slurm(self) -> None:
        identifiers = Counter(one.id for one in self._ran)
        wanted = Counter(str(job["scheduler_id"]) for job in self.ledger.values())
        if identifiers != wanted:
            self.problems.append(
                f"sacct and ledger differ in {sorted((identifiers - wanted) + (wanted - identifiers))}"
            )
        for one in self._ran:
            if (one.state, one.exit_code) != ("COMPLETED", "0:0"):
                self.problems.append(f"Slurm's job {one.id} is {one.state} {one.exit_code} in {one.folder}")


def _listed(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{times} {name}" for name, times in sorted(counted.items()))
