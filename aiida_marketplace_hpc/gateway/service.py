"""The gateway as one object: what is made of the settings, what runs in the background, and what a caller may use."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
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
        self.site = _site(settings, self.keep)
        self.backend = backend or make_backend(settings, self.site)
        # The marks in users' folders are looked at on this machine's disk: where that is not the cluster's, there are none.
        self.homes = Homes([] if self.site is not None else self.settings.roots)
        self.metrics = Metrics()
        self.metrics.count_jobs(self.ledger.count)
        self.maintenance = Maintenance(self.ledger)
        interval = settings.poll_interval or _POLL_INTERVAL.get(self.backend.name, 2.0)
        self.watch = Watch(self.ledger, self.backend, interval, now=now, metrics=self.metrics)
        self.jobs = Jobs(
            self.ledger,
            self.backend,
            self.watch,
            self.files_of,
            self._username_of,
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
        if self.site is not None and token:
            self.site.accounts.offer(user.username, token, identity.expires_at)
        files = self.files_of(user)
        with suppress(FileError, Busy, Unavailable):  # Whoever uses the root says what is wrong with it.
            files.roots.prepare()
        self.homes.claim(user)
        return Caller(user, files, self._transfers_of(files))

    def known_caller(self, token: str) -> Caller | None:
        """The answer of :meth:`caller` if it was given a moment ago; takes no time."""
        until, caller = self._callers.get(token_key(token), (0.0, None))
        return caller if time.monotonic() < until else None

    def files_of(self, user: User) -> AnyFiles:
        """What a user can do with files."""
        if self.site is None:
            return self.local_files_of(user)
        return self.site.files_of(
            user, self._roots_of(user), lambda roots: LiveJobs(self.ledger, self.watch.refresh, roots, user.id)
        )

    def local_files_of(self, user: User) -> Files:
        """The same where the gateway sees the cluster's disk."""
        roots = Roots(self._roots_of(user))
        return Files(roots, protection=LiveJobs(self.ledger, self.watch.refresh, roots, user.id))

    def _roots_of(self, user: User) -> list[Root]:
        return [Root(root.name, root.path_for(user.username), root.read_only) for root in self.settings.roots]

    def _transfers_of(self, files: AnyFiles) -> AnyTransfers:
        if isinstance(files, Files):
            return Transfers(files, self.keep)
        assert self.site is not None  # noqa: S101 - there are these two.
        return self.site.transfers_of(files)

    def _username_of(self, path: str, owner: str) -> str | None:
        """The folder name of the user whose root a path lies below; empty below a root that is everybody's.

        :param owner: who says that it is theirs; ``None`` if it is marked as somebody else's.
        """
        for root in self.settings.roots:
            username = root.username_in(path)
            if username is not None and not root.read_only:
                return username if not username or self.homes.may_be(username, owner) else None
        return None

    def sweep(self) -> None:
        """Remove what is too old to be kept; the background does so every ten minutes."""
        if self.site is not None:
            self.site.sweep()
        else:
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


def _site(settings: Settings, keep: Keep) -> FirecrestSite | None:
    if settings.backend != "firecrest":
        return None
    # Here: pyfirecrest takes its time to load, and most gateways do not need it.
    from aiida_marketplace_hpc.gateway.firecrest.site import FirecrestSite

    return FirecrestSite(settings, keep)


def make_backend(settings: Settings, site: FirecrestSite | None = None) -> Backend:
    """The backend that the settings name; it is not started.

    :param site: what there is of a FirecREST, if that is the backend.
    :raises ConfigurationError: if this version has none of that name.
    """
    if site is not None:
        from aiida_marketplace_hpc.gateway.backends.firecrest import FirecrestBackend
        from aiida_marketplace_hpc.gateway.backends.firecrest_v1 import FirecrestV1Backend

        kind = FirecrestV1Backend if settings.firecrest_version == 1 else FirecrestBackend
        return kind(site.accounts, machine=settings.machine_name)
    if settings.backend == "local":
        from aiida_marketplace_hpc.gateway.backends.local import LocalBackend

        return LocalBackend(
            settings.state.expanduser().absolute() / "local", slots=settings.slots or os.cpu_count() or 1
        )
    if settings.backend == "slurm":
        from aiida_marketplace_hpc.gateway.backends.slurm import SlurmBackend

        return SlurmBackend()
    raise ConfigurationError(f"there is no backend {settings.backend}")
