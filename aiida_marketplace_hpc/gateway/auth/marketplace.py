"""Asking the platform who somebody is, as the published gateway does: once in a while, not at every request."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiida_marketplace_hpc.claims import claims_of, moment
from aiida_marketplace_hpc.errors import ConfigurationError, Unauthorized, Unavailable
from aiida_marketplace_hpc.gateway.auth import Identity, check_form, token_key
from aiida_marketplace_hpc.gateway.auth.answers import Answers, Asking
from aiida_marketplace_hpc.gateway.auth.claims import identity_from
from aiida_marketplace_hpc.gateway.auth.provider import ask, checked_url

FRESH = 60.0
"""Seconds for which an identity is not asked for again."""
GRACE = 600.0
"""Seconds for which an identity holds while the platform does not answer."""
REFUSED = 10.0
"""Seconds for which a refusal holds."""
DOWN = 5.0
"""Seconds for which a platform that did not answer is not asked about anybody."""
_SKEW = 30.0
"""Seconds after its end in which the platform is asked about a token all the same: its clock counts."""
_SIZE = 10_000
_AT_ONCE = 16


def default_issuer() -> str:
    """The realm of the MarketPlace that the environment names.

    :raises ConfigurationError: if it names none.
    """
    host = os.environ.get("MP_HOST_URL") or os.environ.get("MP_HOST")
    if not host:
        raise ConfigurationError(
            "which MarketPlace? Set MP_HOST to its address, such as https://materials-marketplace.eu, "
            "or give --issuer, the address of its realm"
        )
    host = host if "://" in host else f"https://{host}"
    return f"{host.rstrip('/')}/auth/realms/marketplace"


@dataclass(frozen=True)
class _Outage:
    message: str


@dataclass(frozen=True)
class _Refusal:
    message: str


class MarketPlaceTokens:
    """Access tokens of the MarketPlace, or of another realm of Keycloak.

    Who a token belongs to is kept for a minute, never beyond the end of the token, and under a digest of the token. While the
    platform does not answer, whoever it knew in the last ten minutes goes on working. That it does not answer is never a
    refusal.

    :param issuer: the realm's address.
    :param clock: the seconds of a monotonic clock.
    """

    method = "marketplace"
    refresh_margin = 30.0

    def __init__(self, issuer: str, *, email_claim: str = "email", clock: Callable[[], float] = time.monotonic) -> None:
        self.issuer = checked_url(issuer, "the issuer")
        self._userinfo = f"{self.issuer}/protocol/openid-connect/userinfo"
        self._email_claim = email_claim
        self._clock = clock
        self._known: Answers[Identity] = Answers(_SIZE, clock)
        # Apart, so that no number of wrong tokens drives out a right one.
        self._refused: Answers[_Refusal] = Answers(_SIZE, clock)
        self._asking: Asking[Identity | _Refusal | _Outage] = Asking(_AT_ONCE)
        self._down_until = float("-inf")

    def identify(self, token: str) -> Identity:
        check_form(token)
        key = token_key(token)
        found = self._kept(key) or self._asking.once(key, lambda: self._kept(key) or self._found_out(key, token))
        if isinstance(found, _Refusal):
            raise Unauthorized(found.message)
        if isinstance(found, _Outage):
            raise Unavailable(found.message)
        return found

    def _kept(self, key: str) -> Identity | _Refusal | None:
        refusal = self._refused.get(key)
        if refusal is not None:
            return refusal[0]
        known = self._known.get(key)
        return known[0] if known is not None and known[1] < FRESH else None

    def _found_out(self, key: str, token: str) -> Identity | _Refusal | _Outage:
        expires_at = moment(claims_of(token), "exp")  # It is the platform that checks it.
        remaining = float("inf") if expires_at is None else expires_at - time.time()
        if remaining < -_SKEW:
            return self._refuse(key, "the token has expired: get a new one")
        known = self._known.get(key)
        if self._clock() < self._down_until:
            return known[0] if known else _Outage("the MarketPlace does not answer: try again in a moment")
        try:
            status, said = ask(self._userinfo, token)
            if status != 200:
                return self._refuse(key, f"{self.issuer} does not accept this token (any more): log in again")
            if "sub" not in said:  # Whatever answered, it was no userinfo endpoint.
                raise Unavailable(f"what answers for {self.issuer} makes no sense: try again later")
            identity = identity_from(self.issuer, said, email_claim=self._email_claim, expires_at=expires_at)
        except Unauthorized as exc:
            return self._refuse(key, exc.message)
        except Unavailable as exc:
            self._down_until = self._clock() + DOWN
            return known[0] if known else _Outage(exc.message)
        self._known.put(key, identity, min(GRACE, remaining))
        return identity

    def _refuse(self, key: str, message: str) -> _Refusal:
        refusal = _Refusal(message)
        self._known.drop(key)
        self._refused.put(key, refusal, REFUSED)
        return refusal
