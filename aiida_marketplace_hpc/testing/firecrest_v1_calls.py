"""What is asked of a FirecREST v1, and how it is answered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from aiida_marketplace_hpc.gateway.classic.firecrest import is_forbidden


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, description: str, error: str | None = None, *, status: int = 400, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(description)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"description": description} if error is None else {"description": description, "error": error}


@dataclass(frozen=True)
class Call:
    """One request.

    :param file: the name and the content of the part ``file``.
    """

    request: Request
    form: FormData
    file: tuple[str, bytes] | None

    def path(self, about: str, name: str, *, whole: bool = False) -> str:
        """A parameter that becomes a word of a command.

        :param about: what is done; with ``whole`` the description of the refusal.
        """
        given = self.request.query_params if self.request.method == "GET" else self.form
        value = given.get(name)
        text = value if isinstance(value, str) else None
        if text is None or is_forbidden(text):
            raise Refused(about if whole else f"Error on {about} operation", f"'{name}' {problem_of(text)}")
        return text

    def flag(self, name: str) -> bool:
        """A switch."""
        given = self.request.query_params if self.request.method == "GET" else self.form
        return str(given.get(name, "")).upper() in ("TRUE", "YES", "1")

    def account(self) -> str | None:
        """The account that a job is for."""
        account = self.form.get("account")
        if account is not None and is_forbidden(str(account)):
            raise Refused("Invalid account", f"'account' {problem_of(str(account))}")
        return None if account is None else str(account)

    def jobids(self) -> list[str]:
        """The jobs that are asked for; none stands for all."""
        named = self.request.path_params.get("id") or self.request.query_params.get("jobs", "")
        ids = named.split(",") if named else []
        for id in ids:
            if not re.fullmatch(r"\d+(?:[+_]\d+|_\[\d+-\d+\])?", id):
                raise Refused("Failed to retrieve job information", f"{id} is not a valid job ID")
        return ids


async def content_of(form: FormData) -> tuple[str, bytes] | None:
    """The name and the content of the part ``file``."""
    part = form.get("file")
    return (part.filename or "", await part.read()) if isinstance(part, UploadFile) else None


def problem_of(text: str | None) -> str:
    """What is wrong with a parameter."""
    return "not specified" if text is None else "has invalid char" if text else "is empty"


def success(description: str, output: Any, status: int = 200) -> Response:
    """What a command said."""
    return JSONResponse({"description": description, "output": output}, status)
