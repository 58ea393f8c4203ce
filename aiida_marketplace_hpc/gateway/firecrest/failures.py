"""What a failed call to FirecREST is to whoever asked the gateway for files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aiida_marketplace_hpc.errors import (
    Busy,
    FileError,
    GatewayError,
    InvalidRequest,
    NotSupported,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from aiida_marketplace_hpc.gateway.firecrest.client import CallFailed, TokenRefused, UnusableName

_WORDS = (
    ("No such file or directory", "ENOENT"),
    ("Permission denied", "EACCES"),
    ("Operation not permitted", "EPERM"),
    ("File exists", "EEXIST"),
    ("Not a directory", "ENOTDIR"),
    ("Is a directory", "EISDIR"),
    ("Directory not empty", "ENOTEMPTY"),
    ("No space left on device", "ENOSPC"),
    ("Disk quota exceeded", "EDQUOT"),
    ("File name too long", "ENAMETOOLONG"),
    ("Too many levels of symbolic links", "ELOOP"),
    ("Read-only file system", "EROFS"),
)
"""The commands' own words, in English: FirecREST passes them on, under statuses that do not tell them apart."""


@contextmanager
def explained(path: str, *, repeatable: bool = True) -> Iterator[None]:
    """Turn a failed call into the error for the caller, about the path that the caller named.

    :param repeatable: doing it twice is the same as doing it once.
    """
    try:
        yield
    except UnusableName as exc:
        raise InvalidRequest(str(exc)) from exc
    except CallFailed as exc:
        raise error_of(exc, path, repeatable=repeatable) from exc


def error_of(failure: CallFailed, path: str, *, repeatable: bool = True) -> GatewayError:
    """The error for the caller."""
    if isinstance(failure, TokenRefused):
        return Unauthorized(failure.message) if failure.status == 401 else Unavailable(failure.message)
    if failure.own and failure.status in (400, 403, 404, 500):
        for words, errno in _WORDS:
            if words in failure.message:
                return FileError(f"{words}: {path}", errno=errno, path=path)
    if failure.status == 429:
        return Busy(failure.message, retry_after=failure.retry_after or 1.0)
    if failure.status == 501 and failure.own:
        return NotSupported(f"{path}: {failure.message}")
    if failure.status == 413:
        return TooLarge(f"{path}: {failure.message}")
    again = repeatable or not failure.carried_out
    doubt = "" if again else "; whether it was carried out is not known, see how things are before it is done again"
    return Unavailable(f"{path}: {failure.message}{doubt}", retryable=again)
