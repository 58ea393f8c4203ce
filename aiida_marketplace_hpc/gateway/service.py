"""The gateway as one object: what is made of the settings, what runs in the background, and what a caller may use."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING

from aiida_marketplace_hpc.errors import Busy, ConfigurationError, FileError, Unavailable
from aiida_marketplace_hpc.gateway.admission import Admission
from aiida_marketplace_hpc.gateway.auth import Identity, token_key
from aiida_marketplace_hpc.gateway.auth.chosen import authenticator
from aiida_marketplace_hpc.gateway.backends.base import Backend
from aiida_marketplace_hpc.gateway.cleaning import Cleaning
from aiida_marketplace_hpc.gateway.config import Settings
from aiida_marketplace_hpc.gateway.container import ContainerScripts
from aiida_marketplace_hpc.gateway.descriptors import Advance
from aiida_marketplace_hpc.gateway.files import Files
from aiida_marketplace_hpc.gateway.homes import Homes
from aiida_marketplace_hpc.gateway.jobs import Jobs
from aiida_marketplace_hpc.gateway.ledger import Ledger, utc_now
from aiida_marketplace_hpc.gateway.maintenance import Maintenance
from aiida_marketplace_hpc.gateway.metrics import Metrics
from aiida_marketplace_hpc.gateway.operations import Operations
from aiida_marketplace_hpc.gateway.protection import LiveJobs
from aiida_marketplace_hpc.gateway.readiness import Readiness
from aiida_marketplace_hpc.gateway.roots import Root, Roots
from aiida_marketplace_hpc.gateway.schema import User
from aiida_marketplace_hpc.gateway.storage import AnyFiles, AnyTransfers
from aiida_marketplace_hpc.gateway.transfers import Transfers
from aiida_marketplace_hpc.gateway.unfinished import Keep
from aiida_marketplace_hpc.gateway.watch import Watch

if TYPE_CHECKING:
    from aiida_marketplace_hpc.gateway.firecrest.site import FirecrestSite

logger = logging.getLogger(__name__)

_RECONCILE_INTERVAL = 2.0
_SWEEP_INTERVAL = 600.0
_CALLER_AGE = 10.0
_MAX_CALLERS = 1000
_POLL_INTERVAL = {"local": 0.5, "slurm": 2.0, "firecrest": 3.0}
"""Seconds; with Slurm one ``squeue`` (and, when a job ends, one ``sacct``) in that time, whatever the number of users; with
FirecREST one call for each account."""


@dataclass(frozen=True)
class Caller:
    """Who asks, and what is theirs."""

    user: User
    files: AnyFiles
    transfers: AnyTransfers
    elsewhere: Callable[[str], Caller] | None = None
    """Finds the same on a machine of the gateway's, where it has several; then everything here is about the default one."""

    def on(self, machine: str) -> Caller:
        """The same on one of the gateway's machines; empty: on the default one.

        With several machines, the caller's folders there are made when they are needed, so that nobody waits for another one.

        :raises Unavailable: it does not answer now, or is none of the gateway's any more.
        """
        return self if self.elsewhere is None else self.elsewhere(machine)

    def prepare(self) -> None:
        """Make the caller's folders; with several machines :meth:`on` does. May be repeated.

        :raises FileError: if one cannot be made.
        """
        if self.elsewhere is None:
            self.files.roots.prepare()

    def watched(self, advance: Advance) -> Caller:
        """The same, but each operation on files tells its progress."""
        return replace(self, files=self.files.watched(advance))

    def forced(self) -> Caller:
        """The same, but live jobs of the caller's own are not protected."""
        return replace(self, files=self.files.forced(), transfers=self.transfers.forced())

    @cached_property
    def home(self) -> str:
        """The absolute path of the caller's home on the cluster."""
        root = self.files.roots.by_name("home")
        assert root is not None  # noqa: S101 - config.Settings always makes one.
        return root.path


class Gateway:
    """A gateway, apart from HTTP.

    :param settings: checked settings.
    :param backend: replaces the one that the settings name.
    :param now: the time of the jobs, aware.
    """

    def __init__(
        self, settings: Settings, backend: Backend | None = None, *, now: Callable[[], datetime] = utc_now
    ) -> None:
        self.settings = settings
        self.containers = ContainerScripts(settings)
        self.ledger = Ledger(settings.database_url)
        self.keep = Keep(unfinished=settings.keep_unfinished * 86400.0, size=settings.unfinished_limit * 1024**3)
        self.sites = _sites(settings, self.keep)
        self.backend = backend or make_backend(settings, self.sites)
        # The marks in users' folders are looked at on this machine's disk: where that is not the cluster's, there are none.
        self.homes = Homes([] if self.sites else self.settings.roots)
        self.metrics = Metrics()
        self.metrics.count_jobs(self.ledger.count)
        self.maintenance = Maintenance(self.ledger)
        interval = settings.poll_interval or _POLL_INTERVAL.get(self.backend.name, 2.0)
        self.watch = Watch(self.ledger, self.backend, interval, now=now, metrics=self.metrics)
        if len(settings.machines) > 1:
            self.metrics.show_machines(
                settings.machines, lambda one: self.watch.queue is not None and self.watch.problem_of(one) is None
            )
        self.jobs = Jobs(
            self.ledger,
            self.backend,
            self.watch,
            self.files_of,
            self._username_of,
            machine_of=self.machine_of,
            maintenance=self.maintenance,
            policy=settings.policy,
            machine=settings.machine_name,
            most=settings.jobs_per_user,
            now=now,
            metrics=self.metrics,
        )
        self.operations = Operations(hit=self.metrics.limit)
        self.readiness = Readiness(self.ledger, self.watch)
        self.authenticator = authenticator(settings)
        self.admission = Admission(settings, self.ledger, self.homes)
        self._callers: dict[str, tuple[float, Caller]] = {}
        self._callers_lock = threading.Lock()
        self._stopping = threading.Event()
        # Not the reconciler's: removing a folder with a million files takes its time.
        self._cleaner = threading.Thread(target=self._clean, name="clean", daemon=True)
        self.cleaning = Cleaning(
            self.ledger,
            self.local_files_of,
            lambda: self.keep,
            timedelta(days=settings.keep_job_folders) if settings.keep_job_folders else None,
            now=now,
            is_stopping=self._stopping.is_set,
        )
        self._reconciler = threading.Thread(target=self._reconcile, name="reconcile", daemon=True)

    def start(self) -> None:
        """Bring the database up to date and start what runs in the background."""
        self.ledger.migrate()
        self.backend.start()
        self._reconciler.start()
        self._cleaner.start()

    def stop(self) -> None:
        """Stop the background; jobs go on, operations on files end at their next step."""
        self.operations.close()
        self._stopping.set()
        self._reconciler.join(timeout=10)
        self._cleaner.join(timeout=10)
        self.jobs.close()
        self.backend.stop()
        self.ledger.close()

    def caller(self, token: str) -> Caller:
        """Whose token it is; a new user is added, and missing folders are made. Kept for :data:`_CALLER_AGE` seconds.

        :raises Unauthorized: if it is nobody's.
        :raises Forbidden: if they may not use the gateway, or their folder turns out to be somebody else's.
        :raises Unavailable: if who they are cannot be found out now.
        """
        identity = self.authenticator.identify(token)
        caller = self.caller_of(identity, token)
        remaining = math.inf if identity.expires_at is None else identity.expires_at - time.time()
        with self._callers_lock:
            if len(self._callers) >= _MAX_CALLERS:
                self._callers.clear()
            self._callers[token_key(token)] = time.monotonic() + min(_CALLER_AGE, remaining), caller
        return caller

    def caller_of(self, identity: Identity, token: str = "") -> Caller:
        """The same for somebody whose identity is known already; nothing is kept.

        :param token: theirs, where the cluster is asked with it.
        :raises Forbidden: as :meth:`caller`.
        :raises Unavailable: if it cannot be found out now which folder is theirs.
        """
        user = self.admission.user_of(identity)
        if token:
            for site in self.sites.values():
                site.accounts.offer(user.username, token, identity.expires_at)
        if len(self.sites) > 1:
            return replace(self._caller_on(user), elsewhere=lambda machine: self._elsewhere(user, machine))
        caller = self._prepared(user)
        self.homes.claim(user)
        return caller

    def _elsewhere(self, user: User, machine: str) -> Caller:
        machine = self.machine_of(machine)
        if self.backend.on(machine).is_silent:
            # Threads that wait for it would be missing for the others.
            raise Unavailable(f"the machine {machine} does not answer now")
        return self._prepared(user, machine)

    def _prepared(self, user: User, machine: str = "") -> Caller:
        caller = self._caller_on(user, machine)
        with suppress(FileError, Busy, Unavailable):  # Whoever uses the root says what is wrong with it.
            caller.files.roots.prepare()
        return caller

    def _caller_on(self, user: User, machine: str = "") -> Caller:
        files = self.files_of(user, machine)
        return Caller(user, files, self._transfers_of(files, machine))

    def known_caller(self, token: str) -> Caller | None:
        """The answer of :meth:`caller` if it was given a moment ago; takes no time."""
        until, caller = self._callers.get(token_key(token), (0.0, None))
        return caller if time.monotonic() < until else None

    def machine_of(self, recorded: str) -> str:
        """Which of the gateway's machines a job is on, or is to be on.

        :param recorded: what its row in the ledger says; empty: the default one.
        :raises Unavailable: it is none of the gateway's any more.
        """
        machines = self.settings.machines
        if len(machines) == 1 or recorded in ("", self.settings.backend):
            return machines[0]
        if recorded not in machines:
            raise Unavailable(
                f"the machine {recorded} is none of this gateway's any more: it has {', '.join(machines)}"
            )
        return recorded

    def files_of(self, user: User, machine: str = "") -> AnyFiles:
        """What a user can do with files on one of the machines, by default the default one.

        :raises Unavailable: as :meth:`machine_of`.
        """
        if not self.sites:
            return self.local_files_of(user)
        machine = self.machine_of(machine)
        return self.sites[machine].files_of(
            user, self.roots_of(user, machine), lambda roots: LiveJobs(self.ledger, self.watch.refresh, roots, user.id)
        )

    def local_files_of(self, user: User) -> Files:
        """The same where the gateway sees the cluster's disk."""
        roots = Roots(self.roots_of(user))
        return Files(roots, protection=LiveJobs(self.ledger, self.watch.refresh, roots, user.id))

    def roots_of(self, user: User, machine: str = "") -> list[Root]:
        """A user's roots on one of the machines."""
        templates = self.settings.roots_of(machine or self.settings.machine_name)
        return [Root(root.name, root.path_for(user.username), root.read_only) for root in templates]

    def _transfers_of(self, files: AnyFiles, machine: str) -> AnyTransfers:
        if isinstance(files, Files):
            return Transfers(files, self.keep)
        return self.sites[self.machine_of(machine)].transfers_of(files)

    def _username_of(self, path: str, owner: str, machine: str) -> str | None:
        """The folder name of the user whose root a path lies below; empty below a root that is everybody's.

        :param owner: who says that it is theirs; ``None`` if it is marked as somebody else's.
        """
        for root in self.settings.roots_of(machine):
            username = root.username_in(path)
            if username is not None and not root.read_only:
                return username if not username or self.homes.may_be(username, owner) else None
        return None

    def sweep(self) -> None:
        """Remove what is too old to be kept; the background does so every ten minutes."""
        for site in self.sites.values():
            site.sweep()
        if not self.sites:
            self.cleaning.clean()

    def _clean(self) -> None:
        while not self._stopping.is_set():
            try:
                self.sweep()
            except Exception:
                logger.exception("the cleaning stumbled and goes on")
            self._stopping.wait(_SWEEP_INTERVAL)

    def _reconcile(self) -> None:
        while True:
            try:
                with self.metrics.round():
                    self.jobs.reconcile()
            except Exception:
                logger.exception("the reconciler stumbled and goes on")
            if self._stopping.wait(_RECONCILE_INTERVAL):
                return


def _sites(settings: Settings, keep: Keep) -> dict[str, FirecrestSite]:
    if settings.backend != "firecrest":
        return {}
    # Here: pyfirecrest takes its time to load, and most gateways do not need it.
    from aiida_marketplace_hpc.gateway.firecrest.site import FirecrestSite

    named = zip(settings.machines, settings.systems, strict=True)
    return {machine: FirecrestSite(settings, keep, machine, system) for machine, system in named}


def make_backend(settings: Settings, sites: Mapping[str, FirecrestSite] | None = None) -> Backend:
    """The backend that the settings name; it is not started.

    :param sites: what there is of a FirecREST, if that is the backend: each system, by the name of the machine.
    :raises ConfigurationError: if this version has none of that name.
    """
    if sites:
        from aiida_marketplace_hpc.gateway.backends.firecrest import FirecrestBackend
        from aiida_marketplace_hpc.gateway.backends.firecrest_v1 import FirecrestV1Backend
        from aiida_marketplace_hpc.gateway.backends.systems import Systems

        kind = FirecrestV1Backend if settings.firecrest_version == 1 else FirecrestBackend
        found = {machine: kind(site.accounts, machine=machine) for machine, site in sites.items()}
        return Systems(found) if len(found) > 1 else found[settings.machine_name]
    if settings.backend == "local":
        from aiida_marketplace_hpc.gateway.backends.local import LocalBackend

        return LocalBackend(
            settings.state.expanduser().absolute() / "local", slots=settings.slots or os.cpu_count() or 1
        )
    if settings.backend == "slurm":
        from aiida_marketplace_hpc.gateway.backends.slurm import SlurmBackend

        return SlurmBackend()
    raise ConfigurationError(f"there is no backend {settings.backend}")
