"""The program's own log: for people or as one JSON object a line, with whose request and which job a line is about.

What a request or a piece of background work is about is kept in a context variable, so that nobody hands it from function to
function. It follows a request into the threads of its handler; whoever starts another thread copies the context
(:func:`contextvars.copy_context`).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from aiida_marketplace_hpc.gateway.ledger import Ledger
    from aiida_marketplace_hpc.gateway.schema import Job

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

REQUEST, USER, JOB = "request_id", "user", "jobid"
LINE = "line"
"""The key in a record's ``extra`` for a whole JSON object that is the line, such as one of the access log."""
_SHOWN = {REQUEST: "request", USER: "user", JOB: "job"}
_PACKAGE = "aiida_marketplace_hpc"
_SECRETS = (
    (re.compile(r"\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]+", re.IGNORECASE), r"\1\2..."),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"), "..."),  # A JWT begins with {" in base64.
    (re.compile(r"(://[^/\s:@]*:)[^/\s@]+@"), r"\1...@"),
    (re.compile(r"\b((?:access_|refresh_|id_)?token|client_secret|password)=[^&\s\"']+", re.IGNORECASE), r"\1=..."),
)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_context: ContextVar[dict[str, str]] = ContextVar("about", default={})  # noqa: B039 - never changed, only replaced.


def request_id(asked: str) -> str:
    """The id that a request is given: the one that its client asked for, or a new one where that is none."""
    return asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex


def note(**fields: str | None) -> None:
    """From here on in this task or thread, log lines are about these ``request_id``, ``user``, ``jobid``."""
    _context.set({**_context.get(), **{name: value for name, value in fields.items() if value}})


@contextmanager
def about(**fields: str | None) -> Iterator[None]:
    """In this block, log lines are about these; a field that is ``None`` or empty is known to be nobody's."""
    known = {**_context.get(), **fields}
    token = _context.set({name: value for name, value in known.items() if value})
    try:
        yield
    finally:
        _context.reset(token)


@contextmanager
def about_job(ledger: Ledger, job: Job) -> Iterator[None]:
    """In this block, log lines are about a job: its owner and the request that launched it, whoever made us look at it."""
    with about(request_id=job.request_id, user=ledger.email_of(job.user_id), jobid=job.id):
        yield


class _WithLedger(Protocol):
    _ledger: Ledger


SelfT = TypeVar("SelfT", bound=_WithLedger)
ResultT = TypeVar("ResultT")
P = ParamSpec("P")


def tells_of_job(
    method: Callable[Concatenate[SelfT, Job, P], ResultT],
) -> Callable[Concatenate[SelfT, Job, P], ResultT]:
    """:func:`about_job` around a method whose first argument is a job."""

    @wraps(method)
    def telling(self: SelfT, job: Job, /, *arguments: P.args, **options: P.kwargs) -> ResultT:
        with about_job(self._ledger, job):
            return method(self, job, *arguments, **options)

    return telling


def current(field: str) -> str | None:
    """What the request or the work that is under way here is about."""
    return _context.get().get(field)


def set_up(form: LogFormat = "text", level: LogLevel = "info", secrets: Iterable[str] = ()) -> None:
    """Let this process write its log to standard error.

    :param level: of this package's own lines; other packages say nothing below ``info``, as what they say for their own
        developers may be anything.
    :param secrets: texts that are never written, beside what looks like a token or a password.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(secrets) if form == "json" else _Text(secrets))
    number = logging.getLevelName(level.upper())
    logging.basicConfig(handlers=[handler], level=max(number, logging.INFO), force=True)
    logging.getLogger(_PACKAGE).setLevel(number)
    logging.getLogger("alembic").setLevel(max(number, logging.WARNING))
    # It would log each address that is called, and those of FirecREST's store open it for whoever has them.
    logging.getLogger("httpx").setLevel(max(number, logging.WARNING))
    logging.captureWarnings(True)
    threading.excepthook = _thread_failed


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
        name = failure.thread.name if failure.thread else "?"
        error = (failure.exc_type, failure.exc_value, failure.exc_traceback)
        logging.getLogger(__name__).error("the thread %s has ended with an error", name, exc_info=error)


class _Formatter(logging.Formatter):
    """Formats in the thread that logs, where the context is."""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        # The longest first: one may be the beginning of another.
        self._secrets = sorted((one for one in secrets if one), key=len, reverse=True)

    def said(self, record: logging.LogRecord) -> tuple[str, str]:
        """The message, and what there is of an exception; neither has a secret in it."""
        trace = "" if record.exc_info is None else self.formatException(record.exc_info)
        return self._without_secrets(record.getMessage()), self._without_secrets(trace)

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "...")
        for pattern, replacement in _SECRETS:
            text = pattern.sub(replacement, text)
        return text


class _Text(_Formatter):
    """``TIME LEVEL LOGGER: MESSAGE [request … user … job …]``; a message is one line, whatever file names are in it."""

    def format(self, record: logging.LogRecord) -> str:
        message, trace = self.said(record)
        fields = {} if hasattr(record, LINE) else _context.get()
        known = " ".join(f"{shown} {fields[name]}" for name, shown in _SHOWN.items() if name in fields)
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {_one_line(message)}"
        line += f" [{_one_line(known)}]" if known else ""
        return f"{line}\n{trace}" if trace else line


class _Json(_Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, what it is about, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if isinstance(line := getattr(record, LINE, None), dict):
            return json.dumps({**document, **line})
        message, trace = self.said(record)
        document |= {"message": message, **_context.get()}
        if trace:
            document["exception"] = trace
        return json.dumps(document)


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")
