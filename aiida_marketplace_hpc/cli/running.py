"""The flags that gateway and relay share: what they say while they run, and the file that their settings come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_LOG = (
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        help="The program's own log, on standard error: for people, or a JSON object a line.  [default: text]",
    ),
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        help="From which level on it says something.  [default: info]",
    ),
)


def log_options(command: F) -> F:
    """Add the flags about the program's own log."""
    for option in reversed(_LOG):
        command = option(command)
    return command


config_option = click.option(
    "--config", type=click.Path(path_type=Path, dir_okay=False), help="A TOML file with the same settings."
)
