"""What a gateway's machines are called, and the roots of each, by its settings."""

from __future__ import annotations

from typing import Any

import pytest

from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.config import Settings, load

FIRECREST = {
    "backend": "firecrest",
    "dev_token": {"alice@example.org": "token-of-alice"},
    "home": "/home/{username}",
    "firecrest_url": "http://f7t.example.org",
    "firecrest_token_url": "http://f7t.example.org/token",
    "firecrest_client_id": "gateway",
    "firecrest_client_secret": "secret",
}


def settings(system: str, *roots: str, **more: Any) -> Settings:
    return load({**FIRECREST, "firecrest_system": system, "root": roots, **more})


def test_one_system_is_called_as_the_operator_says() -> None:
    assert settings("daint").machines == ("firecrest",)
    assert settings("daint", machine="Piz").machines == ("Piz",)
    assert (settings("daint").machine_name, settings("daint").systems) == ("firecrest", ("daint",))
    assert load({"dev_token": FIRECREST["dev_token"]}).machines == ("local",)


def test_several_are_called_as_firecrest_calls_them() -> None:
    both = settings("daint,eiger.one")
    assert (both.machines, both.machine_name) == (("daint", "eiger.one"), "daint")


def test_each_has_the_roots_of_all_and_its_own() -> None:
    both = settings(
        "daint,eiger.one",
        "eiger.one.home=/users/{username}",
        "scratch=/scratch/{username}",
        "eiger.one.store=/store:ro",
        "daint.scratch=/snx/{username}",
    )
    assert {root.name: root.template for root in both.roots} == {
        "home": "/home/{username}",
        "scratch": "/snx/{username}",
    }
    found = both.roots_of("eiger.one")
    assert [(root.name, root.template, root.read_only) for root in found] == [
        ("home", "/users/{username}", False),
        ("scratch", "/scratch/{username}", False),
        ("store", "/store", True),
    ]
    for machine in both.machines:
        for root in both.roots_of(machine):
            assert both.root_at(both.address_of(machine, root.name)) == (machine, root.name)
    assert both.address_of("eiger.one", "home") == "eiger.one.home"
    assert both.root_at("daint.home") == both.root_at("home") == ("daint", "home")
    for nothing in ("store", "daint.store", "eiger.home", "eiger.one", ".home", "home.", "0123456789abcdef01234567"):
        assert both.root_at(nothing) is None


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"system": "daint,daint"}, "named once"),
        ({"system": "daint,firecrest"}, "the first one only"),
        ({"system": "daint,"}, "firecrest_system"),
        ({"system": "daint, eiger"}, "firecrest_system"),
        ({"system": f"daint,{'x' * 33}"}, "at most 32 characters"),
        ({"system": "daint,eiger", "machine": "Piz"}, "leave machine away"),
        ({"system": "daint,eiger", "roots": ["carme.home=/x/{username}"]}, "machine that this gateway does not have"),
        ({"system": "daint,eiger", "roots": ["eiger.home=/x"], "account": "shared"}, "one folder for several users"),
        ({"system": "daint,eiger", "roots": ["eiger.a=/x", "eiger.a=/y"]}, "a name of its own"),
        ({"system": "daint,eiger", "roots": ["eiger.a=/home/x:ro"]}, "would not be read-only"),
    ],
)
def test_what_contradicts_itself_is_refused(given: dict[str, Any], problem: str) -> None:
    roots = given.pop("roots", [])
    with pytest.raises(ConfigurationError, match=problem):
        settings(given.pop("system"), *roots, **given)
