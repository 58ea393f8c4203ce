"""``marketplace-hpc gateway relay``: what it says when something is missing."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from aiida_marketplace_hpc.cli import main


@pytest.mark.parametrize(
    ("broker", "arguments", "named"),
    [
        (None, ["--queue", "q"], "MARKETPLACE_HPC_RELAY_BROKER"),
        ("amqp://name:pass-word@localhost", [], "--client-id"),
        ("amqp://name:pass-word@localhost", ["--queue", "q", "--config", "/no/such.toml"], "/no/such.toml"),
        ("amqp://name:pass-word@localhost", ["--queue", "q", "--workers", "1000"], "workers"),
    ],
)
def test_what_is_missing_is_named(
    broker: str | None, arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MARKETPLACE_HPC_RELAY_BROKER", raising=False)
    if broker is not None:
        monkeypatch.setenv("MARKETPLACE_HPC_RELAY_BROKER", broker)
    done = CliRunner().invoke(main, ["gateway", "relay", *arguments])
    assert done.exit_code == 1
    assert named in done.output
    assert "pass-word" not in done.output
