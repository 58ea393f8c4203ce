"""Which versions of client and gateway work together, and what to say where they do not.

A client and a gateway that are one version apart do: fields, operations and capabilities are only added, each leaves alone
what it does not know, and does without what the other has not. Where that ends, each side says so, and which one to upgrade.
"""

from __future__ import annotations

import re
from typing import Any

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.errors import InvalidRequest, VersionMismatch
from aiida_marketplace_hpc.protocol import API_VERSION, OLDEST_API, OLDEST_CLIENT

USER_AGENT = f"aiida-marketplace-hpc/{__version__}"
"""How this package's client names itself."""
_OURS = re.compile(r"aiida-marketplace-hpc/(\S+)")


def check_gateway(info: dict[str, Any], url: str) -> None:
    """Make sure that a client of this version can work with a gateway, by its answer to ``getInfo``.

    :raises VersionMismatch: if not, with what to upgrade.
    """
    api, oldest = str(info.get("api_version", "")), str(info.get("oldest_client", "0"))
    named = f"the gateway at {url} (version {info.get('version', 'unknown')})"
    if _numbers(__version__) < _numbers(oldest):
        raise VersionMismatch(
            f"{named} serves clients from version {oldest} on, this is {__version__}: upgrade aiida-marketplace-hpc here"
        )
    if not api:
        return
    if _numbers(api)[:1] > _numbers(API_VERSION)[:1]:
        raise VersionMismatch(
            f"{named} speaks version {api} of the protocol, this client {API_VERSION}: upgrade aiida-marketplace-hpc here"
        )
    if _numbers(api) < _numbers(OLDEST_API):
        raise VersionMismatch(
            f"{named} speaks version {api} of the protocol, this client needs {OLDEST_API}: ask its operator to upgrade it, "
            "or use an older version of aiida-marketplace-hpc here"
        )


def check_client(user_agent: str | None) -> None:
    """Make sure that a gateway of this version can serve a client, by how it names itself; any other client may try.

    :raises InvalidRequest: if it is this package's, and too old.
    """
    match = _OURS.match(user_agent or "")
    if match is not None and _numbers(match[1]) < _numbers(OLDEST_CLIENT):
        raise InvalidRequest(
            f"this gateway (version {__version__}) serves clients from version {OLDEST_CLIENT} on, yours is {match[1][:20]}: "
            "upgrade aiida-marketplace-hpc on your side"
        )


def _numbers(version: str) -> list[int]:
    """The release of a version, to be compared; what follows it (``rc1``, ``.dev0``) counts for nothing."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else [0]
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return numbers
