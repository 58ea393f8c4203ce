"""``marketplace-hpc gateway check-config``: every setting with its origin, everything that is wrong, and no secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.gateway.config import Settings
from aiida_marketplace_hpc.gateway.relay_config import load as load_relay

TOKEN = {"MARKETPLACE_HPC_DEV_TOKEN": json.dumps({"me@example.org": "a-token-of-mine"})}
PUBLISHED = {
    "MP_HOST_URL": "https://staging.example.org",
    "GATEWAY_CLIENT_ID": "c0ee3889-0b97-4083-8a7b-a1a807848437",
    "GATEWAY_CLIENT_SECRET": "s3cret",
    "HPCGATEWAY_URL": "http://gateway.internal:5253",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith("MARKETPLACE_HPC_") or key in PUBLISHED]:
        monkeypatch.delenv(key)


def check(*arguments: str, **env: str) -> Result:
    return CliRunner().invoke(main, ["gateway", "check-config", *arguments], env=env)


def rows(result: Result) -> dict[str, tuple[str, str]]:
    """Value and origin of each setting; only of those that have a value without blanks."""
    words = [line.split() for line in result.stdout.splitlines()[1:]]
    return {line[0]: (line[1], line[2]) for line in words if len(line) == 3}


def test_each_setting_is_shown_with_where_it_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(f'port = 1\nslots = 2\nhome = "{tmp_path}/home/{{username}}"\n[policy]\nmax_nodes = 3\n')
    env = {**TOKEN, "MARKETPLACE_HPC_PORT": "4", "MARKETPLACE_HPC_SLOTS": "5", "MARKETPLACE_HPC_NAME": ""}
    result = check("--config", str(file), "--slots", "6", **env)
    assert result.exit_code == 0, result.output
    shown = rows(result)
    assert shown["slots"] == ("6", "--slots")
    assert shown["port"] == ("4", "MARKETPLACE_HPC_PORT")
    assert shown["policy.max_nodes"] == ("3", str(file))
    assert shown["connections"] == ("500", "default")
    assert not (tmp_path / "home").exists()


def test_no_secret_is_shown(tmp_path: Path) -> None:
    secret = "pass-word"
    database = f"postgresql+psycopg://name:{secret}@127.0.0.1:1/ledger"
    result = check("--state", str(tmp_path), MARKETPLACE_HPC_DATABASE=database, **TOKEN)
    assert rows(result)["dev_token"] == ("me@example.org=***", "MARKETPLACE_HPC_DEV_TOKEN")
    assert rows(result)["database"][0] == "postgresql+psycopg://name:***@127.0.0.1:1/ledger"
    assert result.exit_code == 1
    assert "does not answer" in result.stderr
    assert secret not in result.output
    assert "a-token-of-mine" not in result.output


def test_whatever_is_called_a_secret_is_one(tmp_path: Path) -> None:
    """Also what somebody adds later."""
    named = [name for name in Settings.model_fields if name.endswith(("secret", "password"))]
    assert {"firecrest_client_secret", "page_client_secret"} <= set(named)
    for name in named:
        env = {f"MARKETPLACE_HPC_{name.upper()}": "pass-word", **TOKEN}
        result = check("--state", str(tmp_path), **env)
        assert rows(result)[name] == ("***", f"MARKETPLACE_HPC_{name.upper()}")
        assert "pass-word" not in result.output


def test_a_database_that_is_no_address_repeats_no_secret() -> None:
    for database in ("mysql://name:pass-word@host/x", "postgresql+psycopg2://name:pass-word@host/x", "pass-word"):
        result = check(MARKETPLACE_HPC_DATABASE=database, **TOKEN)
        assert result.exit_code == 1
        assert "setting database (from MARKETPLACE_HPC_DATABASE)" in result.stderr
        assert "pass-word" not in result.output


def test_all_problems_are_said_at_once_with_where_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('port = 99999\n[policy]\nmax_time = "soon"\n')
    result = check("--config", str(file), "--connections", "0", MARKETPLACE_HPC_SLOTS="many", **TOKEN)
    assert result.exit_code == 1
    for said in (
        f"setting port (from {file})",
        f"setting policy.max_time (from {file})",
        "setting connections (from --connections)",
        "setting slots (from MARKETPLACE_HPC_SLOTS)",
    ):
        assert said in result.stderr
    assert len(result.stderr.splitlines()) == 4


def test_what_a_start_would_stumble_over_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    roots = ["--root", "software=/no/such/folder:ro", "--home", f"{tmp_path}/a-file/{{username}}"]
    template = str(tmp_path / "no.j2")
    result = check(*roots, "--certfile", "/no/such.pem", "--container-template", template, **TOKEN)
    assert result.exit_code == 1
    for said in ("/no/such/folder", "a-file", "/no/such.pem", template):
        assert said in result.stderr


def test_a_variable_that_is_no_setting_is_noted(tmp_path: Path) -> None:
    env = {"MARKETPLACE_HPC_PROT": "1", "MARKETPLACE_HPC_RELAY_QUEUE": "q"}
    result = check("--state", str(tmp_path), **TOKEN, **env)
    assert result.exit_code == 0
    assert "MARKETPLACE_HPC_PROT" in result.stderr
    assert "QUEUE" not in result.stderr


def test_a_list_that_is_not_json_is_named() -> None:
    result = check(MARKETPLACE_HPC_ROOT="scratch=/scratch")
    assert result.exit_code == 1
    assert "setting root (from MARKETPLACE_HPC_ROOT): lists and tables are written in JSON" in result.stderr


def test_the_published_names_make_a_relay() -> None:
    result = check("--relay", **PUBLISHED, MARKETPLACE_HPC_RELAY_ALLOW_CLEAR_TEXT="true")
    assert result.exit_code == 0, result.output
    shown = rows(result)
    assert shown["client_id"] == (PUBLISHED["GATEWAY_CLIENT_ID"], "GATEWAY_CLIENT_ID")
    assert shown["client_secret"] == ("***", "GATEWAY_CLIENT_SECRET")
    assert shown["gateway"] == ("http://gateway.internal:5253", "HPCGATEWAY_URL")
    assert shown["broker"] == ("***", "MP_HOST_URL")
    assert "s3cret" not in result.output


def test_they_mean_what_they_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PUBLISHED.items():
        monkeypatch.setenv(name, value)
    settings = load_relay({"allow_clear_text": True})
    assert settings.broker.get_secret_value() == "amqp://guest:guest@staging.example.org:5672/%2F"
    assert settings.queue_name == "c0ee3889-0b97-4083-8a7b-a1a807848437:7861589027953859"


def test_our_names_win_over_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PUBLISHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MARKETPLACE_HPC_RELAY_BROKER", "amqps://a:b@broker.example.org")
    monkeypatch.setenv("MARKETPLACE_HPC_RELAY_CLIENT_ID", "mine")
    settings = load_relay({})
    assert (settings.shown_broker, settings.client_id) == ("amqps://broker.example.org", "mine")


def test_a_broker_without_tls_still_has_to_be_wanted() -> None:
    result = check("--relay", **PUBLISHED)
    assert result.exit_code == 1
    assert "--allow-clear-text" in result.stderr


def test_flags_of_the_gateway_are_none_of_the_relay() -> None:
    assert check("--relay", "--port", "1", **PUBLISHED).exit_code == 2


def test_it_is_installed(tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("marketplace-hpc")),
        "gateway",
        "check-config",
        "--state",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"], **TOKEN})
    assert (done.returncode, done.stderr) == (0, "")
