"""A real RabbitMQ with data, ports and password of its own, which can be killed and started again."""

from __future__ import annotations

import secrets
from pathlib import Path
from urllib.parse import quote

import pika
import pika.exceptions

from aiida_marketplace_hpc.testing.machine import (
    Machine,
    NotPossibleHere,
    free_ports,
)
from aiida_marketplace_hpc.testing.server import Server

_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_USER = "relay"


class RabbitMq(Server):
    """One node of RabbitMQ; a context manager. The port mapper that it starts ends with the machine.

    :param certificate: a certificate of 127.0.0.1 with its key: TLS is spoken, too.
    """

    title = "RabbitMQ"

    def __init__(self, machine: Machine, certificate: Path | None = None) -> None:
        super().__init__(machine)
        self._certificate = certificate
        self._port, self._tls_port, self._distribution, self._epmd = free_ports(4)

    @staticmethod
    def check_possible() -> None:
        """Raise :class:`NotPossibleHere` where RabbitMQ is not installed."""
        if not _SERVER.exists():
            command = "sudo apt-get install --no-install-recommends rabbitmq-server"
            raise NotPossibleHere("RabbitMQ is not installed", command)

    @property
    def url(self) -> str:
        """Its address, with name and password; stays the same over restarts."""
        return f"amqp://{_USER}:{quote(self.password, safe='')}@127.0.0.1:{self._port}/%2F"

    @property
    def tls_url(self) -> str:
        """Its address for TLS."""
        return self.url.replace("amqp:", "amqps:").replace(f":{self._port}/", f":{self._tls_port}/")

    def _set_up(self) -> None:
        self._directory = self.machine.make_directory("rabbitmq", user=self.machine.user, mode=0o700)
        configuration = (
            f"listeners.tcp.1 = 127.0.0.1:{self._port}\n"
            f"default_user = {_USER}\ndefault_pass = {self.password}\n"
            "log.console = true\nlog.console.level = warning\n"
        )
        user = self.machine.user
        if self._certificate is not None:
            pem = f"{self._directory}/certificate.pem"
            self.machine.write(pem, self._certificate.read_bytes(), user=user, mode=0o600)
            configuration += (
                f"listeners.ssl.1 = 127.0.0.1:{self._tls_port}\n"
                f"ssl_options.certfile = {pem}\nssl_options.keyfile = {pem}\n"
                "ssl_options.verify = verify_none\nssl_options.fail_if_no_peer_cert = false\n"
            )
        self.machine.write(f"{self._directory}/rabbitmq.conf", configuration, user=user, mode=0o600)
        self.machine.write(f"{self._directory}/plugins", "[].\n", user=user)
        # Erlang reads the cookie from the home; with one of our own it meets no other node.
        self.machine.write(f"{self._directory}/.erlang.cookie", secrets.token_hex(16), user=user, mode=0o400)

    def _command(self) -> list[str]:
        return [str(_SERVER)]

    def _environment(self) -> dict[str, str]:
        directory = self._directory
        return {
            "HOME": directory,
            "RABBITMQ_NODENAME": f"mphpc{self._port}@localhost",
            "RABBITMQ_CONF_ENV_FILE": f"{directory}/no-environment",
            "RABBITMQ_CONFIG_FILE": f"{directory}/rabbitmq",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{directory}/plugins",
            "RABBITMQ_MNESIA_BASE": f"{directory}/mnesia",
            "RABBITMQ_LOG_BASE": f"{directory}/logs",
            "RABBITMQ_LOGS": "-",
            # Without a shell in between, which would be killed and leave the server to nobody.
            "RUNNING_UNDER_SYSTEMD": "1",
            "RABBITMQ_PID_FILE": f"{directory}/pid",
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +S 1:1",
            "ERL_EPMD_PORT": str(self._epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }

    def _lets_in(self) -> bool:
        try:
            pika.BlockingConnection(pika.URLParameters(self.url)).close()
        except (pika.exceptions.AMQPError, OSError):
            return False
        return True
