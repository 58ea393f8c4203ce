"""The public keys of an issuer, as it publishes them: kept, asked for again when a new one turns up, and not too often."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jwt

from aiida_marketplace_hpc.errors import ConfigurationError, Unavailable
from aiida_marketplace_hpc.gateway.auth.provider import ask, checked_url

logger = logging.getLogger(__name__)

FRESH = 600.0
"""Seconds after which the keys are asked for again, so that one that was withdrawn is forgotten."""
KEPT = 86400.0
"""Seconds for which keys are used while the issuer does not answer."""
PAUSE = 10.0
"""Seconds between two questions, whatever tokens come."""
_PATIENCE = 2.0
"""Seconds to wait for another thread that asks."""

_ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "P-256": ("ES256",),
    "P-384": ("ES384",),
    "P-521": ("ES512",),
    "Ed25519": ("EdDSA",),
}
"""What a key of a type or curve may have signed with: asymmetric algorithms only. The token has no say in it."""


@dataclass(frozen=True)
class Key:
    """A public key, and the algorithms that it is for."""

    public: Any
    algorithms: tuple[str, ...]


class Keys:
    """The keys of an issuer. May be used by many threads.

    :param url: the issuer's address.
    :param issuer: what it calls itself.
    :param clock: the seconds of a monotonic clock.
    """

    def __init__(self, url: str, issuer: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url, self._issuer, self._clock = url, issuer, clock
        self._keys: Mapping[str, Key] = {}
        self._read_at = float("-inf")
        self._asked_at = float("-inf")
        self._lock = threading.Lock()

    def find(self, kid: str, issued_at: float) -> Key | None:
        """The key of that id; if the token names none, the only one that there is.

        :param issued_at: when the token says that it was issued, in seconds of the same clock.
        :returns: ``None`` if the issuer has no such key.
        :raises Unavailable: if that cannot be found out now.
        """
        key = self._known(kid)
        if key is not None and self._clock() - self._read_at < FRESH:
            return key
        # Who has a key need not wait for who asks.
        if not (self._lock.acquire(timeout=_PATIENCE) if key is None else self._lock.acquire(blocking=False)):
            return key or _raise(self._issuer)
        try:
            return self._found_out(kid, issued_at)
        finally:
            self._lock.release()

    def _found_out(self, kid: str, issued_at: float) -> Key | None:
        key = self._known(kid)
        if key is not None and self._clock() - self._read_at < FRESH:
            return key
        if self._clock() - self._asked_at >= PAUSE:
            self._asked_at = self._clock()
            try:
                self._keys = self._read()
            except Unavailable:
                if key is None:
                    raise
                return key
            self._read_at = self._clock()
            return self._known(kid)
        if key is not None:
            return key
        if self._read_at >= self._asked_at and issued_at < self._read_at:
            return None  # What we have was published after the token was issued.
        return _raise(self._issuer)

    def _known(self, kid: str) -> Key | None:
        if self._clock() - self._read_at > KEPT:
            return None
        if not kid:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid)

    def _read(self) -> Mapping[str, Key]:
        status, document = ask(f"{self._url}/.well-known/openid-configuration")
        if document.get("issuer") != self._issuer:
            logger.error("%s does not say that it is the issuer (%s)", self._issuer, document.get("issuer") or status)
            raise Unavailable(f"{self._issuer} does not say that it is the issuer: ask the operator of this gateway")
        try:
            address = checked_url(str(document.get("jwks_uri")), "the address of its keys")
        except ConfigurationError as exc:
            logger.error("%s: %s", self._issuer, exc.message)
            raise Unavailable(f"{self._issuer} does not say where its keys are") from None
        _, published = ask(address)
        listed = published.get("keys")
        keys = {}
        for entry in listed if isinstance(listed, list) else ():
            if isinstance(entry, dict) and (key := _key(entry)) is not None:
                keys[str(entry.get("kid", ""))] = key
        if not keys:
            logger.error("%s publishes no key that can be used", address)
            raise Unavailable(f"{self._issuer} publishes no key that can be used")
        return keys


def _raise(issuer: str) -> NoReturn:
    raise Unavailable(f"the keys of {issuer} cannot be asked for just now: try again in {PAUSE:.0f} seconds")


def _key(entry: dict[str, Any]) -> Key | None:
    """One published key, if it is one for signatures."""
    possible = _ALGORITHMS.get(str(entry.get("crv", entry.get("kty"))), ())
    algorithms = tuple(name for name in possible if entry.get("alg", name) == name)
    if not algorithms or entry.get("use", "sig") != "sig":
        return None
    try:
        return Key(jwt.PyJWK(entry, algorithms[0]).key, algorithms)
    except (jwt.PyJWTError, ValueError, TypeError) as exc:
        logger.warning("a published key cannot be used: %s", type(exc).__name__)
        return None
