"""``marketplace-hpc gateway relay``: a gateway that nobody can connect to takes its requests from a message broker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from aiida_marketplace_hpc.cli.running import config_option, log_options
from aiida_marketplace_hpc.errors import ConfigurationError


@click.command()
@click.option("--gateway", metavar="URL", help="The gateway's address.  [default: http://localhost:5005]")
@click.option("--client-id", help="The id under which the gateway is registered on the platform.")
@click.option("--queue", help="The queue to take requests from.  [default: follows from id and secret]")
@click.option("--workers", type=int, help="Requests that are under way at once.  [default: 8]")
@click.option("--timeout", type=float, help="Seconds that the gateway has for an answer.  [default: 60]")
@click.option("--answer-limit", type=int, metavar="MIB", help="The largest answer.  [default: 16]")
@click.option(
    "--cafile",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The certificate of a private authority that signed the broker's.",
)
@click.option(
    "--certfile",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A certificate to show to the broker (PEM, with its key).",
)
@click.option(
    "--allow-clear-text", is_flag=True, default=None, help="Speak to a broker on another machine without TLS, too."
)
@log_options
@config_option
def relay(config: Path | None, **flags: Any) -> None:
    """Hand requests from a message broker to a gateway.

    Settings come from these flags, from the environment (MARKETPLACE_HPC_RELAY_ and the name in capitals), and from a TOML
    file; the first that says something wins. The broker's address, with its password, and the client secret are no flags, as
    everybody on the machine can see those: MARKETPLACE_HPC_RELAY_BROKER and MARKETPLACE_HPC_RELAY_CLIENT_SECRET, or the file.
    """
    try:
        from aiida_marketplace_hpc.gateway import relay
        from aiida_marketplace_hpc.gateway.relay_config import load
    except ImportError as exc:
        raise click.ClickException(
            f"the relay's own packages are missing ({exc}): pip install 'aiida-marketplace-hpc[relay]'"
        ) from exc
    try:
        relay.serve(load({name: value for name, value in flags.items() if value is not None}, config))
    except ConfigurationError as exc:
        raise click.ClickException(exc.message) from exc
