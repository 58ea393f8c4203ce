"""A short soak: whoever is killed while a submission is under way, each calculation runs once and none is lost.

``make soak`` is the long one.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from tabulate import tabulate

from aiida_marketplace_hpc.testing.slurm import SlurmCluster
from tests.soak.account import Account, Calculation, Record
from tests.soak.campaign import BLOWS, LATE, Plan, set_up


@pytest.mark.services
@pytest.mark.alone
@pytest.mark.timeout(240)
def test_calculations_run_once_whoever_is_killed_while_they_are_submitted(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    seed = int(os.environ.get("MARKETPLACE_HPC_SEED", "0")) or random.randrange(10**6)
    with set_up(slurm_cluster, tmp_path, print) as soak:
        try:
            account = soak.run(Plan(calculations=20, kills=7, late=0, seed=seed, patience=150))
            print(f"\n{tabulate([*soak.table(), *account.table()], tablefmt='plain', disable_numparse=True)}")
            assert account.problems == []
            assert sum(soak.kills.in_flight.values()) >= 6
        except BaseException:
            soak.keep(tmp_path / "kept")
            raise


def account(**changes: object) -> Account:
    """Of two calculations that went well, but for the changes."""
    calculations = [
        Calculation(number, f"uuid-{number}", "finished", 0, number + 7, f"job-{number}") for number in (0, 1)
    ]
    ledger = {
        one.jobid: {
            "client_ref": one.uuid, "state": "COMPLETED", "exit_code": 0, "scheduler_id": str(one.number), "message": None
        }
        for one in calculations
    }  # fmt: skip
    records = [Record(str(number), "COMPLETED", "0:0", True, "/folder") for number in (0, 1)]
    parts = {"executions": {0: 1, 1: 1}, "calculations": calculations, "ledger": ledger, "records": records}
    return Account(wanted=2, addend=7, **{**parts, **changes})  # type: ignore[arg-type]


def test_an_account_that_agrees_has_no_problems() -> None:
    assert account().problems == []
    copies = [Record("8", "FAILED", "75:0", True, "/folder"), Record("9", "CANCELLED by 1", "0:0", False, "/folder")]
    assert account(records=[*account().records, *copies]).problems == []


def test_an_account_sees_what_is_wrong_in_one_place_alone() -> None:
    good = account()
    first, second = good.calculations
    again = {**good.ledger, "job-2": good.ledger["job-1"]}
    lost = {**good.ledger, "job-1": {**good.ledger["job-1"], "state": "QUEUED"}}
    third = Record("2", "COMPLETED", "0:0", True, "/folder")
    for change, words in (
        ({"executions": {0: 1, 1: 2}}, "executed 2 times"),
        ({"executions": {0: 1}}, "executed 0 times"),
        ({"calculations": [first]}, "AiiDA has 1"),
        ({"calculations": [first, replace(second, total=9)]}, "result 9"),
        ({"calculations": [first, replace(second, state="excepted")]}, "is excepted"),
        ({"ledger": again}, "several jobs for uuid-1"),
        ({"ledger": lost}, "is QUEUED"),
        ({"ledger": {"job-0": good.ledger["job-0"]}}, "AiiDA and ledger differ"),
        ({"records": [*good.records, third]}, "sacct and ledger differ"),
        ({"records": [good.records[0], replace(good.records[1], state="FAILED", exit_code="1:0")]}, "is FAILED"),
    ):
        assert any(words in problem for problem in account(**change).problems), (change, words)


def test_each_portion_of_a_plan_has_a_kill() -> None:
    plan = Plan(calculations=20, kills=7, late=2, seed=1)
    portions = plan.portions()
    assert [number for portion in portions for number in portion] == list(range(20))
    assert all(portions)
    assert len(portions) == len(plan.blows()) == 9
    assert {*plan.blows()} == {*BLOWS, LATE}
