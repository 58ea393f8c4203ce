"""Everything of a gateway that has to do with FirecREST, made of the settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from aiida_marketplace_hpc.gateway.config import GIB, Settings
from aiida_marketplace_hpc.gateway.firecrest.accounts import Accounts, EachUsers, OneAccount
from aiida_marketplace_hpc.gateway.firecrest.client import Cluster
from aiida_marketplace_hpc.gateway.firecrest.client_v1 import ClusterV1
from aiida_marketplace_hpc.gateway.firecrest.files import RemoteFiles
from aiida_marketplace_hpc.gateway.firecrest.one_by_one import TransfersOneByOne
from aiida_marketplace_hpc.gateway.firecrest.roots import RemoteRoots
from aiida_marketplace_hpc.gateway.firecrest.tokens import ConstantToken, ServiceTokens, Tokens
from aiida_marketplace_hpc.gateway.firecrest.transfers import OnTheWay, RemoteTransfers, sweep_spool
from aiida_marketplace_hpc.gateway.protection import LiveJobs
from aiida_marketplace_hpc.gateway.roots import Root
from aiida_marketplace_hpc.gateway.schema import User
from aiida_marketplace_hpc.gateway.storage import AnyFiles
from aiida_marketplace_hpc.gateway.unfinished import Keep, sweep_root

_LEFT_BEHIND = 3600.0
"""Seconds after which a file in a spool is one that nobody waits for."""


class FirecrestSite:
    """The accounts on one system, and for each user files and transfers over them.

    :param keep: how long what clients have not sent to its end is kept.
    :param machine: what users call the system.
    :param system: what FirecREST calls it.
    """

    def __init__(self, settings: Settings, keep: Keep, machine: str, system: str) -> None:
        self._settings = settings
        self._system = system
        self._keep = keep
        self._moving = OnTheWay()
        spool = "spool" if machine == settings.machine_name else f"spool-{machine}"
        self._spool = settings.state.expanduser().absolute() / spool
        self.accounts: Accounts
        if settings.account_mode == "delegated":
            self.accounts = EachUsers(self._connect, settings.roots_of(machine))
        else:
            self.accounts = OneAccount(self._connect(_own_tokens(settings)))

    def files_of(self, user: User, roots: Sequence[Root], protection: Callable[[RemoteRoots], LiveJobs]) -> RemoteFiles:
        """What a user can do with files."""
        cluster = self.accounts.of(user.username)
        remote = RemoteRoots(roots, cluster)
        return RemoteFiles(remote, cluster, protection(remote), self._spool_of(user))

    def transfers_of(self, files: AnyFiles) -> RemoteTransfers:
        """What a user can send and fetch, over their files."""
        assert isinstance(files, RemoteFiles)  # noqa: S101 - this site has made them.
        kind = TransfersOneByOne if self._settings.firecrest_version == 1 else RemoteTransfers
        return kind(files, self._keep, self._moving, self._settings.archive_size * GIB)

    def sweep(self) -> None:
        """Remove from the gateway's disk what was on its way too long ago."""
        if self._spool.is_dir():
            for folder in self._spool.iterdir():
                sweep_root(Root("spool", str(folder)), self._keep)
                sweep_spool(folder, _LEFT_BEHIND)

    def _connect(self, tokens: Tokens) -> Cluster:
        kind = ClusterV1 if self._settings.firecrest_version == 1 else Cluster
        return kind(self._settings.firecrest_url, self._system, tokens)

    def _spool_of(self, user: User) -> Path:
        folder = self._spool / user.id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder


def _own_tokens(settings: Settings) -> Tokens:
    if constant := settings.firecrest_token.get_secret_value():
        return ConstantToken(constant)
    secret = settings.firecrest_client_secret.get_secret_value()
    return ServiceTokens(settings.firecrest_client_id, secret, settings.firecrest_token_url)
