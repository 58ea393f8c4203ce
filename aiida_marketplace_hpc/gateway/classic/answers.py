"""Answers byte for byte as the published gateway's Flask 2.0 and gunicorn write them."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from html import escape
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES

STATUS_PHRASES.setdefault(600, b"UNKNOWN")  # Flask's word for it; uvicorn sends no status without one.


class Failed(Exception):
    """What the published gateway answers in JSON when something fails.

    :param status: also such as HTTP has none for: 505 and 600.
    :param body: the JSON object.
    """

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(body.get("error"))
        self.status = status
        self.body = body


class Uncaught(Exception):
    """Where the published gateway's own code fails: a page of HTML instead of JSON.

    :param status: 500 for whatever nobody has caught; others are the framework's.
    :param text: what a page other than that of 500 says; by default what the framework says.
    """

    def __init__(self, status: int = 500, text: str = "") -> None:
        super().__init__(status)
        self.status = status
        self.text = text


def as_json(content: Mapping[str, Any], status: int = 200) -> Response:
    """JSON with sorted keys, two blanks of indent, a blank after each comma, and a line break at the end."""
    text = json.dumps(content, indent=2, sort_keys=True, separators=(", ", ": "))
    return Response(f"{text}\n".encode("ascii"), status, media_type="application/json")


_UNCAUGHT = """\
<html>
  <head>
    <title>Internal Server Error</title>
  </head>
  <body>
    <h1><p>Internal Server Error</p></h1>
    
  </body>
</html>
"""  # noqa: W293 - as gunicorn writes it.


_TEXTS = {
    404: "The requested URL was not found on the server. "
    "If you entered the URL manually please check your spelling and try again.",
    405: "The method is not allowed for the requested URL.",
}


def as_page(status: int = 500, text: str = "", headers: Mapping[str, str] | None = None) -> Response:
    """An error in HTML: gunicorn's page for 500, which closes the connection, else Werkzeug's.

    :param text: what it says; by default what Werkzeug says.
    """
    if status == 500:
        return Response(_UNCAUGHT, status, headers={"Content-Type": "text/html", "Connection": "close"})
    phrase = HTTPStatus(status).phrase
    said = escape(text or _TEXTS.get(status, f"{phrase}."))
    content = f"{_DOCTYPE}\n<title>{status} {phrase}</title>\n<h1>{phrase}</h1>\n<p>{said}</p>\n"
    return Response(content, status, headers={"Content-Type": "text/html; charset=utf-8", **(headers or {})})


_DOCTYPE = '<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 3.2 Final//EN">'


_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def disposition(name: str) -> str:
    """The part of ``Content-Disposition`` that names a file, as Werkzeug writes it."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")
    quoted = plain if _TOKEN.fullmatch(plain) else '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"filename={quoted}" if plain == name else f"filename={quoted}; filename*=UTF-8''{quote(name, safe='')}"
