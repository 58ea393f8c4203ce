"""A real RabbitMQ, and a gateway that nothing but a relay reaches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import Machine
from aiida_marketplace_hpc.testing.rabbitmq import RabbitMq
from aiida_marketplace_hpc.testing.relay import BrokerClient, RelayProcess

CLIENT_ID, SECRET = "c0ee3889-0b97-4083-8a7b-a1a807848437", "s3cret"
QUEUE = f"{CLIENT_ID}:7861589027953859"


@pytest.fixture(scope="session")
def hidden_gateway(cluster_machine: Machine) -> Iterator[GatewayProcess]:
    with GatewayProcess(cluster_machine) as gateway:
        yield gateway


@pytest.fixture
def relay(broker: RabbitMq, hidden_gateway: GatewayProcess, cluster_machine: Machine) -> Iterator[RelayProcess]:
    secret = {"MARKETPLACE_HPC_RELAY_CLIENT_SECRET": SECRET}
    options = ["--client-id", CLIENT_ID, "--timeout", "6", "--workers", "4", "--answer-limit", "1"]
    with RelayProcess(cluster_machine, broker.url, hidden_gateway.url, *options, env=secret) as relay:
        yield relay
        for unsaid in (SECRET, broker.password, hidden_gateway.token, QUEUE):
            assert unsaid not in relay.log


@pytest.fixture
def platform(relay: RelayProcess, broker: RabbitMq, hidden_gateway: GatewayProcess) -> Iterator[BrokerClient]:
    """The platform's end of the broker, with the token of a user."""
    with BrokerClient(broker.url, QUEUE, {"authorization": f"Bearer {hidden_gateway.token}"}) as client:
        yield client
