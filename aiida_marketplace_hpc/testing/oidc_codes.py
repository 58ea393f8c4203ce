"""Logging in at an OpenID Connect provider with a browser, and the codes that send it back (RFC 6749, RFC 7636)."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import urlencode

CODE_GRANT = "authorization_code"
_LIFETIME = 60.0
"""Seconds for which a code is good."""


@dataclass(frozen=True)
class Answer:
    """What a browser is answered."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""


@dataclass
class Code:
    """A code, and what the browser's request said."""

    client: str
    redirect_uri: str
    challenge: str
    scope: str
    nonce: str | None
    until: float
    claims: dict[str, Any]


class Codes:
    """The codes of a provider. Each is good once, for the client, address and verifier that it was asked for with.

    :param now: seconds since the epoch.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._codes: dict[str, Code] = {}

    def answer(
        self,
        method: str,
        query: Mapping[str, str],
        form: Mapping[str, str],
        redirect_uris: Mapping[str, Sequence[str]],
    ) -> Answer:
        """Show the page to log in on, or take what was entered there: any name, ``subject``; empty: the person refuses.

        A request that names an address which its client has not registered is answered here and sent nowhere.
        """
        address = query.get("redirect_uri", "")
        if address not in redirect_uris.get(query.get("client_id", ""), ()):
            return _page(400, "<h1>Invalid parameter: redirect_uri</h1>")
        said = {"state": query["state"]} if "state" in query else {}
        if query.get("response_type") != "code" or query.get("code_challenge_method") != "S256":
            return _sent(address, {**said, "error": "invalid_request"})
        if method == "GET":
            action = escape("?" + urlencode(query))
            return _page(
                200,
                f'<h1>Log in</h1><form method="post" action="{action}"><label>User <input name="subject" autofocus></label>'
                "<button>Log in</button></form>",
            )
        subject = form.get("subject", "")
        if not subject:
            return _sent(address, {**said, "error": "access_denied", "error_description": "The person refused"})
        code = secrets.token_urlsafe(24)
        self._codes[code] = Code(
            query["client_id"],
            address,
            query.get("code_challenge", ""),
            query.get("scope", ""),
            query.get("nonce"),
            self._now() + _LIFETIME,
            {"subject": subject, "email": f"{subject}@example.org"},
        )
        return _sent(address, {**said, "code": code})

    def redeemed(self, form: Mapping[str, str], client: str) -> Code | None:
        """The code of a request for tokens, which is used up by it, if all fits."""
        code = self._codes.pop(form.get("code", ""), None)
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).decode().rstrip("=")
        if code is None or self._now() > code.until:
            return None
        fits = (code.client, code.redirect_uri, code.challenge) == (client, form.get("redirect_uri"), challenge)
        return code if fits else None


def _page(status: int, content: str) -> Answer:
    return Answer(status, body=f'<!doctype html><html lang="en"><title>Identity provider</title>{content}</html>')


def _sent(address: str, parameters: Mapping[str, str]) -> Answer:
    return Answer(302, {"Location": f"{address}?{urlencode(parameters)}"})
