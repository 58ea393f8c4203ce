"""The tokens that FirecREST is called with: the gateway's own, one that never changes, or those that users send along.

FirecREST refuses a token that has less than half a minute to live (``min_token_ttl``, 30 s by default), although it is still
valid: a token is given up before that.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

import requests
from firecrest import ClientCredentialsAuth, FirecrestException

MARGIN = 45.0
"""Seconds that a token has to live when a call is made with it: what FirecREST asks for, and the time of the call's way."""
_TIMEOUT = 10.0


class NoToken(Exception):
    """There is no token to call with now; the message is for a person."""


class Tokens(Protocol):
    """What gives the token for a call; pyfirecrest asks it before each."""

    def get_access_token(self) -> str:
        """Return a token that lives long enough.

        :raises NoToken: if there is none.
        """
        ...

    def refused(self) -> bool:
        """Note that the last token was refused; whether there may be a better one."""
        ...


class ServiceTokens:
    """Those of the gateway's own account: client credentials (RFC 6749, section 4.4)."""

    def __init__(self, client_id: str, client_secret: str, token_url: str) -> None:
        self._credentials = client_id, client_secret, token_url
        self._lock = threading.Lock()
        self._source = self._new()

    def get_access_token(self) -> str:
        with self._lock:
            try:
                return self._source.get_access_token()
            except (FirecrestException, requests.RequestException, ValueError, KeyError) as exc:
                # Not the provider's own words, which may repeat what was sent.
                raise NoToken(
                    f"the identity provider gives the gateway no token for FirecREST ({type(exc).__name__}): check the "
                    "client id, its secret and the token url"
                ) from None

    def refused(self) -> bool:
        with self._lock:
            self._source = self._new()
        return True

    def _new(self) -> ClientCredentialsAuth:
        source = ClientCredentialsAuth(*self._credentials, min_token_validity=int(MARGIN))
        source.timeout = _TIMEOUT
        source.disable_client_logging = True
        return source


class ConstantToken:
    """One that was given to the gateway's operator, and is used until FirecREST refuses it."""

    def __init__(self, token: str) -> None:
        self._token = token

    def get_access_token(self) -> str:
        return self._token

    def refused(self) -> bool:
        return False


class PassedOn:
    """The newest one that a user has sent, as long as it lives; nothing is written down."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._token = ""
        self._until = 0.0

    def offer(self, token: str, expires_at: float | None) -> None:
        """Take a token that the user has sent.

        :param expires_at: seconds since the epoch, where it is known; else it is good for ten minutes.
        """
        until = time.time() + 600.0 + MARGIN if expires_at is None else expires_at
        with self._lock:
            if until >= self._until or token == self._token:
                self._token, self._until = token, until

    @property
    def alive(self) -> bool:
        """Whether there is a token that lives long enough."""
        return time.time() < self._until - MARGIN

    def get_access_token(self) -> str:
        with self._lock:
            if not self.alive:
                raise NoToken(
                    "the gateway has no token of this user that lives long enough: it works for them while they send one"
                )
            return self._token

    def refused(self) -> bool:
        with self._lock:
            self._token, self._until = "", 0.0
        return False
