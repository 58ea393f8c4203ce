"""The relay's settings: what is wrong is named, and no secret is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.relay import Relay
from aiida_marketplace_hpc.gateway.relay_config import load

BROKER = "amqps://name:pass-word@broker.example.org/%2F"


@pytest.fixture(autouse=True)
def broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARKETPLACE_HPC_RELAY_BROKER", BROKER)


def test_the_queue_follows_from_id_and_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARKETPLACE_HPC_RELAY_CLIENT_SECRET", "s3cret")
    settings = load({"client_id": "c0ee3889-0b97-4083-8a7b-a1a807848437"})
    assert settings.queue_name.endswith(":7861589027953859")
    assert "s3cret" not in repr(settings)
    assert "pass-word" not in repr(settings)
    assert settings.shown_broker == "amqps://broker.example.org/%2F"
    assert settings.shown_queue == "the queue of c0ee3889-0b97-4083-8a7b-a1a807848437"
    assert {"s3cret", "pass-word", settings.queue_name} <= set(settings.secrets)


def test_settings_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MARKETPLACE_HPC_RELAY_BROKER")
    file = tmp_path / "relay.toml"
    file.write_text('broker = "amqp://a:b@localhost"\nqueue = "q"\nworkers = 3\n')
    assert (load({}, file).queue_name, load({"workers": 4}, file).workers) == ("q", 4)


@pytest.mark.parametrize(
    ("broker", "flags", "named"),
    [
        ("", {"queue": "q"}, "MARKETPLACE_HPC_RELAY_BROKER"),
        ("http://name:pass-word@host", {"queue": "q"}, "amqps://"),
        ("amqps://name:pass-word@host:nonsense", {"queue": "q"}, "amqps://"),
        ("amqp://name:pass-word@broker.example.org", {"queue": "q"}, "--allow-clear-text"),
        (BROKER, {}, "--client-id"),
        (BROKER, {"client_id": "x"}, "CLIENT_SECRET"),
        (BROKER, {"queue": "q", "gateway": "nonsense"}, "https://"),
        (BROKER, {"queue": "q", "workers": 0}, "workers"),
        (BROKER, {"queue": "q", "timeout": 0}, "timeout"),
    ],
)
def test_what_makes_no_sense_is_named(
    broker: str, flags: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARKETPLACE_HPC_RELAY_BROKER", broker)
    with pytest.raises(ConfigurationError) as refused:
        load(flags)
    assert named in refused.value.message
    assert "pass-word" not in refused.value.message


def test_clear_text_is_possible_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARKETPLACE_HPC_RELAY_BROKER", "amqp://broker.example.org")
    assert load({"queue": "q", "allow_clear_text": True}).allow_clear_text


@pytest.mark.parametrize("setting", ["cafile", "certfile"])
def test_a_certificate_that_cannot_be_used_is_named(setting: str, tmp_path: Path) -> None:
    for content in (None, "nonsense"):
        if content is not None:
            (tmp_path / "file").write_text(content)
        with pytest.raises(ConfigurationError, match=f"file cannot be used as --{setting}"):
            Relay(load({"queue": "q", setting: tmp_path / "file"}))
