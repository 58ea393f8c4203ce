"""``marketplace-hpc heartbeat``."""

from __future__ import annotations

import click

from aiida_marketplace_hpc.cli.common import Settings, client_options, connect, emit


@click.command()
@client_options()
@click.pass_obj
def heartbeat(settings: Settings) -> None:
    """Ask whether the gateway is up. Needs no token where the gateway is asked directly."""
    with connect(settings) as gateway:
        answer = gateway.heartbeat()
    emit(settings, answer, str(answer.get("message", "the gateway is up")))
