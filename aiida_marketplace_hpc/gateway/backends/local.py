"""The backend ``local``: processes on the gateway's own machine, in a limited number of slots, without any scheduler.

``submit`` puts a job into the spool; a thread starts waiting jobs in their order whenever a slot is free, each under a
supervisor process of its own. Gateway and supervisor share nothing but the spool, so either may die.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from aiida_marketplace_hpc.gateway.backends import local_supervisor
from aiida_marketplace_hpc.gateway.backends.base import (
    Backend,
    Deferred,
    Observation,
    SchedulerDown,
    Submission,
    Trace,
    is_in,
)
from aiida_marketplace_hpc.gateway.backends.local_job import make_spec, observe, read_request
from aiida_marketplace_hpc.gateway.backends.local_spool import Spool, SpooledJob
from aiida_marketplace_hpc.gateway.backends.wrapper import check_folder, make_wrapper, read_trace

logger = logging.getLogger(__name__)

_POLL = 0.2
_SUBMISSION_LIMIT = 10.0  # It writes two small files.
_POLL_FOR_SLOT = 0.05
_LAUNCHES = 3
_LAUNCH_TIMEOUT = 60.0


class LocalBackend(Backend):
    """Runs jobs as processes of the gateway's account on the gateway's machine.

    What the caller may rely on:

    - A job starts at most once, in the order of submission, when one of the slots is free; slots are shared by all gateways
      that use the same spool.
    - Jobs go on, and end as they should, while no gateway runs.
    - A job has ended when no process of it is left; whatever a script leaves running is ended with it. If its supervisor is
      killed, it is reported as running until the last process that can be attributed to it is gone.
    - ``--time`` is kept to the second; ``--output``, ``--error``, ``--input``, ``--open-mode``, ``--job-name``, ``--account``
      and ``--export`` are honoured; requests for resources are accepted and ignored, except for more than one node.

    It works on Linux.

    :param spool: the folder of all its state; on a local file system.
    :param slots: how many jobs may run at once; default: one per CPU.
    :param machine: the name that users know the machine by.
    :param partitions: the names that ``--partition`` may have; the first is the default.
    :param kill_wait: seconds between the request to end (SIGTERM) and the end (SIGKILL).
    :param retention: seconds for which the record of a job is kept after its end.
    """

    name = "local"

    def __init__(
        self,
        spool: Path,
        *,
        slots: int | None = None,
        machine: str = "local",
        partitions: Sequence[str] = ("local",),
        kill_wait: float = 5.0,
        retention: float = 30 * 86400.0,
    ) -> None:
        self._spool = Spool(spool.absolute())
        self._slots = max(1, slots or os.cpu_count() or 1)
        self._machine = machine
        self._partitions = tuple(partitions)
        self._kill_wait = kill_wait
        self._retention = retention
        self._node = socket.gethostname()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._dispatcher: threading.Thread | None = None
        self._launches: Counter[str] = Counter()
        self._kill_from: dict[str, float] = {}

    def start(self) -> None:
        self._spool.create()
        self._spool.prune(self._retention)
        self._stopping.clear()
        self._dispatcher = threading.Thread(target=self._dispatch, name="local-dispatcher", daemon=True)
        self._dispatcher.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        if self._dispatcher is not None:
            self._dispatcher.join()
            self._dispatcher = None

    def submit(self, submission: Submission) -> str:
        request = read_request(submission, self._partitions)
        wrapper = make_wrapper(submission, request.directives)
        check_folder(submission.folder)

        def describe(id: str) -> dict[str, Any]:
            return make_spec(id, request, node=self._node, kill_wait=self._kill_wait)

        try:
            id = self._spool.add(describe, wrapper)
        except OSError as error:
            raise Deferred(f"the job cannot be put into the spool: {error}") from error
        self._wake.set()
        return id

    def cancel(self, id: str, folder: str | None = None) -> None:
        try:
            job = self._spool.get(id)
            if job is None or job.has_ended:
                return
            job.request_cancel()
            job.settle()
        except FileNotFoundError:
            # Forgotten in this moment, therefore ended long ago.
            return
        except OSError as error:
            raise SchedulerDown(f"the spool cannot be written: {error}") from error
        self._wake.set()

    def queue(self) -> Mapping[str, Observation]:
        """Observe the jobs that have not ended; how one ended is for :meth:`accounting` to say."""
        try:
            observations = [observe(job, self._node) for job in self._spool.living()]
        except OSError as error:
            raise _unreadable(error) from error
        return {one.id: one for one in observations if one is not None and not one.state.final}

    def accounting(self, folders: Mapping[str, str]) -> Mapping[str, Observation]:
        try:
            jobs = [self._spool.get(id) for id in folders]
            observations = [observe(job, self._node) for job in jobs if job is not None]
        except OSError as error:
            raise _unreadable(error) from error
        return {one.id: one for one in observations if one is not None and is_in(one, folders[one.id])}

    def traces(self, ids: Collection[str]) -> Mapping[str, Trace]:
        try:
            found = {id: read_trace(job.wrapper) for id in ids if (job := self._spool.get(id)) is not None}
        except OSError as error:
            raise _unreadable(error) from error
        return {id: trace for id, trace in found.items() if trace is not None}

    def find(self, folder: str, since: datetime) -> Sequence[Observation]:
        wanted = os.path.normpath(folder)
        try:
            observations = [observe(job, self._node) for job in self._spool.since(since.timestamp())]
        except OSError as error:
            raise _unreadable(error) from error
        return [one for one in observations if one is not None and os.path.normpath(one.folder) == wanted]

    @property
    def submission_limit(self) -> float:
        return _SUBMISSION_LIMIT

    def describe(self) -> dict[str, object]:
        return {
            "name": self._machine,
            "backend": self.name,
            "partitions": list(self._partitions),
            "slots": self._slots,
        }

    # --- the dispatcher ----------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            pause = _POLL
            try:
                if not self._step():
                    pause = _POLL_FOR_SLOT
            except Exception:
                logger.exception("the local dispatcher stumbled and goes on")
            self._wake.wait(pause)

    def _step(self) -> bool:
        """Start what can be started, and end what has nobody else to end it.

        :returns: whether there was a slot for every job.
        """
        waiting = []
        for job in self._spool.living():
            started = job.started
            if started is None:
                waiting.append(job)
            elif not job.supervised:
                self._care_for_orphan(job, started)
        for job in waiting:
            if job.settle() is not None:
                continue
            with self._spool.slot(self._slots) as slot:
                if slot is None or self._stopping.is_set():
                    return False
                self._launch(job, slot)
        return True

    def _launch(self, job: SpooledJob, slot: int) -> None:
        """Start the supervisor of a job; slot and claim go over to it."""
        with job.claim() as claim:
            if claim is None or job.started is not None or job.has_ended:
                return
            if self._launches[job.id] >= _LAUNCHES:
                job.end("NODE_FAIL", f"its supervisor does not start, see {job.folder / local_supervisor.LOG}")
                return
            self._launches[job.id] += 1
            command = [sys.executable, "-I", "-S", local_supervisor.__file__, str(job.folder), str(slot), str(claim)]
            # The environment of the supervisor can be read by the jobs; some interpreters need to be told their libraries.
            environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
            with open(job.folder / local_supervisor.LOG, "ab") as log:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    cwd="/",
                    pass_fds=(slot, claim),
                    start_new_session=True,
                    timeout=_LAUNCH_TIMEOUT,
                    check=False,
                )
            if done.returncode != 0:
                logger.error("job %s: its supervisor ended with exit code %s", job.id, done.returncode)

    def _care_for_orphan(self, job: SpooledJob, started: Mapping[str, Any]) -> None:
        """Do for a job what its supervisor, which was killed, would have done."""
        if job.settle() is not None:
            self._kill_from.pop(job.id, None)
            return
        limit = job.spec["time_limit"]
        if limit is not None and time.time() >= started["started_at"] + limit and not job.cancel_requested:
            job.mark_overdue()
        if not (job.cancel_requested or job.overdue):
            return
        first_time = job.id not in self._kill_from
        kill_from = self._kill_from.setdefault(job.id, time.monotonic() + self._kill_wait)
        if first_time:
            logger.warning("job %s has lost its supervisor; ending it", job.id)
            local_supervisor.signal_all(job.members(started), signal.SIGTERM)
        elif time.monotonic() >= kill_from:
            local_supervisor.signal_all(job.members(started), signal.SIGKILL)


def _unreadable(error: OSError) -> SchedulerDown:
    return SchedulerDown(f"the spool cannot be read: {error}")
