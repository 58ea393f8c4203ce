"""A gateway as its operator runs it: the installed command, in a process of its own."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aiida_marketplace_hpc.testing.machine import (
    Machine,
    ProcessEntry,
    RigError,
    free_ports,
    process_table,
    tail,
    wait_until,
)
from aiida_marketplace_hpc.testing.rig import Rig

if TYPE_CHECKING:
    from aiida_marketplace_hpc.testing.oidc import OidcProvider

_READY = re.compile(r"^listening on (http://\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class ServedRequest:
    """One line of a gateway's access log that is about a request.

    :param time: when it was answered, as the gateway words it.
    :param path: without the query, which is ``query``.
    :param capability: the operationId; ``None`` for a path that is none.
    :param outcome: ``ok``, the code of an error, or ``broken off``.
    :param duration: seconds.
    :param user: whose token it was; ``None`` if there was none, or a wrong one.
    :param client: the address that it came from.
    """

    time: str
    request_id: str
    method: str
    path: str
    query: str
    capability: str | None
    status: int
    outcome: str
    duration: float
    user: str | None
    client: str | None


class GatewayProcess(Rig):
    """``marketplace-hpc gateway serve`` on a machine.

    Its state, and with it jobs and users, lasts from one start to the next; :meth:`close` removes it.

    :param backend: ``local`` or ``slurm``.
    :param users: the names behind the development tokens; each gets a token of its own.
    :param user: the account it runs under; by default the machine's.
    :param home: template of the users' homes.
    :param roots: further roots, by name; by default scratch and the read-only software of the machine.
    :param classic: serve what the published gateway does and nothing else.
    :param options: further options of ``serve``.
    :param env: added to its environment, such as :attr:`SlurmCluster.env`.
    :param beside: another one that has been started: this one uses its state, with database and spool, its tokens, its
        provider and its homes, and is closed before it.
    :param own_state: with ``beside``, have a state folder of its own all the same; the database is then for ``env`` to name.
    :param provider: accept the tokens of this provider instead of development tokens; :attr:`tokens` is empty.
    :param auth: how they are checked: ``oidc``, by the gateway, or ``marketplace``, by asking the provider.
    :param page_client: the provider's client with which browsers are signed in, at ``localhost``: to them, another site than
        the provider, whose address is 127.0.0.1.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        backend: str = "local",
        users: Sequence[str] = ("alice", "bob"),
        user: str | None = None,
        home: str | None = None,
        roots: Mapping[str, str] | None = None,
        classic: bool = False,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        beside: GatewayProcess | None = None,
        own_state: bool = False,
        provider: OidcProvider | None = None,
        auth: Literal["oidc", "marketplace"] = "oidc",
        page_client: str = "",
    ) -> None:
        self.machine = machine
        self.backend = backend
        self.provider: OidcProvider | None = beside.provider if beside else provider
        self.auth: Literal["oidc", "marketplace"] = beside.auth if beside else auth
        own = {} if provider else {name: secrets.token_urlsafe(24) for name in users}
        self.tokens: dict[str, str] = beside.tokens if beside else own
        self.user = user or machine.user
        self.home: str = home or (beside.home if beside else f"{machine.home}/{{username}}")
        default = {"scratch": f"{machine.scratch}/{{username}}", "software": f"{machine.software}:ro"}
        self.roots = dict(default if roots is None else roots)
        self._options = [*(["--classic"] if classic else []), *options]
        self._page_client = page_client
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._url = ""
        self._shares_state_of = None if own_state else beside
        self.state = ""
        self._log_directory = Path()

    @property
    def url(self) -> str:
        """Where it listens; stays the same over restarts."""
        if not self._url:
            raise RigError("the gateway has not been started")
        return self._url

    @property
    def page_url(self) -> str:
        """Where browsers reach it."""
        return f"http://localhost:{self._port}"

    @property
    def token(self) -> str:
        """The development token of the first of its users."""
        return next(iter(self.tokens.values()))

    @property
    def command(self) -> Path:
        """The installed command ``marketplace-hpc``."""
        return Path(sys.executable).with_name("marketplace-hpc")

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RigError("the gateway has not been started")
        return self._process.pid

    @property
    def process(self) -> ProcessEntry:
        """The process that serves; others may stand around it that put it on its machine."""
        wanted = (str(self.command), str(self._port))
        entries = [one for one in process_table() if wanted[0] in one.command()[1:2] and wanted[1] in one.command()]
        if len(entries) != 1:
            raise RigError(f"{len(entries)} processes serve on port {self._port}")
        return entries[0]

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What it has printed, over all its starts."""
        return self._log_file.read_text(encoding="utf-8", errors="replace") if self._log_file.exists() else ""

    @property
    def _log_file(self) -> Path:
        return self._log_directory / "gateway.log"

    def start(self, within: float = 30.0) -> None:
        """Start it and wait until it listens.

        :param within: seconds.
        :raises RigError: with the end of its log, if it ends or does not listen in time.
        """
        if not self.command.exists():
            raise RigError(
                f"{self.command} does not exist; install the package: {sys.executable} -m pip install -e '.[dev]'"
            )
        if not self.state:
            self._log_directory = Path(tempfile.mkdtemp(prefix="mphpc-gateway-log-"))
            shared = self._shares_state_of.state if self._shares_state_of else ""
            self.state = shared or self.machine.make_directory("gateway", user=self.user, mode=0o700)
            self._port = free_ports(1)[0]  # not 0: see there
        seen = len(self.log)
        with self._log_file.open("ab") as log:
            self._process = self.machine.popen(
                [str(self.command), *self._arguments()],
                user=self.user,
                # Tokens among the arguments would be seen by everybody on the machine.
                env={"PYTHONUNBUFFERED": "1", "MARKETPLACE_HPC_DEV_TOKEN": json.dumps(self.tokens), **self._env},
                stdout=log,
                stderr=log,
            )
        wait_until(
            lambda: not self.running or _READY.search(self.log, seen) is not None,
            within=within,
            failure=lambda: f"the gateway does not listen\n{tail(self._log_file)}",
        )
        said = _READY.search(self.log, seen)
        if not self.running or said is None:
            raise RigError(f"the gateway ended while it started\n{tail(self._log_file)}")
        self._url = said[1]

    def stop(self, within: float = 15.0) -> None:
        """Ask it to end and wait for that; kill it if it does not. Nothing happens if it does not run."""
        if self._process is not None and self.running:
            self._process.terminate()
            try:
                self._process.wait(timeout=within)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """Kill it at once, as ``kill -9`` does; what it has started goes on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)

    def restart(self) -> None:
        """Start it again with the same state and port; stop it before, if it runs."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Let it hang: connections are taken, nothing is answered until :meth:`resume`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after :meth:`pause`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and remove its state. May be repeated."""
        self.resume()
        self.stop()
        if self.state:
            if self._shares_state_of is None:
                self.machine.run(["rm", "-rf", self.state])
            shutil.rmtree(self._log_directory, ignore_errors=True)
        self.state = ""

    def requests(self) -> list[ServedRequest]:
        """The requests that it has answered so far, over all its starts, in the order of their answers."""
        path = self.access_log
        if not self.machine.exists(path):
            return []
        lines = self.machine.read_text(path).splitlines(keepends=True)
        # A line without its end is being written.
        entries = [json.loads(line) for line in lines if line.endswith("\n")]
        return [ServedRequest(**entry) for entry in entries if "method" in entry]

    @property
    def access_log(self) -> str:
        """Where it writes a line of JSON for each request, on its machine."""
        return f"{self.state}/access-{self._port}.log"

    def _arguments(self) -> list[str]:
        arguments = ["gateway", "serve", "--backend", self.backend, "--host", "127.0.0.1", "--port", str(self._port)]
        arguments += ["--home", self.home, "--state", self.state, "--access-log", self.access_log]
        arguments += ["--stop-timeout", "10"]
        for name, template in self.roots.items():
            arguments += ["--root", f"{name}={template}"]
        if self.provider is not None:
            arguments += ["--auth", self.auth, "--issuer", self.provider.issuer]
            audience = self.provider.audience if self.auth == "oidc" else []
            for name in [audience] if isinstance(audience, str) else audience:
                arguments += ["--audience", name]
            if self._page_client:
                arguments += ["--page-url", self.page_url, "--page-client", self._page_client]
                self.provider.redirect_uris[self._page_client] = [f"{self.page_url}/sign-in/callback"]
        return [*arguments, *self._options]
