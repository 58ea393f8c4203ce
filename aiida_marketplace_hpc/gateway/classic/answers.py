"""Answers byte for byte as the published gateway's Flask 2.0 and gunicorn write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

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

    :param status: 500 for whatever nobody has caught; 400, 404 and 405 are the framework's.
    """

    def __init__(self, status: int = 500, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.headers = dict(headers or {})


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


def as_page(status: int, headers: Mapping[str, str] | None = None) -> Response:
    """An error in HTML: gunicorn's page for 500, which closes the connection, else a short one of the framework's form."""
    if status == 500:
        content, kind = _UNCAUGHT, {"Content-Type": "text/html", "Connection": "close"}
    else:
        phrase = HTTPStatus(status).phrase
        content = f"<!doctype html>\n<html lang=en>\n<title>{status} {phrase}</title>\n<h1>{phrase}</h1>\n"
        kind = {"Content-Type": "text/html; charset=utf-8"}
    return Response(content.encode("ascii"), status, headers={**kind, **(headers or {})})
