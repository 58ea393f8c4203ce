"""The token: where it comes from, what it says about itself, and whether it can be renewed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from aiida_marketplace_hpc.cli.doctor.checks import Checks
from aiida_marketplace_hpc.errors import TokenUnavailable

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.auth import TokenSource
    from aiida_marketplace_hpc.client.gateway import HpcGateway


_METHODS = {
    "dev": "development tokens",
    "oidc": "tokens that {issuer} has signed",
    "marketplace": "tokens that {issuer} vouches for",
}


def check(gateway: HpcGateway, checks: Checks) -> None:
    """Check the token, as far as it can be read here."""
    source = gateway.token_source
    token = checks.run("token", source.token, lambda token: _said(source, token), needed=True)
    if token is not None and not source.reloadable:
        checks.run("expiry", lambda: _expiry(source, token), str)


def accepted(gateway: HpcGateway, info: dict[str, Any]) -> str:
    """What a gateway says about the tokens that it accepts, beside what ours has, which it has accepted."""
    from aiida_marketplace_hpc.claims import claims_of

    auth = info.get("auth") or {}
    method = str(auth.get("method") or "")
    claims = claims_of(gateway.token_source.token())
    scopes = f"; scopes: {claims['scope']}" if isinstance(claims.get("scope"), str) else ""
    return f"the gateway accepts {_METHODS.get(method, method).format(issuer=auth.get('issuer'))}, yours too{scopes}"


def _said(source: TokenSource, token: str) -> str:
    from aiida_marketplace_hpc.claims import claims_of, holder, moment

    claims = claims_of(token)
    facts = [f"{source.name} gives one"]
    if who := holder(claims):
        facts.append(f"of {who}")
    if issuer := claims.get("iss"):
        facts.append(f"from {issuer}")
    if audience := claims.get("aud"):
        facts.append(f"for {', '.join(map(str, audience)) if isinstance(audience, list) else audience}")
    end = moment(claims, "exp")
    if end is not None:
        facts.append(
            f"good for {_duration(end - time.time())}" if end > time.time() else "expired by this machine's clock"
        )
    if source.reloadable and end is not None:
        facts.append("and renewed in time")
    return ", ".join(facts)


def _expiry(source: TokenSource, token: str) -> str:
    from aiida_marketplace_hpc.claims import claims_of, moment

    end = moment(claims_of(token), "exp")
    if end is None:
        return "the token does not say when it ends"
    left = end - time.time()
    if left <= 0:
        raise TokenUnavailable(
            f"the token of {source.name} expired {_duration(-left)} ago: get a new one, or log in once with "
            "`marketplace-hpc login NAME` and use login:NAME, which renews itself"
        )
    return f"in {_duration(left)}; nobody renews {source.name} but you, login:NAME renews itself"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
