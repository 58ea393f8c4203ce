"""Where a setting comes from: a flag, the environment, a name that was published before, the file, or nowhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, TomlConfigSettingsSource


@dataclass(frozen=True)
class Published:
    """A variable of the environment under which a setting was known before it had a name of ours.

    :param variable: its name.
    :param setting: which setting it is.
    :param read: makes the setting of its value.
    """

    variable: str
    setting: str
    read: Callable[[str], str] = str


def published_in(settings: type[BaseSettings]) -> tuple[Published, ...]:
    """The variables that settings of a kind were published with."""
    found: tuple[Published, ...] = getattr(settings, "published", ())
    return found


class PublishedNames(PydanticBaseSettingsSource):
    """Settings from variables of the environment that were published before; an empty one says nothing."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        for one in published_in(self.settings_cls):
            if one.setting == field_name and os.environ.get(one.variable):
                return one.read(os.environ[one.variable]), field_name, False
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in found.items() if value is not None}


def origin(kind: type[BaseSettings], name: str, flags: Mapping[str, Any], config: Path | None) -> str:
    """Where a setting comes from, as its owner would look for it.

    :param flags: those that were given.
    """
    if name in flags:
        return f"--{name.replace('_', '-')}"
    wanted = variable_of(kind, name)
    for variable, value in os.environ.items():
        if variable.upper() == wanted and value:
            return variable
    for one in published_in(kind):
        if one.setting == name and os.environ.get(one.variable):
            return one.variable
    if config is not None and name in TomlConfigSettingsSource(kind, toml_file=config)():
        return str(config)
    return "default"


def variable_of(kind: type[BaseSettings], name: str) -> str:
    """The variable of the environment that a setting has."""
    return f"{kind.model_config.get('env_prefix', '')}{name}".upper()


def unknown_variables(kind: type[BaseSettings]) -> list[str]:
    """Variables of the environment that look like settings and are none."""
    prefix = str(kind.model_config.get("env_prefix", ""))
    known = {variable_of(kind, name) for name in kind.model_fields}
    others = ("MARKETPLACE_HPC_RELAY_",) if prefix != "MARKETPLACE_HPC_RELAY_" else ()
    return sorted(
        name
        for name in os.environ
        if name.upper().startswith(prefix)
        and name.upper() not in known
        and not name.upper().startswith(others or ("\0",))
    )
