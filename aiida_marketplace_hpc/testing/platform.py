"""A stand-in for the MarketPlace: who somebody is, what an app offers, and the proxy through which apps are reached.

Built from what the published programs send and expect; how the real platform treats what they never send is unknown, so the
strict modes go further than it may. It forwards by the OpenAPI document that a provider uploads, or by our own table, over
HTTP or by messages through a broker. In front of it is a :class:`~aiida_marketplace_hpc.testing.proxy.FaultyProxy`, with the
limits of strict proxies, and all faults.
"""

from __future__ import annotations

import http.client
import io
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import IO, TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from aiida_marketplace_hpc.protocol import CAPABILITIES
from aiida_marketplace_hpc.testing.machine import RigError
from aiida_marketplace_hpc.testing.proxy import FaultyProxy
from aiida_marketplace_hpc.testing.web import WebServer

if TYPE_CHECKING:
    from aiida_marketplace_hpc.testing.oidc import OidcProvider
    from aiida_marketplace_hpc.testing.relay import Messages

Json = dict[str, Any]

APP_ID = "13f59545-cb1f-4113-b873-6bb079539788"
"""An id by which the published client knows an app (``mc``)."""
USERINFO = "/auth/realms/marketplace/protocol/openid-connect/userinfo"
_INFO = "/api/applications/"
_PROXY = "/api/applications/proxy/"
_BROKER = "/message-broker"
_API_VERSION = "0.3.0"
_METHODS = ("get", "put", "post", "patch", "delete")
_OF_ONE_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}
)
_PATIENCE = 60.0
_PIECE = 256 * 1024
_IN_MEMORY = 8 * 1024 * 1024


@dataclass(frozen=True)
class Offer:
    """Where a capability leads.

    :param path: with ``{name}`` for each parameter that stands in it.
    :param parameters: the names of all that are declared.
    """

    method: str
    path: str
    parameters: frozenset[str]


def offers_of_table(*, published: bool = False) -> dict[str, Offer]:
    """What our own table offers through the platform, by capability.

    :param published: only the nine, with the parameters as first published.
    """
    return {
        row.name: Offer(
            row.method,
            row.path,
            frozenset(parameter.name for parameter in row.parameters if parameter.published or not published),
        )
        for row in CAPABILITIES
        if row.registered and (row.published or not published)
    }


def offers_of_document(document: Mapping[str, Any]) -> dict[str, Offer]:
    """What an OpenAPI document offers, by operationId.

    :raises ValueError: an operation has no operationId, or two have the same.
    """
    offers: dict[str, Offer] = {}
    for path, item in document["paths"].items():
        for method in _METHODS:
            if method not in item:
                continue
            operation = item[method]
            name = operation.get("operationId")
            if not name or name in offers:
                raise ValueError(f"{method.upper()} {path} needs an operationId of its own")
            declared = [*item.get("parameters", ()), *operation.get("parameters", ())]
            offers[name] = Offer(method.upper(), path, frozenset(parameter["name"] for parameter in declared))
    return offers


class Platform:
    """The MarketPlace on a free port of 127.0.0.1, with one app; a context manager. Plain HTTP.

    What the attributes say may be changed while it runs.

    :param gateway_url: ``http://HOST:PORT`` of the app.
    :param document: the OpenAPI document that its provider uploaded; by default our table.
    :param provider: refuses tokens that are none of this provider's, and knows whose they are; by default all are passed on.
    :param only_published: offer and declare nothing but the nine, as first published; not with ``document``.
    :param undeclared: what happens to query parameters that are not declared.
    :param known_headers_only: drop all headers that a proxy need not know.
    :param max_body: answer 413 to requests whose body has more bytes.
    :param refuse_chunked: answer 411 to requests with a chunked body.
    :param broker: the address of a message broker, with name and password, through which the app is reached, and not at
        ``gateway_url``. Needed if the document's server is the platform's broker.
    :param secret: that of the app, from which the name of its queue follows.
    :param patience: seconds after which an app that does not answer is given up.
    :raises ValueError: the document wants a broker, and there is none.
    """

    def __init__(
        self,
        gateway_url: str,
        document: Mapping[str, Any] | None = None,
        *,
        provider: OidcProvider | None = None,
        app_id: str = APP_ID,
        only_published: bool = False,
        undeclared: Literal["pass", "drop", "refuse"] = "drop",
        known_headers_only: bool = False,
        max_body: int | None = None,
        refuse_chunked: bool = False,
        broker: str = "",
        secret: str = "",
        patience: float = _PATIENCE,
    ) -> None:
        said = (document or {}).get("info", {})
        servers = (document or {}).get("servers") or [{}]
        if str(servers[0].get("url", "")).endswith(_BROKER) and not broker:
            raise ValueError(f"the document's server is {servers[0]['url']}: give the platform a broker")
        self.gateway_url = gateway_url
        self.provider = provider
        self.app_id = app_id
        self.name: str = said.get("x-application-name", "hpc-gateway")
        self.api_version: str = said.get("x-api-version", _API_VERSION)
        self.offers = offers_of_document(document) if document else offers_of_table(published=only_published)
        self.undeclared = undeclared
        self.purchased = True
        """Whether the caller has bought a product of the app; without one, everything about it is refused."""
        self.patience = patience
        self.messages: Messages | None = _messages(broker, app_id, secret, patience) if broker else None
        """What hands requests to the app by messages."""
        self._server = _Server(self)
        self.proxy = FaultyProxy(
            self._server.url,
            max_body=max_body,
            refuse_chunked=refuse_chunked,
            known_headers_only=known_headers_only,
            buffered=True,
        )
        """What stands in front: it has all requests, and faults on demand."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.proxy.url

    def __enter__(self) -> Platform:
        self._server.start()
        self.proxy.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.proxy.close()
        self._server.stop()
        if self.messages is not None:
            self.messages.close()

    def application(self) -> Json:
        """What it says of the app."""
        return {
            "id": self.app_id,
            "name": self.name,
            "api_version": self.api_version,
            "capabilities": [{"name": name} for name in self.offers],
        }

    def userinfo(self, authorization: str) -> tuple[int, Json]:
        """Say who somebody is: status and document."""
        if self.provider is None:
            return 404, {"message": "nobody is known here"}
        path = urlsplit(self.provider.userinfo_endpoint).path
        _, status, document = self.provider.handle("GET", path, {}, authorization)
        return status, document or {}

    def refusal(self, app_id: str, authorization: str) -> tuple[int, str] | None:
        """Why a request that concerns an app is refused: status and reason."""
        if not authorization or (self.provider is not None and self.userinfo(authorization)[0] != 200):
            return 401, "the token is not valid"
        if app_id != self.app_id:
            return 404, f"there is no application {app_id}"
        if not self.purchased:
            return 403, "no product of this application was purchased"
        return None

    def target(self, method: str, capability: str, query: str) -> str | tuple[int, str]:
        """Where a request goes, path and query; or status and reason of a refusal."""
        offer = self.offers.get(capability)
        if offer is None:
            return 404, f"the application has no capability {capability}"
        if method != offer.method:
            return 405, f"{capability} is asked for with {offer.method}"
        path, rest = offer.path, []
        # The published document declares some parameters of the path as those of the query: they go by their names.
        for name, value in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
            if f"{{{name}}}" in path:
                path = path.replace(f"{{{name}}}", quote(value, safe="", errors="surrogateescape"))
            elif name in offer.parameters or self.undeclared == "pass":
                rest.append((name, value))
            elif self.undeclared == "refuse":
                return 400, f"{capability} has no parameter {name}"
        if missing := re.search(r"{(\w+)}", path):
            return 400, f"{capability} needs {missing[1]}"
        encoded = urlencode(rest, quote_via=quote, errors="surrogateescape")
        return f"{path}?{encoded}" if encoded else path


def _messages(broker: str, app_id: str, secret: str, patience: float) -> Messages:
    from aiida_marketplace_hpc.gateway.relay_messages import queue_name
    from aiida_marketplace_hpc.testing.relay import BrokerForwarder

    return BrokerForwarder(broker, queue_name(app_id, secret), patience)


class _Server(WebServer):
    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        super().__init__(_Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as body:
            # Read in any case: what is left of it would be taken for the next request. The proxy in front says its length.
            left = int(self.headers.get("Content-Length") or 0)
            while left and (piece := self.rfile.read(min(left, _PIECE))):
                left -= len(piece)
                body.write(piece)
            body.seek(0)
            self._handle(body)

    do_PUT = do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def _handle(self, body: IO[bytes]) -> None:
        platform = self.server.platform
        parts = urlsplit(self.path)
        authorization = self.headers.get("Authorization", "")
        if parts.path == USERINFO:
            self._say(*platform.userinfo(authorization))
            return
        if not parts.path.startswith(_INFO):
            self._refuse(404, "there is nothing here")
            return
        proxied = parts.path.startswith(_PROXY)
        app_id, _, capability = parts.path.removeprefix(_PROXY if proxied else _INFO).partition("/")
        if refusal := platform.refusal(app_id, authorization):
            self._refuse(*refusal)
        elif not proxied:
            self._say(200, platform.application())
        else:
            target = platform.target(self.command, capability, parts.query)
            if not isinstance(target, str):
                self._refuse(*target)
            elif platform.messages is not None:
                self._send_message(platform.messages, target, body)
            else:
                self._forward(target, body)

    def _forward(self, target: str, body: IO[bytes]) -> None:
        parts = urlsplit(self.server.platform.gateway_url)
        gateway = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=self.server.platform.patience)
        headers = self._headers_to_forward()
        headers["Content-Length"] = self.headers.get("Content-Length") or "0"
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as content:
            try:
                gateway.request(self.command, parts.path + target, body, headers)
                answer = gateway.getresponse()
                while piece := answer.read(_PIECE):
                    content.write(piece)
            except (OSError, http.client.HTTPException):
                self._refuse(502, "the application does not answer")
                return
            finally:
                gateway.close()
            self._answer(answer.status, answer.getheaders(), content)

    def _send_message(self, messages: Messages, target: str, body: IO[bytes]) -> None:
        path, _, query = target.partition("?")
        try:
            text = body.read().decode()
        except UnicodeDecodeError:
            self._refuse(415, "the application is behind the message broker, which carries only text")
            return
        headers = {name.lower(): value for name, value in self._headers_to_forward().items()}
        # In a message they are texts: what is no UTF-8 does not survive.
        asked = dict(parse_qsl(query, keep_blank_values=True, errors="replace"))
        try:
            answer = messages.ask(self.command, path.lstrip("/"), asked, headers, text or None)
        except RigError:
            self._refuse(504, "the application did not answer in time")
        except ConnectionError:
            self._refuse(502, "the message broker does not answer")
        else:
            with io.BytesIO(answer.body.encode()) as content:
                content.seek(0, io.SEEK_END)
                self._answer(answer.status, list(answer.headers.items()), content)

    def _headers_to_forward(self) -> dict[str, str]:
        return {name: value for name, value in self.headers.items() if name.lower() not in _OF_ONE_HOP}

    def _answer(self, status: int, headers: Iterable[tuple[str, str]], content: IO[bytes]) -> None:
        """Pass an answer on; ``content`` stands at its end."""
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _OF_ONE_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(content.tell()))
        self.end_headers()
        content.seek(0)
        while piece := content.read(_PIECE):
            self.wfile.write(piece)

    def _refuse(self, status: int, message: str) -> None:
        self._say(status, {"message": message})

    def _say(self, status: int, document: Json) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests know what they ask."""
