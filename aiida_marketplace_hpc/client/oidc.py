"""An OpenID Connect provider, as a client uses it: discovery, device flow, client credentials, authorization code, refresh.

Only requests and answers; what is kept, and when a token is renewed, is the business of
:mod:`~aiida_marketplace_hpc.client.login`.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote_plus, urlsplit

import requests
import urllib3
from requests.auth import AuthBase

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.addresses import is_loopback
from aiida_marketplace_hpc.claims import claims_of, moment
from aiida_marketplace_hpc.client.connection import Exchange, WatchedAdapter
from aiida_marketplace_hpc.client.failure import connection_error
from aiida_marketplace_hpc.errors import (
    ConfigurationError,
    ConnectionFailed,
    MarketplaceHpcError,
    ProviderUnavailable,
    TokenUnavailable,
)

Json = dict[str, Any]

MARKETPLACE = "https://materials-marketplace.eu"
"""The MarketPlace, unless ``MP_HOST`` names another one."""
_REALM = "auth/realms/marketplace"

PATIENCE = 30.0
"""Seconds that one answer of a provider may take."""
_CONNECT = 5.0
_READ = 15.0
_MAX_ANSWER = 1024 * 1024
_MAX_REASON = 200  # Characters; it is kept, and shown wherever the login is missed.
_DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_UNSTATED_LIFETIME = 60.0
"""Seconds for which a token counts as good whose provider does not say how long it lives."""


class GrantRefused(TokenUnavailable):
    """The provider answered: no.

    :param error: the code that OAuth has for the reason, such as ``invalid_grant``.
    """

    def __init__(self, message: str, *, error: str) -> None:
        super().__init__(message)
        self.error = error


def marketplace_issuer(host: str) -> str:
    """The issuer of the MarketPlace's realm.

    :param host: the MarketPlace's address; empty: the public one.
    """
    return f"{(host or MARKETPLACE).rstrip('/')}/{_REALM}"


@dataclass(frozen=True)
class Provider:
    """Where a provider is asked for what, as its well-known document says.

    :param basic: a client's secret goes into the ``Authorization`` header, not into the form.
    """

    issuer: str
    token_endpoint: str
    device_endpoint: str = ""
    revocation_endpoint: str = ""
    end_session_endpoint: str = ""
    basic: bool = True
    scopes: tuple[str, ...] = ()
    authorization_endpoint: str = ""

    @classmethod
    def discover(cls, issuer: str) -> Provider:
        """Read the provider's well-known document. May be repeated.

        :raises ConfigurationError: there is no provider of that name.
        :raises ProviderUnavailable: it does not answer now.
        """
        issuer = issuer.rstrip("/")
        _checked(issuer)
        status, document = _ask("GET", f"{issuer}/.well-known/openid-configuration")
        if status != 200 or not isinstance(document.get("token_endpoint"), str):
            raise ConfigurationError(
                f"{issuer} is no OpenID Connect provider (status {status}): the gateway's operator knows the right issuer, "
                "which --issuer names"
            )
        if str(document.get("issuer", "")).rstrip("/") != issuer:
            raise ConfigurationError(f"the provider at {issuer} calls itself {document.get('issuer')}: use that name")
        methods = document.get("token_endpoint_auth_methods_supported") or ["client_secret_basic"]
        provider = cls(
            issuer,
            document["token_endpoint"],
            str(document.get("device_authorization_endpoint") or ""),
            str(document.get("revocation_endpoint") or ""),
            str(document.get("end_session_endpoint") or ""),
            "client_secret_basic" in methods,
            tuple(str(scope) for scope in document.get("scopes_supported") or ()),
            str(document.get("authorization_endpoint") or ""),
        )
        for endpoint in (
            provider.token_endpoint,
            provider.device_endpoint,
            provider.revocation_endpoint,
            provider.authorization_endpoint,
        ):
            if endpoint:
                _checked(endpoint)
        return provider


@dataclass(frozen=True)
class Tokens:
    """What a provider has granted.

    :param received: when they were asked for, by this machine's clock, in seconds since the epoch.
    :param lifetime: seconds from then for which the access token is good.
    :param refresh_token: with which the next one is asked for; empty: there is none.
    :param id_token: who has logged in, signed by the provider for this client; empty: it does not say.
    """

    access_token: str = field(repr=False)
    received: float
    lifetime: float
    refresh_token: str = field(default="", repr=False)
    id_token: str = field(default="", repr=False)


@dataclass(frozen=True)
class DeviceCode:
    """What a person has to do, and what is asked for meanwhile.

    :param uri: the page to open, where ``code`` is to be entered.
    :param complete_uri: the same with the code in it; may be empty.
    :param interval: seconds between two questions.
    :param lifetime: seconds that the person has.
    """

    uri: str
    complete_uri: str
    code: str
    device_code: str = field(repr=False)
    interval: float
    lifetime: float


@dataclass(frozen=True)
class OidcClient:
    """A client of a provider: a program that a person trusts, or a service with a secret of its own.

    :param clock: seconds since the epoch.
    """

    provider: Provider
    client_id: str
    secret: str = field(default="", repr=False)
    clock: Callable[[], float] = time.time

    def start_device_flow(self, scope: str) -> DeviceCode:
        """Ask for a code that a person can approve elsewhere. May be repeated.

        :raises GrantRefused: the provider does not allow it to this client.
        """
        if not self.provider.device_endpoint:
            raise ConfigurationError(
                f"{self.provider.issuer} offers no login by device code: "
                "ask its operator, or use --client-credentials with a client of your own"
            )
        document = self._granted(self.provider.device_endpoint, {"scope": scope})
        try:
            return DeviceCode(
                str(document["verification_uri"]),
                str(document.get("verification_uri_complete") or ""),
                str(document["user_code"]),
                str(document["device_code"]),
                float(document.get("interval", 5)),
                float(document.get("expires_in", 600)),
            )
        except (KeyError, TypeError, ValueError):
            raise ProviderUnavailable(f"{self.provider.issuer} gave no device code: try again later") from None

    def await_approval(
        self,
        device: DeviceCode,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> Tokens:
        """Wait until the person has approved, and return the tokens.

        :raises GrantRefused: the person refused, or took too long.
        """
        until, interval = clock() + device.lifetime, device.interval
        while clock() < until:
            sleep(interval)
            try:
                return self._tokens({"grant_type": _DEVICE_GRANT, "device_code": device.device_code})
            except GrantRefused as exc:
                if exc.error == "slow_down":
                    interval += 5
                elif exc.error == "access_denied":
                    raise GrantRefused("the login was refused on the provider's page", error=exc.error) from None
                elif exc.error == "expired_token":
                    break
                elif exc.error != "authorization_pending":
                    raise
            except ProviderUnavailable:
                interval = max(2 * interval, 1.0)
        raise GrantRefused("nobody approved the login in time: start again", error="expired_token")

    def log_in_as_service(self, scope: str) -> Tokens:
        """Ask for tokens with the client's own secret. May be repeated."""
        return self._tokens({"grant_type": "client_credentials", **({"scope": scope} if scope else {})})

    def exchange_code(self, code: str, *, verifier: str, redirect_uri: str) -> Tokens:
        """Ask for tokens with the code that a browser has brought. A code is good once.

        :param verifier: what the challenge in the browser's request was made of (RFC 7636).
        :param redirect_uri: the one of the browser's request.
        :raises GrantRefused: with ``invalid_grant``: the code is used up, too old, or for somebody else.
        :raises ProviderUnavailable: there was no answer.
        """
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "code_verifier": verifier,
            "redirect_uri": redirect_uri,
        }
        return self._tokens(form)

    def refresh(self, refresh_token: str) -> Tokens:
        """Ask for new tokens. Must not be repeated with the same ``refresh_token`` once it was answered.

        :raises GrantRefused: with ``invalid_grant``: the login is over.
        :raises ProviderUnavailable: there was no answer.
        """
        tokens = self._tokens({"grant_type": "refresh_token", "refresh_token": refresh_token})
        return tokens if tokens.refresh_token else replace(tokens, refresh_token=refresh_token)

    def revoke(self, refresh_token: str) -> bool:
        """Let the provider forget a login. May be repeated; whether the provider could do so."""
        if self.provider.revocation_endpoint:
            form = {"token": refresh_token, "token_type_hint": "refresh_token"}
            status, _ = self._ask(self.provider.revocation_endpoint, form)
        elif self.provider.end_session_endpoint:
            status, _ = self._ask(self.provider.end_session_endpoint, {"refresh_token": refresh_token})
        else:
            return False
        return 200 <= status < 300

    def _tokens(self, form: Mapping[str, str]) -> Tokens:
        received = self.clock()
        document = self._granted(self.provider.token_endpoint, form)
        access, refresh = document.get("access_token"), document.get("refresh_token")
        if not isinstance(access, str) or not access:
            raise ProviderUnavailable(f"{self.provider.issuer} granted something without a token: try again later")
        identity = document.get("id_token")
        return Tokens(
            access,
            received,
            _lifetime(document, access),
            refresh if isinstance(refresh, str) else "",
            identity if isinstance(identity, str) else "",
        )

    def _granted(self, endpoint: str, form: Mapping[str, str]) -> Json:
        status, document = self._ask(endpoint, form)
        if status == 200:
            return document
        error = str(document.get("error") or f"status {status}")
        said = f"{error}: {document['error_description']}" if document.get("error_description") else error
        raise GrantRefused(f"{self.provider.issuer} refuses ({said[:_MAX_REASON]})", error=error)

    def _ask(self, endpoint: str, form: Mapping[str, str]) -> tuple[int, Json]:
        if self.secret and self.provider.basic:
            return _ask("POST", endpoint, form, _Basic(self.client_id, self.secret))
        named = {"client_id": self.client_id, **form}
        return _ask("POST", endpoint, {**named, "client_secret": self.secret} if self.secret else named)


class _Basic(AuthBase):
    # Also for requests without a secret: else requests would send the password of a ~/.netrc.
    def __init__(self, client_id: str = "", secret: str = "") -> None:
        self._pair = f"{quote_plus(client_id)}:{quote_plus(secret)}" if secret else ""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._pair:
            request.headers["Authorization"] = f"Basic {base64.b64encode(self._pair.encode()).decode()}"
        return request


def _ask(
    method: str, url: str, form: Mapping[str, str] | None = None, auth: AuthBase | None = None
) -> tuple[int, Json]:
    """Return status and document. No redirect is followed: secrets would go to wherever it points.

    :raises ProviderUnavailable: there is no answer, or one that says that there will be one later.
    """
    host = urlsplit(url).netloc
    exchange = Exchange(time.monotonic, _READ, time.monotonic() + PATIENCE)
    with exchange.under_way(), requests.Session() as session:
        session.mount("http://", WatchedAdapter())
        session.mount("https://", WatchedAdapter())
        try:
            response = session.request(
                method,
                url,
                data=form,
                headers={"Accept": "application/json", "User-Agent": f"aiida-marketplace-hpc/{__version__}"},
                auth=auth or _Basic(),
                timeout=(_CONNECT, _READ),
                allow_redirects=False,
                stream=True,
            )
            content = response.raw.read(_MAX_ANSWER, decode_content=True)
        except (OSError, urllib3.exceptions.HTTPError) as exc:
            raise _said_of_the_provider(connection_error(exc, exchange, host)) from None
    status = response.status_code
    if status >= 500 or status in (408, 425, 429):
        raise ProviderUnavailable(f"the identity provider {host} answers with status {status}: try again later")
    try:
        document = json.loads(content) if content else {}
    except ValueError:
        document = None
    if not isinstance(document, dict):
        if status == 200:
            raise ProviderUnavailable(
                f"the identity provider {host} gives an answer that makes no sense: try again later"
            )
        document = {}
    return status, document


def _said_of_the_provider(error: MarketplaceHpcError) -> MarketplaceHpcError:
    text = f"the identity provider gives no answer: {error.message}"
    return ProviderUnavailable(text) if isinstance(error, ConnectionFailed) else ConfigurationError(text)


def _lifetime(document: Json, token: str) -> float:
    try:
        stated = float(document["expires_in"])
    except (KeyError, TypeError, ValueError):
        stated = _difference(claims_of(token))
    return stated if stated > 0 else _UNSTATED_LIFETIME


def _difference(claims: Json) -> float:
    # Both are of the provider's clock, so that it does not matter what ours says.
    begin, end = moment(claims, "iat"), moment(claims, "exp")
    return _UNSTATED_LIFETIME if begin is None or end is None else end - begin


def _checked(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        return
    raise ConfigurationError(
        f"the address of an identity provider begins with https://, not {url!r}: secrets travel to it"
    )
