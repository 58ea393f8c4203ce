"""``marketplace-hpc gateway openapi``: the file with which a gateway is registered with the MarketPlace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from aiida_marketplace_hpc.errors import ConfigurationError

_BY_ENDING = {".json": "json", ".yaml": "yaml", ".yml": "yaml"}


def _products(_: click.Context, __: click.Parameter, values: tuple[tuple[str, ...], ...]) -> list[dict[str, str]]:
    return [dict(zip(("name", "description", "id"), value, strict=True)) for value in values]


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="The file.  [default: standard output]"
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["yaml", "json"]),
    help="How to write it.  [default: as the file's name ends, else yaml]",
)
@click.option("--server", metavar="URL", help="Where the platform reaches the gateway.")
@click.option(
    "--broker",
    metavar="URL",
    help="Instead of --server, for a gateway behind a firewall: the platform, whose message broker brings the requests.",
)
@click.option("--name", help="What the application is called.  [default: the gateway's name]")
@click.option("--description", metavar="TEXT", help="What it is for.")
@click.option("--contact", metavar="EMAIL", help="Whom to ask about it.")
@click.option(
    "--product",
    type=(str, str, str),
    multiple=True,
    callback=_products,
    metavar="NAME TEXT ID",
    help="What users purchase to use it, with a description and the platform's id of it ('' for a new one). May be "
    "repeated.  [default: one of the application's own name]",
)
@click.option(
    "--document-version",
    "version",
    metavar="VERSION",
    help="The version of the document, a greater one at each update.  [default: that of this package]",
)
@click.option(
    "--api-version",
    metavar="VERSION",
    help="The version of the MarketPlace's standard API; the published client accepts only the default.  [default: 0.3.0]",
)
@click.option(
    "--classic", is_flag=True, help="Nothing but the nine published capabilities with their published parameters."
)
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="The gateway's TOML file.")
def openapi(output: Path | None, form: str | None, classic: bool, config: Path | None, **flags: Any) -> None:
    """Write the OpenAPI document that the MarketPlace asks for when a gateway is registered.

    What the options do not say is taken from the table `registration` of the gateway's configuration, where a key is named as
    its option is (`--document-version` is `version` there). Needed is `--server` or `--broker`.
    """
    try:
        import yaml  # type: ignore[import-untyped]

        from aiida_marketplace_hpc.gateway.config import load
        from aiida_marketplace_hpc.gateway.registration import registration
    except ImportError as exc:
        raise click.ClickException(
            f"the gateway's own packages are missing ({exc}): pip install 'aiida-marketplace-hpc[gateway]'"
        ) from exc
    form = form or (_form(output) if output else "yaml")
    given = {name: value for name, value in flags.items() if value}
    for name, other in (("server", "broker"), ("broker", "server")):
        if name in given:  # It replaces the other one of the configuration, too.
            given.setdefault(other, "")
    try:
        document = registration(load({"registration": given}, config), classic=classic)
    except ConfigurationError as exc:
        raise click.ClickException(exc.message) from exc
    if form == "json":
        text = json.dumps(document, indent=2) + "\n"
    else:
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise click.ClickException(f"{output} cannot be written: {exc.strerror}") from exc


def _form(output: Path) -> str:
    try:
        return _BY_ENDING[output.suffix.lower()]
    except KeyError:
        raise click.UsageError(f"{output} does not end in .yaml, .yml or .json: say which with --format") from None
