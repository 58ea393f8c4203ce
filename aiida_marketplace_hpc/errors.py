"""Everything that can go wrong, as one tree, known to the client and to the gateway.

::

    MarketplaceHpcError
    ├── ConfigurationError            a setting that a person must mend (address, token source, option)
    │   ├── TokenUnavailable          the token source gives no token
    │   └── VersionMismatch           client and gateway are too far apart; the message says which to upgrade
    ├── ConnectionFailed              no complete answer; ``phase`` says whether the request can have arrived
    │   ├── DeadlineExceeded          no progress within the deadline
    │   └── ProviderUnavailable       whoever renews the token does not answer; nothing was sent to the gateway
    └── GatewayError                  the gateway answered: no
        ├── InvalidRequest     400    the request makes no sense; repeating it changes nothing
        ├── Unauthorized       401    no token, or one that is not accepted
        ├── Forbidden          403    a path outside the roots, a write below a read-only root, somebody who is not admitted
        ├── NotFound           404    no such job of yours, no such path on the gateway
        ├── Conflict           409    the state of the job or folder does not allow it
        ├── FileError          409    the file system refused; ``errno`` says how
        ├── IntegrityError     422    bytes arrived, at either end, that are not the bytes that were sent
        ├── TooLarge           413    over a limit that ``getInfo`` states
        ├── SubmissionRefused  422    the scheduler refuses this job for good; its words are the message
        ├── Busy               429    too much at once; ask again after ``retry_after`` seconds
        ├── ServerFault        500    a fault of the gateway's own
        ├── NotSupported       501    this gateway cannot do that
        └── Unavailable        503    what the gateway needs (scheduler, database, who knows tokens) does not answer now

The gateway raises the lower half and answers with :meth:`GatewayError.to_wire`; the client makes the same classes again
from that answer with :func:`from_wire`. Nobody tells errors apart by their text.
"""

from __future__ import annotations

import errno as errno_module
import os
from enum import Enum
from typing import Any, ClassVar


class Phase(str, Enum):
    """How far a request got before it failed: what may be repeated depends on it."""

    NOT_SENT = "not_sent"
    """The gateway cannot have seen the request: repeating it is always safe."""
    MAYBE_SENT = "maybe_sent"
    """The gateway may have acted on it: repeat only what is idempotent."""
    ANSWERED = "answered"
    """The gateway answered; the answer says what happened."""


class MarketplaceHpcError(Exception):
    """The root of the tree; catching it catches every error that this package raises on purpose."""

    code: ClassVar[str] = "error"
    retryable: bool = False
    phase: Phase = Phase.NOT_SENT

    @property
    def message(self) -> str:
        """What happened, to what, and what to do next."""
        return str(self.args[0]) if self.args else self.code


class ConfigurationError(MarketplaceHpcError):
    """A setting that a person must mend before anything can work."""

    code = "configuration"


class TokenUnavailable(ConfigurationError):
    """The token source gives no token."""

    code = "token_unavailable"


class VersionMismatch(ConfigurationError):
    """Client and gateway are of versions that do not work together."""

    code = "version_mismatch"


class ConnectionFailed(MarketplaceHpcError):
    """The gateway gave no complete answer.

    Deliberately not an :class:`OSError`: AiiDA reads an ``OSError`` of ``mkdir`` as "the folder is there already".
    """

    code = "connection_failed"
    retryable = True

    def __init__(self, message: str, *, phase: Phase = Phase.MAYBE_SENT) -> None:
        super().__init__(message)
        self.phase = phase


class DeadlineExceeded(ConnectionFailed):
    """The call made no progress within its deadline."""

    code = "deadline_exceeded"


class ProviderUnavailable(ConnectionFailed):
    """Whoever renews the token gives no answer now. The login may be good: asking again later can succeed."""

    code = "provider_unavailable"

    def __init__(self, message: str, *, phase: Phase = Phase.NOT_SENT) -> None:
        super().__init__(message, phase=phase)


class GatewayError(MarketplaceHpcError):
    """The gateway answered with an error.

    :param message: what happened and what to do, for a person.
    :param request_id: the id under which the gateway's log has the details.
    :param retryable: overrides the class's own opinion whether the same request may succeed later.
    """

    code = "gateway_error"
    status: ClassVar[int] = 500
    phase = Phase.ANSWERED
    foreign = False
    """Whether it is not in the form of a gateway of this package: said by a proxy on the way, or a classic gateway."""
    http_status: int | None = None
    """The status that it came with, on the client's side: the published gateway says by it what it says nowhere else."""

    def __init__(self, message: str, *, request_id: str | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id
        if retryable is not None:
            self.retryable = retryable

    def __str__(self) -> str:
        suffix = f" [request {self.request_id}]" if self.request_id else ""
        return f"{self.message}{suffix}"

    def to_wire(self) -> dict[str, Any]:
        """The JSON object that says this error on the wire; ``error`` is the published field, the rest is added."""
        return {"error": self.message, "code": self.code, "retryable": self.retryable, "request_id": self.request_id}

    @classmethod
    def _from_wire(cls, message: str, body: dict[str, Any]) -> GatewayError:
        return cls(message, request_id=body.get("request_id"), retryable=bool(body.get("retryable", cls.retryable)))


class InvalidRequest(GatewayError):
    """The request makes no sense; repeating it changes nothing."""

    code = "invalid_request"
    status = 400


class Unauthorized(GatewayError):
    """There is no token, or one that the gateway does not accept."""

    code = "unauthorized"
    status = 401


class Forbidden(GatewayError):
    """A path outside the roots, a write below a read-only root, or somebody who may not use the gateway."""

    code = "forbidden"
    status = 403


class NotFound(GatewayError):
    """No such job of the caller's; also the answer for somebody else's job."""

    code = "not_found"
    status = 404


class Conflict(GatewayError):
    """The state of the job or of its folder does not allow what was asked."""

    code = "conflict"
    status = 409


class FileError(GatewayError):
    """The file system refused.

    :param errno: the symbolic name of the POSIX error, such as ``ENOENT``.
    :param path: the absolute path on the cluster that it is about.
    """

    code = "file_error"
    status = 409

    def __init__(
        self,
        message: str,
        *,
        errno: str,
        path: str = "",
        request_id: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, request_id=request_id, retryable=retryable)
        self.errno = errno
        self.path = path

    @classmethod
    def from_os_error(cls, error: OSError, path: str) -> FileError:
        """Say an :class:`OSError` of the gateway's file system about ``path`` without any path of the server's own."""
        number = error.errno or errno_module.EIO
        name = errno_module.errorcode.get(number, "EIO")
        return cls(f"{os.strerror(number)}: {path}", errno=name, path=path)

    def to_wire(self) -> dict[str, Any]:
        return {**super().to_wire(), "errno": self.errno, "path": self.path}

    def to_os_error(self) -> OSError:
        """The Python exception for it; its class follows from ``errno`` (``ENOENT``: :class:`FileNotFoundError`)."""
        number = getattr(errno_module, self.errno, errno_module.EIO)
        plain = f"{os.strerror(number)}: {self.path}"
        return OSError(number, os.strerror(number) if self.message == plain else self.message, self.path)

    @classmethod
    def _from_wire(cls, message: str, body: dict[str, Any]) -> FileError:
        return cls(
            message,
            errno=str(body.get("errno", "EIO")),
            path=str(body.get("path", "")),
            request_id=body.get("request_id"),
            retryable=bool(body.get("retryable", False)),
        )


class IntegrityError(GatewayError):
    """Bytes arrived that are not the bytes that were sent; nothing was put under its final name."""

    code = "integrity"
    status = 422
    retryable = True


class TooLarge(GatewayError):
    """Over a limit that ``getInfo`` states."""

    code = "too_large"
    status = 413


class SubmissionRefused(GatewayError):
    """The scheduler refuses this job for good; its own words are the message."""

    code = "submission_refused"
    status = 422


class Busy(GatewayError):
    """Too many requests at once, or what was asked for is not there yet.

    :param retry_after: seconds.
    :param under_way: the gateway is at work on it, and will say if that fails: to be asked for again, however long it takes.
    """

    code = "busy"
    status = 429
    retryable = True

    def __init__(
        self,
        message: str,
        *,
        retry_after: float = 1.0,
        under_way: bool = False,
        request_id: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, request_id=request_id, retryable=retryable)
        self.retry_after = retry_after
        self.under_way = under_way

    def to_wire(self) -> dict[str, Any]:
        wire = {**super().to_wire(), "retry_after": round(self.retry_after, 3)}
        return {**wire, "under_way": True} if self.under_way else wire


class ServerFault(GatewayError):
    """A fault of the gateway's own; its log has the details under the request id."""

    code = "server_fault"
    status = 500


class NotSupported(GatewayError):
    """This gateway cannot do that."""

    code = "not_supported"
    status = 501


class Unavailable(GatewayError):
    """What the gateway needs (scheduler, database, identity provider, a proxy's upstream) does not answer now."""

    code = "unavailable"
    status = 503
    retryable = True


_ALL = (
    InvalidRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    Conflict,
    FileError,
    IntegrityError,
    TooLarge,
    SubmissionRefused,
    Busy,
    ServerFault,
    NotSupported,
    Unavailable,
)
_BY_CODE: dict[str, type[GatewayError]] = {cls.code: cls for cls in _ALL}
_BY_STATUS: dict[int, type[GatewayError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: InvalidRequest,
    429: Busy,
    501: NotSupported,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def all_gateway_errors() -> tuple[type[GatewayError], ...]:
    """Every error that a gateway answers with."""
    return _ALL


def from_wire(status: int, body: Any) -> GatewayError:
    """Make the error again that a gateway (or a proxy in front of it) answered.

    :param status: the HTTP status, or 0 for one failed operation inside a successful ``query``.
    :param body: the decoded JSON body, or the text of a body that is not JSON.
    """
    fields = body if isinstance(body, dict) else {}
    cls = _BY_CODE.get(str(fields.get("code"))) or _BY_STATUS.get(status, ServerFault)
    message = str(fields.get("error") or fields.get("message") or "").strip()
    if not message:
        message = f"HTTP status {status} without an explanation from the gateway"
    if cls is FileError and "errno" not in fields:
        cls = Conflict
    if not fields:
        return cls(message)
    if "retryable" not in fields:
        fields = {**fields, "retryable": cls.retryable}
    return cls._from_wire(message, fields)
