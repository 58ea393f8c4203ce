"""AiiDA's scheduler: the job script as for Slurm, the job's life through the gateway."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from aiida.engine import ExitCode
from aiida.schedulers import SchedulerError
from aiida.schedulers.datastructures import JobInfo, JobState
from aiida.schedulers.plugins.slurm import SlurmScheduler

from aiida_marketplace_hpc import protocol
from aiida_marketplace_hpc.errors import (
    ConfigurationError,
    GatewayError,
    MarketplaceHpcError,
    SubmissionRefused,
    Unauthorized,
)
from aiida_marketplace_hpc.submission import submission
from aiida_marketplace_hpc.transport import Connection, MarketplaceHpcTransport

EXIT_REFUSED = 130
"""The exit status of a calculation whose job the scheduler refused for good; aiida-core has none for that."""
EXIT_INVALID_ACCOUNT = 131
"""aiida-core's own ``ERROR_SCHEDULER_INVALID_ACCOUNT``."""
EXIT_UNPREPARED = 132
"""The exit status of a calculation whose folder the job itself could not make as it should be, on a classic gateway."""
_WAIT_FOR_END = 10
"""Seconds that the detailed information of a job waits for its whole accounting record."""

_STATES = {
    protocol.JobState.CREATED: JobState.QUEUED,
    protocol.JobState.SUBMITTING: JobState.QUEUED,
    protocol.JobState.QUEUED: JobState.QUEUED,
    protocol.JobState.HELD: JobState.QUEUED_HELD,
    protocol.JobState.RUNNING: JobState.RUNNING,
    protocol.JobState.SUSPENDED: JobState.SUSPENDED,
}


class MarketplaceHpcScheduler(SlurmScheduler):
    """Support for schedulers behind an HPC gateway (Slurm, or the gateway's own).

    Resources and the script's header are those of aiida-core's Slurm plugin. The job id is the gateway's.
    """

    _logger = SlurmScheduler._logger.parent.getChild("marketplace_hpc")

    # What the gateway last said about each job, for the polls that it does not answer.
    _last_known: dict[str, dict[str, Any]] = {}  # noqa: RUF012 - shared on purpose: AiiDA makes a scheduler for each poll.

    @property
    def _connection(self) -> Connection:
        transport = self.transport
        if not isinstance(transport, MarketplaceHpcTransport):
            raise SchedulerError(
                f"the scheduler marketplace_hpc works with the transport marketplace_hpc only, not with {transport}"
            )
        return transport.connection

    def submit_job(self, working_directory: str, filename: str) -> str | ExitCode:
        """Create and launch the job in one request, and return the gateway's id for it.

        May be repeated: the gateway knows the folder and the script, and answers with the same job.

        :returns: an exit code, with the scheduler's own words, for a job that it refuses for good.
        :raises asyncio.CancelledError: the calculation was killed meanwhile; see :mod:`~aiida_marketplace_hpc.submission`.
        """
        try:
            job = submission(self._connection, str(working_directory), filename).carry_out()
        except SubmissionRefused as exc:
            return refusal(exc.message, exc.request_id)
        return str(job["jobid"])

    def get_jobs(self, jobs: list[str] | None = None, user: str | None = None, as_dict: bool = False) -> Any:
        """The state of the given jobs, or the caller's active ones, in one request.

        There is an entry for *every* id that was asked for: AiiDA reads a missing one as "done". What cannot be known now is
        ``UNDETERMINED``, with the last known state and the reason in ``raw_data``, and AiiDA goes on asking.

        :raises MarketplaceHpcError: only for what a person must mend, such as a token that is refused.
        """
        connection = self._connection
        infos: dict[str, JobInfo] = {}
        if jobs is None:
            for document in connection.scheduler_off_loop.run_blocking(connection.on_jobs, "active_jobs"):
                infos[document["jobid"]] = job_info(document, connection.gateway.url)
        else:
            infos = self._states(connection, [str(job) for job in jobs])
        return infos if as_dict else list(infos.values())

    def _states(self, connection: Connection, jobids: list[str]) -> dict[str, JobInfo]:
        reason = "the gateway knows no such job of yours"
        try:
            answer = connection.scheduler_off_loop.run_blocking(connection.on_jobs, "job_states", jobids)
        except (ConfigurationError, Unauthorized):
            raise
        except MarketplaceHpcError as exc:
            answer, reason = {"jobs": {}}, str(exc)
        known, reasons = answer["jobs"], answer.get("reasons", {})
        infos = {}
        for jobid in jobids:
            document = known.get(jobid)
            if document is None:
                why = reasons.get(jobid, reason)
                infos[jobid] = undetermined(jobid, why, self._last_known.get(jobid), connection.gateway.url)
                continue
            infos[jobid] = job_info(document, connection.gateway.url)
            if document["final"]:
                self._last_known.pop(jobid, None)
            else:
                self._last_known[jobid] = document
        return infos

    def kill_job(self, jobid: str) -> bool:
        """Cancel a job. May be repeated.

        :returns: ``True`` if the job has ended, or if the gateway has it in writing that it is to end: it goes on trying, also
            when the scheduler does not take the cancellation now. ``False`` if the gateway refuses.
        :raises MarketplaceHpcError: the gateway has not confirmed anything; AiiDA tries again.
        """
        connection = self._connection
        try:
            connection.scheduler_off_loop.run_blocking(connection.on_jobs, "cancel_job", str(jobid))
        except GatewayError as exc:
            if exc.retryable or isinstance(exc, Unauthorized):
                raise
            self.logger.error("job %s could not be cancelled: %s", jobid, exc)
            return False
        return True

    def get_detailed_job_info(self, job_id: str) -> dict[str, Any]:
        """The job with its accounting, in the form that ``parse_output`` reads.

        A job that was cancelled a moment ago may not have ended yet; its end is waited for.

        :returns: ``retval``, ``stdout`` and ``stderr`` as of ``sacct --parsable``, and beside them ``job``, what the gateway
            knows, and ``gateway``, its address.
        :raises SchedulerError: the job has not ended, so there is no whole record yet; AiiDA tries again.
        """
        connection = self._connection
        job = connection.scheduler_off_loop.run_blocking(connection.on_jobs, "show_job", str(job_id), _WAIT_FOR_END)
        if not job["final"]:
            raise SchedulerError(f"job {job_id} has not ended, it is {job['state']}: there is no accounting of it yet")
        accounting = job.pop("accounting", None) or {}
        columns = accounting.get("columns") or ["JobID", "State"]
        rows = accounting.get("rows") or [[job["scheduler_id"] or job_id, job["scheduler_state"] or job["state"]]]
        return {
            "retval": 0,
            "stdout": "\n".join("|".join(line) for line in [columns, *rows]),
            "stderr": "",
            "gateway": connection.gateway.url,
            "job": job,
        }

    def parse_output(
        self, detailed_job_info: Any = None, stdout: str | None = None, stderr: str | None = None
    ) -> ExitCode | None:
        """The exit code that follows from how the job ended, if one does."""
        job = (detailed_job_info or {}).get("job") or {}
        if job.get("state") == protocol.JobState.REFUSED.value:
            return refusal(job.get("message") or "the scheduler refused the job", job.get("request_id"))
        if job.get("unprepared"):
            words = f"The job's folder could not be prepared, and its script was not run: {job['message']}"
            return ExitCode(EXIT_UNPREPARED, words, invalidates_cache=True)
        exit_code: ExitCode | None = super().parse_output(detailed_job_info, stdout, stderr)
        return None if exit_code is None else _traceable(exit_code, job.get("request_id"))


def refusal(words: str, request_id: str | None = None) -> ExitCode:
    """The exit code of a job that the scheduler refuses for good.

    :param request_id: what the gateway's operator finds it by.
    """
    status = EXIT_INVALID_ACCOUNT if "invalid account" in words.lower() else EXIT_REFUSED
    return _traceable(ExitCode(status, f"The scheduler refused the job: {words}", invalidates_cache=True), request_id)


def _traceable(exit_code: ExitCode, request_id: str | None) -> ExitCode:
    """The same, whose message says by what the gateway's log and Slurm's comment name the submission."""
    if not request_id:
        return exit_code
    return ExitCode(exit_code.status, f"{exit_code.message} [request {request_id}]", exit_code.invalidates_cache)


def job_info(document: dict[str, Any], gateway: str) -> JobInfo:
    """What the gateway says about a job, in AiiDA's terms; everything it says is in ``raw_data``, and its address."""
    info = JobInfo()
    info.job_id = document["jobid"]
    # A newer gateway may know more states: whatever they mean, the job has not ended.
    info.job_state = JobState.DONE if document["final"] else _STATES.get(document["state"], JobState.UNDETERMINED)
    info.job_substate = document["scheduler_state"]
    info.annotation = document["reason"] or document["message"]
    info.title = document["name"]
    info.queue_name = document["partition"]
    info.account = document["account"]
    info.exit_status = document["exit_code"]
    info.terminating_signal = document["signal"]
    info.allocated_machines_raw = document["nodes"]
    info.requested_wallclock_time_seconds = document["time_limit"]
    info.wallclock_time_seconds = None if document["elapsed"] is None else int(document["elapsed"])
    info.submission_time = _moment(document["submitted_at"])
    info.dispatch_time = _moment(document["started_at"])
    info.finish_time = _moment(document["ended_at"])
    info.raw_data = {"gateway": gateway, **document}
    return info


def undetermined(jobid: str, reason: str, last_known: dict[str, Any] | None, gateway: str) -> JobInfo:
    """The entry of a job about which nothing can be known now."""
    info = JobInfo()
    info.job_id = jobid
    info.job_state = JobState.UNDETERMINED
    info.annotation = reason
    info.raw_data = {"gateway": gateway, "reason": reason, "last_known": last_known}
    return info


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
