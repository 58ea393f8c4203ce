"""What the settings of a gateway or relay are, where each comes from, and everything that is wrong with them, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr

from aiida_marketplace_hpc.errors import ConfigurationError, Unavailable
from aiida_marketplace_hpc.gateway.config import FileSettings, Settings
from aiida_marketplace_hpc.gateway.databases import shown_url
from aiida_marketplace_hpc.gateway.origins import origin

_MASK = "***"


@dataclass(frozen=True)
class Setting:
    """One setting.

    :param value: as it is shown: without secrets.
    :param origin: the flag, the variable or the file that it comes from; ``default``.
    """

    name: str
    value: str
    origin: str


def effective(settings: FileSettings, flags: Mapping[str, Any], config: Path | None) -> list[Setting]:
    """All settings as they count."""
    kind = type(settings)
    found = []
    for name in kind.model_fields:
        comes_from = origin(kind, name, flags, config)
        for key, value in _parts(name, getattr(settings, name)):
            found.append(Setting(key, _shown(key, value), comes_from))
    return found


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        for key in type(value).model_fields:
            yield f"{name}.{key}", getattr(value, key)
    else:
        yield name, value


def _shown(name: str, value: Any) -> str:
    if isinstance(value, SecretStr):
        return _MASK if value.get_secret_value() else ""
    if name == "database" and value:
        return shown_url(value)
    if name == "dev_token":
        return ", ".join(f"{user}={_MASK}" for user in value)
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ", ".join(str(one) for one in value)
    return str(value)


def gateway_problems(settings: Settings) -> list[str]:
    """What keeps a gateway with these settings from starting on this machine. Changes nothing."""
    from aiida_marketplace_hpc.gateway import server
    from aiida_marketplace_hpc.gateway.account import check_account
    from aiida_marketplace_hpc.gateway.auth.chosen import authenticator
    from aiida_marketplace_hpc.gateway.container import ContainerScripts

    checks: list[Callable[[], object]] = [
        lambda: check_account(settings),
        lambda: authenticator(settings),
        lambda: ContainerScripts(settings),
        lambda: server.check_backend(settings),
        lambda: server.check_tls(settings),
        lambda: _check_database(settings),
    ]
    checks += [lambda root=root: server.check_root(root, make=False) for root in settings.roots]  # type: ignore[misc]
    return _problems(checks)


def _check_database(settings: Settings) -> None:
    from aiida_marketplace_hpc.gateway.ledger import Ledger

    if not settings.database:
        return  # It is made in the state folder.
    ledger = Ledger(settings.database_url)
    try:
        ledger.check_version()
    except Unavailable as exc:
        raise ConfigurationError(f"the database {shown_url(settings.database_url)}: {exc.message}") from exc
    finally:
        ledger.close()


def relay_problems(settings: FileSettings) -> list[str]:
    """What keeps a relay with these settings from starting on this machine; the broker is not asked."""
    from aiida_marketplace_hpc.gateway.relay import Relay

    return _problems([lambda: Relay(settings)])  # type: ignore[arg-type]


def _problems(checks: list[Callable[[], object]]) -> list[str]:
    found: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigurationError as exc:
            if exc.message not in found:
                found.append(exc.message)
    return found
