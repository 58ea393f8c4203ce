"""The two ways to a gateway, as pure functions from a capability and its parameters to an HTTP request.

*Directly*, a capability is its method and path below the gateway's address. *Through the MarketPlace's proxy* it is one
address per capability, to which path and query parameters all travel as query parameters.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit

from aiida_marketplace_hpc.errors import ConfigurationError, InvalidRequest, NotSupported
from aiida_marketplace_hpc.protocol import BY_NAME, Capability

Value = str | int | bool | None
"""A parameter's value; ``None`` leaves it out."""

_APP_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_APPLICATION = Capability(
    "application", "GET", "/api/applications/{app_id}", "What the platform knows of the app", registered=False
)
"""Asked of the platform and not of a gateway, and so not in the table."""


@dataclass(frozen=True)
class Target:
    """Where a request goes.

    :param url: without the query.
    :param parameters: the query parameters, decoded; bytes that are not UTF-8 are surrogate escapes.
    :param given: all parameters, those of the path included.
    """

    capability: Capability
    method: str
    url: str
    parameters: tuple[tuple[str, str], ...] = ()
    given: tuple[tuple[str, str], ...] = ()

    @property
    def full_url(self) -> str:
        """The address with the encoded query."""
        if not self.parameters:
            return self.url
        # Encoded here and not by requests, which refuses file names that are not UTF-8.
        return f"{self.url}?{urlencode(self.parameters, quote_via=quote, errors='surrogateescape')}"

    @property
    def has_additions(self) -> bool:
        """Whether it asks for something that the published gateway does not have."""
        row = self.capability
        return not row.published or any(not row.parameter(name).published for name, _ in self.given)

    @property
    def host(self) -> str:
        """The host and port, for messages."""
        return urlsplit(self.url).netloc


class Route(abc.ABC):
    """A way to a gateway."""

    url: str
    """The address, without a trailing slash."""

    @abc.abstractmethod
    def target(self, capability: str, parameters: Mapping[str, Value] | None = None) -> Target:
        """Say where the request for a capability goes.

        :param parameters: by the names of the capability table; those that are ``None`` are left out.
        :raises NotSupported: this route does not offer the capability.
        :raises InvalidRequest: a required parameter is missing, or cannot stand in a path.
        :raises KeyError: there is no such capability or parameter: a fault of the caller's.
        """

    @abc.abstractmethod
    def offers(self, capability: str) -> bool:
        """Whether the capability can be asked for on this route."""


@dataclass(frozen=True)
class DirectRoute(Route):
    """Straight to the gateway.

    :param url: the gateway's address, such as ``https://hpc.example.org``.
    :raises ConfigurationError: it is not an address that a gateway can have.
    """

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _address(self.url))

    def target(self, capability: str, parameters: Mapping[str, Value] | None = None) -> Target:
        row = BY_NAME[capability]
        path, query = row.path, []
        given = tuple(_texts(row, parameters or {}))
        for name, text in given:
            if row.parameter(name).where == "path":
                # A dot segment would be folded away on the way and ask for something else.
                if text in ("", ".", ".."):
                    raise InvalidRequest(f"{text!r} cannot be a {name}")
                path = path.replace(f"{{{name}}}", quote(text, safe="", errors="surrogateescape"))
            else:
                query.append((name, text))
        return Target(row, row.method, self.url + path, tuple(query), given)

    def offers(self, capability: str) -> bool:
        return capability in BY_NAME


@dataclass(frozen=True)
class ProxyRoute(Route):
    """Through the MarketPlace's proxy.

    :param url: the platform's address.
    :param app_id: the id under which the gateway is registered on the platform.
    :raises ConfigurationError: one of them makes no sense.
    """

    url: str
    app_id: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _address(self.url))
        if not _APP_ID.fullmatch(self.app_id):
            raise ConfigurationError("the app_id must be the id of a MarketPlace app, such as the platform shows it")

    def target(self, capability: str, parameters: Mapping[str, Value] | None = None) -> Target:
        row = BY_NAME[capability]
        if not row.registered:
            raise NotSupported(f"{capability} is not offered through the MarketPlace: ask the gateway directly for it")
        query = tuple(_texts(row, parameters or {}))
        return Target(row, row.method, f"{self.url}/api/applications/proxy/{self.app_id}/{row.name}", query, query)

    def offers(self, capability: str) -> bool:
        return capability in BY_NAME and BY_NAME[capability].registered

    def application(self) -> Target:
        """Say where the platform is asked for the app itself."""
        return Target(_APPLICATION, _APPLICATION.method, f"{self.url}/api/applications/{self.app_id}")


def _texts(capability: Capability, parameters: Mapping[str, Value]) -> list[tuple[str, str]]:
    given = {name: value for name, value in parameters.items() if value is not None}
    for parameter in capability.parameters:
        if parameter.required and parameter.name not in given:
            raise InvalidRequest(f"{capability.name} needs {parameter.name}")
    return [(capability.parameter(name).name, _text(value)) for name, value in given.items()]


def _text(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _address(url: str) -> str:
    """Check a gateway's or platform's address and take trailing slashes off."""
    if not url:
        raise ConfigurationError("no url: give the gateway's address, or set MP_HOST")
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        raise ConfigurationError("the url is malformed: it must look like https://hpc.example.org") from exc
    # Not repeated in the message: it may hold a password.
    if "@" in parts.netloc:
        raise ConfigurationError(
            "the url must not contain a user or password: the token source is the place for secrets"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigurationError(f"the url {url!r} must start with https:// (or http://) and a host")
    if parts.query or parts.fragment or any(ord(character) <= 32 for character in parts.netloc + parts.path):
        raise ConfigurationError(
            f"the url {url!r} must be an address and nothing else, such as https://hpc.example.org"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
