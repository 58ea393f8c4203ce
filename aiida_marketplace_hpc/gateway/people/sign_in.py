"""Signing in with a browser: at the issuer, by an authorization code with PKCE, or with a development token.

Either way the token is looked at as that of a program is, and then forgotten. What belongs to one attempt (``state``,
``nonce``, the verifier) is derived from a secret that only the browser has.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlencode

from aiida_marketplace_hpc.client.oidc import GrantRefused, OidcClient, Provider
from aiida_marketplace_hpc.errors import (
    ConfigurationError,
    ConnectionFailed,
    Forbidden,
    InvalidRequest,
    Unauthorized,
    Unavailable,
)
from aiida_marketplace_hpc.gateway.auth import Authenticator, Identity
from aiida_marketplace_hpc.gateway.auth.oidc import OidcTokens
from aiida_marketplace_hpc.gateway.config import Settings
from aiida_marketplace_hpc.gateway.people.cookies import derived, is_derived

logger = logging.getLogger(__name__)

CALLBACK = "/sign-in/callback"
_SCOPE = "openid email profile"
_FRESH = 600.0
"""Seconds for which the issuer is not asked again where its endpoints are."""


class IssuerSignIn:
    """Signing in at the issuer of the settings.

    :param authenticator: whatever looks at the tokens of programs.
    :raises ConfigurationError: the secret of the client cannot be read.
    """

    def __init__(
        self, settings: Settings, authenticator: Authenticator, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._issuer, self._authenticator, self._clock = authenticator.issuer, authenticator, clock
        self._client_id, self._secret = settings.page_client, _secret(settings)
        self._redirect_uri = settings.page_url + CALLBACK
        # An ID token is for the client that asks for it, and need not have an address.
        self._id_tokens = OidcTokens(self._issuer, [settings.page_client], email_claim="sub")
        self._lock = threading.Lock()
        self._known: tuple[float, Provider] | None = None

    def address(self, secret: str) -> str:
        """Where to send the browser that has this secret.

        :raises Unavailable: if the issuer does not answer.
        """
        endpoint = self._provider().authorization_endpoint
        if not endpoint:
            logger.error("%s names no authorization_endpoint", self._issuer)
            raise Unavailable(f"{self._issuer} does not say where people sign in: ask the operator of this gateway")
        challenge = hashlib.sha256(derived(secret, "verifier").encode()).digest()
        asked = {
            "response_type": "code",
            "client_id": self._client_id,
            "redirect_uri": self._redirect_uri,
            "scope": _SCOPE,
            "state": derived(secret, "state"),
            "nonce": derived(secret, "nonce"),
            "code_challenge": base64.urlsafe_b64encode(challenge).decode().rstrip("="),
            "code_challenge_method": "S256",
        }
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(asked)}"

    def finished(self, query: Mapping[str, str], secret: str) -> Identity:
        """Who has signed in, as the issuer sends the browser back.

        :param secret: what the browser has; empty if it has nothing.
        :raises InvalidRequest: if that browser did not ask to sign in, or something does not fit.
        :raises Forbidden: if the issuer, or the person, refused.
        :raises Unauthorized: if the token is not one for this gateway.
        :raises Unavailable: if the issuer does not answer.
        """
        again = "begin again from this gateway's first page"
        if not secret or not is_derived(query.get("state", ""), secret, "state"):
            raise InvalidRequest(f"this browser did not ask to sign in, or it took too long: {again}")
        if query.get("iss", self._issuer) != self._issuer:
            raise InvalidRequest(f"somebody other than {self._issuer} sent this browser: {again}")
        if "error" in query:
            raise Forbidden(f"{self._issuer} did not let you in ({query['error'][:100]}): {again}")
        try:
            tokens = OidcClient(self._provider(), self._client_id, self._secret).exchange_code(
                query.get("code", ""), verifier=derived(secret, "verifier"), redirect_uri=self._redirect_uri
            )
        except GrantRefused as exc:
            # Its words may be about the client's secret, which is none of the person's business.
            logger.warning("no tokens for a browser: %s", exc.message)
            raise InvalidRequest(f"{self._issuer} does not accept this code (any more): {again}") from None
        except (ConnectionFailed, ConfigurationError) as exc:
            raise self._outage(exc.message) from None
        said = self._id_tokens.identify(tokens.id_token)
        if not is_derived(str(said.claims.get("nonce", "")), secret, "nonce"):
            raise Unauthorized(f"the answer of {self._issuer} is to another question: {again}")
        if said.claims.get("azp", self._client_id) != self._client_id:
            raise Unauthorized(f"the answer of {self._issuer} is for another client: {again}")
        identity = self._authenticator.identify(tokens.access_token)
        if identity.subject != said.subject:
            raise Unauthorized(f"{self._issuer} names two people at once: {again}")
        return identity

    def _provider(self) -> Provider:
        with self._lock:
            if self._known is not None and self._clock() - self._known[0] < _FRESH:
                return self._known[1]
        try:
            provider = Provider.discover(self._issuer)
        except (ConnectionFailed, ConfigurationError) as exc:
            raise self._outage(exc.message) from None
        with self._lock:
            self._known = self._clock(), provider
        return provider

    def _outage(self, reason: str) -> Unavailable:
        logger.error("browsers cannot sign in: %s", reason)
        return Unavailable(f"{self._issuer}, where you sign in, does not answer properly: try again in a moment")


def still_holds(settings: Settings, authenticator: Authenticator, identity: Identity) -> bool:
    """Whether somebody with this identity could sign in under these settings: they may have changed since."""
    if identity.issuer != authenticator.issuer:
        return False
    return settings.auth != "dev" or identity.subject in settings.dev_token


def _secret(settings: Settings) -> str:
    path = settings.page_client_secret_file
    if path is None:
        return settings.page_client_secret.get_secret_value()
    try:
        if path.stat().st_mode & 0o007:
            raise ConfigurationError(f"page_client_secret_file {path} can be read by everybody: chmod 600 {path}")
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no text"
        raise ConfigurationError(f"page_client_secret_file {path} cannot be read: {reason}") from exc
