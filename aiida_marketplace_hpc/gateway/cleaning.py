"""What is removed after a time: uploads that broke off, and by policy the folders of jobs that the gateway made itself.

A job that was created as published has a folder that the gateway made, ``HOME/JOBID``, and there it stays unless the policy
says otherwise. Folders that somebody else made (AiiDA, a user) are never touched, whichever jobs ran in them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

from aiida_marketplace_hpc.errors import GatewayError
from aiida_marketplace_hpc.gateway.draft import opened
from aiida_marketplace_hpc.gateway.files import Files
from aiida_marketplace_hpc.gateway.ledger import Ledger
from aiida_marketplace_hpc.gateway.log import about_job
from aiida_marketplace_hpc.gateway.roots import Root
from aiida_marketplace_hpc.gateway.schema import Job, User
from aiida_marketplace_hpc.gateway.staging import staged
from aiida_marketplace_hpc.gateway.unfinished import Keep, sweep_root

logger = logging.getLogger(__name__)

_JOBID = re.compile(r"[0-9a-f]{24}")


class Cleaning:
    """Removes what is old, of everybody. May be repeated, and done by several gateways at once.

    :param files_of: what a user can do with files: folders are removed with it, so live jobs are protected.
    :param keep: how long uploads that broke off are kept.
    :param folders: how long the folder of a job is kept after its end, and after the last change in it; ``None``: for ever.
    :param now: the time, aware.
    :param is_stopping: whether to end early.
    """

    def __init__(
        self,
        ledger: Ledger,
        files_of: Callable[[User], Files],
        keep: Callable[[], Keep],
        folders: timedelta | None,
        *,
        now: Callable[[], datetime],
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._ledger = ledger
        self._files_of = files_of
        self._keep = keep
        self._folders = folders
        self._now = now
        self._is_stopping = is_stopping

    def clean(self) -> None:
        """Do it once, for all users."""
        for user in self._ledger.users():
            if self._is_stopping():
                return
            try:
                self._clean_of(user)
            except Exception:
                logger.exception("cleaning the folders of %s stumbled and goes on with the next", user.email)

    def _clean_of(self, user: User) -> None:
        files = self._files_of(user)
        for root in files.roots:
            if not root.read_only:
                sweep_root(root, self._keep())
        home = files.roots.by_name("home")
        if self._folders is None or home is None:
            return
        try:
            named = [name for name in files.names(home.path, "") if _JOBID.fullmatch(name)]
        except GatewayError:  # There is no home yet, or its disk is away.
            return
        for job in self._ledger.get_many(named, user.id).values():
            if self._is_stopping():
                return
            if self._may_go(job, f"{home.path}/{job.id}", files):
                with about_job(self._ledger, job):
                    self._remove(job, home, files)

    def _may_go(self, job: Job, folder: str, files: Files) -> bool:
        """Whether it is the folder that was made for this job and for no other, and it is old."""
        # Nobody can choose a job's id: the folder of that name is the one that was made for it.
        if job.folder != folder or not job.job_state.final or self._ledger.has_others_below(folder, job.id):
            return False
        oldest = self._now() - (self._folders or timedelta())
        if (job.ended_at or job.intended_at or job.created_at) >= oldest:
            return False
        try:
            found = files.stat(folder)
        except GatewayError:
            return False
        return found["type"] == "directory" and datetime.fromtimestamp(found["mtime"], timezone.utc) < oldest

    def _remove(self, job: Job, home: Root, files: Files) -> None:
        """Take the folder out of sight as a whole, and then remove it: nobody ever finds half of one."""
        try:
            with opened(home.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) as parent, staged(home, parent) as out:
                files.protection.check_folder(parent, job.id)
                os.rename(job.id, job.id, src_dir_fd=parent, dst_dir_fd=out)
        except FileNotFoundError:
            logger.info("the old folder %s is gone already", job.folder)
        except (OSError, GatewayError) as exc:
            logger.warning("the old folder %s was not removed: %s", job.folder, exc)
        else:
            logger.info("the old folder %s was removed: its job ended %s", job.folder, job.ended_at)
