"""Browsers, as far as they keep cookies and send forms."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import requests

from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway

SESSION = "mphpc-session"
MakeJob = Callable[..., str]


class Browser:
    """Somebody's browser. It follows no redirect by itself, and knows nothing of ``SameSite``."""

    def __init__(self, served: ServedGateway | GatewayProcess) -> None:
        self.served = served
        self.session = requests.Session()

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(self._url(path), allow_redirects=False, timeout=20, **options)

    def post(self, path: str, **form: str) -> requests.Response:
        return self.session.post(self._url(path), data=form, allow_redirects=False, timeout=20)

    def _url(self, path: str) -> str:
        return path if path.startswith("http") else self.served.url + path

    def token_on(self, path: str) -> str:
        """What the forms of a page have in them."""
        found = re.search('name="token" value="([^"]+)"', self.get(path).text)
        assert found is not None, path
        return found[1]

    def sign_in(self, user: str = ALICE, *, job: str = "") -> requests.Response:
        token = self.token_on(f"/sign-in?job={job}" if job else "/sign-in")
        return self.post("/sign-in", token=token, access=TOKENS[user])

    @property
    def secret(self) -> str:
        """Of the session."""
        return str(self.session.cookies.get(SESSION) or "")

    @secret.setter
    def secret(self, value: str) -> None:
        self.session.cookies.clear()
        self.session.cookies.set(SESSION, value)
