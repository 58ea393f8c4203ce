"""Asking an identity provider over HTTP: bounded in time and size, and an answer that makes no sense is none."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import requests

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.addresses import is_loopback
from aiida_marketplace_hpc.client.connection import Bearer
from aiida_marketplace_hpc.errors import ConfigurationError, Unavailable

logger = logging.getLogger(__name__)

_TIMEOUT = (3.0, 5.0)
"""Seconds: to connect, and without a byte."""
_PATIENCE = 8.0
"""Seconds for an answer."""
_LARGEST = 1024 * 1024
"""Bytes of an answer."""


def checked_url(url: str, what: str) -> str:
    """Return an address without the slash at its end.

    :param what: the setting that names it.
    :raises ConfigurationError: if tokens would travel to it in the clear.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ConfigurationError(f"{what} is a URL such as https://login.example.org/realms/lab, not {url!r}")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ConfigurationError(f"{what} {url} is not encrypted: who is in between could read tokens; use https")
    return url.rstrip("/")


def ask(url: str, token: str | None = None) -> tuple[int, Mapping[str, Any]]:
    """Get a JSON object. May be repeated.

    :returns: the status, which is 200 or one of 400, 401 and 403, and the object, which is empty unless the status is 200.
    :raises Unavailable: if there is no such answer, for whatever reason; the log says which.
    """
    host = urlsplit(url).hostname
    headers = {"Accept": "application/json", "User-Agent": f"aiida-marketplace-hpc/{__version__}"}
    until = time.monotonic() + _PATIENCE
    content = bytearray()
    try:
        with requests.get(
            url, headers=headers, auth=Bearer(token), timeout=_TIMEOUT, allow_redirects=False, stream=True
        ) as answer:
            if answer.status_code in (400, 401, 403):
                return answer.status_code, {}
            if answer.status_code != 200:
                raise _outage(url, f"status {answer.status_code}")
            for chunk in answer.iter_content(64 * 1024):
                content += chunk
                if len(content) > _LARGEST or time.monotonic() > until:
                    raise _outage(url, "the answer does not end")
        said = json.loads(content)
    except requests.RequestException as exc:
        raise _outage(url, type(exc).__name__) from None  # Its text may have what was sent.
    except ValueError:
        raise _outage(url, "the answer is not JSON") from None
    if not isinstance(said, dict):
        raise _outage(url, f"the answer of {host} is not an object")
    return 200, said


def _outage(url: str, reason: str) -> Unavailable:
    logger.warning("no answer from %s: %s", url, reason)
    return Unavailable(f"the identity provider {urlsplit(url).hostname} does not answer: try again in a moment")
