"""AiiDA's transport: every file operation on the cluster through the gateway."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import click
from aiida.common.exceptions import InvalidOperation
from aiida.transports.transport import AsyncTransport, validate_positive_number

from aiida_marketplace_hpc.client.auth import TokenSource
from aiida_marketplace_hpc.client.far import FarSide
from aiida_marketplace_hpc.client.files import RemoteDisk
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.client.routes import DirectRoute
from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.offloop import OffLoop

DEFAULT_TOKEN_SOURCE = "env:MP_ACCESS_TOKEN"  # noqa: S105 - where the token is, not the token.
DEFAULT_MAX_IO = 8
_SCHEDULER_CALLS = 4
MACHINE = "gateway_machine"
"""The key under which the parameter ``machine`` is stored: AiiDA itself passes the computer's host name to every transport
as ``machine``, so that a stored parameter of that name would make it fail."""


@dataclass(frozen=True)
class Connection:
    """One gateway as one AiiDA process uses it; shared by all transports with the same parameters.

    Shared, because AiiDA makes a transport for each batch of tasks, and connections, tokens and what the gateway says about
    itself outlive those.
    """

    gateway: HpcGateway
    far: FarSide
    off_loop: OffLoop
    """For the transport."""
    scheduler_off_loop: OffLoop
    """For the scheduler, whose calls must not wait for transfers of hours to end."""
    missing: WeakKeyDictionary[asyncio.Task[Any], str] = field(default_factory=WeakKeyDictionary)
    """The tasks whose last call asked whether a path exists and was told no, with that path."""

    def on_disk(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Do something to the cluster's disk; blocks."""
        return getattr(self.far.disk, operation)(*args, **kwargs)

    def on_jobs(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Ask something about jobs, by the name of a method of ``HpcGateway``; blocks."""
        return getattr(self.far.jobs, operation)(*args, **kwargs)


_connections: dict[tuple[Any, ...], Connection] = {}
_connections_lock = threading.Lock()


def connection(url: str, app_id: str, machine: str, token_source: str, max_io_allowed: int) -> Connection:
    """The connection for these parameters; making one does not touch the network."""
    key = (url, app_id, machine, token_source, max_io_allowed)
    with _connections_lock:
        if key not in _connections:
            gateway = HpcGateway(url, app_id=app_id, token_source=token_source, machine=machine)
            far = FarSide(gateway, max_io_allowed)
            _connections[key] = Connection(gateway, far, OffLoop(max_io_allowed), OffLoop(_SCHEDULER_CALLS))
        return _connections[key]


def forget_connections(url: str) -> None:
    """Drop what is known about the gateway at an address, where another one is to be from now on, as in tests, whose ports
    come again. May be repeated."""
    with _connections_lock:
        for key in [key for key in _connections if key[0] == url]:
            dropped = _connections.pop(key)
            dropped.far.close()
            dropped.gateway.close()


def _checked(check: Callable[[str], object]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(_: click.Context, __: click.Parameter, value: Any) -> Any:
        try:
            check(str(value or ""))
        except ConfigurationError as exc:
            raise click.BadParameter(exc.message) from exc
        return value

    return callback


def _store_machine(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if not ctx.params.get(MACHINE):
        ctx.params[MACHINE] = value or ""


def _stored_machine(ctx: click.Context, _: click.Parameter, value: str | None) -> str:
    return value or str(ctx.params.get(MACHINE) or "")


def _empty_if_none(_: click.Context, __: click.Parameter, value: str | None) -> str:
    return value or ""


def _unprompted(default: Any) -> dict[str, Any]:
    """An option that is accepted but not asked for."""
    return {
        "default": default,
        "non_interactive_default": True,
        "prompt_fn": lambda _: False,
        "callback": lambda _, __, value: default if value is None else value,
    }


def _in_pool(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The asynchronous form of an operation; the synchronous one is found through its attribute ``operation``."""

    async def method(self: MarketplaceHpcTransport, *args: Any, **kwargs: Any) -> Any:
        self._last_found_missing()
        return await self.connection.off_loop.run(self.connection.on_disk, operation.__name__, *args, **kwargs)

    return _form_of(operation, method)


def _form_of(operation: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    method.operation = operation  # type: ignore[attr-defined]
    method.__name__ = f"{operation.__name__.lstrip('_')}_async"
    method.__doc__ = operation.__doc__
    return method


class MarketplaceHpcTransport(AsyncTransport):
    """Support for clusters that can be reached only through an HPC gateway: HTTPS and a token instead of SSH.

    Paths are absolute paths on the cluster below one of the gateway's roots. There is no shell: ``exec_command_wait`` raises
    :class:`NotImplementedError`.

    :param url: the gateway's address, or with ``app_id`` the MarketPlace platform's.
    :param app_id: the gateway's application id on the platform; empty: talk to the gateway directly.
    :param token_source: where the token is: ``env:NAME``, ``file:PATH``, ``command:CMD``, ``login:NAME``. The token itself is
        never stored.
    :param max_io_allowed: how many requests may be under way at once.
    """

    DEFAULT_MINIMUM_JOB_POLL_INTERVAL = 5.0
    """Seconds. A poll is one request whatever the number of jobs, but AiiDA spends 20 ms on each of them then."""
    _DEFAULT_SAFE_OPEN_INTERVAL = 0.0

    _valid_auth_options: ClassVar[list[tuple[str, dict[str, Any]]]] = [
        (
            "url",
            {
                "type": str,
                "prompt": "Gateway address (URL)",
                "help": "The gateway's address, such as https://hpc.example.org; with an app id, the platform's.",
                "non_interactive_default": True,
                "callback": _checked(DirectRoute),
            },
        ),
        (
            "app_id",
            {
                "type": str,
                "default": "",
                "prompt": "MarketPlace app id (empty: no platform in between)",
                "help": "The gateway's application id on the MarketPlace, if it is reached through the platform's proxy.",
                "non_interactive_default": True,
                "callback": _empty_if_none,
            },
        ),
        (
            "machine",
            {
                "type": str,
                "default": "",
                "prompt": "Machine (empty: the gateway's only or default one)",
                "help": "The system to use, of a gateway that has several.",
                "non_interactive_default": True,
                "callback": _store_machine,
                "expose_value": False,
            },
        ),
        (
            # So that what `verdi computer export config` writes can be read again.
            MACHINE,
            {
                "type": str,
                "hidden": True,
                "prompt_fn": lambda _: False,
                "contextual_default": lambda _: None,
                "callback": _stored_machine,
            },
        ),
        (
            "token_source",
            {
                "type": str,
                "default": DEFAULT_TOKEN_SOURCE,
                "prompt": "Where the access token is (env:NAME, file:PATH, command:CMD or login:NAME)",
                "help": "Never the token itself. env:NAME reads an environment variable (of the daemon, too: set it before "
                "the daemon is started), file:PATH a file that only you can read, command:CMD the output of a program, "
                "login:NAME what `marketplace-hpc login NAME` has kept.",
                "non_interactive_default": True,
                "callback": _checked(TokenSource.parse),
            },
        ),
        (
            "max_io_allowed",
            {
                "type": int,
                "default": DEFAULT_MAX_IO,
                "prompt": "Requests at once",
                "help": "The greatest number of requests that one process has under way at the same time.",
                "non_interactive_default": True,
                "callback": validate_positive_number,
            },
        ),
    ]
    _common_auth_options: ClassVar[list[tuple[str, dict[str, Any]]]] = [
        (
            "use_login_shell",
            {"switch": True, "help": "Has no meaning here: there is no shell.", **_unprompted(False)},
        ),
        (
            "safe_interval",
            {"type": float, "help": "Seconds between opening connections; HTTP needs none.", **_unprompted(0.0)},
        ),
    ]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("use_login_shell", False)
        super().__init__(*args, **{key: value for key, value in kwargs.items() if value is not None})
        self._parameters: dict[str, Any] = {
            "url": kwargs.get("url") or "",
            "app_id": kwargs.get("app_id") or "",
            "machine": kwargs.get(MACHINE) or "",
            "token_source": kwargs.get("token_source") or DEFAULT_TOKEN_SOURCE,
            "max_io_allowed": int(kwargs.get("max_io_allowed") or DEFAULT_MAX_IO),
        }

    @classmethod
    def get_valid_auth_params(cls) -> list[str]:
        """The names under which parameters are stored; see :data:`MACHINE`."""
        return [name for name in cls.auth_options if name != "machine"]

    @classmethod
    def _get_machine_suggestion_string(cls, computer: Any) -> str:
        return str(computer.get_configuration().get(MACHINE) or "")

    @classmethod
    def _get_use_login_shell_suggestion_string(cls, computer: Any) -> bool:
        return False

    def __str__(self) -> str:
        return f"marketplace_hpc [{'OPEN' if self._is_open else 'CLOSED'}] {self._parameters['url']}"

    @property
    def connection(self) -> Connection:
        """What this transport works with.

        :raises ConfigurationError: if the computer's parameters make no sense.
        """
        if not self._parameters["url"]:
            raise ConfigurationError("this computer has no gateway: run verdi computer configure marketplace_hpc LABEL")
        return connection(**self._parameters)

    @property
    def max_io_allowed(self) -> int:
        return int(self._parameters["max_io_allowed"])

    def run_command_blocking(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make the call behind one of the asynchronous methods from synchronous code, wherever that runs."""
        operation = func.operation  # type: ignore[attr-defined]
        return self.connection.off_loop.run_blocking(self.connection.on_disk, operation.__name__, *args, **kwargs)

    # Opening costs nothing: connections are made by the first request that needs one.

    def open(self) -> MarketplaceHpcTransport:
        """Open the transport.

        :raises InvalidOperation: if it is open.
        :raises ConfigurationError: if the computer's parameters make no sense.
        """
        if self._is_open:
            raise InvalidOperation("Cannot open the transport twice")
        _ = self.connection
        self._is_open: bool = True
        return self

    def close(self) -> None:
        """Close the transport.

        :raises InvalidOperation: if it is closed.
        """
        if not self._is_open:
            raise InvalidOperation("Cannot close the transport: it is already closed")
        self._is_open = False

    async def open_async(self) -> MarketplaceHpcTransport:
        """Open the transport."""
        return self.open()

    async def close_async(self) -> None:
        """Close the transport."""
        self.close()

    chmod_async = _in_pool(RemoteDisk.chmod)
    compress_async = _in_pool(RemoteDisk.compress)
    copy_async = _in_pool(RemoteDisk.copy)
    copyfile_async = _in_pool(RemoteDisk.copyfile)
    copytree_async = _in_pool(RemoteDisk.copytree)
    extract_async = _in_pool(RemoteDisk.extract)
    get_async = _in_pool(RemoteDisk.get)
    getfile_async = _in_pool(RemoteDisk.getfile)
    gettree_async = _in_pool(RemoteDisk.gettree)
    get_attribute_async = _in_pool(RemoteDisk.get_attribute)
    get_mode_async = _in_pool(RemoteDisk.get_mode)
    glob_async = _in_pool(RemoteDisk.glob)
    iglob_async = _in_pool(RemoteDisk.iglob)
    isdir_async = _in_pool(RemoteDisk.isdir)
    isfile_async = _in_pool(RemoteDisk.isfile)
    listdir_async = _in_pool(RemoteDisk.listdir)
    listdir_withattributes_async = _in_pool(RemoteDisk.listdir_withattributes)
    mkdir_async = _in_pool(RemoteDisk.mkdir)
    normalize_async = _in_pool(RemoteDisk.normalize)
    put_async = _in_pool(RemoteDisk.put)
    putfile_async = _in_pool(RemoteDisk.putfile)
    puttree_async = _in_pool(RemoteDisk.puttree)
    remove_async = _in_pool(RemoteDisk.remove)
    rename_async = _in_pool(RemoteDisk.rename)
    rmdir_async = _in_pool(RemoteDisk.rmdir)
    rmtree_async = _in_pool(RemoteDisk.rmtree)
    symlink_async = _in_pool(RemoteDisk.symlink)
    whoami_async = _in_pool(RemoteDisk.whoami)

    # AiiDA looks whether the work directory exists and makes it if not. The first calculations in a new one do that at once:
    # what was made between a task's look and its own attempt is what the task wanted, and no reason to fail.

    async def _path_exists(self, path: Any) -> Any:
        found = await self.connection.off_loop.run(self.connection.on_disk, "path_exists", path)
        task = asyncio.current_task()
        if task is not None:
            self.connection.missing.pop(task, None)
            if not found:
                self.connection.missing[task] = str(path)
        return found

    async def _makedirs(self, path: Any, ignore_existing: bool = False) -> Any:
        ignore = ignore_existing or self._last_found_missing() == str(path)
        await self.connection.off_loop.run(self.connection.on_disk, "makedirs", path, ignore)

    path_exists_async = _form_of(RemoteDisk.path_exists, _path_exists)
    makedirs_async = _form_of(RemoteDisk.makedirs, _makedirs)

    def _last_found_missing(self) -> str | None:
        """The path that this task was told does not exist, if that was its last call; it is forgotten."""
        task = asyncio.current_task()
        return None if task is None else self.connection.missing.pop(task, None)

    def iglob(self, pathname: Any) -> Any:
        """Iterate over the paths that match a pattern."""
        return self.run_command_blocking(self.iglob_async, pathname)

    async def copy_from_remote_to_remote_async(
        self, transportdestination: Any, remotesource: Any, remotedestination: Any, **kwargs: Any
    ) -> None:
        """Copy files to another computer, by way of this one."""
        dereference = kwargs.pop("dereference", True)
        run = self.connection.off_loop.run
        folder = await run(tempfile.mkdtemp)
        try:
            await self.get_async(remotesource, folder, dereference=dereference)
            for name in await run(os.listdir, folder):
                await transportdestination.put_async(os.path.join(folder, name), remotedestination, **kwargs)
        finally:
            await run(shutil.rmtree, folder, ignore_errors=True)

    def copy_from_remote_to_remote(
        self, transportdestination: Any, remotesource: Any, remotedestination: Any, **kwargs: Any
    ) -> None:
        """Copy files to another computer, by way of this one."""
        dereference = kwargs.pop("dereference", True)
        with tempfile.TemporaryDirectory() as folder:
            self.get(remotesource, folder, dereference=dereference)
            for name in os.listdir(folder):
                transportdestination.put(os.path.join(folder, name), remotedestination, **kwargs)

    def exec_command_wait(self, *args: Any, **kwargs: Any) -> Any:
        """There is no shell on a gateway.

        :raises NotImplementedError: always; it says what was to be run, and what to do instead.
        """
        command = kwargs.get("command", args[0] if args else "")
        raise NotImplementedError(
            f"a gateway runs jobs, not commands, and so not {command!r}. With aiida-shell, call "
            "launch_shell_job(..., resolve_command=False) with the command's name or absolute path on the cluster, or pass a "
            "code instead of a command. Otherwise use the transport's file methods, or submit a calculation job"
        )

    async def exec_command_wait_async(self, *args: Any, **kwargs: Any) -> Any:
        """There is no shell on a gateway.

        :raises NotImplementedError: always.
        """
        return self.exec_command_wait(*args, **kwargs)

    def gotocomputer_command(self, remotedir: Any = None) -> str:
        """A command for a local shell that opens ``marketplace-hpc shell`` in a folder, with the computer's parameters.

        The token is not in it, only where the token is. Nothing is asked of the gateway here.

        :param remotedir: absolute path on the cluster; without one, the user's home.
        """
        # The program beside this Python, whatever the PATH is. Without one, Python itself, which would look for modules in
        # the current folder, too.
        program = Path(sys.executable).with_name("marketplace-hpc")
        words = [str(program)] if os.access(program, os.X_OK) else [sys.executable, "-m", "aiida_marketplace_hpc"]
        parameters = self._parameters
        # An empty app id is said, too: the environment may hold one for another gateway.
        for option in ("url", "app_id", "token_source"):
            words.append(f"--{option.replace('_', '-')}={parameters[option]}")
        if parameters["machine"]:
            words.append(f"--machine={parameters['machine']}")
        words += ["shell", *(["--", str(remotedir)] if remotedir else [])]
        return shlex.join(words)
