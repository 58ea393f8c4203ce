"""Who a caller is: from the bearer token of a request to an identity."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from aiida_marketplace_hpc.errors import ConfigurationError, Unauthorized


@dataclass(frozen=True)
class Identity:
    """A person or service, as whoever issued the token vouches for it.

    :param issuer: who vouches; with ``subject`` it is the key of a user and never changes.
    :param email: from it comes the name of the user's folder, as on the published gateway.
    """

    issuer: str
    subject: str
    email: str
    name: str


class Authenticator(Protocol):
    """A way to find out who a token belongs to."""

    def identify(self, token: str) -> Identity:
        """Return whose token it is.

        :raises Unauthorized: if it is nobody's.
        :raises Unavailable: if that cannot be found out now.
        """
        ...


class DevelopmentTokens:
    """Fixed tokens from the command line: for development and for a gateway that serves one person on one machine.

    :param tokens: the token of each user; a user is an e-mail address or a bare name.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        if not tokens:
            raise ConfigurationError(
                "nobody could use this gateway: give at least one --dev-token USER=TOKEN "
                "(or set MARKETPLACE_HPC_DEV_TOKEN to a JSON object of them)"
            )
        for user, token in tokens.items():
            if not user or len(token) < 8 or token.split() != [token]:
                raise ConfigurationError(f"the development token of {user!r} needs at least 8 characters and no blanks")
        if len(set(tokens.values())) != len(tokens):
            raise ConfigurationError("two users have the same development token")
        self._tokens = dict(tokens)

    def identify(self, token: str) -> Identity:
        found = None
        for user, expected in self._tokens.items():  # All of them: how long it takes does not depend on which one fits.
            if hmac.compare_digest(expected.encode(), token.encode()):
                found = user
        if found is None:
            raise Unauthorized("this token is not accepted; check the token source of your client")
        return Identity("dev", found, found, found.partition("@")[0])


def bearer_token(header: str | None) -> str:
    """Take the token out of an ``Authorization`` header; the scheme's word is ignored, as the published gateway does.

    :raises Unauthorized: if there is none.
    """
    parts = (header or "").split()
    if len(parts) != 2:
        raise Unauthorized("Authentication Token is missing: send the header 'Authorization: Bearer TOKEN'")
    return parts[1]
