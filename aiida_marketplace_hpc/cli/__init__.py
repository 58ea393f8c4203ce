"""The command line of both sides.

``common`` holds what all commands of the client share (options, output, exit codes); ``service``, ``job``, ``file``,
``user``, ``doctor`` and the package ``shell`` are those commands; ``login`` keeps what they prove themselves with.
``computer``, ``gateway`` and ``demo`` are commands of their own. Each module is imported only when its command runs, so that
``--help`` and completion answer at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.cli.common import Settings, client_options, exit_codes

_COMMANDS: Mapping[str, tuple[str, str]] = {
    "heartbeat": ("service:heartbeat", "Ask whether the gateway is up."),
    "doctor": ("doctor:doctor", "Check everything between here and the cluster."),
    "login": ("login:login", "Log in, and stay logged in."),
    "logout": ("login:logout", "Forget a login."),
    "logins": ("login:logins", "List the logins that are kept here."),
    "user": ("user:user", "Register with a gateway."),
    "job": ("job:job", "Create, launch, watch and cancel jobs."),
    "file": ("file:file", "List, upload, download and delete files."),
    "shell": ("shell:shell", "Look at and work on the cluster's files, as in a shell."),
    "computer": ("computer:computer", "Make a gateway a computer in AiiDA, and look after it."),
    "gateway": ("gateway:gateway", "Publish a cluster: serve the gateway."),
    "demo": ("demo:demo", "See a study run from beginning to end."),
}
"""Each command: where it is (module of this package, attribute), and its line in ``--help``."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click would import every command for its line of help.
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        with exit_codes(ctx):
            return super().invoke(ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "obj": None})
@client_options(environment=True)
@click.version_option(__version__, prog_name="marketplace-hpc")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Work with a cluster through its gateway, or publish a cluster.

    The gateway is named by --url (or MP_HOST) and, through the MarketPlace's proxy, --app-id (or MP_APP_ID); the token comes
    from MP_ACCESS_TOKEN unless --token-source says otherwise.
    """
    ctx.ensure_object(Settings)
