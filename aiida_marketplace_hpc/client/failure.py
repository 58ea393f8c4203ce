"""The one place where errors of requests, urllib3, ssl and sockets become errors of ours."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Mapping

import requests
import urllib3

from aiida_marketplace_hpc.client.connection import Exchange
from aiida_marketplace_hpc.errors import (
    ConfigurationError,
    ConnectionFailed,
    DeadlineExceeded,
    MarketplaceHpcError,
    Phase,
)


def connection_error(exc: Exception, exchange: Exchange, host: str, request_id: str = "") -> MarketplaceHpcError:
    """Turn an error of requests, urllib3, ssl or a socket into one of ours."""
    causes = list(_causes(exc))
    suffix = f" [request {request_id}]" if exchange.sent and request_id else ""
    for cause in causes:
        if isinstance(cause, (ssl.SSLCertVerificationError, ssl.CertificateError)):
            return ConfigurationError(_certificate_fault(cause, host))
        if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
            return ConfigurationError(
                f"{host} does not speak TLS: should the url begin with http:// instead of https://?"
            )
    settings = (
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidHeader,
        requests.exceptions.InvalidSchema,
        requests.exceptions.MissingSchema,
    )
    if isinstance(exc, settings):
        return ConfigurationError(f"the address {host}, or that of a proxy in the environment, is malformed: {exc}")
    if not isinstance(exc, requests.RequestException) and type(exc) is OSError:
        # What requests raises for a certificate file that does not exist.
        return ConfigurationError(f"{exc}: check REQUESTS_CA_BUNDLE")
    phase = Phase.MAYBE_SENT if exchange.sent else Phase.NOT_SENT
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return ConnectionFailed(
            f"the name of {host} cannot be resolved: check the url and the network{suffix}", phase=phase
        )
    if any(isinstance(cause, requests.exceptions.ProxyError) for cause in causes):
        return ConnectionFailed(f"the proxy on the way to {host} fails: check HTTPS_PROXY{suffix}", phase=phase)
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return ConnectionFailed(f"{host} refuses connections: check the url; does it run?{suffix}", phase=phase)
    if any(_is_late(cause) for cause in causes):
        action = "did not answer" if exchange.sent else "cannot be reached"
        return DeadlineExceeded(f"{host} {action} in time: try again later{suffix}", phase=phase)
    detail = next((cause.strerror for cause in reversed(causes) if isinstance(cause, OSError) and cause.strerror), "")
    action = "before the answer was complete" if exchange.sent else "before the request was sent"
    return ConnectionFailed(
        f"the connection to {host} broke off {action}{f' ({detail})' if detail else ''}{suffix}", phase=phase
    )


_NAMED_IN = "name the file with it in the environment variable REQUESTS_CA_BUNDLE"
_CERTIFICATE_FAULTS: Mapping[int, str] = {
    9: "the certificate of {host} is not valid yet: is this machine's clock right? Else tell the operator",
    10: "the certificate of {host} has expired: tell the operator; or is this machine's clock wrong?",
    18: "the certificate of {host} is not trusted, as it is signed by nobody but itself: if it is the right one (ask the "
    f"operator), {_NAMED_IN}",
    62: "the certificate of {host} is for another name: use the address that the operator has published",
    64: "the certificate of {host} is for a name, not for this IP address: use the address that the operator has published",
}
"""By the number that OpenSSL has for what is wrong."""


def _certificate_fault(cause: BaseException, host: str) -> str:
    known = _CERTIFICATE_FAULTS.get(getattr(cause, "verify_code", 0))
    if known is not None:
        return known.format(host=host)
    reason = getattr(cause, "verify_message", "") or str(cause)
    return (
        f"the certificate of {host} is not trusted ({reason}): if a private authority signed it, ask for the authority's "
        f"certificate and {_NAMED_IN}; else check the url"
    )


def _is_late(cause: BaseException) -> bool:
    late = (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError)
    # urllib3 calls every connection that cannot be made a timeout.
    return isinstance(cause, late) and not isinstance(cause, urllib3.exceptions.NewConnectionError)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """All errors that an error wraps, however requests and urllib3 wrap them."""
    seen: set[int] = set()
    waiting: list[object] = [exc]
    while waiting:
        cause = waiting.pop(0)
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        waiting += [cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args]
