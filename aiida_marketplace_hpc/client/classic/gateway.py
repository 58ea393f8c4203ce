"""The nine capabilities of a classic gateway, asked for with care, and what its answers mean.

What may be repeated there is not what may be repeated elsewhere: uploads, downloads, listings and cancellations; not the
creation of a job, which leaves another folder each time, nor its launch, which is another job each time, nor the removal of a
file, which is not found the second time. A status of 500 says nothing: whether a file is there, the listing says.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from aiida_marketplace_hpc.client.answer import Answer
from aiida_marketplace_hpc.client.body import BytesBody, FormBody, open_regular
from aiida_marketplace_hpc.client.classic.journal import Folder, FolderState, Journal
from aiida_marketplace_hpc.client.classic.names import END, piece_name
from aiida_marketplace_hpc.client.classic.records import End, Records, read_end, read_records
from aiida_marketplace_hpc.client.classic.tree import Piece, Pieces
from aiida_marketplace_hpc.client.gateway import HpcGateway, Place
from aiida_marketplace_hpc.client.session import Timeouts
from aiida_marketplace_hpc.errors import (
    ConnectionFailed,
    IntegrityError,
    InvalidRequest,
    NotSupported,
    Phase,
    ServerFault,
    TooLarge,
    Unavailable,
)

Json = dict[str, Any]

LARGEST = 5 * 1024 * 1024 - 4096
"""Bytes of a piece that is tried first: FirecREST takes 5 MiB for the whole form."""
SMALLEST = 64 * 1024
"""Bytes of a piece that is not halved any more."""
_LAUNCH = Timeouts(read=45.0, total=45.0)
"""A launch is answered when the scheduler has taken the job: the published gateway waits for that in steps of up to 10 s."""
_JOB = {
    "job_name": "aiida",
    "ntasks_per_node": 1,
    "partition": "normal",
    "image": "none",
    "executable_cmd": "true",
}
"""What the script says that the gateway writes, and that AiiDA's replaces."""


@dataclass(frozen=True)
class Account:
    """Who the caller is there.

    :param home: absolute path on the cluster.
    """

    home: str
    name: str
    email: str


@dataclass(frozen=True)
class Look:
    """A job's folder as the gateway lists it."""

    files: tuple[Json, ...]
    records: Records

    def size_of(self, name: str) -> int | None:
        """Bytes of a file; ``None`` if it is not listed."""
        for file in self.files:
            if file.get("name") == name:
                return _number(file.get("size"))
        return None


class ClassicGateway:
    """A gateway that has only the nine.

    :param gateway: may be shared between threads.
    :param journal_folder: where journals are kept.
    """

    def __init__(self, gateway: HpcGateway, journal_folder: Path | None = None) -> None:
        self._gateway = gateway
        self._launching = HpcGateway(
            gateway.url, app_id=gateway.app_id, token_source=gateway.token_source, timeouts=_LAUNCH
        )
        self._journal_folder = journal_folder
        self._lock = threading.Lock()
        self._account: Account | None = None
        self._journal: Journal | None = None

    @property
    def url(self) -> str:
        return self._gateway.url

    def close(self) -> None:
        """Close all idle connections."""
        self._launching.close()

    # Who and where

    def account(self) -> Account:
        """Who the caller is; asked for once.

        :raises Unavailable: the gateway is no classic one after all.
        """
        with self._lock:
            if self._account is None:
                self._account = self._ask_account()
            return self._account

    def _ask_account(self) -> Account:
        try:
            said = self._gateway.create_user()
        except NotSupported as exc:
            if exc.http_status != 501:
                raise
            # The published status for a cluster that does not answer.
            raise Unavailable(f"{self.url} cannot make your home on the cluster: {exc.message}") from exc
        if "username" in said:
            raise Unavailable(
                f"{self.url} offers more than the nine published capabilities, but does not say what just now: try again"
            )
        home = str(said.get("home") or "")
        if not home.startswith("/"):
            raise ServerFault(f"{self.url} does not say where your home on the cluster is")
        return Account(home.rstrip("/"), PurePosixPath(home).name, str(said.get("email") or said.get("_id") or ""))

    @property
    def journal(self) -> Journal:
        """What this user has on this gateway."""
        account = self.account()
        with self._lock:
            if self._journal is None:
                who = (self.url, self._gateway.app_id, account.email, account.home)
                self._journal = Journal(*who, folder=self._journal_folder)
            return self._journal

    # Jobs

    def job_of(self, path: str) -> str:
        """The gateway's job of a working directory, made if there is none. Not for a thread that holds the folder's lock."""
        folder = self.journal.folder(path)
        if folder is not None and folder.jobid:
            return folder.jobid
        with self.journal.locked(path):
            return self.job_of_locked(path)

    def job_of_locked(self, path: str) -> str:
        """The same for a thread that holds the folder's lock."""
        folder = self.journal.folder(path)
        if folder is None:
            raise FileNotFoundError(2, "the working directory does not exist", path)
        if folder.jobid:
            return folder.jobid
        # Written down first: a process that is killed now leaves a folder on the cluster that nobody knows, and no second job.
        self.journal.change_folder(path, state=FolderState.CREATING)
        jobid = self._launching.create_job(_JOB)
        self.journal.change_folder(path, state=FolderState.CREATED, jobid=jobid)
        return jobid

    def launch(self, jobid: str) -> None:
        """Submit what is in ``job.sh``. Every call submits: never to be repeated.

        :raises MarketplaceHpcError: see :func:`is_in_doubt`.
        """
        self._launching.launch_job(jobid)

    def cancel(self, jobid: str) -> str:
        """Cancel a job. May be repeated.

        :return: ``sent``; ``not launched`` or ``refused``, which is also what a job that has ended is answered.
        """
        try:
            self._gateway.cancel_job(jobid)
        except ServerFault as exc:
            if exc.http_status == 505:
                return "not launched"
            if exc.http_status == 600:
                return "refused"
            raise
        return "sent"

    def look(self, jobid: str) -> Look:
        """List a job's folder. May be repeated."""
        files = self._gateway.check_job_state(jobid).get("files")
        if not isinstance(files, list):
            raise ServerFault(f"the gateway does not list the folder of job {jobid}")
        listed = tuple(file for file in files if isinstance(file, dict))
        return Look(listed, read_records(listed))

    def end_of(self, jobid: str) -> End | None:
        """How a job ended, asked without a listing; ``None`` if it has not, or if nothing is said now. May be repeated."""
        try:
            return read_end(self.download(jobid, END))
        except (ServerFault, ValueError):
            return None

    def note_end(self, folder: Folder, end: End) -> Folder:
        """Write down that a job has ended."""
        # Of several polls that see it, the first one is right.
        if folder.state is not FolderState.ENDED:
            self.journal.change_folder(folder.path, state=FolderState.ENDED, end=vars(end))
        found = self.journal.folder(folder.path)
        return found if found is not None else folder

    # Files

    def upload(self, jobid: str, name: str, content: bytes) -> None:
        """Upload one file under a name that survives. May be repeated. The answer does not say that it arrived."""
        form = FormBody(name, BytesBody(content))
        self._gateway.upload(
            Place(jobid, name), lambda: form, content_type=form.content_type, parameters={}, repeatable=True
        )

    def download(self, jobid: str, path: str) -> bytes:
        """Download one file, at most about 5 MiB. May be repeated.

        :raises ServerFault: it is not there, is too large, or the cluster does not answer: the gateway does not say which.
        """
        return self._gateway.download(Place(jobid, path), Answer.raw, parameters={})

    def delete(self, jobid: str, path: str) -> None:
        """Delete a file, or a folder with all that is in it. It being gone already is no error where a listing shows that.

        :raises ServerFault: it cannot be deleted.
        """
        try:
            self._gateway.delete_file(jobid, path)
        except (ServerFault, ConnectionFailed, Unavailable):
            if "/" in path or path.startswith(".") or self.look(jobid).size_of(path) is not None:
                raise

    @property
    def piece(self) -> int:
        """Bytes of the largest piece that the gateway takes, as far as is known."""
        return int(self.journal.fact("piece") or LARGEST)

    def put(self, jobid: str, local: Path) -> Pieces:
        """Upload a file in pieces, of which those that are there are not sent again. May be repeated."""
        with open_regular(local) as file:
            return self._put(jobid, file.read, lambda back: file.seek(-back, 1))

    def put_bytes(self, jobid: str, content: bytes) -> Pieces:
        """The same for bytes in memory."""
        position = 0

        def read(size: int) -> bytes:
            nonlocal position
            piece = content[position : position + size]
            position += len(piece)
            return piece

        def back(size: int) -> int:
            nonlocal position
            position -= size
            return position

        return self._put(jobid, read, back)

    def _put(self, jobid: str, read: Callable[[int], bytes], back: Callable[[int], int]) -> Pieces:
        whole = hashlib.sha256()
        pieces: list[Piece] = []
        limit = self.piece
        while content := read(limit):
            piece = Piece(jobid, len(content), hashlib.sha256(content).hexdigest())
            if not self.journal.has_piece(piece):
                try:
                    self.upload(jobid, piece_name(piece.digest), content)
                except (TooLarge, ServerFault, InvalidRequest, ConnectionFailed) as exc:
                    late = isinstance(exc, ConnectionFailed) and exc.phase is Phase.NOT_SENT
                    if late or len(content) <= SMALLEST:
                        raise
                    # Perhaps it was too large: proxies, the gateway and FirecREST have limits of their own.
                    limit = max(SMALLEST, len(content) // 2)
                    back(len(content))
                    continue
                self.journal.add_piece(piece, seen=False)
                if limit < self.piece:
                    self.journal.learn("piece", str(limit))
            whole.update(content)
            pieces.append(piece)
        return Pieces(tuple(pieces), whole.hexdigest())

    def check_pieces(self, jobid: str, pieces: set[Piece]) -> None:
        """Make sure that pieces are in a job's folder under their names; answers to uploads do not say so.

        :raises IntegrityError: some are not; they will be sent again.
        """
        if not pieces:
            return
        look = self.look(jobid)
        missing = [piece for piece in pieces if look.size_of(piece_name(piece.digest)) != piece.size]
        for piece in pieces:
            if piece in missing:
                self.journal.forget_piece(piece)
            else:
                self.journal.add_piece(piece, seen=True)
        if missing:
            raise IntegrityError(
                f"{len(missing)} of {len(pieces)} uploaded pieces are not in the folder of job {jobid}, though the gateway "
                "took them: is the cluster's disk full?"
            )

    def get_pieces(self, content: Pieces, write: Callable[[bytes], object]) -> None:
        """Download a file that was uploaded in pieces. May be repeated.

        :raises IntegrityError: a piece is not what was uploaded.
        """
        for piece in content.pieces:
            data = self.download(piece.jobid, piece_name(piece.digest))
            if hashlib.sha256(data).hexdigest() != piece.digest:
                raise IntegrityError(f"a piece in the folder of job {piece.jobid} is not what was uploaded")
            write(data)


def is_in_doubt(error: Exception) -> bool:
    """Whether a launch that failed with this error may have been carried out.

    Not if the request never left, was refused before the gateway acted (400 to 499), or is said to have failed (600). The
    gateway says 600 also where the cluster's own service, FirecREST, may have submitted all the same: then the lock that the
    job script takes keeps a second copy from running.
    """
    status = getattr(error, "http_status", None)
    phase = getattr(error, "phase", Phase.MAYBE_SENT)
    if status is None or phase is Phase.NOT_SENT:
        return phase is Phase.MAYBE_SENT
    return not (400 <= status < 500 or status == 600)


def _number(text: object) -> int | None:
    try:
        return int(str(text))
    except ValueError:
        return None
