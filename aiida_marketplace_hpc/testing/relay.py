"""A relay as its operator runs it, and the other end of the broker: who asks for something, as the platform does."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pika
import pika.exceptions

from aiida_marketplace_hpc.gateway.relay import ToGateway
from aiida_marketplace_hpc.gateway.relay_messages import read_request
from aiida_marketplace_hpc.testing.machine import Machine, RigError, tail, wait_until
from aiida_marketplace_hpc.testing.rig import Rig

_READY = re.compile(r"^relaying to \S+$", re.MULTILINE)


class RelayProcess(Rig):
    """``marketplace-hpc gateway relay`` in a process of its own; a context manager.

    :param broker: the broker's address, with name and password.
    :param options: further options of the command.
    :param env: added to its environment, such as the secret.
    """

    def __init__(
        self, machine: Machine, broker: str, gateway: str, *options: str, env: Mapping[str, str] | None = None
    ) -> None:
        self._machine = machine
        self._options = ["--gateway", gateway, *options]
        self._env = {"PYTHONUNBUFFERED": "1", "MARKETPLACE_HPC_RELAY_BROKER": broker, **(env or {})}
        self._folder = Path(tempfile.mkdtemp(prefix="mphpc-relay-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What it has printed, over all its starts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def times_ready(self) -> int:
        """How often it has begun to take requests, over all its starts."""
        return len(_READY.findall(self.log))

    @property
    def _log(self) -> Path:
        return self._folder / "relay.log"

    def start(self, within: float = 30.0) -> None:
        """Start it and wait until it takes requests.

        :raises RigError: with the end of its log, if it does not.
        """
        before = self.times_ready
        command = str(Path(sys.executable).with_name("marketplace-hpc"))
        with self._log.open("ab") as log:
            self._process = self._machine.popen(
                [command, "gateway", "relay", *self._options], env=self._env, stdout=log, stderr=log
            )
        process = self._process
        self.wait_ready(before + 1, within, lambda: process.poll() is None)

    def wait_ready(self, times: int, within: float = 60.0, lives: Callable[[], bool] = lambda: True) -> None:
        """Wait until it has begun to take requests so often."""
        wait_until(
            lambda: self.times_ready >= times or not lives(),
            within=within,
            failure=lambda: f"the relay takes no requests\n{tail(self._log)}",
        )
        if self.times_ready < times:
            raise RigError(f"the relay ended\n{tail(self._log)}")

    def kill(self) -> None:
        """Kill it at once, as ``kill -9`` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process is not None:
            self._process.terminate()

    def wait(self, within: float = 30.0) -> int:
        """Wait for its end, and say with which code it ended."""
        if self._process is None:
            raise RigError("the relay has not been started")
        return self._process.wait(timeout=within)

    def close(self) -> None:
        """End it and remove its log. May be repeated."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class BrokerAnswer:
    """What came back: as published, ``body`` is a text."""

    status: int
    headers: Mapping[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request_message(
    method: str,
    endpoint: str,
    query: Mapping[str, str] | None,
    headers: Mapping[str, str] | None,
    body: str | None,
) -> bytes:
    """A request in the published form."""
    fields = {"endpoint": endpoint, "query_params": query, "headers": headers or None, "method": method, "body": body}
    return json.dumps(fields).encode()


def answer_in(message: bytes) -> BrokerAnswer:
    """The answer in a message of the published form."""
    fields = json.loads(message)
    return BrokerAnswer(fields["status_code"], fields["headers"] or {}, fields["body"] or "")


class BrokerClient:
    """Asks for things by putting messages into a queue, as the published platform does; a context manager.

    Of one thread's. Each has a queue of its own for answers.
    """

    def __init__(self, broker: str, queue: str, headers: Mapping[str, str] | None = None) -> None:
        self._queue = queue
        self._headers = dict(headers or {})
        self._connection = pika.BlockingConnection(pika.URLParameters(broker))
        self._channel = self._connection.channel()
        self._channel.queue_declare(queue)
        self._answers = str(self._channel.queue_declare("", exclusive=True).method.queue)
        self._arrived: dict[str, list[bytes]] = {}
        self._channel.basic_consume(self._answers, self._take, auto_ack=True)

    def __enter__(self) -> BrokerClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # The broker may have been killed meanwhile.
        with contextlib.suppress(pika.exceptions.AMQPError):
            self._connection.close()

    def ask(
        self,
        method: str,
        endpoint: str,
        query: Mapping[str, str] | None = None,
        body: str | None = None,
        headers: Mapping[str, str] | None = None,
        within: float = 30.0,
    ) -> BrokerAnswer:
        """Send a request and wait for the answer.

        :raises RigError: there is none within so many seconds.
        """
        return self.wait(self.send(method, endpoint, query, body, headers), within)

    def send(
        self,
        method: str,
        endpoint: str,
        query: Mapping[str, str] | None = None,
        body: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Send a request, and return its ``correlation_id``."""
        return self.send_raw(request_message(method, endpoint, query, {**self._headers, **(headers or {})}, body))

    def send_raw(self, message: bytes, *, reply_to: str | None = None, correlation_id: str | None = None) -> str:
        """Send any message; ``reply_to`` is by default the own queue for answers, ``""`` none."""
        correlation_id = correlation_id or str(uuid.uuid4())
        where = self._answers if reply_to is None else reply_to or None
        properties = pika.BasicProperties(reply_to=where, correlation_id=correlation_id)
        self._channel.basic_publish("", self._queue, message, properties)
        return correlation_id

    def wait(self, correlation_id: str, within: float = 30.0) -> BrokerAnswer:
        """Wait for the (next) answer to a request.

        :raises RigError: there is none within so many seconds.
        """
        deadline = time.monotonic() + within
        while not self._arrived.get(correlation_id):
            if time.monotonic() > deadline:
                raise RigError(f"no answer to {correlation_id} within {within:g} s")
            self._connection.process_data_events(time_limit=0.1)
        return answer_in(self._arrived[correlation_id].pop(0))

    def delete_queue(self) -> None:
        """Delete the queue of requests, with all that waits in it."""
        self._channel.queue_delete(self._queue)

    def waiting(self) -> int:
        """How many messages wait in the queue of requests, without those that somebody has taken."""
        return int(self._channel.queue_declare(self._queue, passive=True).method.message_count)

    def takers(self) -> int:
        """How many take requests from the queue."""
        return int(self._channel.queue_declare(self._queue, passive=True).method.consumer_count)

    def look(self) -> None:
        """Make sure that the broker is there.

        :raises pika.exceptions.AMQPError: it has gone.
        """
        self._connection.process_data_events(time_limit=0)

    def _take(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._arrived.setdefault(properties.correlation_id, []).append(body)


class Messages(Protocol):
    """Hands requests to an app as messages."""

    def ask(
        self, method: str, endpoint: str, query: Mapping[str, str], headers: Mapping[str, str], body: str | None
    ) -> BrokerAnswer:
        """Send a request and wait for the answer.

        :raises RigError: there is none in time.
        :raises ConnectionError: whoever brings the messages is not there, or has gone before the answer came.
        """

    def close(self) -> None:
        """Let go of what is not in use. May be repeated."""


class RelayInProcess:
    """A relay without a broker: reads what would be in a message, and writes what would be in the next.

    :param limit: bytes of an answer.
    """

    def __init__(self, gateway_url: str, limit: int) -> None:
        self._gateway = ToGateway(gateway_url, 60.0, limit)

    def ask(
        self, method: str, endpoint: str, query: Mapping[str, str], headers: Mapping[str, str], body: str | None
    ) -> BrokerAnswer:
        """Hand a request to the gateway."""
        message = request_message(method, endpoint, query, headers, body)
        return answer_in(self._gateway.answer(read_request(message)).message)

    def close(self) -> None:
        """There is nothing to let go of."""


class BrokerForwarder:
    """Sends requests as messages and waits for their answers, for many threads at once, as a platform does.

    Connections are kept, and made anew when the broker was away.

    :param queue: where the app takes its requests from.
    :param patience: seconds after which there is no answer.
    """

    def __init__(self, broker: str, queue: str, patience: float) -> None:
        # Nobody serves a connection that waits for its next request, so the broker must not expect it to say that it lives.
        self._broker = f"{broker}?heartbeat=0"
        self._queue = queue
        self._patience = patience
        self._lock = threading.Lock()
        self._idle: list[BrokerClient] = []

    def ask(
        self, method: str, endpoint: str, query: Mapping[str, str], headers: Mapping[str, str], body: str | None
    ) -> BrokerAnswer:
        """Send a request and wait for the answer.

        :raises RigError: there is none in time.
        :raises ConnectionError: the broker is not there, or has gone before the answer came.
        """
        try:
            client = self._client()
            answer = client.ask(method, endpoint, query, body, headers, self._patience)
        except (pika.exceptions.AMQPError, OSError) as exc:
            raise ConnectionError(f"the broker does not answer ({type(exc).__name__})") from exc
        with self._lock:
            self._idle.append(client)
        return answer

    def close(self) -> None:
        """Close all connections that are not in use. May be repeated."""
        while (client := self._taken()) is not None:
            client.__exit__()

    def _client(self) -> BrokerClient:
        while (client := self._taken()) is not None:
            with contextlib.suppress(pika.exceptions.AMQPError, OSError):
                client.look()
                return client
        return BrokerClient(self._broker, self._queue)

    def _taken(self) -> BrokerClient | None:
        with self._lock:
            return self._idle.pop() if self._idle else None
