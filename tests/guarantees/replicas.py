"""Gateways on one database over a batch system in memory, in a time of their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event

from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.config import Settings, load
from aiida_marketplace_hpc.gateway.ledger import Ledger
from aiida_marketplace_hpc.gateway.schema import Base, Job, User
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.clock import VirtualClock
from aiida_marketplace_hpc.testing.faulty_scheduler import FaultyScheduler
from aiida_marketplace_hpc.testing.replica import Replica
from aiida_marketplace_hpc.testing.served import TOKENS

SETTLING_TIME = 30.0
SCRIPT = "run.sh"


class Site:
    """A cluster with one user, and the gateways in front of it.

    :param ledger: whose engine all gateways use: what is prepared in it need not be prepared again.
    """

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        self.clock = VirtualClock()
        self.batch = FakeBackend(SETTLING_TIME, clock=self.clock)
        self.scheduler = FaultyScheduler(self.batch, self.clock)
        self.alice: User = ledger.user_of(Identity("dev", "alice", "alice@example.org", "Alice"))
        self.home = Path(settings.home.format(username=self.alice.username))
        self.home.mkdir(parents=True, mode=0o700)
        self.replicas: list[Replica] = []

    def close(self) -> None:
        for replica in self.replicas:
            replica.moments.kill()
        self.scheduler.release()
        for replica in self.replicas:
            replica.close()

    def replica(self) -> Replica:
        """Start one more gateway."""
        replica = Replica(self.settings, self.scheduler, self.clock)
        replica.gateway.ledger.close()
        replica.gateway.ledger.engine = self.ledger.engine
        self.replicas.append(replica)
        return replica

    def wait_for_threads(self) -> None:
        """Wait until nothing goes on in any gateway, killed ones included."""
        for replica in self.replicas:
            replica.settle()

    def write(self, name: str, text: str = "#!/bin/sh\n") -> str:
        """Put a script into a folder of Alice's, and return the folder."""
        folder = self.home / name
        folder.mkdir(exist_ok=True)
        (folder / SCRIPT).write_text(text)
        return str(folder)

    def launch(self, replica: Replica, folder: str) -> Job:
        """Create and launch, as a client does in one request."""
        jobs = replica.gateway.jobs
        return jobs.launch(self.alice, jobs.create_in_folder(self.alice, folder, SCRIPT))

    def copies(self, folder: str) -> list[str]:
        """The batch system's jobs that were submitted for a folder, oldest first."""
        return [id for id in self.batch.ids if self.batch.submission_of(id).folder == folder]

    def executed(self, folder: str) -> list[str]:
        """Those of them that came to run user code, each as often as it did."""
        return [id for id in self.batch.executed if self.batch.submission_of(id).folder == folder]

    def work(self, exit_code: int) -> None:
        """Let the batch system take each job one step further: what waits starts, what runs ends."""
        for id, job in list(self.batch.jobs.items()):
            if job.state is JobState.QUEUED:
                self.batch.run(id)
            elif job.state is JobState.RUNNING:
                self.batch.end(id, JobState.FAILED if exit_code else JobState.COMPLETED, exit_code)


class Sites:
    """Sites one after the other, on one database that is emptied in between: to make one takes more time than to use it.

    :param database: its address; by default one of SQLite.
    """

    def __init__(self, place: Path, database: str = "") -> None:
        self._place = place
        home = str(place / "home" / "{username}")
        self._settings = load({"state": place / "state", "home": home, "dev_token": TOKENS, "database": database})
        self._ledger = Ledger(self._settings.database_url)
        if self.database == "sqlite":
            event.listen(self._ledger.engine, "connect", _without_disk)
        self._ledger.migrate()

    @property
    def database(self) -> str:
        """What kind of database it is: ``sqlite`` or ``postgresql``."""
        return self._ledger.engine.dialect.name

    def close(self) -> None:
        self._ledger.close()

    @contextmanager
    def new(self) -> Iterator[Site]:
        """A site on which nothing has happened yet."""
        with self._ledger.writing() as session:
            for table in reversed(Base.metadata.sorted_tables):
                session.execute(table.delete())
        shutil.rmtree(self._place / "home", ignore_errors=True)
        site = Site(self._settings, self._ledger)
        try:
            yield site
        finally:
            site.close()


def _without_disk(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")  # No machine is switched off here.
