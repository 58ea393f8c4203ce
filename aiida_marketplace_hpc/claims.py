"""What a token says about itself, as far as it can be read. Nothing is verified."""

from __future__ import annotations

import base64
import json
import math
from typing import Any


def claims_of(token: str) -> dict[str, Any]:
    """Return the claims of a token that is a JWT; of any other there are none."""
    parts = token.split(".")
    if len(parts) != 3:
        return {}
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def moment(claims: dict[str, Any], claim: str) -> float | None:
    """Return a claim that is a time, in seconds since the epoch, or ``None``."""
    value = claims.get(claim)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        seconds = float(value)
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) else None


def holder(claims: dict[str, Any]) -> str:
    """Whose token it is, in words for a person; may be empty."""
    return next((str(claims[name]) for name in ("email", "preferred_username", "sub") if claims.get(name)), "")
