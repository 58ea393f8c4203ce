"""Run a soak and print every figure: ``python -m tests.soak --help``."""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

from aiida_marketplace_hpc.testing.cluster import IsolatedCluster
from aiida_marketplace_hpc.testing.install import install
from aiida_marketplace_hpc.testing.machine import Machine, NotPossibleHere, RigError, is_root_on_debian
from aiida_marketplace_hpc.testing.slurm import SlurmCluster
from tests.soak.campaign import Plan, Soak, set_up


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--calculations", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--kills", type=int, default=24, help="how often, with a submission in flight (default: 24)")
    parser.add_argument("--late", type=int, default=2, help="how many submissions more reach Slurm twice (default: 2)")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--patience", type=float, default=900, help="seconds to end after the last kill (default: 900)")
    parser.add_argument("--keep", type=Path, default=Path("soak-result"), help="for logs, if something is wrong")
    given = parser.parse_args()
    seed = random.randrange(10**6) if given.seed is None else given.seed
    plan = Plan(given.calculations, given.kills, given.late, seed, given.patience)
    # Also where it is told to end otherwise: everything that was started is ended.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)

    try:
        with contextlib.ExitStack() as stack:
            if is_root_on_debian():
                install("slurm")
            slurm = stack.enter_context(SlurmCluster(stack.enter_context(_machine())))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mphpc-soak-")))
            soak = stack.enter_context(set_up(slurm, folder, say))
            try:
                account = soak.run(plan)
            except BaseException:
                _keep(soak, given.keep)
                raise
            rows = [*soak.table(), *account.table()]
            print(f"\nseed {seed}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}\n")
            for problem in account.problems:
                print(f"WRONG: {problem}")
            if account.problems:
                _keep(soak, given.keep)
    except RigError as exc:
        print(exc, file=sys.stderr)
        return 1
    print(f"{'wrong' if account.problems else 'as it should be'}, after {time.monotonic() - started:.0f} s")
    return 1 if account.problems else 0


def _machine() -> Machine:
    try:
        IsolatedCluster.check_possible()
    except NotPossibleHere:
        return Machine()
    return IsolatedCluster()


def _keep(soak: Soak, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    soak.keep(folder)
    print(f"logs, ledger and AiiDA's database are kept in {folder}")


if __name__ == "__main__":
    sys.exit(main())
