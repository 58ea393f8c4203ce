"""``marketplace-hpc gateway check-config``: what the settings are, where they come from, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from aiida_marketplace_hpc.cli.common import printable, table
from aiida_marketplace_hpc.errors import ConfigurationError


@click.command("check-config")
@click.option("--relay", is_flag=True, help="Check the relay's settings, from the environment and the file.")
@click.option(
    "--template", is_flag=True, help="Only print a file for the environment, with every setting and its meaning."
)
@click.pass_context
def check_config(ctx: click.Context, /, relay: bool, template: bool, config: Path | None, **flags: Any) -> None:
    """Show the settings that count, where each comes from, and everything that is wrong. Nothing is started or changed.

    It takes the flags of `gateway serve`. Secrets are not shown. Exit code 1 if a gateway with these settings would not start.
    """
    try:
        from aiida_marketplace_hpc.gateway import config_check, origins
        from aiida_marketplace_hpc.gateway.config import FileSettings, Settings, SettingsInvalid, load_as

        if template:
            click.echo(_template(), nl=False)
            return
        given = {name: value for name, value in flags.items() if value is not None and value != ()}
        kind: type[FileSettings] = Settings
        if relay:
            from aiida_marketplace_hpc.gateway.relay_config import RelaySettings

            if given:
                raise click.UsageError("with --relay, settings come from the environment and the file only")
            kind = RelaySettings
    except ImportError as exc:
        raise click.ClickException(
            f"packages are missing ({exc}): pip install 'aiida-marketplace-hpc[gateway,relay]'"
        ) from exc
    try:
        settings = load_as(kind, given, config)
    except ConfigurationError as exc:
        problems = exc.problems if isinstance(exc, SettingsInvalid) else [exc.message]
    else:
        rows = [[one.name, one.value, one.origin] for one in config_check.effective(settings, given, config)]
        click.echo(table(rows, ["setting", "value", "from"]))
        if isinstance(settings, Settings):
            problems = config_check.gateway_problems(settings)
        else:
            problems = config_check.relay_problems(settings)
    for name in origins.unknown_variables(kind):
        click.echo(f"Note: {printable(name)} is in the environment, and no setting", err=True)
    for problem in problems:
        click.echo(f"Error: {printable(problem)}", err=True)
    ctx.exit(int(bool(problems)))


def _template() -> str:
    from aiida_marketplace_hpc.cli.environment_template import environment_template
    from aiida_marketplace_hpc.cli.gateway import serve
    from aiida_marketplace_hpc.cli.relay import relay

    return environment_template(serve, relay)
