"""The wire: every capability of a gateway, its parameters, the operations of ``query`` and the states of a job.

This table is the only place with wire names. The client's routes, the gateway's routers, the registration document and the
tests read it. The nine capabilities that the MarketPlace's HPC gateway published (version 2.0.0) are marked ``published``:
their names, methods, paths and published parameters never change; everything else is added to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

API_VERSION = "3.0"
"""The version of this contract: the first number changes when an older client can no longer be served."""
OLDEST_CLIENT = "0.1.0"
"""The oldest version of this package's client that a gateway of this version serves."""

OLDEST_API = "3.0"
"""The oldest version of this contract with which a client of this version can do."""

EXTENSIONS = (
    "query",
    "workspaces",
    "bundle",
    "digest",
    "ranges",
    "launch-on-create",
    "resume",
    "operation-keys",
    "base64",
    "envelope",
)
"""What a gateway of this version offers beyond the nine, as ``getInfo`` announces it, and ``heartbeat``."""

CARRIER = "newTransformation"
"""The capability in whose body the envelope travels."""
ENVELOPE = "marketplace_hpc"
"""The reserved key of the body of ``newTransformation``: what it holds is another capability's request, for a platform that
passes only the nine as published. Nothing else may stand beside it."""
ENVELOPE_FIELDS: dict[str, str] = {
    "capability": "the name of what is asked for: any but `newTransformation`",
    "parameters": "its path and query parameters, each as the text that would stand in the address",
    "fields": "its JSON body",
    "content": "its body, if that is a file, as base64; sizes, offsets and digests are those of the file itself",
}
"""What stands in the envelope. The answer is the capability's own, errors and statuses included; that of a download is an
object with the file as base64 in ``content``, and its digest in ``digest`` where it is known beforehand."""

REQUEST_ID_HEADER = "X-Request-Id"
DIGEST_HEADER = "Repr-Digest"
"""The digest of what a download answers with, as RFC 9530 writes it, where the gateway has it beforehand."""
RELAY_HEADER = "X-Marketplace-Hpc-Relay"
"""By this the relay marks what it hands on: only text survives on the way. Its value is the largest answer, in bytes."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a capability.

    :param where: ``path`` or ``query`` on the direct route; the platform's proxy takes both as query parameters.
    :param published: part of the contract as first published, not an addition.
    """

    name: str
    where: Literal["path", "query"]
    type: Literal["string", "integer", "boolean"] = "string"
    required: bool = False
    published: bool = False
    description: str = ""


@dataclass(frozen=True)
class Capability:
    """One thing that can be asked of a gateway.

    :param name: the capability's name on the MarketPlace, which is the ``operationId`` of the registration document.
    :param body: what the request carries: nothing, a JSON object, or a file.
    :param authenticated: whether a token is needed.
    :param published: one of the nine of the published gateway.
    :param registered: offered through the MarketPlace's proxy; the others are for direct callers only.
    :param repeatable: the same request may be sent again without doing anything twice.
    """

    name: str
    method: Literal["GET", "PUT", "POST", "PATCH", "DELETE"]
    path: str
    summary: str
    parameters: tuple[Parameter, ...] = ()
    body: Literal["none", "json", "file"] = "none"
    authenticated: bool = True
    published: bool = True
    registered: bool = True
    repeatable: bool = True

    def parameter(self, name: str) -> Parameter:
        """Look up one parameter.

        :raises KeyError: if the capability has none of that name.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise KeyError(f"{self.name} has no parameter {name}")


def _jobid(*, workspace: bool = False) -> Parameter:
    text = "the job's id, as answered by newTransformation"
    if workspace:
        text += "; or the name of a root, as listed by getInfo, for a path below that root"
    return Parameter("jobid", "path", required=True, published=True, description=text)


_FILENAME = "the file's path below the job's folder or the root"
_FORCE = Parameter(
    "force",
    "query",
    "boolean",
    description="also where the folder, script or guard of a live job of the caller's own is taken away or replaced (default: "
    "that is refused)",
)
_ENCODING = Parameter(
    "encoding",
    "query",
    description="`base64`: the content is sent as base64, for a way on which only text survives; sizes, offsets and digests "
    "are those of the content itself",
)

CAPABILITIES: tuple[Capability, ...] = (
    Capability(
        "heartbeat",
        "GET",
        "/heartbeat",
        "Whether the gateway is up",
        authenticated=False,
    ),
    Capability(
        "createOrUpdateCollection",
        "PUT",
        "/api/v1/user/create",
        "Register the caller and make their home on the cluster",
    ),
    Capability(
        "newTransformation",
        "POST",
        "/api/v1/job/create",
        "Create a job; with `launch`, submit it in the same request",
        (
            Parameter(
                "key",
                "query",
                description="for a job without `folder` and `script`: the same key with the same job is one job, however "
                "often it is sent; a relay adds one",
            ),
        ),
        body="json",
    ),
    Capability(
        "updateTransformation",
        "PATCH",
        "/api/v1/job/launch/{jobid}",
        "Submit a job to the scheduler; a job that was submitted is not submitted again",
        (_jobid(),),
    ),
    Capability(
        "getTransformationState",
        "GET",
        "/api/v1/job/state/{jobid}",
        "The state of a job and the files in its folder",
        (_jobid(),),
    ),
    Capability(
        "deleteTransformation",
        "DELETE",
        "/api/v1/job/cancel/{jobid}",
        "Cancel a job",
        (
            _jobid(),
            Parameter(
                "unlaunched",
                "query",
                "boolean",
                description="end a job that was never launched, too, so that a launch that comes later does nothing "
                "(default: no, that is an error)",
            ),
        ),
    ),
    Capability(
        "createDataset",
        "PUT",
        "/api/v1/file/upload/{jobid}",
        "Upload a file or a folder",
        (
            _jobid(workspace=True),
            Parameter("filename", "query", published=True, description=f"{_FILENAME}; overrides the name in the form"),
            Parameter(
                "digest",
                "query",
                description="`sha-256:` and the hexadecimal digest of the file; a body that differs is refused",
            ),
            Parameter("mode", "query", "integer", description="the file's permission bits, as a decimal number"),
            Parameter(
                "overwrite",
                "query",
                "boolean",
                description="whether a file of that name is replaced (default) or refused",
            ),
            Parameter(
                "into",
                "query",
                description="the name to use inside `filename`, should that be an existing folder",
            ),
            Parameter("parents", "query", "boolean", description="make missing folders on the way (default: no)"),
            Parameter("bundle", "query", "boolean", description="the body is a bundle: a whole folder in one request"),
            Parameter(
                "total",
                "query",
                "integer",
                description="the size of the file in bytes: the file comes in parts, in as many requests as it takes; what "
                "arrived of it, told by `total` and `digest`, is kept; without `offset` the request asks how much is held",
            ),
            Parameter(
                "offset",
                "query",
                "integer",
                description="with `total`: where in the file the body begins, which is a bundle of parts; the digest of each "
                "covers the file up to that part's end",
            ),
            Parameter(
                "restart", "query", "boolean", description="with `total`: forget what is held of the file (default: no)"
            ),
            _ENCODING,
            _FORCE,
        ),
        body="file",
    ),
    Capability(
        "getDataset",
        "GET",
        "/api/v1/file/download/{jobid}",
        "Download a file or a folder",
        (
            _jobid(workspace=True),
            Parameter("filename", "query", required=True, published=True, description=_FILENAME),
            Parameter(
                "offset",
                "query",
                "integer",
                description="begin at this byte of the file (default: 0); past its end there is nothing, which is no error",
            ),
            Parameter(
                "length",
                "query",
                "integer",
                description="send at most so many bytes (default: all); a bundle ends with the entry that reaches it",
            ),
            Parameter(
                "bundle",
                "query",
                "boolean",
                description="answer with a bundle, which carries digests and can hold a folder",
            ),
            Parameter(
                "dereference",
                "query",
                "boolean",
                description="in a bundle, send what symbolic links point to instead of the links (default: yes)",
            ),
            Parameter(
                "after",
                "query",
                description="in a bundle of a folder, go on after this path below it; with `offset`, inside this file",
            ),
            _ENCODING,
        ),
    ),
    Capability(
        "deleteDataset",
        "DELETE",
        "/api/v1/file/delete/{jobid}",
        "Delete a file, or a folder with all that is in it",
        (
            _jobid(workspace=True),
            Parameter("filename", "query", required=True, published=True, description=_FILENAME),
            _FORCE,
        ),
    ),
    Capability(
        "getInfo",
        "GET",
        "/api/v1/info",
        "Versions, machines, limits, the caller and the roots",
        published=False,
    ),
    Capability(
        "query",
        "POST",
        "/api/v1/query",
        "An ordered list of operations on files and jobs, each with its own result or error",
        body="json",
        published=False,
        repeatable=False,
    ),
    Capability(
        "listJobs",
        "GET",
        "/api/v1/job/",
        "The caller's jobs",
        registered=False,
    ),
    Capability(
        "listFiles",
        "GET",
        "/api/v1/file/list/{jobid}",
        "The files in a job's folder, or in a root",
        (
            _jobid(workspace=True),
            Parameter("filename", "query", description="a folder below the job's folder or the root"),
        ),
        registered=False,
    ),
)

BY_NAME: dict[str, Capability] = {capability.name: capability for capability in CAPABILITIES}


@dataclass(frozen=True)
class Operation:
    """One operation of ``query``.

    :param required: fields that must be there.
    :param optional: fields that may be.
    :param repeatable: doing it twice is the same as doing it once; only lists of such operations are repeated by a client
        that does not know whether its request arrived.
    """

    name: str
    summary: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    repeatable: bool = True


_OPERATION_ROWS = (
    Operation(
        "stat", "attributes of a path; `follow` (default: no) looks through a symbolic link", ("path",), ("follow",)
    ),
    Operation(
        "list",
        "the entries of a folder with their attributes; `follow` says of each symbolic link what it leads to",
        ("path",),
        ("recursive", "pattern", "follow"),
    ),
    Operation(
        "glob",
        "the paths that match a shell pattern; `attributes` answers with the entries instead, as `list` with `follow`",
        ("pattern",),
        ("attributes",),
    ),
    Operation(
        "realpath",
        "the path with every symbolic link resolved; what does not exist is left as it is written",
        ("path",),
    ),
    Operation("checksum", "the `digest` (`sha-256:…`) and the `size` of a file", ("path",)),
    Operation(
        "usage",
        "what a file, or a folder with all that is in it, takes: `size` and `allocated` bytes, number of `entries`",
        ("path",),
    ),
    Operation(
        "mkdir",
        "make a folder; `parents` makes those on the way, `exist_ok` accepts that it is there",
        ("path",),
        ("parents", "exist_ok", "mode"),
        repeatable=False,
    ),
    Operation(
        "rename",
        "rename a file or folder, or move it to another file system; an existing target is refused",
        ("path", "target"),
        ("force",),
        repeatable=False,
    ),
    Operation(
        "copy",
        "copy a file or folder on the cluster, as `cp -r` does; `exact`: a file's content, to exactly this name; "
        "`directory`: only a folder",
        ("path", "target"),
        ("dereference", "exact", "directory", "force"),
        repeatable=False,
    ),
    Operation("symlink", "make `path` a symbolic link to `target`", ("path", "target"), (), repeatable=False),
    Operation("chmod", "set permission bits", ("path", "mode")),
    Operation(
        "remove",
        "remove a file or link; `directory` removes an empty folder, `recursive` a folder with all that is in it",
        ("path",),
        ("directory", "recursive", "missing_ok", "force"),
        repeatable=False,
    ),
    Operation(
        "compress",
        "write `sources` (paths or patterns, all below `root_dir`) into the archive `target`, with their paths relative to "
        "`root_dir`; `format`: `tar`, `tar.gz`, `tar.bz2` or `tar.xz`; `overwrite`: default yes; `dereference`: follow links",
        ("sources", "target", "root_dir", "format"),
        ("overwrite", "dereference", "force"),
        repeatable=False,
    ),
    Operation(
        "extract",
        "unpack the archive `path` into the folder `target`, leaving away the first `strip_components` of each path in it",
        ("path", "target"),
        ("strip_components", "force"),
        repeatable=False,
    ),
    Operation("jobs.states", "the states of many jobs", ("jobids",)),
    Operation("jobs.show", "one job with its accounting", ("jobid",), ("wait",)),
    Operation("jobs.active", "the caller's jobs that have not ended"),
)

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _OPERATION_ROWS}

ARCHIVE_FORMATS = ("tar", "tar.gz", "tar.bz2", "tar.xz")
"""What ``compress`` writes; ``extract`` looks into the file."""

MAX_OPERATIONS = 1000
"""The greatest number of operations in one ``query``."""
MAX_JOBIDS = 20_000
"""The greatest number of ids in one ``jobs.states``."""


class JobState(str, Enum):
    """The state of a job as the gateway's ledger knows it.

    Only a state that :attr:`final` is true for means that the job has ended; it never changes again.
    """

    CREATED = "CREATED"
    """The folder exists, files may be uploaded; nothing was submitted."""
    SUBMITTING = "SUBMITTING"
    """The intention to submit is durable; the scheduler has not confirmed it yet."""
    QUEUED = "QUEUED"
    HELD = "HELD"
    RUNNING = "RUNNING"
    SUSPENDED = "SUSPENDED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    """It ended with a non-zero exit code or by a signal."""
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NODE_FAIL = "NODE_FAIL"
    DEADLINE = "DEADLINE"
    PREEMPTED = "PREEMPTED"
    REFUSED = "REFUSED"
    """The scheduler refused it for good; it never ran."""

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self in _FINAL

    @property
    def active(self) -> bool:
        """Whether the job was launched and has not ended."""
        return not self.final and self is not JobState.CREATED


_FINAL = frozenset(
    {
        JobState.COMPLETED,
        JobState.FAILED,
        JobState.CANCELLED,
        JobState.TIMEOUT,
        JobState.OUT_OF_MEMORY,
        JobState.NODE_FAIL,
        JobState.DEADLINE,
        JobState.PREEMPTED,
        JobState.REFUSED,
    }
)

JOB_FIELDS = (
    "jobid",
    "state",
    "final",
    "cancel_requested",
    "folder",
    "script",
    "script_digest",
    "client_ref",
    "request_id",
    "machine",
    "backend",
    "name",
    "scheduler_id",
    "scheduler_state",
    "reason",
    "partition",
    "account",
    "nodes",
    "exit_code",
    "signal",
    "created_at",
    "submitted_at",
    "started_at",
    "ended_at",
    "time_limit",
    "elapsed",
    "message",
    "age",
)
"""The fields of a job as ``jobs.states``, ``jobs.show`` and ``jobs.active`` answer it. Times are ISO 8601 in UTC,
``time_limit``, ``elapsed`` and ``age`` seconds; ``age`` says how old the scheduler's word is (``null``: it was never asked).
``jobs.show`` adds ``accounting``: the scheduler's own record, ``{"columns": [...], "rows": [[...], ...]}``."""

INFO_FIELDS: dict[str, str] = {
    "name": "what the gateway calls itself",
    "version": "its version",
    "api_version": "the version of this contract",
    "oldest_client": "the oldest version of the client that it serves",
    "extensions": "what it offers beyond the nine published capabilities",
    "machines": "the machines that jobs run on, each with its `name`, `backend`, `problem` (why its scheduler does not "
    "answer, or null) and what the backend says about it; of several, the first is the default, and each has its `roots`",
    "account_mode": "under which Unix account files are written and jobs run: `own`, `shared` or `delegated`",
    "account_note": "what that does and does not keep apart, in a sentence",
    "auth": "which tokens are accepted: `method` (`dev`, `oidc` or `marketplace`), `issuer`, `audience` (a list, empty where "
    "it does not matter), and `refresh_margin`: how many seconds before the end of a token a client had better use a new one "
    "(with tokens that do not live twice as long, at half of their life)",
    "draining": "whether there is a maintenance: what is launched waits until it is over",
    "notice": "what the operator says about it",
    "policy": "what the site wants of jobs: defaults for what a script does not name, and limits; empty and 0: none",
    "username": "the name of the caller's folders",
    "email": "the caller's e-mail address",
    "home": "the absolute path of the caller's home on the cluster",
    "roots": "the folders below which the caller reaches everything: `name`, `path`, `read_only`, `free` bytes; of "
    "several machines, those of the default one. Those of another are named `MACHINE.NAME`, as their job ids are then",
    "limits": "how much may be asked for in one request; `whole`: bytes of a file up to which it should come in one piece",
    "route": "what the way on which this was asked lets through: with `text_only` nothing but text, and then at most "
    "`answer_limit` bytes in an answer, if that is known",
}
"""The fields of the answer of ``getInfo``, and what each says; an older gateway may leave some away."""

CREATE_FIELDS_PUBLISHED = ("job_name", "ntasks_per_node", "partition", "image", "executable_cmd", "email")
"""The keys of the published ``newTransformation``."""
CREATE_FIELDS_ADDED = ("folder", "script", "client_ref", "launch", "key", "machine")
"""The added keys: ``folder`` (absolute path of an existing folder) and ``script`` (its name inside) make a job of them,
``launch`` submits it at once, ``client_ref`` is AiiDA's UUID, ``key`` makes the request idempotent where folder and script
do not, ``machine`` picks one of several systems."""
