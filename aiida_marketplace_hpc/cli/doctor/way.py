"""What lies on the way to a gateway: its address, TLS, an answer, and how the clocks at both ends differ."""

from __future__ import annotations

import os
import socket
import ssl
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiida_marketplace_hpc.addresses import is_loopback
from aiida_marketplace_hpc.cli.doctor.checks import Checks
from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.protocol import CAPABILITIES

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.application import Application
    from aiida_marketplace_hpc.client.gateway import HpcGateway

_PATIENCE = 10.0
_LARGEST_OFFSET = 60.0
"""Seconds by which clocks may differ: certificates and tokens are good from a time and to a time."""
_SOON = 14
"""Days before the end of a certificate from which it is said."""


def said(gateway: HpcGateway) -> str:
    """The address, for a person."""
    through = f", through the MarketPlace to app {gateway.app_id}" if gateway.app_id else ""
    parts = urlsplit(gateway.url)
    exposed = parts.scheme == "http" and not is_loopback(parts.hostname or "")
    return f"{gateway.url}{through}{'; the token travels unencrypted: use https:// if you can' if exposed else ''}"


def check_tls(gateway: HpcGateway, checks: Checks) -> None:
    """Check TLS, where it is spoken with the gateway itself."""
    if gateway.url.startswith("https://") and not _through_a_proxy(gateway.url):
        checks.run("TLS", lambda: _handshake(gateway.url), str, needed=True)


def check_connection(gateway: HpcGateway, checks: Checks) -> None:
    """Check that there is an answer, and its time; on the MarketPlace, the app first."""
    if gateway.app_id:
        checks.run("app", gateway.application, _offered, needed=True)
    offset = checks.run("connection", gateway.clock_offset, lambda _: "the gateway answers", needed=True)
    if offset is not None:
        checks.run("clock", lambda: _offset(offset), str)


def _offered(app: Application) -> str:
    if app.capabilities is None:
        return f"the MarketPlace does not say what {app.app_id} offers"
    missing = sorted({row.name for row in CAPABILITIES if row.registered} - app.capabilities)
    without = f", without {', '.join(missing)}" if missing else ""
    return f"{app.app_id} offers {len(app.capabilities)} capabilities{without}"


def _through_a_proxy(url: str) -> bool:
    from requests.utils import get_environ_proxies

    return urlsplit(url).scheme in get_environ_proxies(url)


def _handshake(url: str) -> str:
    from requests.utils import DEFAULT_CA_BUNDLE_PATH

    from aiida_marketplace_hpc.client.connection import Exchange
    from aiida_marketplace_hpc.client.failure import connection_error

    parts = urlsplit(url)
    authorities = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or DEFAULT_CA_BUNDLE_PATH
    try:
        folder = authorities if os.path.isdir(authorities) else None
        context = ssl.create_default_context(cafile=None if folder else authorities, capath=folder)
    except OSError as exc:
        raise ConfigurationError(f"{authorities} cannot be read ({exc.strerror}): check REQUESTS_CA_BUNDLE") from None
    try:
        with (
            socket.create_connection((parts.hostname or "", parts.port or 443), timeout=_PATIENCE) as raw,
            context.wrap_socket(raw, server_hostname=parts.hostname) as connection,
        ):
            certificate, version = connection.getpeercert() or {}, connection.version()
    except OSError as exc:
        raise connection_error(exc, Exchange(time.monotonic, _PATIENCE), parts.netloc) from None
    days = int((ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) // 86400)
    soon = "; it expires soon: tell the gateway's operator" if days < _SOON else ""
    return f"{version}, the certificate is good for {days} days more{soon}"


def _offset(seconds: float) -> str:
    if abs(seconds) > _LARGEST_OFFSET:
        direction = "behind" if seconds > 0 else "ahead of"
        raise ConfigurationError(
            f"this machine's clock is {abs(seconds):.0f} s {direction} the gateway's: set the one that is wrong (with NTP); "
            "tokens and certificates can count as expired, or as not valid yet"
        )
    return "as the gateway's" if abs(seconds) < 2 else f"{abs(seconds):.0f} s from the gateway's"
