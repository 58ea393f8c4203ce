"""A gateway as a Python object: the nine capabilities that MarketPlace users know, and what was added to them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from aiida_marketplace_hpc.client import pending, transfer
from aiida_marketplace_hpc.client.answer import Answer
from aiida_marketplace_hpc.client.application import Application
from aiida_marketplace_hpc.client.auth import DEFAULT_SOURCE, TokenSource
from aiida_marketplace_hpc.client.body import FileBody, FormBody
from aiida_marketplace_hpc.client.folder import Destination, Progress, Received
from aiida_marketplace_hpc.client.info import Root
from aiida_marketplace_hpc.client.passage import Passage
from aiida_marketplace_hpc.client.retry import RetryPolicy
from aiida_marketplace_hpc.client.routes import DirectRoute, ProxyRoute, Route, Value
from aiida_marketplace_hpc.client.session import Body, GatewaySession, Request, Timeouts, json_body
from aiida_marketplace_hpc.errors import (
    Forbidden,
    GatewayError,
    InvalidRequest,
    NotSupported,
    ServerFault,
    TooLarge,
    from_wire,
)
from aiida_marketplace_hpc.protocol import MAX_JOBIDS, MAX_OPERATIONS, OPERATIONS
from aiida_marketplace_hpc.versions import check_gateway

T = TypeVar("T")
Json = dict[str, Any]

MAX_WAIT = 10
"""Seconds that the gateway may be asked to wait for the end of a job."""


class Place(NamedTuple):
    """A path as the gateway addresses it.

    :param jobid: a job's id, or the name of a root.
    :param path: relative to the job's folder or the root; ``.`` for that itself.
    """

    jobid: str
    path: str


class HpcGateway:
    """A gateway. Nothing is sent before the first call; one object may be used by many threads.

    Every method raises :class:`~aiida_marketplace_hpc.errors.GatewayError` (the gateway answered: no),
    :class:`~aiida_marketplace_hpc.errors.ConnectionFailed` (no complete answer) or
    :class:`~aiida_marketplace_hpc.errors.ConfigurationError` (a setting is wrong); attempts that can be repeated safely
    have then been repeated. The published SDK answered ``""``, error texts or ``Response`` objects instead.

    :param url: the gateway's address, or with ``app_id`` the MarketPlace's.
    :param app_id: go through the MarketPlace's proxy to this app; empty: talk to the gateway directly.
    :param token_source: ``env:NAME``, ``file:PATH``, ``command:CMD``, ``login:NAME``, or an object.
    :param machine: the one whose files are meant and on which new jobs run, where the gateway has several; empty: its default
        one.
    :param clock: the seconds of a monotonic clock.
    :raises ConfigurationError: one of them makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        app_id: str = "",
        token_source: str | TokenSource = DEFAULT_SOURCE,
        machine: str = "",
        timeouts: Timeouts | None = None,
        retry: RetryPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._route: Route = ProxyRoute(url, app_id) if app_id else DirectRoute(url)
        self.url = self._route.url
        self.app_id = app_id
        self.machine = machine
        self.token_source = TokenSource.parse(token_source) if isinstance(token_source, str) else token_source
        self._session = GatewaySession(self.token_source, timeouts=timeouts, retry=retry, clock=clock, sleep=sleep)
        self._clock = clock
        self._passage = Passage(self._route, self._session, self._learn, clock)
        self.body_limit = self._passage.body_limit

    @classmethod
    def from_environment(cls) -> HpcGateway:
        """Make the gateway that MP_HOST and, for the proxy, MP_APP_ID name, with the token in MP_ACCESS_TOKEN.

        :raises ConfigurationError: MP_HOST is not set.
        """
        return cls(os.environ.get("MP_HOST", ""), app_id=os.environ.get("MP_APP_ID", ""))

    def __repr__(self) -> str:
        through = f", app_id={self.app_id!r}" if self.app_id else ""
        return f"HpcGateway({self.url!r}{through}, token_source={self.token_source!r})"

    def __enter__(self) -> HpcGateway:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all idle connections. The object can still be used."""
        self._session.close()

    # ---- the nine ---------------------------------------------------------------------------------------------------

    def heartbeat(self) -> Json:
        """Ask whether the gateway is up. May be repeated.

        :return: ``message``; not from a classic gateway ``api_version``, ``extensions`` and ``route``, as :meth:`info`.
        """
        return self._call("heartbeat")

    def clock_offset(self) -> float | None:
        """Ask how far the clock at the other end is ahead of this machine's. May be repeated.

        :return: seconds, exact to one or two; ``None`` if it is not said. A proxy may answer with its own time.
        """
        before = time.time()

        def read(answer: Answer) -> float | None:
            answer.json()
            return answer.date

        moment = self._passage.send(self._request("heartbeat"), read)
        if moment is None:
            return None
        # The header has whole seconds.
        return moment - before if moment < before - 1 else max(0.0, moment - time.time())

    def create_user(self) -> Json:
        """Register the caller and make their home on the cluster. May be repeated.

        :return: ``_id``, ``email``, ``name``, ``username``, ``home`` (absolute path), ``message``.
        """
        return self._call("createOrUpdateCollection")

    def create_job(self, new_transformation: Mapping[str, Any]) -> str:
        """Create a job. May be repeated if it has a ``folder`` and ``script``, or a ``key``.

        :param new_transformation: the published keys ``job_name``, ``ntasks_per_node``, ``partition``, ``image``,
            ``executable_cmd``; or ``folder`` and ``script`` of a job that lies on the cluster already.
        :return: the job's id.
        :raises InvalidRequest: a key is missing or unknown.
        """
        return str(self._create(new_transformation)["jobid"])

    def check_job_state(self, jobid: str) -> Json:
        """Ask for a job's state and the files in its folder. May be repeated.

        :return: ``files`` (the published list), ``state``, ``job`` (all fields of a job), ``message``.
        :raises NotFound: there is no such job of the caller's.
        """
        return self._call("getTransformationState", {"jobid": jobid})

    def upload_file(self, jobid: str, filename: str, source_path: str | os.PathLike[str]) -> Json:
        """Upload a file into a job's folder and replace one of that name. May be repeated.

        :param jobid: a job's id, or the name of a root.
        :param filename: path below the job's folder or the root; empty: the name of the local file.
        :raises OSError: the local file cannot be read.
        :raises IntegrityError: the file changed meanwhile, or arrived wrong.
        """
        filename = filename or Path(source_path).name
        if "digest" in self.extensions():
            return transfer.put_file(self, source_path, Place(jobid, filename))
        form = FormBody(filename, FileBody(Path(source_path)))
        return self.upload(
            Place(jobid, filename), lambda: form, content_type=form.content_type, parameters={}, repeatable=True
        )

    def download_file(self, jobid: str, filename: str) -> bytes:
        """Download a file from a job's folder into memory; :meth:`get` is for large ones. May be repeated.

        :param jobid: a job's id, or the name of a root.
        :param filename: path below the job's folder or the root.
        :return: the content; the published SDK returns a ``Response``.
        :raises IsADirectoryError: it is a folder.
        :raises IntegrityError: it arrived wrong.
        """
        place = Place(jobid, filename)
        if "bundle" in self.extensions():
            return transfer.read(self, place)
        return self.download(place, Answer.raw, parameters={})

    def delete_file(self, jobid: str, filename: str, *, force: bool = False) -> Json:
        """Delete a file, or a folder with all that is in it. A second call does not find it any more.

        :param jobid: a job's id, or the name of a root.
        :param filename: path below the job's folder or the root.
        :param force: also the folder, script or guard of a live job of one's own.
        :return: ``message``.
        :raises FileError: it belongs to a live job (``EBUSY``), or the cluster's file system refuses.
        """
        # Not repeated by itself either: what is there by then may be somebody's new file.
        parameters = {"jobid": jobid, "filename": filename, "force": force or None}
        return self._call("deleteDataset", parameters, repeatable=False)

    def launch_job(self, jobid: str) -> Json:
        """Submit a job. May be repeated: a job that was submitted is not submitted again, but for classic gateways.

        :return: ``jobid`` and all fields of a job.
        :raises SubmissionRefused: the scheduler refuses it for good.
        """
        return self._call("updateTransformation", {"jobid": jobid}, repeatable=not self._classic())

    def cancel_job(self, jobid: str, *, unlaunched: bool = False) -> Json:
        """Cancel a job. May be repeated.

        When this returns, the job has ended or will, without anybody asking again: the gateway has it in writing, also if the
        scheduler does not take it now.

        :param unlaunched: end a job that was never launched, too: a launch that arrives later does nothing.
        :return: ``message``, and all fields of a job: ``cancel_requested`` is true.
        :raises Conflict: it was never launched.
        :raises Unavailable: the scheduler does not take it now. If that is the gateway's own word (its ``phase`` is
            ``ANSWERED``), the gateway has written down that the job is to end, and goes on trying.
        """
        return self._call("deleteTransformation", {"jobid": jobid, "unlaunched": unlaunched or None})

    # ---- what the gateway is ----------------------------------------------------------------------------------------

    def info(self, refresh: bool = False) -> Json:
        """Ask what the gateway is: versions, extensions, machines, limits, the caller, the roots. May be repeated.

        The answer is used again for five minutes; threads that ask at the same time share one request.

        :param refresh: ask again now.
        :raises NotSupported: this is a classic gateway, which has only the nine, or the url is wrong.
        """
        return self._passage.info.get(refresh)

    def application(self) -> Application:
        """Ask the MarketPlace for the app: the version of its API and the capabilities on offer. May be repeated.

        The answer is used again for five minutes. Before anything is sent through the proxy it is looked at whether that is on
        offer.

        :raises NotSupported: there is no such app, the caller may not use it, or the gateway is asked directly.
        """
        return self._passage.application()

    def extensions(self) -> frozenset[str]:
        """What the gateway offers beyond the nine; nothing for a classic one. May be repeated."""
        try:
            return frozenset(self.info().get("extensions", ()))
        except NotSupported:
            return frozenset()

    def require(self, extension: str) -> None:
        """Make sure that the gateway offers something beyond the nine. May be repeated.

        :raises NotSupported: it does not.
        """
        if extension not in self.info().get("extensions", ()):
            raise NotSupported(f"{self.url} does not offer {extension}: the gateway is older than this client")

    def _classic(self) -> bool:
        return not self.extensions()

    def roots(self) -> tuple[Root, ...]:
        """The folders on the cluster that the gateway reaches. May be repeated.

        :raises ConfigurationError: the gateway does not have the machine.
        """
        return self._passage.info.roots(self.machine)

    def home(self) -> str:
        """The absolute path of the caller's home. May be repeated.

        :raises ConfigurationError: the gateway does not have the machine.
        """
        roots = self.roots()
        return next((root.path for root in roots if root.name == "home"), "") or str(self.info()["home"])

    def about_machine(self) -> Json:
        """What the gateway says about the machine: its ``name``, ``backend``, ``problem`` and more. May be repeated.

        :raises ConfigurationError: the gateway does not have it.
        """
        return self._passage.info.machine(self.machine)

    def locate(self, path: str) -> Place:
        """Find the root that a path lies below, the innermost if there are several. May be repeated.

        ``..`` is kept: only the gateway knows where a symbolic link on the way leads (:meth:`place` asks it).

        :param path: absolute path on the cluster.
        :raises Forbidden: it lies outside all roots.
        :raises InvalidRequest: it is not absolute.
        """
        if not path.startswith("/"):
            raise InvalidRequest(f"{path!r} is not an absolute path on the cluster")
        parts = _components(path)
        roots = self.roots()
        for root in sorted(roots, key=lambda root: len(_components(root.path)), reverse=True):
            above = _components(root.path)
            if parts[: len(above)] == above:
                below = "/".join(parts[len(above) :])
                # A slash at the end means: a folder.
                return Place(
                    root.address or root.name, (f"{below}/" if path.endswith("/") else below) if below else "."
                )
        known = ", ".join(f"{root.path}{' (read-only)' if root.read_only else ''}" for root in roots) or "none"
        raise Forbidden(f"{path} lies outside the folders that this gateway reaches: {known}")

    def place(self, remote: str | Place) -> Place:
        """Take a place as it is, and :meth:`locate` an absolute path, after one request where it has a ``..``.

        :raises Forbidden: it lies outside all roots.
        """
        if isinstance(remote, Place):
            return remote
        if ".." in remote.split("/"):
            remote = str(self.ask("realpath", path=remote)["path"])
        return self.locate(remote)

    # ---- many operations in one request -----------------------------------------------------------------------------

    def query(self, operations: Sequence[Mapping[str, Any]], stop_on_error: bool = False) -> list[Json | GatewayError]:
        """Do a list of operations in order, in one request per :data:`~aiida_marketplace_hpc.protocol.MAX_OPERATIONS`.

        It may take as long as it makes progress. An answer that is lost is asked for again, so that nothing is done twice.
        To be repeated by the caller only if all operations may
        (:data:`~aiida_marketplace_hpc.protocol.OPERATIONS`).

        :param operations: each with its name as ``op`` and its fields.
        :param stop_on_error: end with the first operation that fails.
        :return: for each operation in order its result, or the error with which it failed (as a value: it is not raised).
        """
        results: list[Json | GatewayError] = []
        for start in range(0, len(operations), MAX_OPERATIONS):
            part = operations[start : start + MAX_OPERATIONS]
            rows, request_id = self._query_in_pieces(part, stop_on_error)
            results += [_result(row, request_id) for row in rows]
            if len(rows) < len(part):
                break
        return results

    def _query_in_pieces(self, operations: Sequence[Mapping[str, Any]], stop_on_error: bool) -> tuple[list[Json], str]:
        """Send a list in one request, or in as many as a proxy wants that takes only small bodies."""
        try:
            return self._query(operations, stop_on_error)
        except TooLarge as exc:
            # In the gateway's own words it is about what was asked for, and not about how much was sent.
            if not exc.foreign or len(operations) < 2:
                raise
        half = len(operations) // 2
        rows, request_id = self._query_in_pieces(operations[:half], stop_on_error)
        if not stop_on_error or all(row.get("ok") for row in rows):
            more, request_id = self._query_in_pieces(operations[half:], stop_on_error)
            rows = rows + more
        return rows, request_id

    def _query(self, operations: Sequence[Mapping[str, Any]], stop_on_error: bool) -> tuple[list[Json], str]:
        body: Json = {"operations": [dict(operation) for operation in operations], "stop_on_error": stop_on_error}
        if self.machine:
            self.about_machine()
            body["machine"] = self.machine
        repeatable = all(_is_repeatable(operation) for operation in operations)
        answer, request_id = pending.carry_out(
            self._send_query,
            body,
            # What may not be done twice may be sent twice to a gateway that carries out once what has a key.
            repeatable=repeatable or "operation-keys" in self.extensions(),
            clock=self._clock,
            seconds=self._session.seconds,
        )
        rows = answer.get("results")
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            stopped = stop_on_error and rows and not rows[-1].get("ok")
            if len(rows) == len(operations) or (stopped and len(rows) < len(operations)):
                return rows, request_id
        raise ServerFault("the gateway did not answer every operation of the query", request_id=request_id)

    def _send_query(self, body: Callable[[], Json], *, repeatable: bool, seconds: float) -> tuple[Json, str]:
        request = replace(
            self._request("query", fields={}, repeatable=repeatable), body=lambda: json_body(body())(), seconds=seconds
        )
        return self._passage.send(request, lambda answer: (answer.json(), answer.request_id))

    def ask(self, op: str, **fields: Any) -> Json:
        """Do one operation of :meth:`query` and return its result. May be repeated if the operation may.

        :raises GatewayError: it failed.
        """
        result = self.query([{"op": op, **{name: value for name, value in fields.items() if value is not None}}])[0]
        if isinstance(result, GatewayError):
            raise result
        return result

    def checksum(self, path: str) -> Json:
        """Ask for the digest of a file, which is read on the cluster. May be repeated.

        :param path: absolute path on the cluster.
        :return: ``digest`` (``sha-256:…``) and ``size`` in bytes.
        :raises FileError: there is no such file.
        """
        return self.ask("checksum", path=path)

    def usage(self, path: str) -> Json:
        """Ask what a file, or a folder with all that is in it, takes. May be repeated.

        :param path: absolute path on the cluster.
        :return: ``size`` (bytes as ``du -b`` counts), ``allocated`` (bytes on the disk), ``entries``.
        :raises FileError: there is nothing.
        """
        return self.ask("usage", path=path)

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def submit(self, folder: str, script: str, client_ref: str | None = None) -> Json:
        """Make a folder on the cluster a job and submit it. May be repeated: the same script there runs once.

        :param folder: absolute path of an existing folder, the job's working directory.
        :param script: name of the job script in it.
        :param client_ref: the caller's own reference, such as the UUID of an AiiDA node.
        :return: ``jobid`` and all fields of a job; ``state`` is SUBMITTING if the scheduler has not answered yet.
        :raises SubmissionRefused: the scheduler refuses it for good.
        """
        fields = {"folder": folder, "script": script, "launch": True}
        return self._create(fields if client_ref is None else {**fields, "client_ref": client_ref})

    def job_states(self, jobids: Sequence[str]) -> Json:
        """Ask for the states of many jobs at once. May be repeated.

        :return: ``jobs`` (fields by id) and ``unknown`` (ids of no job of the caller's).
        """
        merged: Json = {"jobs": {}, "unknown": []}
        for start in range(0, len(jobids), MAX_JOBIDS):
            answer = self.ask("jobs.states", jobids=list(jobids[start : start + MAX_JOBIDS]))
            merged["jobs"].update(answer.get("jobs", {}))
            merged["unknown"] += answer.get("unknown", [])
        return merged

    def show_job(self, jobid: str, wait: int = 0) -> Json:
        """Ask for one job with its accounting. May be repeated.

        :param wait: seconds, at most :data:`MAX_WAIT`, that the gateway may wait for the job to end.
        :return: all fields of a job, and ``accounting``: ``columns`` and ``rows``, or ``None``.
        :raises NotFound: there is no such job of the caller's.
        """
        job: Json = self.ask("jobs.show", jobid=jobid, wait=min(wait, MAX_WAIT) if wait > 0 else None)["job"]
        return job

    def active_jobs(self) -> list[Json]:
        """Ask for the caller's jobs that have not ended. May be repeated."""
        jobs: list[Json] = self.ask("jobs.active")["jobs"]
        return jobs

    def list_jobs(self) -> dict[str, Json]:
        """Ask for all jobs of the caller, by id, in the published form. May be repeated.

        :raises NotSupported: the MarketPlace's proxy is on the way, which does not offer it; see :meth:`active_jobs`.
        """
        jobs: dict[str, Json] = self._call("listJobs").get("jobs", {})
        return jobs

    def list_files(self, jobid: str, path: str = "") -> list[Json]:
        """List a folder as the published gateway does: without hidden files, sizes as text. May be repeated.

        :param jobid: a job's id, or the name of a root.
        :param path: a folder below it.
        :raises NotSupported: the MarketPlace's proxy is on the way, and it is not the job's own folder.
        """
        if not path and not self._route.offers("listFiles"):
            answer = self.check_job_state(jobid)
        else:
            answer = self._call("listFiles", {"jobid": jobid, "filename": path or None})
        files: list[Json] = answer.get("files", [])
        return files

    # ---- files and folders ------------------------------------------------------------------------------------------

    def put_file(
        self,
        local: str | os.PathLike[str],
        remote: str | Place,
        *,
        mode: int | None = None,
        overwrite: bool = True,
        into: str | None = None,
        parents: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Json:
        """Upload one file: :func:`aiida_marketplace_hpc.client.transfer.put_file`."""
        return transfer.put_file(
            self,
            local,
            remote,
            mode=mode,
            overwrite=overwrite,
            into=into,
            parents=parents,
            force=force,
            progress=progress,
        )

    def put_tree(
        self,
        local: str | os.PathLike[str],
        remote: str | Place,
        *,
        dereference: bool = True,
        overwrite: bool = True,
        into: str | None = None,
        parents: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Json:
        """Upload a folder: :func:`aiida_marketplace_hpc.client.transfer.put_tree`."""
        return transfer.put_tree(
            self,
            local,
            remote,
            dereference=dereference,
            overwrite=overwrite,
            into=into,
            parents=parents,
            force=force,
            progress=progress,
        )

    def get(
        self,
        remote: str | Place,
        local: str | os.PathLike[str] | Destination,
        *,
        dereference: bool = True,
        overwrite: bool = True,
        progress: Progress | None = None,
    ) -> Received:
        """Download a file or a folder: :func:`aiida_marketplace_hpc.client.transfer.get`."""
        return transfer.get(
            self,
            remote,
            local,
            dereference=dereference,
            overwrite=overwrite,
            progress=progress,
        )

    def read_range(self, remote: str | Place, offset: int, length: int) -> bytes:
        """Download a piece of a file into memory: :func:`aiida_marketplace_hpc.client.transfer.read_range`."""
        return transfer.read_range(self, remote, offset, length)

    # ---- one request ------------------------------------------------------------------------------------------------

    def upload(
        self,
        place: Place,
        body: Callable[[], Body | bytes],
        *,
        content_type: str = "application/octet-stream",
        parameters: Mapping[str, Value],
        repeatable: bool = True,
        once: bool = False,
    ) -> Json:
        """Ask for ``createDataset`` with a body; the functions of ``transfer`` are what to use instead.

        :param body: makes the body, once per attempt.
        :param once: a single attempt, to be repeated by :meth:`persist`.
        """
        target = self._route.target("createDataset", {"jobid": place.jobid, "filename": place.path, **parameters})
        request = Request(target, body, content_type, repeatable=repeatable, transfer=True, once=once)
        return self._passage.send(request, Answer.json)

    def download(
        self, place: Place, handle: Callable[[Answer], T], *, parameters: Mapping[str, Value], once: bool = False
    ) -> T:
        """Ask for ``getDataset`` and give the answer to ``handle``; see ``transfer``. May be repeated if that may.

        :param once: a single attempt, to be repeated by :meth:`persist`.
        """
        target = self._route.target("getDataset", {"jobid": place.jobid, "filename": place.path, **parameters})
        return self._passage.send(Request(target, accept="*/*", repeatable=True, transfer=True, once=once), handle)

    def persist(self, attempt: Callable[[], T], progress: Callable[[], int]) -> T:
        """Call ``attempt``, which makes several requests and goes on where it stopped, until it succeeds or gets no further.

        :param progress: how far it has got.
        :raises MarketplaceHpcError: the error of the last attempt, after 20 seconds without progress.
        """
        return self._session.persist(attempt, progress)

    def _learn(self, info: Json) -> None:
        check_gateway(info, self.url)
        margin = info.get("auth", {}).get("refresh_margin")
        if isinstance(margin, (int, float)):
            self.token_source.margin = max(0.0, float(margin))

    def _create(self, fields: Mapping[str, Any]) -> Json:
        if self.machine and "machine" not in fields:
            self.about_machine()
            fields = {**fields, "machine": self.machine}
        repeatable = bool(fields.get("key") or (fields.get("folder") and fields.get("script")))
        answer = self._call("newTransformation", fields=fields, repeatable=repeatable)
        if not answer.get("jobid"):
            raise ServerFault("the gateway answered without the id of the new job")
        return answer

    def _call(
        self,
        capability: str,
        parameters: Mapping[str, Value] | None = None,
        *,
        fields: Mapping[str, Any] | None = None,
        repeatable: bool | None = None,
    ) -> Json:
        request = self._request(capability, parameters, fields=fields, repeatable=repeatable)
        return self._passage.send(request, Answer.json)

    def _request(
        self,
        capability: str,
        parameters: Mapping[str, Value] | None = None,
        *,
        fields: Mapping[str, Any] | None = None,
        repeatable: bool | None = None,
    ) -> Request:
        target = self._route.target(capability, parameters)
        row = target.capability
        return Request(
            target,
            None if fields is None else json_body(fields),
            None if fields is None else "application/json",
            repeatable=row.repeatable if repeatable is None else repeatable,
            # The platform's proxy wants a token for everything.
            token_optional=not row.authenticated and not self.app_id,
        )


def _components(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _result(row: Mapping[str, Any], request_id: str) -> Json | GatewayError:
    if row.get("ok"):
        result = row.get("result")
        return result if isinstance(result, dict) else {}
    error = from_wire(0, row.get("error"))
    error.request_id = error.request_id or request_id
    return error


def _is_repeatable(operation: Mapping[str, Any]) -> bool:
    row = OPERATIONS.get(str(operation.get("op")))
    return row is not None and row.repeatable


__all__ = ["HpcGateway", "Place", "Root"]
