"""Settings: one precedence, and messages that name the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.config import RootTemplate, load
from aiida_marketplace_hpc.gateway.people.routes import People

TOKENS = {"alice": "token-of-alice", "bob": "token-of-bob"}


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('port = 1\nname = "from the file"\nmachine = "from the file"\n')
    monkeypatch.setenv("MARKETPLACE_HPC_PORT", "2")
    monkeypatch.setenv("MARKETPLACE_HPC_NAME", "from the environment")
    settings = load({"port": 3}, file)
    assert (settings.port, settings.name, settings.machine) == (3, "from the environment", "from the file")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"home": "relative"}, "home"),
        ({"home": "/home/../etc"}, "home"),
        ({"home": "/home/{user}"}, "username"),
        ({"home": "/shared", "dev_token": TOKENS}, "--allow-shared-home"),
        ({"home": "/shared"}, "--allow-shared-home"),
        ({"backend": "slurm"}, "--home"),
        ({"root": ("Scratch=/x",)}, "root"),
        ({"root": ("scratch=x",)}, "root"),
        ({"root": ("home=/x",)}, "root"),
        ({"root": ("a=/x", "a=/y")}, "root"),
        ({"home": "/h/{username}", "root": ("sw=/h/alice/sw:ro",)}, "would not be read-only"),
        ({"root": ("scratch=/s", "sw=/s/{username}/sw:ro")}, "would not be read-only"),
        ({"port": 70000}, "port"),
        ({"container_runtime": "docker"}, "container_runtime"),
        ({"container_runtime": "bin/apptainer"}, "container_runtime"),
        ({"container_time_limit": "10 minutes"}, "container_time_limit"),
        ({"container_account": "a b"}, "container_account"),
        ({"classic_file_names": "odd"}, "classic_file_names"),
        ({"classic_file_limit": 0}, "classic_file_limit"),
        ({"classic": True, "metrics": True}, "--metrics"),
        ({"nonsense": 1}, "nonsense"),
        ({"page_client": "x", "page_url": "https://x"}, "--auth oidc"),
        ({"auth": "oidc", "page_client": "x"}, "--page-url"),
        ({"page_url": "http://gateway.example.org"}, "page_url"),
        ({"page_url": "https://me:secret@gateway.example.org"}, "page_url"),
        ({"page_url": "https://gateway.example.org/?next=x"}, "page_url"),
        ({"page_url": "gateway.example.org"}, "page_url"),
        ({"page_client_secret": "x", "page_client_secret_file": Path("y")}, "page_client_secret"),
    ],
)
def test_what_makes_no_sense_is_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(flags)


def test_a_shared_home_is_allowed_for_one_user_or_on_demand() -> None:
    assert load({"home": "/own", "dev_token": {"alice": "token-of-alice"}}).account_mode == "own"
    assert load({"home": "/shared", "dev_token": TOKENS, "allow_shared_home": True}).account_mode == "shared"


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({"dev_token": TOKENS}, True),
        ({"dev_token": TOKENS, "pages": False}, False),
        ({"auth": "oidc"}, False),
        ({"auth": "oidc", "page_client": "x", "page_url": "https://x"}, True),
        ({"auth": "oidc", "page_client": "x", "page_url": "https://x", "account": "delegated"}, False),
    ],
)
def test_there_is_a_page_for_people_where_they_can_sign_in(settings: dict[str, Any], possible: bool) -> None:
    assert People.possible(load(settings)) is possible


def test_the_secret_of_the_pages_client_is_in_no_text_about_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARKETPLACE_HPC_PAGE_CLIENT_SECRET", "the-secret")
    settings = load({"auth": "oidc", "page_client": "x", "page_url": "http://localhost:5005/"})
    assert (settings.page_client_secret.get_secret_value(), settings.page_url) == (
        "the-secret",
        "http://localhost:5005",
    )
    assert "the-secret" not in repr(settings) + str(settings)


def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.toml"):
        load({}, tmp_path / "gone.toml")
    (tmp_path / "broken.toml").write_text("port = = 1")
    with pytest.raises(ConfigurationError, match=r"broken\.toml"):
        load({}, tmp_path / "broken.toml")


def test_a_writable_root_may_lie_below_a_read_only_one() -> None:
    load({"home": "/h/{username}", "root": ("all=/h:ro", "usr=/usr:ro")})


def test_roots_are_read_only_on_demand() -> None:
    assert RootTemplate.parse("sw=/opt/sw:ro") == RootTemplate("sw", "/opt/sw", True)
    assert RootTemplate.parse("scratch=/s/{username}").path_for("alice") == "/s/alice"


def test_tokens_do_not_show() -> None:
    settings = load({"dev_token": TOKENS})
    assert "token-of" not in repr(settings)
