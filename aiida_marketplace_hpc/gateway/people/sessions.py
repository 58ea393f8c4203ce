"""Browsers that are signed in.

The browser has a secret, the database its digest and who it is: an identity, no token. So several gateways on one database
share sessions, one that ends is over everywhere, and nothing in the database lets anybody in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, or_, update

from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.ledger import Ledger, utc_now
from aiida_marketplace_hpc.gateway.people.cookies import new_secret
from aiida_marketplace_hpc.gateway.schema import PageSession

LONGEST = timedelta(hours=8)
"""After which a session is over, whatever is done with it."""
IDLE = timedelta(minutes=30)
"""Without a request after which it is over."""
_NOTED = timedelta(minutes=1)
"""How often it is noted that a session is used: not at every request, each of which would be a write."""


class Sessions:
    """The sessions of all browsers. May be used by many threads, and by several gateways on one database.

    :param now: the time, aware.
    """

    def __init__(self, ledger: Ledger, now: Callable[[], datetime] = utc_now) -> None:
        self._ledger, self._now = ledger, now

    def begin(self, identity: Identity) -> str:
        """Sign somebody in, and return the secret for their browser; sessions that are over are forgotten."""
        secret, now = new_secret(), self._now()
        # What holds of a token has been checked and is over when the token is; a session lives by its own times.
        known = asdict(replace(identity, expires_at=None, claims=dict(identity.claims)))
        over = or_(PageSession.created_at < now - LONGEST, PageSession.seen_at < now - IDLE)
        with self._ledger.writing() as session:
            session.execute(delete(PageSession).where(over))
            session.add(PageSession(key=_key(secret), identity=known, created_at=now, seen_at=now))
        return secret

    def find(self, secret: str) -> Identity | None:
        """Who has signed in with the browser that has this secret; ``None`` if the session is over, or never was."""
        if not secret:
            return None
        with self._ledger.reading() as session:
            row = session.get(PageSession, _key(secret))
        if row is None:
            return None
        now = self._now()
        if now - row.created_at >= LONGEST or now - row.seen_at >= IDLE:
            self.end(secret)
            return None
        if now - row.seen_at >= _NOTED:
            with self._ledger.writing() as session:
                session.execute(update(PageSession).where(PageSession.key == row.key).values(seen_at=now))
        known: dict[str, Any] = dict(row.identity)
        return Identity(**known)

    def end(self, secret: str) -> None:
        """Sign a browser out. May be repeated."""
        with self._ledger.writing() as session:
            session.execute(delete(PageSession).where(PageSession.key == _key(secret)))


def _key(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
