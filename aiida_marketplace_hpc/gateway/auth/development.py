"""Fixed tokens from the settings: for trials, and for a gateway that serves one person on one machine."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from aiida_marketplace_hpc.errors import ConfigurationError, Unauthorized
from aiida_marketplace_hpc.gateway.auth import Identity


class DevelopmentTokens:
    """Tokens that never expire, each of one user.

    :param tokens: the token of each user; a user is an e-mail address or a bare name.
    """

    method = "dev"
    issuer = "dev"
    refresh_margin = 0.0

    def __init__(self, tokens: Mapping[str, str]) -> None:
        if not tokens:
            raise ConfigurationError(
                "nobody could use this gateway: give at least one --dev-token USER=TOKEN "
                "(or set MARKETPLACE_HPC_DEV_TOKEN to a JSON object of them), or choose another --auth"
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
            if hmac.compare_digest(expected.encode(), token.encode("utf-8", "surrogateescape")):
                found = user
        if found is None:
            raise Unauthorized("this token is not accepted; check the token source of your client")
        claims = {"sub": found, "email": found}
        return Identity(self.issuer, found, found, found.partition("@")[0], email_verified=True, claims=claims)
