"""``marketplace-hpc gateway openapi``: the document from options and configuration, to standard output or a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from aiida_marketplace_hpc.cli.registration import openapi
from aiida_marketplace_hpc.gateway.config import Registration, load
from aiida_marketplace_hpc.gateway.registration import registration

SERVER = ("--server", "https://hpc.example.org")
CONFIGURATION = """
name = "Cluster of the lab"

[registration]
description = "as the file says: ü"
broker = "https://platform.example.org"
version = "2"

[[registration.product]]
name = "guest"
description = "a week"
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(openapi, arguments)


def written(*arguments: str) -> dict[str, Any]:
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return dict(yaml.safe_load(done.stdout))


def test_it_comes_back_as_it_was_made_in_each_form_and_the_same_every_time(tmp_path: Path) -> None:
    made = registration(load({"registration": {"server": "https://hpc.example.org"}}))
    said = run(*SERVER).stdout
    assert said == run(*SERVER).stdout
    assert "&id" not in said
    as_text = json.dumps(made)  # The order is compared, too.
    assert json.dumps(yaml.safe_load(said)) == as_text
    assert json.dumps(json.loads(run(*SERVER, "--format", "json").stdout)) == as_text
    for name in ("a.json", "a.yaml", "a.YML"):
        assert run(*SERVER, "-o", str(tmp_path / name)).output == ""
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert json.dumps(json.loads(text) if name == "a.json" else yaml.safe_load(text)) == as_text
    assert run(*SERVER, "-o", str(tmp_path / "document"), "--format", "json").exit_code == 0
    assert json.loads((tmp_path / "document").read_text(encoding="utf-8")) == made


def test_options_win_over_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(CONFIGURATION)
    info = written("--config", str(file))["info"]
    assert (info["title"], info["description"], info["version"]) == ("Cluster of the lab", "as the file says: ü", "2")
    assert info["x-products"] == [{"name": "guest", "description": "a week", "product-id": ""}]
    product = ("--product", "full", "for a year", "4711")
    document = written("--config", str(file), *SERVER, "--document-version", "3", "--name", "lab", *product)
    info = document["info"]
    assert (info["title"], info["description"], info["version"]) == ("lab", "as the file says: ü", "3")
    assert info["x-products"] == [{"name": "full", "description": "for a year", "product-id": "4711"}]
    assert document["servers"] == [{"url": "https://hpc.example.org"}]


def test_every_key_of_the_configuration_has_its_option() -> None:
    names = {option.name for option in openapi.params}
    assert names - {"output", "form", "config", "classic"} == set(Registration.model_fields)


def test_the_nine_alone_on_demand() -> None:
    assert "/api/v1/query" in written(*SERVER)["paths"]
    assert "/api/v1/query" not in written(*SERVER, "--classic")["paths"]


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ((), 1, "--server"),
        ((*SERVER, "--broker", "https://platform.example.org"), 1, "not both"),
        ((*SERVER, "--contact", "nobody"), 1, "registration.contact"),
        ((*SERVER, "-o", "document.txt"), 2, "--format"),
        ((*SERVER, "-o", "/no/such/folder/a.yaml"), 1, "cannot be written"),
        ((*SERVER, "--config", "/no/such.toml"), 1, "/no/such.toml"),
        ((*SERVER, "--product", "only a name"), 2, "--product"),
    ],
)
def test_what_makes_no_sense_is_named(arguments: tuple[str, ...], code: int, named: str) -> None:
    done = run(*arguments)
    assert done.exit_code == code
    assert named in done.output
    assert "openapi: 3" not in done.output
