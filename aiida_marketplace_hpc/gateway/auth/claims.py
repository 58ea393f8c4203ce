"""From what a provider says about somebody to an identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiida_marketplace_hpc.errors import Unauthorized
from aiida_marketplace_hpc.gateway.auth import Identity

_LONGEST = 255
"""Characters, as the ledger keeps them."""


def identity_from(
    issuer: str, claims: Mapping[str, Any], *, email_claim: str = "email", expires_at: float | None = None
) -> Identity:
    """Read an identity.

    :param email_claim: where the e-mail address stands.
    :raises Unauthorized: if there is no subject or address, or one that makes no sense.
    """
    subject, email = claims.get("sub"), claim(claims, email_claim)
    for name, value in (("sub", subject), (email_claim, email)):
        if not isinstance(value, str) or not value:
            raise Unauthorized(
                f"the token says nothing about {name}, which this gateway needs: ask for the scopes openid and email"
            )
        if len(value) > _LONGEST or not value.isprintable():
            raise Unauthorized(f"what the token says about {name} makes no sense")
    name = claims.get("name") or claims.get("preferred_username") or ""
    shown = "".join(letter for letter in str(name) if letter.isprintable())[:_LONGEST]
    return Identity(
        issuer,
        str(subject),
        str(email),
        shown or str(email).partition("@")[0],
        email_verified=claims.get("email_verified") is True,
        claims=dict(claims),
        expires_at=expires_at,
    )


def claim(claims: Mapping[str, Any], name: str) -> Any:
    """What a claim says; ``a.b`` is ``b`` inside ``a``, unless there is a claim of that very name."""
    if name in claims:
        return claims[name]
    first, dot, rest = name.partition(".")
    inner = claims.get(first)
    return claim(inner, rest) if dot and isinstance(inner, Mapping) else None


def claim_holds(claims: Mapping[str, Any], name: str, value: str) -> bool:
    """Whether a claim is this value, or a list with it in it."""
    said = claim(claims, name)
    if name == "scope" and isinstance(said, str):
        said = said.split()
    return value in said if isinstance(said, list) else isinstance(said, str) and said == value
