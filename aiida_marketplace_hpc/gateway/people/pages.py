"""The pages' HTML: templates that escape whatever they are given, with one style and no script.

``word`` is the filter for everything that somebody else has written; :mod:`~aiida_marketplace_hpc.gateway.people.readable`
says what it does.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from starlette.responses import HTMLResponse

from aiida_marketplace_hpc.gateway.people import readable
from aiida_marketplace_hpc.protocol import JobState

_FOLDER = Path(__file__).with_name("templates")
_STYLE = (_FOLDER / "style.css").read_text(encoding="utf-8")
_STYLE_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
"""What a browser may do with these pages: load their own style, and send their forms to this gateway."""


STATES = {
    JobState.CREATED: "created",
    JobState.SUBMITTING: "being submitted",
    JobState.QUEUED: "queued",
    JobState.HELD: "held",
    JobState.RUNNING: "running",
    JobState.SUSPENDED: "suspended",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
    JobState.TIMEOUT: "out of time",
    JobState.OUT_OF_MEMORY: "out of memory",
    JobState.NODE_FAIL: "lost with a node",
    JobState.DEADLINE: "past its deadline",
    JobState.PREEMPTED: "preempted",
    JobState.REFUSED: "refused",
}
"""A job is …"""


def duration(seconds: float | None) -> str:
    """A time span for people: ``2 d 03 h``, ``1 h 02 min``, ``3 min 04 s``, ``5 s``."""
    if seconds is None:
        return ""
    rest = round(seconds)
    days, rest = divmod(rest, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days} d {hours:02} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def size(number: int) -> str:
    """Bytes for people: ``512 bytes``, ``1.5 MiB``."""
    if number < 1024:
        return f"{number} byte{'' if number == 1 else 's'}"
    units = ("KiB", "MiB", "GiB", "TiB")
    power = min((number.bit_length() - 1) // 10, len(units))
    return f"{number / 1024**power:.1f} {units[power - 1]}"


def moment(text: str | None) -> Markup:
    """A time in ISO 8601, for people and programs."""
    if not text:
        return Markup()
    at = datetime.fromisoformat(text)
    return Markup('<time datetime="{}">{}</time>').format(at.isoformat(), at.strftime("%Y-%m-%d %H:%M:%S UTC"))


def since_epoch(seconds: float) -> str:
    """Seconds since the epoch in ISO 8601; empty for what is no time that anybody could have meant."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
    except (ValueError, OverflowError, OSError):
        return ""


def state(name: str) -> str:
    """A state of a job as what the job is."""
    return STATES[JobState(name)]


def in_url(path: str) -> str:
    """A path in an address; names need not be UTF-8."""
    return quote(path, safe="/", errors="surrogateescape")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        word=readable.word,
        duration=duration,
        size=size,
        moment=moment,
        state=state,
        in_url=in_url,
        since_epoch=since_epoch,
    )
    environment.globals["style"] = Markup(_STYLE)  # noqa: S704 - it is a file of ours.
    return environment


_ENVIRONMENT = _environment()


def page(name: str, values: dict[str, Any], status: int = 200) -> HTMLResponse:
    """Make a page of a template."""
    content = _ENVIRONMENT.get_template(f"{name}.html.j2").render(**values)
    return HTMLResponse(
        content.encode("utf-8", "backslashreplace"), status, headers={"Content-Security-Policy": POLICY}
    )
