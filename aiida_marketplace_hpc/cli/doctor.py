"""``marketplace-hpc doctor``: check what lies between here and the cluster, one thing after the other."""

from __future__ import annotations

import functools
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.cli.common import Settings, client_options, connect, emit, exit_code, mark
from aiida_marketplace_hpc.errors import ConfigurationError, IntegrityError, MarketplaceHpcError, NotSupported
from aiida_marketplace_hpc.protocol import API_VERSION

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.gateway import HpcGateway, Root

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    :param good: ``None``: it was not, because something before it failed.
    :param text: what was found, or what is wrong and what to do.
    """

    name: str
    good: bool | None
    text: str


class _Checks:
    def __init__(self) -> None:
        self.all: list[Check] = []
        self.failure: MarketplaceHpcError | None = None
        self._stopped = False

    def run(self, name: str, find: Callable[[], T], say: Callable[[T], str], *, needed: bool = False) -> T | None:
        """Make one check, unless a needed one has failed; return what it found.

        :param say: makes the text for a person of it.
        :param needed: those that follow make no sense without it.
        """
        if self._stopped:
            self.all.append(Check(name, None, "not checked"))
            return None
        try:
            found = find()
            self.all.append(Check(name, True, say(found)))
            return found
        except OSError as exc:
            error: MarketplaceHpcError = MarketplaceHpcError(str(exc))
        except MarketplaceHpcError as exc:
            error = exc
        self.all.append(Check(name, False, str(error)))
        self.failure = self.failure or error
        self._stopped = needed
        return None


@click.command()
@client_options()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Check address, connection, token, gateway, folders and scheduler, and say what to do about what fails.

    Writes a small file to each folder that can be written, and deletes it again.
    """
    settings = ctx.ensure_object(Settings)
    checks = _Checks()
    gateway = checks.run("address", lambda: connect(settings), _address, needed=True)
    if gateway is not None:
        with gateway:
            _through(gateway, checks)
    lines = [f"{mark(check.good)} {check.name}: {check.text}" for check in checks.all]
    document: dict[str, Any] = {"ok": checks.failure is None, "checks": [asdict(check) for check in checks.all]}
    emit(settings, document, "\n".join(lines))
    if checks.failure is not None:
        ctx.exit(exit_code(checks.failure))


def _through(gateway: HpcGateway, checks: _Checks) -> None:
    # Through the proxy even a heartbeat needs a token, so that comes first.
    checks.run("token", gateway.token_source.token, lambda _: f"{gateway.token_source.name} gives one", needed=True)
    checks.run("connection", gateway.heartbeat, lambda _: "the gateway answers", needed=True)
    checks.run("gateway", lambda: gateway.info(refresh=True), _gateway, needed=True)
    checks.run("user", lambda: {**gateway.info(), **gateway.create_user()}, _user, needed=True)
    for root in checks.run("folders", gateway.roots, lambda roots: f"{len(roots)}", needed=True) or ():
        checks.run(f"folder {root.name}", functools.partial(_try, gateway, root), str)
    checks.run("scheduler", gateway.active_jobs, _scheduler)


def _address(gateway: HpcGateway) -> str:
    through = f", through the MarketPlace to app {gateway.app_id}" if gateway.app_id else ""
    exposed = gateway.url.startswith("http://") and not any(
        gateway.url.startswith(f"http://{host}") for host in ("localhost", "127.", "[::1]")
    )
    return f"{gateway.url}{through}{'; the token travels unencrypted: use https:// if you can' if exposed else ''}"


def _gateway(info: dict[str, Any]) -> str:
    api, oldest = str(info.get("api_version", "")), str(info.get("oldest_client", "0"))
    if _numbers(__version__) < _numbers(oldest):
        raise ConfigurationError(
            f"the gateway serves clients from version {oldest} on, this is {__version__}: upgrade it"
        )
    if api.partition(".")[0] != API_VERSION.partition(".")[0]:
        raise NotSupported(f"the gateway speaks version {api} of the protocol, this client {API_VERSION}")
    machines = ", ".join(_machine(machine) for machine in info.get("machines", ()))
    shared = "; jobs of all its users run under one account" if info.get("account_mode") == "shared" else ""
    return f"{info.get('name')} {info.get('version')}, {machines or 'no machine'}{shared}"


def _machine(machine: dict[str, Any]) -> str:
    # How a job ended is less certain there: docs/howto/run-a-gateway.md.
    without = ", without accounting" if machine.get("accounting") is False else ""
    return f"{machine.get('name')} ({machine.get('backend')}{without})"


def _user(user: dict[str, Any]) -> str:
    return f"{user.get('username')} ({user.get('email')}), home {user.get('home')}"


def _try(gateway: HpcGateway, root: Root) -> str:
    free = f", {root.free / 1024**3:.1f} GiB free" if root.free is not None else ""
    if root.read_only:
        gateway.ask("stat", path=root.path, follow=True)
        return f"{root.path}, read-only{free}"
    name = f".marketplace-hpc-doctor-{secrets.token_hex(4)}"
    remote = f"{root.path.rstrip('/')}/{name}"
    with tempfile.TemporaryDirectory() as folder:
        local, back = Path(folder, "up"), Path(folder, "down")
        local.write_bytes(secrets.token_bytes(1024))
        gateway.put_file(local, remote)
        try:
            gateway.get(remote, back)
            if back.read_bytes() != local.read_bytes():
                raise IntegrityError(f"a file in {root.path} came back with another content")
        finally:
            gateway.ask("remove", path=remote, missing_ok=True)
    return f"{root.path}, written and read{free}"


def _scheduler(jobs: list[dict[str, Any]]) -> str:
    ages = [job["age"] for job in jobs if job.get("age") is not None]
    return f"{len(jobs)} active jobs" + (f", seen {max(ages):.0f} s ago" if ages else "")


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in version.split(".")]
