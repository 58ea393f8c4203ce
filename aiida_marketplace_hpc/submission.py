"""The submission of one calculation, which may be killed meanwhile.

A calculation that has no job id yet has nothing that AiiDA could cancel, and so a kill just ends it. The request that is under
way goes on all the same, and after a kill by force so do AiiDA's further attempts: a job would run that nobody waits for. So
the job is *withdrawn* when

- the process ends, but not well: at once, though the request may still be under way;
- the request comes back, with an answer or an error, and the process has ended meanwhile;
- AiiDA makes another attempt for a process that has ended: then nothing is submitted at all.

To withdraw a job is to cancel it by its id or, if no answer has brought one, by what identifies it, its folder and script: the
gateway notes it as cancelled even if it has not heard of it yet, and a request that arrives later launches nothing. A daemon
that is stopped ends no process, and so withdraws nothing.

Nodes and processes are touched on the loop's thread only.
"""

from __future__ import annotations

import asyncio
import uuid
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from aiida.common.log import LOG_LEVEL_REPORT
from aiida.engine import Process

from aiida_marketplace_hpc.errors import MarketplaceHpcError
from aiida_marketplace_hpc.offloop import on_loop_with_portal

if TYPE_CHECKING:
    from aiida.orm import ProcessNode

    from aiida_marketplace_hpc.transport import Connection


class Submission:
    """A job to be submitted for AiiDA, in one attempt or more.

    :param folder: absolute path on the cluster, the calculation's working directory.
    :param script: name of the job script in it.
    :param process: the calculation that AiiDA carries out on this thread's event loop, if that is who submits.
    """

    def __init__(self, connection: Connection, folder: str, script: str, process: Process | None = None) -> None:
        self._connection = connection
        self._folder = folder
        self._script = script
        self._jobid: str | None = None
        self._withdrawn = False
        # Not the process itself, which would then never be forgotten.
        self._node: ProcessNode | None = None
        if process is not None:
            self._node = process.node
            process.future().add_done_callback(self._on_end)

    def carry_out(self) -> dict[str, Any]:
        """Create and launch the job in one request. May be repeated.

        :return: the job, as ``HpcGateway.submit`` does.
        :raises asyncio.CancelledError: the calculation has ended, and the job is withdrawn. It ends AiiDA's attempts.
        :raises SubmissionRefused: the scheduler refuses it for good.
        """
        if not self._has_ended():
            try:
                job = self._send()
            except MarketplaceHpcError:
                if not self._has_ended():
                    raise
                # The request may have arrived all the same.
            else:
                if not self._has_ended():
                    return job
        self._withdraw()
        raise asyncio.CancelledError

    def _send(self) -> dict[str, Any]:
        job: dict[str, Any] = self._connection.scheduler_off_loop.run_blocking_to_the_end(
            self._connection.on_jobs, "submit", self._folder, self._script, client_ref=calculation_uuid(self._folder)
        )
        self._jobid = str(job["jobid"])
        return job

    def _has_ended(self) -> bool:
        return self._node is not None and self._node.is_terminated

    def _on_end(self, outcome: asyncio.Future[Any]) -> None:
        if outcome.cancelled() or outcome.exception() is not None:
            self._withdraw()

    def _withdraw(self) -> None:
        """Start to cancel the job, and note on the node what came of it; nothing waits for that."""
        if not self._withdrawn:
            self._connection.scheduler_off_loop.start(self._cancel).add_done_callback(self._report)

    def _cancel(self) -> str:
        connection = self._connection
        jobid = self._jobid
        if jobid is None:
            fields = {"folder": self._folder, "script": self._script, "client_ref": calculation_uuid(self._folder)}
            jobid = str(connection.on_jobs("create_job", fields))
        connection.on_jobs("cancel_job", jobid, unlaunched=True)
        return jobid

    def _report(self, cancellation: asyncio.Future[str]) -> None:
        if self._node is None or cancellation.cancelled():
            return
        error = cancellation.exception()
        if error is None:
            self._withdrawn = True
            said = "job %s was cancelled: the calculation ended while it was submitted"
            self._node.logger.log(LOG_LEVEL_REPORT, said, cancellation.result())
        else:
            label = self._node.computer.label if self._node.computer else "LABEL"
            self._node.logger.error(
                "the calculation ended while its job was submitted, and the job could not be cancelled: %s. It may run; "
                "look with: marketplace-hpc computer reconcile %s",
                error,
                label,
            )


_of_processes: WeakKeyDictionary[Process, Submission] = WeakKeyDictionary()


def submission(connection: Connection, folder: str, script: str) -> Submission:
    """The submission that AiiDA asks for here and now: all attempts on behalf of one process are the same one."""
    process = Process.current() if on_loop_with_portal() else None
    if not isinstance(process, Process) or process.node.uuid != calculation_uuid(folder):
        return Submission(connection, folder, script)
    found = _of_processes.get(process)
    if found is None:
        found = _of_processes[process] = Submission(connection, folder, script, process)
    return found


def calculation_uuid(working_directory: str) -> str | None:
    """The UUID of the calculation that a working directory belongs to: AiiDA makes the path's last three parts of it."""
    text = "".join(PurePath(working_directory).parts[-3:])
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return None
