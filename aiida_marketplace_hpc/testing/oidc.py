"""An OpenID Connect provider, as far as a gateway and its clients use one; shaped like a realm of Keycloak.

It is real in what it does: tokens are signed and checked, expire, and are revoked; a refresh token is good once. Who logs in
is what a test says, and so are the faults.
"""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal, NoReturn
from urllib.parse import parse_qs, unquote_plus

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from aiida_marketplace_hpc.testing.oidc_codes import CODE_GRANT, Answer, Codes
from aiida_marketplace_hpc.testing.web import WebServer

Json = dict[str, Any]

PUBLIC_CLIENT = "marketplace-hpc"
"""A client without a secret, such as a program on a person's machine."""
SERVICE, SERVICE_SECRET = "service", "secret-of-the-service"
"""A client with a secret: a service that logs in as itself."""

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_ALGORITHM = "RS256"
_PATH = "protocol/openid-connect"


class _Refused(Exception):
    def __init__(self, status: int, error: str, description: str = "") -> None:
        super().__init__(error)
        self.status = status
        self.document = {"error": error, "error_description": description or error}


@dataclass
class _Login:
    """What a client was once allowed: all tokens that came of it live and die together."""

    client: str
    claims: Json
    scope: str
    nonce: str | None = None
    """Of the browser's request, for the ID token."""
    alive: bool = True
    used: set[str] = field(default_factory=set)
    """The refresh tokens that were used up."""


@dataclass
class _Device:
    client: str
    scope: str
    code: str
    until: float
    claims: Json | None = None
    denied: bool = False
    polled: float = float("-inf")


class _Key:
    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self.private = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def public(self) -> Json:
        document = RSAAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        return {**document, "kid": self.id, "use": "sig", "alg": _ALGORITHM}


class OidcProvider:
    """A provider on a free port of 127.0.0.1; a context manager. Other processes reach it by :attr:`issuer`.

    All attributes may be changed while it runs.

    :param lifetime: seconds that access tokens live.
    :param refresh_lifetime: seconds that refresh tokens live.
    :param interval: seconds that a client has to wait between two questions whether a device was approved.
    :param audience: the ``aud`` of access tokens, unless :meth:`issue` says otherwise.
    :param clients: the secret of each client, ``None`` where it has none.
    :param clock: seconds since the epoch.
    """

    def __init__(
        self,
        *,
        realm: str = "marketplace",
        lifetime: float = 300.0,
        refresh_lifetime: float = 30 * 86400.0,
        interval: float = 0.0,
        audience: str | list[str] = "hpc-gateway",
        clients: Mapping[str, str | None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.lifetime = lifetime
        self.refresh_lifetime = refresh_lifetime
        self.interval = interval
        self.audience = audience
        self.clients = dict({PUBLIC_CLIENT: None, SERVICE: SERVICE_SECRET} if clients is None else clients)
        self.clock = clock
        self.skew = 0.0
        """Seconds by which its clock is ahead."""
        self.outage: Literal["unavailable", "drop"] | None = None
        """Answer 503 to everything, or close the connection without an answer."""
        self.before_answer: Callable[[str], None] | None = None
        """Called with the name of an endpoint when that has acted, before its answer is sent: to wait, or to kill somebody."""
        self.requests: Counter[str] = Counter()
        """How often each endpoint was asked: ``discovery``, ``jwks``, ``token``, ``device``, ``userinfo``, ``logout``,
        ``revoke``, ``auth``; requests in an outage count, too."""
        self.grants: Counter[str] = Counter()
        """How often each kind of grant has led to tokens: ``refresh_token``, ``client_credentials``, ``authorization_code``,
        :data:`DEVICE_GRANT`."""
        self.redirect_uris: dict[str, list[str]] = {}
        """For each client that signs people in with a browser, the addresses that a code may be sent to."""
        self.id_token_changes: Json = {}
        """Claims that go wrong into the ID tokens that are issued from now on."""
        self.reused = 0
        """How often a refresh token came that had been used before."""
        self._lock = threading.RLock()
        self._keys = [_Key()]
        self._devices: dict[str, _Device] = {}
        self._refresh: dict[str, tuple[_Login, float]] = {}
        self._revoked: set[str] = set()
        self._codes = Codes(self.now)
        self._server = _Server(self)
        self.url = self._server.url
        self.issuer = f"{self.url}/realms/{realm}"

    def __enter__(self) -> OidcProvider:
        self._server.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.stop()

    def now(self) -> float:
        """Its time, in seconds since the epoch."""
        return self.clock() + self.skew

    # ---- what tests do ----------------------------------------------------------------------------------------------

    @property
    def key_id(self) -> str:
        """Which key signs now."""
        return self._keys[0].id

    @property
    def private_key(self) -> rsa.RSAPrivateKey:
        """What signs now, for tests that make tokens of their own."""
        return self._keys[0].private

    @property
    def discovery_url(self) -> str:
        return f"{self.issuer}/.well-known/openid-configuration"

    @property
    def jwks_uri(self) -> str:
        return self._endpoint("certs")

    @property
    def authorization_endpoint(self) -> str:
        return self._endpoint("auth")

    @property
    def userinfo_endpoint(self) -> str:
        return self._endpoint("userinfo")

    def issue(
        self,
        subject: str,
        *,
        email: str | None = None,
        name: str | None = None,
        lifetime: float | None = None,
        audience: str | list[str] | None = None,
        **claims: Any,
    ) -> str:
        """Sign an access token.

        :param lifetime: seconds; negative: it has expired already.
        :param claims: added to it, or put in the place of what would be there; ``None`` leaves a claim out.
        """
        now = self.now()
        known = {
            "exp": int(now + (self.lifetime if lifetime is None else lifetime)),
            "iat": int(now),
            "jti": secrets.token_hex(8),
            "iss": self.issuer,
            "aud": self.audience if audience is None else audience,
            "sub": subject,
            "typ": "Bearer",
            "azp": PUBLIC_CLIENT,
            "scope": "openid email profile",
            "email": email,
            "email_verified": None if email is None else True,
            "name": name or (None if email is None else email.partition("@")[0]),
            "preferred_username": subject,
            **claims,
        }
        payload = {claim: value for claim, value in known.items() if value is not None}
        return jwt.encode(payload, self.private_key, algorithm=_ALGORITHM, headers={"kid": self.key_id})

    def approve(self, user_code: str, subject: str = "alice", *, email: str | None = None, **claims: Any) -> None:
        """Be the person who enters the code that a device shows, and agrees.

        :raises KeyError: no device shows it.
        """
        with self._lock:
            self._shown(user_code).claims = {
                "subject": subject,
                "email": f"{subject}@example.org" if email is None else email,
                **claims,
            }

    def deny(self, user_code: str) -> None:
        """Be the person who enters the code that a device shows, and does not agree."""
        with self._lock:
            self._shown(user_code).denied = True

    def user_codes(self) -> list[str]:
        """The codes that devices show now and nobody has entered."""
        with self._lock:
            return [one.code for one in self._devices.values() if one.claims is None and not one.denied]

    def rotate_keys(self, *, keep: bool = True) -> str:
        """Sign with a new key from now on, and return its id.

        :param keep: go on publishing the old ones, so that tokens signed with them stay good.
        """
        with self._lock:
            self._keys = [_Key(), *(self._keys if keep else [])]
            return self.key_id

    def revoke(self, token: str) -> None:
        """Let a token be good no more. An access token is refused by userinfo; with a refresh token its whole login dies."""
        with self._lock:
            if token in self._refresh:
                self._refresh[token][0].alive = False
            else:
                self._revoked.add(token)

    def end_logins(self) -> None:
        """Let all refresh tokens be dead, as after a long time, or when the operator ends all sessions."""
        with self._lock:
            for login, _ in self._refresh.values():
                login.alive = False

    def sign(self, claims: Json) -> str:
        """Sign any claims, as a token of this issuer."""
        return jwt.encode(claims, self.private_key, algorithm=_ALGORITHM, headers={"kid": self.key_id})

    # ---- endpoints --------------------------------------------------------------------------------------------------

    def _endpoint(self, name: str) -> str:
        return f"{self.issuer}/{_PATH}/{name}"

    def _discovery(self) -> Json:
        return {
            "issuer": self.issuer,
            "authorization_endpoint": self._endpoint("auth"),
            "token_endpoint": self._endpoint("token"),
            "device_authorization_endpoint": self._endpoint("auth/device"),
            "userinfo_endpoint": self._endpoint("userinfo"),
            "jwks_uri": self._endpoint("certs"),
            "end_session_endpoint": self._endpoint("logout"),
            "revocation_endpoint": self._endpoint("revoke"),
            "grant_types_supported": [CODE_GRANT, "refresh_token", "client_credentials", DEVICE_GRANT],
            "response_types_supported": ["code"],
            "code_challenge_methods_supported": ["S256"],
            "scopes_supported": ["openid", "email", "profile", "offline_access"],
            "id_token_signing_alg_values_supported": [_ALGORITHM],
        }

    def _jwks(self) -> Json:
        with self._lock:
            return {"keys": [key.public() for key in self._keys]}

    def _client(self, form: Mapping[str, str], authorization: str) -> str:
        name, secret = form.get("client_id", ""), form.get("client_secret")
        if authorization.startswith("Basic "):
            name, _, secret = base64.b64decode(authorization[len("Basic ") :]).decode().partition(":")
            name, secret = unquote_plus(name), unquote_plus(secret)
        if name not in self.clients or self.clients[name] != secret:
            raise _Refused(401, "invalid_client", "Invalid client or Invalid client credentials")
        return name

    def _device(self, form: Mapping[str, str], authorization: str) -> Json:
        client = self._client(form, authorization)
        code = "-".join(secrets.token_hex(2).upper() for _ in range(2))
        device = secrets.token_urlsafe(24)
        self._devices[device] = _Device(client, form.get("scope", ""), code, self.now() + 600)
        return {
            "device_code": device,
            "user_code": code,
            "verification_uri": f"{self.issuer}/device",
            "verification_uri_complete": f"{self.issuer}/device?user_code={code}",
            "expires_in": 600,
            "interval": self.interval,
        }

    def _shown(self, user_code: str) -> _Device:
        return {one.code: one for one in self._devices.values()}[user_code]

    def _token(self, form: Mapping[str, str], authorization: str) -> Json:
        client, kind = self._client(form, authorization), form.get("grant_type", "")
        if kind == DEVICE_GRANT:
            login = self._approved(form, client)
        elif kind == "refresh_token":
            login = self._refreshed(form.get("refresh_token", ""), client)
        elif kind == CODE_GRANT:
            login = self._signed_in(form, client)
        elif kind == "client_credentials":
            if self.clients[client] is None:
                raise _Refused(401, "unauthorized_client", "Public client not allowed to retrieve service account")
            login = _Login(client, {"subject": f"service-account-{client}"}, form.get("scope", ""))
        else:
            raise _Refused(400, "unsupported_grant_type")
        self.grants[kind] += 1
        answer = {
            "access_token": self.issue(**login.claims, azp=client, scope=login.scope or None),
            "token_type": "Bearer",
            "expires_in": int(self.lifetime) if self.lifetime == int(self.lifetime) else self.lifetime,
            "scope": login.scope,
        }
        if "openid" in login.scope.split() and kind == CODE_GRANT:
            answer["id_token"] = self._id_token(login)
        if kind != "client_credentials":
            fresh = secrets.token_urlsafe(32)
            self._refresh[fresh] = (login, self.now() + self.refresh_lifetime)
            offline = "offline_access" in login.scope.split()
            answer.update(refresh_token=fresh, refresh_expires_in=0 if offline else int(self.refresh_lifetime))
        return answer

    def _approved(self, form: Mapping[str, str], client: str) -> _Login:
        code = form.get("device_code", "")
        device = self._devices.get(code)
        if device is None or device.client != client:
            raise _Refused(400, "invalid_grant", "Device code not valid")
        now, too_soon = self.now(), self.now() - device.polled < self.interval
        device.polled = now
        if now > device.until:
            raise _Refused(400, "expired_token", "Device code is expired")
        if device.denied:
            raise _Refused(400, "access_denied", "The end user denied the authorization request")
        if too_soon:
            raise _Refused(400, "slow_down", "Slow down")
        if device.claims is None:
            raise _Refused(400, "authorization_pending", "The authorization request is still pending")
        del self._devices[code]
        return _Login(client, device.claims, device.scope)

    def _signed_in(self, form: Mapping[str, str], client: str) -> _Login:
        code = self._codes.redeemed(form, client)
        if code is None:
            raise _Refused(400, "invalid_grant", "Code not valid")
        return _Login(client, code.claims, code.scope, code.nonce)

    def _id_token(self, login: _Login) -> str:
        now = int(self.now())
        claims = {
            "iss": self.issuer,
            "aud": login.client,
            "azp": login.client,
            "sub": login.claims["subject"],
            "exp": now + int(self.lifetime),
            "iat": now,
            "auth_time": now,
            "typ": "ID",
            "nonce": login.nonce,
            **self.id_token_changes,
        }
        return self.sign({claim: value for claim, value in claims.items() if value is not None})

    def _refreshed(self, token: str, client: str) -> _Login:
        login, until = self._refresh.get(token, (None, 0.0))
        if login is None or login.client != client:
            raise _Refused(400, "invalid_grant", "Invalid refresh token")
        if token in login.used:
            # Somebody has a copy: nobody can tell who is the thief, so nobody gets more.
            self.reused += 1
            login.alive = False
        if not login.alive or self.now() > until:
            raise _Refused(400, "invalid_grant", "Token is not active")
        login.used.add(token)
        return login

    def _userinfo(self, authorization: str) -> Json:
        token = authorization.removeprefix("Bearer ")
        kid = str(_header(token).get("kid", ""))
        key = next((key for key in self._keys if key.id == kid), None)
        if key is None or token in self._revoked:
            raise _Refused(401, "invalid_token", "Token verification failed")
        try:
            claims: Json = jwt.decode(
                token,
                key.private.public_key(),
                algorithms=[_ALGORITHM],
                options={"verify_aud": False, "verify_exp": False, "verify_iat": False, "verify_nbf": False},
            )
        except jwt.InvalidTokenError:
            raise _Refused(401, "invalid_token", "Token verification failed") from None
        if claims["exp"] <= self.now():
            raise _Refused(401, "invalid_token", "Token verification failed")
        shown = ("sub", "email_verified", "name", "preferred_username", "given_name", "family_name", "email")
        return {"roles": [], **{claim: claims[claim] for claim in shown if claim in claims}}

    def _end(self, form: Mapping[str, str], authorization: str) -> None:
        self._client(form, authorization)
        self.revoke(form.get("refresh_token") or form.get("token", ""))

    def browse(self, method: str, query: Mapping[str, str], form: Mapping[str, str]) -> Answer:
        """Answer a browser at the authorization endpoint: with a page to log in on, or by sending it back."""
        with self._lock:
            self.requests["auth"] += 1
            if self.outage:
                return Answer(503, body="<!doctype html><title>Down</title>")
            return self._codes.answer(method, query, form, self.redirect_uris)

    def handle(
        self, method: str, path: str, form: Mapping[str, str], authorization: str
    ) -> tuple[str, int, Json | None]:
        """Answer one request: the endpoint's name, status, document."""
        path = path.partition("?")[0]
        routes: dict[tuple[str, str], tuple[str, Callable[[], Json | None]]] = {
            ("GET", self.discovery_url): ("discovery", self._discovery),
            ("GET", self.jwks_uri): ("jwks", self._jwks),
            ("GET", self.userinfo_endpoint): ("userinfo", lambda: self._userinfo(authorization)),
            ("POST", self._endpoint("token")): ("token", lambda: self._token(form, authorization)),
            ("POST", self._endpoint("auth/device")): ("device", lambda: self._device(form, authorization)),
            ("POST", self._endpoint("logout")): ("logout", lambda: self._end(form, authorization)),
            ("POST", self._endpoint("revoke")): ("revoke", lambda: self._end(form, authorization)),
        }
        name, answer = routes.get((method, self.url + path), ("unknown", _unknown))
        with self._lock:
            self.requests[name] += 1
            if self.outage == "unavailable":
                return name, 503, {"error": "temporarily_unavailable"}
            if self.outage == "drop":
                return name, 0, None
            try:
                document = answer()
            except _Refused as exc:
                return name, exc.status, exc.document
        if self.before_answer is not None:
            self.before_answer(name)
        return name, 204 if document is None else 200, document


def _unknown() -> NoReturn:
    raise _Refused(404, "not_found")


def _header(token: str) -> Json:
    try:
        header: Json = jwt.get_unverified_header(token)
    except jwt.InvalidTokenError:
        raise _Refused(401, "invalid_token", "Token verification failed") from None
    return header


class _Server(WebServer):
    def __init__(self, provider: OidcProvider) -> None:
        self.provider = provider
        super().__init__(_Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        form = {key: values[-1] for key, values in parse_qs(self.rfile.read(length).decode()).items()}
        authorization = self.headers.get("Authorization", "")
        provider = self.server.provider
        path, _, query = self.path.partition("?")
        if provider.url + path == provider.authorization_endpoint:
            asked = {key: values[-1] for key, values in parse_qs(query).items()}
            self._send(provider.browse(self.command, asked, form))
            return
        _, status, document = provider.handle(self.command, self.path, form, authorization)
        if not status:
            return
        self.send_response(status)
        content = b"" if document is None else json.dumps(document).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send(self, answer: Answer) -> None:
        content = answer.body.encode()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "text/html; charset=utf-8", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests know what they ask."""
