"""Who a caller is: from the bearer token of a request to an identity.

There are three ways, one module each: :mod:`~aiida_marketplace_hpc.gateway.auth.development` (fixed tokens),
:mod:`~aiida_marketplace_hpc.gateway.auth.marketplace` (the platform is asked) and
:mod:`~aiida_marketplace_hpc.gateway.auth.oidc` (a signed token is checked here);
:mod:`~aiida_marketplace_hpc.gateway.auth.chosen` makes the one that the settings name. What an identity may do is decided
elsewhere: :mod:`aiida_marketplace_hpc.gateway.admission`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiida_marketplace_hpc.errors import Unauthorized

_LONGEST = 16 * 1024
_FORM = re.compile(r"[A-Za-z0-9._~+/-]+=*")


@dataclass(frozen=True)
class Identity:
    """A person or service, as whoever issued the token vouches for it.

    :param issuer: who vouches; with ``subject`` it is the key of a user and never changes.
    :param email: from it comes the name of the user's folder, as on the published gateway.
    :param email_verified: whether the issuer says that the address is theirs; only then does it open anything.
    :param claims: all that the issuer says about them.
    :param expires_at: until when that holds, in seconds since the epoch, where it is known.
    """

    issuer: str
    subject: str
    email: str
    name: str
    email_verified: bool = False
    claims: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    expires_at: float | None = None

    def is_called(self, who: str) -> bool:
        """Whether an operator who writes a subject or an e-mail address means them."""
        return who == self.subject or (self.email_verified and who.lower() == self.email.lower())

    def __str__(self) -> str:
        unverified = "" if self.email_verified else ", not verified"
        return f"{self.subject} ({self.email}{unverified}) of {self.issuer}"


class Authenticator(Protocol):
    """A way to find out who a token belongs to. May be used by many threads at once.

    ``method`` and ``issuer`` tell clients which tokens are accepted, ``refresh_margin`` how many seconds before the end of a
    token they had better use a new one.
    """

    method: str
    issuer: str
    refresh_margin: float

    def identify(self, token: str) -> Identity:
        """Return whose token it is. May be repeated.

        :raises Unauthorized: if it is nobody's.
        :raises Unavailable: if that cannot be found out now.
        """
        ...


def bearer_token(header: str | None) -> str:
    """Take the token out of an ``Authorization`` header; the scheme's word is ignored, as the published gateway does.

    :raises Unauthorized: if there is none.
    """
    parts = (header or "").split()
    if len(parts) != 2:
        raise Unauthorized("Authentication Token is missing: send the header 'Authorization: Bearer TOKEN'")
    return parts[1]


def check_form(token: str) -> None:
    """Refuse what cannot be a token of a provider, without a further look.

    :raises Unauthorized: if it is too long, or has letters that none has.
    """
    if len(token) > _LONGEST or not _FORM.fullmatch(token):
        raise Unauthorized(
            "this is no token of the kind that this gateway accepts; check the token source of your client"
        )


def token_key(token: str) -> str:
    """What a token is remembered by: it cannot be used in its place."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
