"""What a browser keeps for this gateway: secrets, and what is derived from them.

A secret is known to the browser and, as a digest, to the gateway. What a page or an address shows (the token of a form, the
state of a sign-in) is derived from it, so that nothing has to be kept for it here and nobody gets back to the secret.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

SESSION = "mphpc-session"
"""The cookie of a browser that is signed in. It is sent by pages of this gateway only."""
SIGN_IN = "mphpc-sign-in"
"""The cookie of a browser that is about to sign in. It is sent, too, when the issuer sends the browser back."""
SIGN_IN_LIFE = 600
"""Seconds that somebody has for signing in."""
_FORM = re.compile(r"[A-Za-z0-9_-]{43}(\.[0-9a-f]{24})?")


def new_secret() -> str:
    """A secret that nobody guesses: 256 bits."""
    return secrets.token_urlsafe(32)


def derived(secret: str, purpose: str) -> str:
    """What is shown in place of a secret, for one purpose: 43 letters, digits, ``-`` and ``_``."""
    digest = hmac.new(secret.encode(), purpose.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def is_derived(shown: str, secret: str, purpose: str) -> bool:
    """Whether something was derived from a secret."""
    return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), derived(secret, purpose).encode())


def read(request: Request, name: str, *, secure: bool) -> str:
    """The value of a cookie; empty if there is none that this gateway can have made."""
    value = request.cookies.get(_full(name, secure), "")
    return value if _FORM.fullmatch(value) else ""


def put(response: Response, name: str, value: str, *, secure: bool, life: int | None = None) -> None:
    """Let the browser keep a value, out of reach of scripts.

    :param life: seconds; without it until the browser is closed.
    """
    response.set_cookie(
        _full(name, secure), value, max_age=life, path="/", secure=secure, httponly=True, samesite=_same_site(name)
    )


def drop(response: Response, name: str, *, secure: bool) -> None:
    """Let the browser forget it."""
    response.delete_cookie(_full(name, secure), path="/", secure=secure, httponly=True, samesite=_same_site(name))


def _same_site(name: str) -> Literal["lax", "strict"]:
    return "lax" if name == SIGN_IN else "strict"


def _full(name: str, secure: bool) -> str:
    # With this prefix a browser takes the cookie from this very host only, and over TLS; from no neighbour under its domain.
    return f"__Host-{name}" if secure else name
