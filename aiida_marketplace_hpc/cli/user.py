"""``marketplace-hpc user``."""

from __future__ import annotations

import click

from aiida_marketplace_hpc.cli.common import Settings, client_options, connect, emit


@click.group()
def user() -> None:
    """Register with a gateway."""


@user.command()
@client_options()
@click.pass_obj
def create(settings: Settings) -> None:
    """Register with the gateway and make a home on the cluster. May be repeated."""
    with connect(settings) as gateway:
        answer = gateway.create_user()
    emit(settings, answer, f"{answer.get('name') or answer.get('email')}: home {answer.get('home')}")
