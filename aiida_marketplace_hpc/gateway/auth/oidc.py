"""Signed access tokens of an OpenID Connect provider, checked here: nobody is asked about a single token."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jwt

from aiida_marketplace_hpc.errors import ConfigurationError, Unauthorized
from aiida_marketplace_hpc.gateway.auth import Identity, check_form
from aiida_marketplace_hpc.gateway.auth.claims import identity_from
from aiida_marketplace_hpc.gateway.auth.keys import Keys
from aiida_marketplace_hpc.gateway.auth.provider import checked_url

LEEWAY = 30.0
"""Seconds by which the clocks of issuer and gateway may differ."""
_CLAIMS = {f"verify_{claim}": True for claim in ("aud", "exp", "iat", "iss", "jti", "nbf", "sub")}


class OidcTokens:
    """Access tokens that are JWTs.

    Of a token are checked: its signature, by a key that the issuer publishes and an asymmetric algorithm that fits it; issuer,
    audience, expiry and beginning; and that it names a subject and an e-mail address. The issuer is asked for its keys now and
    then, and when a token names a new one, at most every ten seconds. While it does not answer, the keys that are known hold.

    :param issuer: as tokens name it, to the letter.
    :param audience: what tokens for this gateway name as their audience, one of them.
    :param email_claim: where the e-mail address stands.
    :param clock: the seconds of a monotonic clock.
    """

    method = "oidc"
    refresh_margin = 30.0

    def __init__(
        self,
        issuer: str,
        audience: Collection[str],
        *,
        email_claim: str = "email",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not audience or not all(audience):
            raise ConfigurationError(
                "whoever has a token of the issuer for anything else could use it here: give --audience, "
                "what tokens for this gateway have as their aud"
            )
        self.issuer = issuer
        self._audience = list(audience)
        self._email_claim = email_claim
        self._clock = clock
        self._keys = Keys(checked_url(issuer, "the issuer"), issuer, clock=clock)

    def identify(self, token: str) -> Identity:
        check_form(token)
        try:
            header, issued_at = self._look(token)
            key = self._keys.find(header.get("kid", ""), self._clock() - (time.time() - issued_at) + LEEWAY)
            if key is None:
                raise Unauthorized(f"this token is not signed by {self.issuer}: log in again")
            claims = self._checked(token, {}, key=key.public, algorithms=key.algorithms)["payload"]
        except jwt.PyJWTError as exc:
            raise Unauthorized(_refusal(exc, self.issuer)) from None
        return identity_from(
            self.issuer, claims, email_claim=self._email_claim, expires_at=float(claims["exp"]) + LEEWAY
        )

    def _look(self, token: str) -> tuple[dict[str, Any], float]:
        """The header of a token and when it says that it was issued: nothing of it is true yet.

        Whatever it says wrongly is wrong whoever signed it, so that nobody is asked for the key of such a token.

        :raises jwt.InvalidTokenError: if it is no token, or not one for this gateway.
        """
        try:
            whole = self._checked(token, {"verify_signature": False, **_CLAIMS})
            return whole["header"], float(whole["payload"].get("iat", 0))
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:
            raise jwt.DecodeError(type(exc).__name__) from None

    def _checked(
        self, token: str, options: dict[str, bool], *, key: Any = "", algorithms: Sequence[str] = ()
    ) -> dict[str, Any]:
        return jwt.decode_complete(
            token,
            key,
            algorithms=list(algorithms),
            issuer=self.issuer,
            audience=self._audience,
            leeway=LEEWAY,
            options={"require": ["exp", "iss", "aud", "sub"], **options},  # type: ignore[arg-type]
        )


def _refusal(error: jwt.PyJWTError, issuer: str) -> str:
    """What was wrong with a token, without a word of what is in it."""
    if isinstance(error, jwt.ExpiredSignatureError):
        return "the token has expired: get a new one"
    if isinstance(error, jwt.ImmatureSignatureError):
        return "the token is not valid yet: compare the clocks of this gateway and of who issued it"
    if isinstance(error, jwt.InvalidIssuerError):
        return f"the token is not one of {issuer}: log in there"
    if isinstance(error, jwt.InvalidAudienceError):
        return "the token is for another service: ask for one with this gateway's audience"
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"the token says nothing about {error.claim}, which this gateway needs"
    return f"this token is not signed by {issuer}: log in again"
