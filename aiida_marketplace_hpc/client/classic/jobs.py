"""The life of jobs on a classic gateway, with the methods that :class:`~aiida_marketplace_hpc.client.gateway.HpcGateway` has.

*Absence is never evidence* here, too. A job is reported as ended only when its own script says so; or when it cannot begin
any more, as a cancellation lies in its folder that every copy looks for after it has taken the lock; or when it has been
silent for long and the scheduler, asked several times, no longer has it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from aiida_marketplace_hpc.client.classic.disk import ClassicDisk
from aiida_marketplace_hpc.client.classic.gateway import ClassicGateway, is_in_doubt
from aiida_marketplace_hpc.client.classic.journal import Folder, FolderState
from aiida_marketplace_hpc.client.classic.names import CANCEL, JOB_SCRIPT
from aiida_marketplace_hpc.client.classic.records import End, Records
from aiida_marketplace_hpc.client.classic.script import Plan, all_pieces, make_script
from aiida_marketplace_hpc.directives import DirectiveError
from aiida_marketplace_hpc.errors import (
    ConfigurationError,
    Conflict,
    FileError,
    IntegrityError,
    MarketplaceHpcError,
    NotSupported,
    ServerFault,
    SubmissionRefused,
    Unauthorized,
    Unavailable,
)
from aiida_marketplace_hpc.protocol import JOB_FIELDS

Json = dict[str, Any]

BEAT = "MARKETPLACE_HPC_CLASSIC_HEARTBEAT"
"""The environment variable with the seconds between two heartbeats of a job."""
_BEAT = 30.0
SILENCE = 60
"""After how many heartbeats that did not come a job is asked after."""
_SILENCE_AT_END = 4
"""The same for a job that has said that it is about to end."""
_POLLS = 3
"""How many polls must have seen the silence, and how often the scheduler must have said that it does not have the job."""
_BETWEEN_QUESTIONS = 2
"""Heartbeats between two such questions."""
_TOGETHER = 20.0
"""Seconds that the poll of many jobs may take; the others come first the next time."""
_IN_SCRIPT = 64 * 1024
"""Bytes of small files that the job script itself carries; more go as one file."""
_UPLOADS = 3
"""How often the job script is sent, should it not arrive as it is."""
NONE = "(none)"
"""In place of the id of a job that there is not."""
_CALC_INFO = ".aiida/calcinfo.json"
_RETRIEVED = ("retrieve_list", "retrieve_temporary_list", "retrieve_singlefile_list")


@dataclass
class _Pulse:
    """The heartbeat of one job as this process has seen it.

    :param since: by the monotonic clock: when it was first seen as it is.
    :param polls: that have seen it so.
    :param refusals: how often the scheduler, asked to cancel it, did not have it.
    :param sent: when a cancellation was first taken: the scheduler may still have had it, or says so of jobs that it has just
        seen the end of.
    :param asked: when it was last asked.
    """

    beats: str
    since: float
    polls: int = 1
    refusals: int = 0
    sent: float | None = None
    asked: float = -1e9


class ClassicJobs:
    """Jobs of AiiDA on a classic gateway; may be used by many threads.

    :param threads: how many jobs are asked for at once.
    :param clock: the seconds of a monotonic clock.
    """

    def __init__(
        self,
        gateway: ClassicGateway,
        disk: ClassicDisk,
        *,
        threads: int = 8,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._gateway, self._disk = gateway, disk
        self._clock, self._sleep = clock, sleep
        self._threads = threads
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._pulses: dict[str, _Pulse] = {}
        self._answered: dict[str, float] = {}

    def close(self) -> None:
        """End the threads that ask."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    # Submission

    def submit(self, folder: str, script: str, client_ref: str | None = None) -> Json:
        """Write the job script of a working directory and launch it, once.

        May be repeated: a launch whose answer was lost is not sent again. One that the gateway says has failed (status 600)
        is: it may have been carried out all the same, but then the second copy ends before user code.

        :param folder: the virtual path of the working directory.
        :param script: name of AiiDA's script in it.
        :return: the job.
        :raises SubmissionRefused: sbatch would refuse the script.
        :raises Unavailable: the gateway says that it could not submit.
        :raises Conflict: the job was cancelled before it was launched.
        """
        path = os.path.normpath(folder)
        journal = self._gateway.journal
        with journal.locked(path):
            known = journal.folder(path)
            if known is None:
                raise FileError(f"there is no working directory {path}", errno="ENOENT", path=path)
            if known.is_launched:
                return self._document(known, None)
            jobid = self._gateway.job_of_locked(path)
            self._upload_script(path, jobid, script)
            self._launch(path, jobid)
            launched = journal.folder(path)
        return self._document(launched or known, None)

    def _upload_script(self, path: str, jobid: str, script: str) -> None:
        """Put everything in place that the launch needs."""
        journal = self._gateway.journal
        nodes = journal.nodes(path, data=True)
        text = self._disk.read(f"{path}/{script}")
        small = sum(len(node.data or b"") for node in nodes)
        pack = None
        if small > _IN_SCRIPT:
            pack = self._gateway.put_bytes(jobid, b"".join(node.data or b"" for node in nodes))
        pieces = all_pieces(nodes)
        plan = Plan(
            path,
            script,
            text,
            tuple(nodes),
            pack=pack,
            kept=frozenset(piece for piece in pieces if journal.is_used(piece, outside=path)),
            retrieved=self._retrieved(path),
            beat=float(os.environ.get(BEAT) or _BEAT),
            piece=self._gateway.piece,
        )
        try:
            content = make_script(plan)
        except DirectiveError as exc:
            raise SubmissionRefused(str(exc)) from exc
        self._gateway.check_pieces(jobid, pieces | set(pack.pieces if pack else ()))
        self._replace_script(jobid, content)
        digest = hashlib.sha256(text).hexdigest()
        journal.change_folder(path, digest=digest, piece=plan.piece)

    def _replace_script(self, jobid: str, content: bytes) -> None:
        found = set()
        for _ in range(_UPLOADS):
            self._gateway.upload(jobid, JOB_SCRIPT, content)
            there = self._gateway.download(jobid, JOB_SCRIPT)
            if there == content:
                return
            found.add(there)
        if len(found) > 1:
            raise IntegrityError(f"the script of job {jobid} did not arrive whole: is there a broken proxy on the way?")
        raise NotSupported(
            f"the gateway keeps the job script that it has written itself ({JOB_SCRIPT} of job {jobid} is not what was "
            "uploaded): AiiDA cannot run jobs there, as it could set neither resources nor what is run"
        )

    def _retrieved(self, path: str) -> tuple[str, ...]:
        """What AiiDA will retrieve, as paths and patterns relative to the working directory."""
        try:
            said = json.loads(self._disk.read(f"{path}/{_CALC_INFO}"))
        except (FileNotFoundError, ValueError):
            return ()
        items = [item for name in _RETRIEVED for item in (said.get(name) or ()) if item]
        paths = [str(item[0] if isinstance(item, (list, tuple)) else item) for item in items]
        return tuple(dict.fromkeys(item for item in paths if not item.startswith("/")))

    def _launch(self, path: str, jobid: str) -> None:
        journal = self._gateway.journal
        known = journal.folder(path)
        if known is not None and known.withdrawn:
            raise Conflict(f"job {jobid} was cancelled before it was launched")
        # Written down first: whoever finds it without an answer does not launch again.
        journal.change_folder(path, state=FolderState.LAUNCHING, launched=time.time())
        try:
            self._gateway.launch(jobid)
        except MarketplaceHpcError as exc:
            if is_in_doubt(exc):
                return
            if getattr(exc, "http_status", None) == 600 and self._has_begun(jobid):
                journal.change_folder(path, state=FolderState.LAUNCHED)
                return
            journal.change_folder(path, state=FolderState.CREATED)
            if getattr(exc, "http_status", None) == 600:
                raise Unavailable(
                    f"{exc}: the gateway does not say why. Are the partition, account and resources right, and does the "
                    "cluster answer?"
                ) from exc
            raise
        journal.change_folder(path, state=FolderState.LAUNCHED)

    def _has_begun(self, jobid: str) -> bool:
        try:
            return self._gateway.look(jobid).records.taken
        except MarketplaceHpcError:
            return False

    def create_job(self, fields: Json) -> str:
        """Withdraw a working directory's job: it is not launched any more.

        :param fields: ``folder``.
        :return: the gateway's id of the job; :data:`NONE` if there is none yet, which will not be launched, either.
        """
        path = os.path.normpath(str(fields.get("folder", "")))
        self._gateway.journal.change_folder(path, withdrawn=True)
        known = self._gateway.journal.folder(path)
        return known.jobid if known is not None and known.jobid else NONE

    # Cancellation

    def cancel_job(self, jobid: str, *, unlaunched: bool = False) -> Json:
        """Cancel a job. May be repeated.

        When this returns, the job has ended, or ends within a heartbeat, or never begins: a cancellation lies in its folder.

        :param unlaunched: has no effect.
        """
        if jobid == NONE:
            return {"jobid": jobid, "message": "there is no job", "cancel_requested": True}
        look = self._gateway.look(jobid)
        folder = self._gateway.journal.folder_of_job(jobid)
        if look.records.end is None:
            self._gateway.upload(jobid, CANCEL, b"cancelled\n")
            if folder is not None:
                self._gateway.journal.change_folder(folder.path, withdrawn=True)
            self._gateway.cancel(jobid)
            if self._gateway.look(jobid).size_of(CANCEL) is None:
                raise IntegrityError(f"the cancellation of job {jobid} did not arrive in its folder: cancel it again")
        return {"jobid": jobid, "message": f"job {jobid} is cancelled", "cancel_requested": True}

    # Polls

    def job_states(self, jobids: Sequence[str]) -> Json:
        """Ask for the states of jobs, one request each, several at a time. May be repeated.

        :return: ``jobs`` (fields by id), ``unknown``, and ``reasons``: why nothing is known now about the others.
        :raises Unauthorized: the token is refused.
        :raises ConfigurationError: a person must mend something.
        """
        jobs: dict[str, Json] = {}
        reasons: dict[str, str] = {}
        asked: dict[Any, str] = {}
        # Whoever was answered longest ago comes first, should the time not be enough for all.
        for jobid in sorted(dict.fromkeys(jobids), key=lambda jobid: self._answered.get(jobid, -1.0)):
            folder = self._gateway.journal.folder_of_job(jobid)
            if folder is not None and folder.state is FolderState.ENDED:
                jobs[jobid] = self._document(folder, None)
            else:
                asked[self._pool.submit(self._state, jobid)] = jobid
        done, late = wait(asked, _TOGETHER) if asked else (set(), set())
        for future in late:
            future.cancel()
            reasons[asked[future]] = f"the gateway did not answer within {_TOGETHER:.0f} s"
        for future in done:
            jobid = asked[future]
            self._answered[jobid] = self._clock()
            try:
                jobs[jobid] = future.result()
            except (Unauthorized, ConfigurationError):
                raise
            except MarketplaceHpcError as exc:
                reasons[jobid] = str(exc)
        return {"jobs": jobs, "unknown": [], "reasons": reasons}

    @property
    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="marketplace-hpc-classic")
            return self._executor

    def active_jobs(self) -> list[Json]:
        """The jobs of this journal that were launched and have not ended, as they are now. May be repeated."""
        launched = (FolderState.LAUNCHING, FolderState.LAUNCHED)
        ids = [folder.jobid for folder in self._gateway.journal.folders() if folder.state in launched]
        jobs = self.job_states(ids)["jobs"].values()
        return [job for job in jobs if not job["final"]]

    def show_job(self, jobid: str, wait: int = 0) -> Json:
        """One job. May be repeated.

        :param wait: seconds for which its end is waited for.
        :return: its fields, and ``accounting``: there is none.
        """
        until = self._clock() + wait
        while True:
            folder = self._gateway.journal.folder_of_job(jobid)
            if folder is not None and folder.state is FolderState.ENDED:
                job = self._document(folder, None)
            else:
                job = self._state(jobid)
            if job["final"] or self._clock() >= until:
                return {**job, "accounting": None}
            self._sleep(1.0)

    def _state(self, jobid: str) -> Json:
        """Look how a job is."""
        folder = self._gateway.journal.folder_of_job(jobid) or Folder("", FolderState.LAUNCHED, jobid)
        try:
            records = self._gateway.look(jobid).records
        except ServerFault:
            # Some servers cannot list a folder with a file of an odd name.
            end = self._gateway.end_of(jobid)
            if end is None:
                raise
            records = Records(True, end.scheduler_id, end=end)
        end = records.end
        if end is not None and end.state in ("UNPREPARED", "NODE_FAIL"):
            end = self._gateway.end_of(jobid) or end
        end = end or self._end_without_record(jobid, records)
        if end is not None:
            self._forget(jobid)
            if folder.path:
                folder = self._gateway.note_end(folder, end)
            return self._document(replace(folder, state=FolderState.ENDED, end=folder.end or vars(end)), records)
        if records.taken and folder.path and folder.state is FolderState.LAUNCHING:
            self._gateway.journal.change_folder(folder.path, state=FolderState.LAUNCHED)
        return self._document(folder, records)

    def _end_without_record(self, jobid: str, records: Records) -> End | None:
        now = int(time.time())
        if not records.taken:
            # A copy that begins from now on sees the cancellation, since it looks for it after it has taken the lock.
            if records.cancelled:
                return End("CANCELLED", 143, now, now, 0, reason="it was cancelled before it began")
            return None
        pulse = self._pulse(jobid, f"{records.scheduler_id}/{records.beats}")
        beat = records.beat or _BEAT
        silent = self._clock() - pulse.since
        patience = beat * (_SILENCE_AT_END if records.ending else SILENCE)
        if pulse.polls < _POLLS or silent < patience or self._clock() - pulse.asked < beat * _BETWEEN_QUESTIONS:
            return None
        # A suspended job is silent, too, and lives. Once it is asked after, it does not: that it has ended is then true.
        pulse.asked = self._clock()
        answer = self._gateway.cancel(jobid)
        if answer == "sent":
            pulse.refusals = 0
            if pulse.sent is None:
                pulse.sent = self._clock()
            # The scheduler has killed it meanwhile, whether it could be stopped gently or not.
            if self._clock() - pulse.sent < beat * SILENCE:
                return None
        else:
            pulse.refusals += 1
            if pulse.refusals < _POLLS:
                return None
        reason = "it fell silent, and the scheduler does not have it any more"
        if records.ending:
            return End(records.ending, records.ending_code, now, now, records.pieces, records.scheduler_id, reason)
        if pulse.sent is not None:
            reason = "it was silent for long and was cancelled"
        state = "CANCELLED" if records.cancelled else "NODE_FAIL"
        return End(state, 137, now, now, 0, records.scheduler_id, f"{reason}: was it killed, or its node lost?")

    def _pulse(self, jobid: str, beats: str) -> _Pulse:
        with self._lock:
            pulse = self._pulses.get(jobid)
            if pulse is None or pulse.beats != beats:
                pulse = self._pulses[jobid] = _Pulse(beats, self._clock())
            else:
                pulse.polls += 1
            return pulse

    def _forget(self, jobid: str) -> None:
        with self._lock:
            self._pulses.pop(jobid, None)
            self._answered.pop(jobid, None)

    def _document(self, folder: Folder, records: Records | None) -> Json:
        """The job in the form in which other gateways answer it."""
        job: Json = dict.fromkeys(JOB_FIELDS)
        job |= {
            "jobid": folder.jobid,
            "folder": folder.path,
            "script": JOB_SCRIPT,
            "script_digest": f"sha-256:{folder.digest}" if folder.digest else None,
            "cancel_requested": folder.withdrawn,
            "submitted_at": _moment(folder.launched),
            "message": "",
            "reason": "",
            "age": 0.0,
            "final": False,
            "state": "QUEUED",
            "backend": "classic",
        }
        if folder.end is not None:
            end = End(**folder.end)
            state = "FAILED" if end.state == "UNPREPARED" else end.state
            job |= {
                "state": state,
                "final": True,
                "scheduler_state": state,
                "scheduler_id": end.scheduler_id or None,
                "exit_code": end.exit_code,
                "signal": end.signal,
                "started_at": _moment(end.began),
                "ended_at": _moment(end.ended),
                "elapsed": max(0, end.ended - end.began),
                "message": end.reason,
                "unprepared": end.state == "UNPREPARED",
            }
        elif records is not None and records.taken:
            job |= {"state": "RUNNING", "scheduler_state": "RUNNING", "scheduler_id": records.scheduler_id or None}
        elif folder.state is FolderState.LAUNCHING:
            job["message"] = (
                "the answer to its submission was lost: it is submitted if the gateway got that far, and shows that when it "
                "begins. If it should have by now, kill the calculation and submit another one"
            )
        return job


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).isoformat()
