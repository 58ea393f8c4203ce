"""As whom FirecREST is called: as one account for everybody, or as each user with the token that they have sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from aiida_marketplace_hpc.gateway.config import RootTemplate
from aiida_marketplace_hpc.gateway.firecrest.client import Cluster
from aiida_marketplace_hpc.gateway.firecrest.tokens import PassedOn, Tokens

Connect = Callable[[Tokens], Cluster]
"""Makes the calls of one account."""


class Accounts(Protocol):
    """The accounts that the gateway acts for."""

    def of(self, username: str) -> Cluster:
        """That of a user."""
        ...

    def of_folder(self, folder: str) -> Cluster | None:
        """That of the user whose folder this is; ``None`` if it is nobody's."""
        ...

    def usable(self) -> Sequence[Cluster]:
        """All that can be called now."""
        ...

    def offer(self, username: str, token: str, expires_at: float | None) -> None:
        """Take note of a token that a user has sent."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


class OneAccount:
    """The gateway's own, for everybody."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def of(self, username: str) -> Cluster:
        return self._cluster

    def of_folder(self, folder: str) -> Cluster | None:
        return self._cluster

    def usable(self) -> Sequence[Cluster]:
        return [self._cluster]

    def offer(self, username: str, token: str, expires_at: float | None) -> None:
        """Nothing: the gateway has its own."""

    def close(self) -> None:
        self._cluster.close()


class EachUsers:
    """Each user's own, while they send tokens that live long enough.

    :param roots: by the name in a path it is known whose a folder is.
    """

    def __init__(self, connect: Connect, roots: Sequence[RootTemplate]) -> None:
        self._connect = connect
        self._roots = [root for root in roots if root.per_user and not root.read_only]
        self._lock = threading.Lock()
        self._known: dict[str, tuple[PassedOn, Cluster]] = {}

    def of(self, username: str) -> Cluster:
        return self._account(username)[1]

    def of_folder(self, folder: str) -> Cluster | None:
        names = {name for root in self._roots if (name := root.username_in(folder))}
        return self.of(names.pop()) if len(names) == 1 else None

    def usable(self) -> Sequence[Cluster]:
        with self._lock:
            return [cluster for tokens, cluster in self._known.values() if tokens.alive]

    def offer(self, username: str, token: str, expires_at: float | None) -> None:
        self._account(username)[0].offer(token, expires_at)

    def close(self) -> None:
        with self._lock:
            for _, cluster in self._known.values():
                cluster.close()

    def _account(self, username: str) -> tuple[PassedOn, Cluster]:
        with self._lock:
            if username not in self._known:
                tokens = PassedOn()
                self._known[username] = tokens, self._connect(tokens)
            return self._known[username]
