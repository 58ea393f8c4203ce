"""The relay's settings: from flags, environment and file, in this order of precedence, checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from aiida_marketplace_hpc.addresses import is_loopback
from aiida_marketplace_hpc.client.routes import DirectRoute
from aiida_marketplace_hpc.errors import ConfigurationError
from aiida_marketplace_hpc.gateway.config import FileSettings, load_as
from aiida_marketplace_hpc.gateway.log import LogFormat, LogLevel
from aiida_marketplace_hpc.gateway.origins import Published
from aiida_marketplace_hpc.gateway.relay_messages import queue_name

_WHICH_BROKER = "set MARKETPLACE_HPC_RELAY_BROKER to the broker's address, such as amqps://NAME:PASSWORD@broker.example.org:5671/%2F"


def _published_broker(host: str) -> str:
    """The broker on the platform's host, as the published relay reached it: pika's defaults, without TLS."""
    name = urlsplit(host if "//" in host else f"//{host}").hostname or ""
    return f"amqp://guest:guest@{name}:5672/%2F"


class RelaySettings(FileSettings):
    """Everything that can be set about a relay; the flags of ``gateway relay`` have the same names.

    Read from flags, from the environment (``MARKETPLACE_HPC_RELAY_`` and the name in capitals, else the published names) and
    from a TOML file with the same keys; the first that says something wins.
    """

    model_config = SettingsConfigDict(
        env_prefix="MARKETPLACE_HPC_RELAY_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    published: ClassVar[tuple[Published, ...]] = (
        Published("MP_HOST_URL", "broker", _published_broker),
        Published("GATEWAY_CLIENT_ID", "client_id"),
        Published("GATEWAY_CLIENT_SECRET", "client_secret"),
        Published("HPCGATEWAY_URL", "gateway"),
    )

    broker: SecretStr = SecretStr("")
    """The broker's address, with name and password; from the environment or the file only."""
    client_id: str = ""
    """The id under which the gateway is registered on the platform."""
    client_secret: SecretStr = SecretStr("")
    """The secret that the platform showed with it; from the environment or the file only."""
    queue: str = ""
    """The queue to take requests from; by default the one that follows from id and secret."""
    gateway: str = "http://localhost:5005"
    """The gateway's address."""
    workers: int = Field(default=8, ge=1, le=100)
    """Requests that are under way at once."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds after which a request is given up that the gateway has not answered."""
    answer_limit: int = Field(default=16, ge=1, le=100)
    """The largest answer, in MiB; it is held in memory, as the broker's messages are."""
    cafile: Path | None = None
    """The certificate of a private authority that signed the broker's certificate."""
    certfile: Path | None = None
    """A certificate to show to the broker, with its key in the same file."""
    allow_clear_text: bool = False
    """Whether a broker on another machine may be spoken to without TLS."""
    log_format: LogFormat = "text"
    """The relay's log, on standard error: for people, or a JSON object a line."""
    log_level: LogLevel = "info"
    """From which level on it says something."""

    @field_validator("broker")
    @classmethod
    def _is_a_broker(cls, value: SecretStr) -> SecretStr:
        try:
            parts = urlsplit(value.get_secret_value())
            complete = bool(parts.hostname) and parts.port != 0
        except ValueError:
            complete = False
        if not complete or parts.scheme not in ("amqp", "amqps"):
            raise ValueError(_WHICH_BROKER)
        return value

    @field_validator("gateway")
    @classmethod
    def _is_a_gateway(cls, value: str) -> str:
        try:
            return DirectRoute(value).url
        except ConfigurationError as exc:
            raise ValueError(exc.message) from exc

    @model_validator(mode="after")
    def _fits_together(self) -> RelaySettings:
        if not self.broker.get_secret_value():
            raise ValueError(_WHICH_BROKER)
        if not self.queue and not (self.client_id and self.client_secret.get_secret_value()):
            raise ValueError(
                "which queue? Give --client-id, and MARKETPLACE_HPC_RELAY_CLIENT_SECRET in the environment; or --queue"
            )
        parts = urlsplit(self.broker.get_secret_value())
        if parts.scheme == "amqp" and not is_loopback(parts.hostname or "") and not self.allow_clear_text:
            raise ValueError(
                f"without TLS everybody on the way to {parts.hostname} can read the users' tokens: use amqps://, or, if that "
                "is what you want, --allow-clear-text"
            )
        return self

    @property
    def queue_name(self) -> str:
        """The queue. Whoever sees it can guess at the secret: it belongs into no log."""
        return self.queue or queue_name(self.client_id, self.client_secret.get_secret_value())

    @property
    def shown_queue(self) -> str:
        """What the log calls the queue."""
        return self.queue or f"the queue of {self.client_id}"

    @property
    def secrets(self) -> list[str]:
        """What is in no log, whatever it is written by."""
        password = urlsplit(self.broker.get_secret_value()).password or ""
        derived = "" if self.queue else self.queue_name
        return [self.client_secret.get_secret_value(), password, unquote(password), derived]

    @property
    def shown_broker(self) -> str:
        """The broker's address without name and password."""
        parts = urlsplit(self.broker.get_secret_value())
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def load(flags: dict[str, Any], config: Path | None = None) -> RelaySettings:
    """Make the settings from the flags that were given, the environment and a file.

    :param flags: only those that the user gave; they win over everything.
    :raises ConfigurationError: naming each setting that is wrong and why; never with a value that is a secret.
    """
    return load_as(RelaySettings, flags, config)
