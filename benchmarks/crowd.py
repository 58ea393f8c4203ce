"""Fill a ledger with jobs, as a process on the cluster: ``python -m benchmarks.crowd DATABASE USERNAME ROWS``.

It reads the folders of waiting jobs by their Slurm ids as JSON, and prints the ids of these jobs, in their order. What is
missing to ``ROWS`` are jobs that ended long ago.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

from aiida_marketplace_hpc.gateway.ledger import Ledger, new_id, utc_now
from aiida_marketplace_hpc.gateway.schema import Job
from aiida_marketplace_hpc.protocol import JobState


def waiting_job(user: str, folder: str, identifier: str) -> Job:
    """A job that was submitted just now."""
    jobid, now = new_id(), utc_now()
    return Job(
        id=jobid,
        user_id=user,
        key=f"id:{jobid}",
        folder=folder,
        script="_aiidasubmit.sh",
        script_digest=f"sha-256:{'0' * 64}",
        client_ref=f"{jobid[:8]}-0000-4000-8000-{jobid[8:20]}",
        machine="slurm",
        backend="slurm",
        created_at=now,
        state=JobState.QUEUED.value,
        cancel_requested=False,
        attempt=1,
        fence=1,
        search_first=False,
        intended_at=now,
        scheduler_id=identifier,
        submitted_at=now,
    )


def ended_job(user: str, number: int) -> Job:
    """A job that ended long ago, with an accounting record of the usual size."""
    job, long_ago = waiting_job(user, f"/nowhere/{number}", f"{10**6 + number}"), utc_now() - timedelta(days=10)
    columns = [f"Column{place}" for place in range(40)]
    job.state = job.scheduler_state = JobState.COMPLETED.value
    job.created_at = job.intended_at = job.submitted_at = job.started_at = job.ended_at = job.observed_at = long_ago
    job.exit_code, job.signal, job.elapsed = 0, None, 12.0
    job.name, job.partition, job.account, job.nodes = "aiida-1", "debug", "project", "node1"
    job.accounting = {"columns": columns, "rows": [columns] * 3}
    return job


def main() -> None:
    database, username, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
    ledger = Ledger(database)
    (user,) = (user.id for user in ledger.users() if user.username == username)
    alive = [waiting_job(user, folder, identifier) for identifier, folder in json.load(sys.stdin).items()]
    with ledger.writing() as session:
        session.add_all(alive)
        session.add_all(ended_job(user, number) for number in range(rows - len(alive)))
    ledger.close()
    print(json.dumps([job.id for job in alive]))


if __name__ == "__main__":
    main()
