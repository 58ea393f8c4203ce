"""A request of a browser as a view sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from aiida_marketplace_hpc.errors import Forbidden, Unauthorized
from aiida_marketplace_hpc.gateway.people.cookies import derived, is_derived
from aiida_marketplace_hpc.gateway.people.pages import page
from aiida_marketplace_hpc.gateway.service import Caller, Gateway

_FORM = "form"


@dataclass(frozen=True)
class Visit:
    """One request.

    :param base: leads from this page to the gateway's first one; addresses are relative, so that a proxy may add a path.
    :param secure: whether the browser's connection is encrypted.
    :param secret: of the browser's session; empty if it has none.
    :param attempt: of the browser's attempt to sign in: a secret, or one with a job's id behind it.
    :param signed_in: whose session it is.
    :param form: what was entered.
    """

    gateway: Gateway
    request: Request
    base: str
    secure: bool
    query: Mapping[str, str]
    secret: str = ""
    attempt: str = ""
    signed_in: Caller | None = None
    form: Mapping[str, str] = field(default_factory=dict)

    @property
    def caller(self) -> Caller:
        """Who is signed in.

        :raises Unauthorized: nobody is.
        """
        if self.signed_in is None:
            raise Unauthorized("you are not signed in, or were for too long")
        return self.signed_in

    @property
    def jobid(self) -> str:
        """The job in the address."""
        return str(self.request.path_params["jobid"])

    def path_after(self, word: str) -> str:
        """The file in the address, behind ``/jobs/ID/WORD/``. Names need not be UTF-8."""
        # Not the decoded path, in which such a name has been spoilt.
        raw: bytes = self.request.scope.get("raw_path") or self.request.url.path.encode()
        _, _, rest = raw.partition(b"?")[0].partition(f"/{word}/".encode())
        return unquote_to_bytes(rest).decode("utf-8", "surrogateescape")

    def check_form(self, secret: str) -> None:
        """Make sure that the form is one of a page of this gateway's, in this very browser.

        :raises Forbidden: it is not.
        """
        if not secret or not is_derived(self.form.get("token", ""), secret, _FORM):
            raise Forbidden("this form is not of this session: go back, load the page again, and repeat what you did")

    def show(self, template: str, status: int = 200, *, secret: str = "", **values: Any) -> HTMLResponse:
        """Answer with a page.

        :param secret: of its forms; without it, that of the session.
        """
        common = {
            "base": self.base,
            "gateway": self.gateway.settings.name,
            "person": self.signed_in.user.email if self.signed_in else "",
            "token": derived(secret or self.secret, _FORM) if secret or self.signed_in else "",
            "refresh": None,
        }
        return page(template, {**common, **values}, status)

    def go(self, where: str) -> Response:
        """Send the browser to another page of this gateway.

        :param where: from the first page on, such as ``jobs/ID``. Never anything that came with the request.
        """
        return RedirectResponse(self.base + where, status_code=303)


def base_of(request: Request) -> str:
    """What leads from the address of a request to the gateway's first page."""
    raw: bytes = request.scope.get("raw_path") or request.url.path.encode()
    return "../" * (raw.partition(b"?")[0].count(b"/") - 1) or "./"


def query_of(request: Request) -> dict[str, str]:
    """The query of a request; of a name that comes twice the first counts."""
    found: dict[str, str] = {}
    for pair in request.scope["query_string"].decode("latin-1").split("&")[:50]:
        name, _, value = pair.partition("=")
        found.setdefault(unquote(name), unquote(value.replace("+", " ")))
    return found
