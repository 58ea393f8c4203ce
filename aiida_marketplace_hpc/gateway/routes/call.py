"""A request as a handler sees it: who asks, the checked parameters, the body."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from aiida_marketplace_hpc.errors import InvalidRequest, Unauthorized
from aiida_marketplace_hpc.gateway.service import Caller, Gateway
from aiida_marketplace_hpc.protocol import Capability


@dataclass(frozen=True)
class Body:
    """A file on its way in.

    :param read: reads at most so many bytes, ``b""`` at the end.
    :param filename: the name in the form, where the body was one.
    :param arriving: whether it has not all come yet, so that reading may have to wait for the client.
    """

    read: Callable[[int], bytes]
    filename: str | None = None
    arriving: bool = False


@dataclass(frozen=True)
class Stream:
    """A file on its way out, in chunks; ``size`` in bytes where it is known beforehand."""

    chunks: Generator[bytes, None, None]
    media_type: str
    size: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Later:
    """An answer that another thread still works on; nobody's thread waits for it.

    :param future: gives it.
    :param patience: seconds after which ``meanwhile`` is answered instead; ``None``: never.
    """

    future: Future[dict[str, Any]]
    meanwhile: Callable[[], dict[str, Any]]
    patience: float | None = None


@dataclass(frozen=True)
class Route:
    """What the way that a request came by lets through.

    :param text_only: nothing but text, as a message broker.
    :param answer_limit: bytes of an answer, where that is known.
    """

    text_only: bool = False
    answer_limit: int | None = None

    @classmethod
    def of(cls, mark: str | None, *, text_only: bool) -> Route:
        """The way of one request.

        :param mark: what the relay has marked it with. Whoever else sends that gets text, and nothing else comes of it.
        :param text_only: the gateway's own setting, for a relay that marks nothing.
        """
        if mark is None:
            return cls(text_only)
        limit = int(mark) if mark.isascii() and mark.isdigit() and len(mark) < 19 else None
        return cls(True, limit)

    def as_wire(self) -> dict[str, Any]:
        """The object that says it."""
        return {"text_only": self.text_only, "answer_limit": self.answer_limit}


Answer = dict[str, Any] | Stream | Later
Note = Callable[[str | None, Mapping[str, Any], str], None]
"""Takes down an operation of a ``query``: its name, what it was about, and what came of it."""


@dataclass(frozen=True)
class Call:
    """One request.

    :param parameters: those that were given, by name, converted to their types.
    :param json: the JSON object of a body, empty where there was none.
    :param body: the file of a body.
    :param note: takes down each operation that was carried out or refused.
    :param route: what the way that it came by lets through.
    """

    gateway: Gateway
    parameters: Mapping[str, Any]
    json: Mapping[str, Any]
    identified: Caller | None = None
    body: Body | None = None
    note: Note = lambda name, fields, outcome: None
    route: Route = field(default_factory=Route)

    @property
    def caller(self) -> Caller:
        """Who asks.

        :raises Unauthorized: on a capability that needs no token; handlers of those do not ask.
        """
        if self.identified is None:
            raise Unauthorized("Authentication Token is missing")
        return self.identified

    def machine(self, named: str | None) -> str:
        """The machine that a request names; the default one if it names none.

        :raises InvalidRequest: the gateway has no such machine.
        """
        machines = self.gateway.settings.machines
        if named and named not in machines:
            several = "s" if len(machines) > 1 else ""
            raise InvalidRequest(f"this gateway has the machine{several} {', '.join(machines)}, not {named}")
        return named or machines[0]


def text(name: str, value: Any) -> str:
    """A text of a JSON object that may be, or become, the name of a file.

    :raises InvalidRequest: it is none, or has characters that no name can have.
    """
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is a text, not {value!r}")
    try:
        possible = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # Half of a character; but what stands for a byte that is no UTF-8 is fine.
        possible = False
    if not possible:
        raise InvalidRequest(f"{name} has characters that no file's name can have")
    return value


def flag(name: str, value: Any) -> bool:
    """A switch of a JSON object.

    :raises InvalidRequest: it is none.
    """
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is true or false, not {value!r}")
    return value


def parse_parameters(capability: Capability, path: Mapping[str, str], query: Mapping[str, str]) -> dict[str, Any]:
    """Check and convert the parameters of a request.

    Path parameters are accepted as query parameters, too: the platform's proxy sends them so. Unknown ones are ignored, as
    they may come from a newer client.

    :raises InvalidRequest: for one that is missing or has the wrong type.
    """
    given: dict[str, Any] = {}
    for parameter in capability.parameters:
        text = path.get(parameter.name, query.get(parameter.name))
        if text is None:
            if parameter.required:
                raise InvalidRequest(f"{capability.name} needs the parameter {parameter.name}: {parameter.description}")
            continue
        if "\0" in text:
            raise InvalidRequest(f"the parameter {parameter.name} has a NUL character")
        given[parameter.name] = _convert(parameter.name, parameter.type, text)
    return given


def _convert(name: str, kind: str, text: str) -> Any:
    if kind == "string":
        return text
    if kind == "integer" and text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    if kind == "boolean" and text.lower() in ("true", "1", "false", "0"):
        return text.lower() in ("true", "1")
    raise InvalidRequest(f"the parameter {name} is not a valid {kind}: {text!r}")
