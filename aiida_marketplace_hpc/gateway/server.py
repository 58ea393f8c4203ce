"""Running the application as a process: the socket, the signals, the one line that says it is ready."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.supervisors import ChangeReload

import aiida_marketplace_hpc
from aiida_marketplace_hpc.addresses import is_loopback
from aiida_marketplace_hpc.errors import ConfigurationError, Unavailable
from aiida_marketplace_hpc.gateway import log
from aiida_marketplace_hpc.gateway.account import SEPARATION, check_account
from aiida_marketplace_hpc.gateway.app import create_app
from aiida_marketplace_hpc.gateway.auth.chosen import authenticator
from aiida_marketplace_hpc.gateway.classic.app import create_app as create_classic_app
from aiida_marketplace_hpc.gateway.config import RootTemplate, Settings, load
from aiida_marketplace_hpc.gateway.connections import KEEP_ALIVE, Connection
from aiida_marketplace_hpc.gateway.continuity import check_living_jobs
from aiida_marketplace_hpc.gateway.databases import shown_url
from aiida_marketplace_hpc.gateway.ledger import Ledger
from aiida_marketplace_hpc.gateway.service import Gateway, make_backend

logger = logging.getLogger(__name__)

_DATABASE_PATIENCE = 30.0
"""Seconds that the database may take to come up, for instance when the whole machine starts."""
_UNWIND = 10
"""Seconds that handlers have after their connections were cut: to notice, and to keep what has arrived."""


class Server(uvicorn.Server):
    """Serves a gateway, and stops in good order.

    Asked to stop, it takes no new connections and no new requests: whoever comes is refused before anything was sent, which
    clients may repeat. Long operations end at their next step. Transfers and other requests under way go on for
    ``stop_timeout`` seconds; then their connections are cut, which is to them what a broken line is: an upload keeps what
    has arrived, and both sides know what is missing.

    :param announce: print where it listens when it does, and not before.
    """

    def __init__(self, gateway: Gateway, *, announce: bool = True) -> None:
        super().__init__(configuration(gateway))
        self._gateway = gateway
        self._announce = announce

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gateway.readiness.stopping = True
        self._gateway.operations.stop()
        cut = asyncio.get_running_loop().call_later(self._gateway.settings.stop_timeout, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    def _cut(self) -> None:
        connections = list(self.server_state.connections)
        if connections:
            logger.warning("%d connections are cut after %d s", len(connections), self._gateway.settings.stop_timeout)
        for connection in connections:
            connection.transport.abort()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._announce and self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            scheme = "https" if self._gateway.settings.certfile else "http"
            print(f"listening on {scheme}://{shown}:{port}", flush=True)  # noqa: T201 - scripts wait for this line.


def serve(settings: Settings, flags: dict[str, Any], config: Path | None, *, reload: bool = False) -> None:
    """Serve until a signal ends it.

    :param flags: with ``config``, what ``settings`` were made of; a process that starts after a change of the code makes
        them anew.
    :param reload: start again in a new process whenever the code of this package changes.
    :raises ConfigurationError: if the address is taken, the state folder cannot be written, or a setting does not fit.
    """
    _log_to_stderr(settings)
    check_account(settings)
    issuer = authenticator(settings).issuer
    state = settings.state.expanduser().absolute()
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        (state / ".writable").touch()
    except OSError as exc:
        raise ConfigurationError(
            f"the state folder {state} cannot be written ({exc.strerror}): give --state DIR"
        ) from exc
    if settings.backend != "firecrest":  # Its file systems are not here.
        for root in settings.roots:
            check_root(root)
    check_tls(settings)
    _prepare_database(settings)
    listener = _listen(settings.host, settings.port)
    for line in _welcome(settings, issuer):
        logger.info("%s", line)
    with listener:
        if reload:
            package = Path(aiida_marketplace_hpc.__file__).parent
            watched = uvicorn.Config(
                "aiida_marketplace_hpc.gateway.app:create_app", reload=True, reload_dirs=[str(package)]
            )
            ChangeReload(watched, target=_Reloaded(flags, config).run, sockets=[listener]).run()
        else:
            run(settings, [listener])


def run(settings: Settings, sockets: list[socket.socket]) -> None:
    """Run the application on a socket that is listening already."""
    gateway = Gateway(settings)
    Server(gateway).run(sockets=sockets)


def configuration(gateway: Gateway) -> uvicorn.Config:
    """How HTTP is served to whoever connects."""
    settings = gateway.settings
    return uvicorn.Config(
        create_classic_app(gateway) if settings.classic else create_app(gateway),
        http=partial(Connection, most=settings.connections),  # type: ignore[arg-type]
        ssl_certfile=settings.certfile,
        ssl_keyfile=settings.keyfile,
        proxy_headers=bool(settings.trusted_proxy),
        forwarded_allow_ips=list(settings.trusted_proxy),
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=settings.stop_timeout + _UNWIND,
        lifespan="on",
        ws="none",
    )


class _Reloaded:
    """What the process that is started after a change does; it travels there by pickle."""

    def __init__(self, flags: dict[str, Any], config: Path | None) -> None:
        self._flags = flags
        self._config = config

    def run(self, sockets: list[socket.socket] | None) -> None:
        settings = load(self._flags, self._config)
        _log_to_stderr(settings)
        run(settings, sockets or [])


def _log_to_stderr(settings: Settings) -> None:
    secrets = [
        *settings.dev_token.values(),
        settings.firecrest_client_secret.get_secret_value(),
        settings.firecrest_token.get_secret_value(),
        settings.page_client_secret.get_secret_value(),
    ]
    log.set_up(settings.log_format, settings.log_level, secrets=secrets)


def _prepare_database(settings: Settings) -> None:
    """Bring the database up to date; one that is about to come up is waited for.

    :raises ConfigurationError: if it does not answer for long, is of a newer version, or has living jobs of another cluster.
    """
    ledger = Ledger(settings.database_url)
    deadline = time.monotonic() + _DATABASE_PATIENCE
    try:
        while True:
            try:
                ledger.migrate()
                check_living_jobs(settings, ledger)
                return
            except Unavailable as exc:
                if time.monotonic() > deadline:
                    raise ConfigurationError(
                        f"the database {shown_url(settings.database_url)} does not answer, see above: check --database"
                    ) from exc
            time.sleep(1.0)
    finally:
        ledger.close()


def check_backend(settings: Settings) -> None:
    """Make sure that this version has the backend.

    :raises ConfigurationError: if not.
    """
    make_backend(settings)


def check_root(root: RootTemplate, *, make: bool = True) -> None:
    """Make sure that the part of a root which is the same for everybody is there.

    :param make: make it if it is not; else look whether it could be made.
    :raises ConfigurationError: if it cannot be used.
    """
    above, placeholder, _ = root.template.partition("{username}")
    folder = os.path.dirname(above) if placeholder else root.template
    while not make and not root.read_only and not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        if not root.read_only:
            os.makedirs(folder, exist_ok=True)
            os.stat(os.path.join(folder, "."))
        elif not os.path.isdir(folder):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    except OSError as exc:
        raise ConfigurationError(f"the folder {folder} of the root {root.name} cannot be used: {exc.strerror}") from exc
    if not root.read_only and not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(f"the folder {folder} of the root {root.name} cannot be written by this account")


def check_tls(settings: Settings) -> None:
    """Make sure that certificate and key can be used, and that the key is not everybody's."""
    if settings.certfile is None:
        return
    key = settings.keyfile or settings.certfile
    try:
        if key.stat().st_mode & 0o007:
            raise ConfigurationError(f"the key file {key} can be read by everybody: chmod 600 {key}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.certfile, settings.keyfile, password=_no_password)
    except OSError as exc:  # Those of ssl are, too.
        raise ConfigurationError(
            f"the certificate {settings.certfile} with the key {key} cannot be used: {exc.strerror or exc}"
        ) from exc


def _no_password() -> str:
    # Without this, OpenSSL would ask for it on the terminal.
    raise ConfigurationError("the key file needs a password: give one without, which only the gateway can read")


def _listen(host: str, port: int) -> socket.socket:
    try:
        # With the protocol named, asyncio sets TCP_NODELAY; without it each answer waits 40 ms for an acknowledgement.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            # Listening from here on: who reads the address may connect before the application is up, and waits.
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise ConfigurationError(
            f"cannot listen on {host}, port {port}: {reason}; choose another with --port (0: any free one) or --host"
        ) from exc


def _page(settings: Settings) -> str:
    if not settings.pages or settings.classic or settings.account_mode == "delegated":
        return "no page for people"
    if settings.auth == "dev":
        return "the page for people, at /, asks for a development token"
    if settings.page_client:
        return f"the page for people, at {settings.page_url}/, signs them in as {settings.page_client}"
    return "no page for people, as nobody could sign in there: give --page-client and --page-url"


def _welcome(settings: Settings, issuer: str) -> Sequence[str]:
    roots = ", ".join(
        f"{root.name}={root.template}{' (read-only)' if root.read_only else ''}" for root in settings.roots
    )
    machines = f"machines {', '.join(settings.machines)}, " if len(settings.machines) > 1 else ""
    tokens = {
        "dev": "development tokens are accepted: for trials and for one's own machine, not for the internet",
        "oidc": f"tokens of {issuer} for {', '.join(settings.audience)} are accepted",
        "marketplace": f"tokens that {issuer} knows are accepted",
    }
    if settings.account_mode == "own":
        served = f"served is {settings.owner or 'who has the token'} alone"
    else:
        served = "served is whom you admit" if settings.closed else "served is everybody whose token is accepted"
    lines = [
        f"backend {settings.backend}, {machines}roots {roots}",
        f"cluster account {settings.account_mode}: {SEPARATION[settings.account_mode]}",
        tokens[settings.auth],
        served,
        _page(settings),
    ]
    if settings.classic:
        lines.append(
            "only what was published is served: a launch that is sent twice runs twice, and no job has a state"
        )
    if settings.certfile is None and not settings.trusted_proxy and not is_loopback(settings.host):
        lines.append(
            f"without TLS on {settings.host}: everybody on the way can read the users' tokens; give --certfile, or put a "
            "reverse proxy in front and give --trusted-proxy"
        )
    return lines
