"""The relay: takes requests from a message broker and hands them to the gateway, for a cluster behind a firewall.

All connections go outwards. One thread speaks to the broker, as its library demands; a bounded number of others wait for the
gateway. A message is acknowledged after its answer was published, so that one which is lost on the way is delivered again:
what the relay sends on may be sent twice, with the same key.
"""

from __future__ import annotations

import logging
import random
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import pika
import pika.exceptions
import requests
from urllib3.exceptions import NewConnectionError

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.errors import (
    ConfigurationError,
    GatewayError,
    InvalidRequest,
    ServerFault,
    TooLarge,
    Unavailable,
)
from aiida_marketplace_hpc.gateway import log
from aiida_marketplace_hpc.gateway.config import MIB
from aiida_marketplace_hpc.gateway.relay_config import RelaySettings
from aiida_marketplace_hpc.gateway.relay_messages import (
    AnswerMessage,
    RelayedRequest,
    read_request,
    repetition_key,
    write_answer,
    write_error,
)
from aiida_marketplace_hpc.protocol import RELAY_HEADER, REQUEST_ID_HEADER

logger = logging.getLogger(__name__)

_CONNECT = 10.0
"""Seconds within which the gateway takes a connection."""
_LONGEST_PAUSE = 30.0
"""Seconds between two attempts to reach the broker, at most."""
_TICK = 0.25
"""Seconds after which the thread of the broker looks whether it is to stop, at the latest."""
_CHUNK = 64 * 1024


def pauses() -> Iterator[float]:
    """Seconds to wait before each attempt to reach the broker: longer each time, never the same for two relays."""
    longest = 0.5
    while True:
        longest = min(2 * longest, _LONGEST_PAUSE)
        yield random.uniform(longest / 2, longest)  # noqa: S311 - not to be guessed by nobody


class ToGateway:
    """Sends requests on to a gateway; of any thread's.

    :param url: the gateway's address.
    :param timeout: seconds that a request may take.
    :param limit: bytes of an answer.
    """

    def __init__(self, url: str, timeout: float, limit: int) -> None:
        self._url = url
        self._timeout = timeout
        self._limit = limit

    def answer(self, request: RelayedRequest, key: str = "", request_id: str | None = None) -> AnswerMessage:
        """The answer to a request: the gateway's, or why there is none.

        :param key: the same for each delivery of one message, so that a job is created once.
        :param request_id: under which the gateway is to know it.
        """

        def error(problem: GatewayError, status: int | None = None) -> AnswerMessage:
            return write_error(problem, status, request_id)

        try:
            return self._send(request, key, request_id)
        except requests.ConnectTimeout:
            return error(_UNREACHABLE)
        except (requests.Timeout, _TooLate):
            return error(
                _perhaps_done(f"the gateway did not answer the relay within {self._timeout:g} s", request), 504
            )
        except requests.ConnectionError as exc:
            if isinstance(getattr(exc.args[0], "reason", None) if exc.args else None, NewConnectionError):
                return error(_UNREACHABLE)
            return error(_perhaps_done("the connection between the relay and the gateway broke", request), 502)
        except requests.exceptions.ChunkedEncodingError:
            return error(_perhaps_done("the gateway's answer broke off", request), 502)
        except requests.exceptions.ContentDecodingError:
            return error(_perhaps_done("the gateway's answer is not packed as it says", request), 502)
        except GatewayError as exc:
            return error(exc)
        except (requests.RequestException, ValueError):
            # Their texts may repeat the headers, which have a token in them.
            return error(InvalidRequest("the message makes no HTTP request: look at its endpoint and headers"))

    def _send(self, request: RelayedRequest, key: str, request_id: str | None) -> AnswerMessage:
        deadline = time.monotonic() + self._timeout
        query = dict(request.query)
        if key and request.capability is not None and request.capability.name == "newTransformation":
            query.setdefault("key", key)
        headers = {
            "User-Agent": f"marketplace-hpc-relay/{__version__}",
            **request.headers,
            **({REQUEST_ID_HEADER: request_id} if request_id else {}),
            "Accept-Encoding": "identity",
            RELAY_HEADER: str(self._limit),
        }
        with (
            # A session for each request: one user's cookies are not the next one's.
            requests.Session() as session,
            session.request(
                request.method,
                f"{self._url}/{request.endpoint}",
                params=query,
                headers=headers,
                data=request.body,
                auth=_as_it_is,
                timeout=(min(_CONNECT, self._timeout), self._timeout),
                allow_redirects=False,
                stream=True,
            ) as response,
        ):
            content = bytearray()
            for chunk in response.iter_content(_CHUNK):
                content += chunk
                if len(content) > self._limit:
                    raise self._too_large()
                if time.monotonic() > deadline:
                    raise _TooLate
            answer = write_answer(response.status_code, response.headers, bytes(content))
        # Characters may need several bytes in JSON; and what is too large for the broker would come again for ever.
        if len(answer.message) > self._limit:
            raise self._too_large()
        return answer

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"the answer is larger than the {self._limit // MIB} MiB that a message carries: "
            "ask for a part of it (offset, length)"
        )


class _TooLate(Exception):
    """The gateway has begun to answer, and not come to the end in time."""


_UNREACHABLE = Unavailable("the relay does not reach the gateway: nothing was done, try again in a while")


def _perhaps_done(reason: str, request: RelayedRequest) -> Unavailable:
    """The error for a request of which nobody knows whether the gateway has carried it out."""
    repeatable = request.capability is not None and request.capability.repeatable
    advice = "try again in a while" if repeatable else "look whether it was done before you try again"
    return Unavailable(f"{reason}: it may have done what was asked; {advice}", retryable=repeatable)


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """An authentication that adds nothing: otherwise requests would put a password of ~/.netrc in place of the token."""
    return request


@dataclass(frozen=True)
class _Delivery:
    """Where a message came from and where its answer goes."""

    channel: Any
    tag: int
    reply_to: str
    correlation_id: str | None
    redelivered: bool
    started: float
    """A time of :func:`time.monotonic`."""


class Relay:
    """Serves one queue until it is stopped.

    :param ready: called whenever requests are taken from the queue, after each connection.
    :raises ConfigurationError: a certificate cannot be used.
    """

    def __init__(self, settings: RelaySettings, ready: Callable[[], None] = lambda: None) -> None:
        self._settings = settings
        self._queue = settings.queue_name
        self._tls = _tls(settings)
        self._gateway = ToGateway(settings.gateway, settings.timeout, settings.answer_limit * MIB)
        self._ready = ready
        self._stopping = threading.Event()
        self._under_way: set[Future[AnswerMessage]] = set()
        self._pauses = pauses()

    def stop(self) -> None:
        """Take no more requests, finish those under way, and end. May be called by a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Serve, and connect again whenever the connection to the broker is lost.

        :raises ConfigurationError: the broker refuses name, password or virtual host at the first connection.
        """
        connected_once = False
        with ThreadPoolExecutor(self._settings.workers, "relay") as pool:
            while not self._stopping.is_set():
                try:
                    with pika.BlockingConnection(self._parameters()) as connection:
                        connected_once = True
                        self._serve(connection, pool)
                except (pika.exceptions.AMQPError, OSError) as exc:
                    if isinstance(exc, _REFUSALS) and not connected_once:
                        raise ConfigurationError(
                            f"the broker {self._settings.shown_broker} refuses the name, the password or the virtual host"
                        ) from exc
                    pause = next(self._pauses)
                    logger.warning("no connection to the broker (%s); again in %.0f s", self._brief(exc), pause)
                    # What is under way comes again; let it end, so that it is not done twice at the same time.
                    wait(set(self._under_way), timeout=self._settings.timeout)
                    self._under_way.clear()
                    self._stopping.wait(pause)

    def _brief(self, error: BaseException) -> str:
        """What is known about a lost connection, in a few words."""
        said = str(error)
        if not self._settings.queue:  # With its name, a guess at the secret can be checked.
            said = said.replace(self._queue, "the queue")
        return f"{type(error).__name__}: {said}" if said else type(error).__name__

    def _parameters(self) -> Any:
        settings = self._settings
        parameters = pika.URLParameters(settings.broker.get_secret_value())
        parameters.socket_timeout = parameters.stack_timeout = 15.0
        parameters.blocked_connection_timeout = 60.0
        parameters.client_properties = {"connection_name": "marketplace-hpc relay"}
        if parameters.ssl_options is not None:
            parameters.ssl_options = pika.SSLOptions(self._tls, parameters.host)
        return parameters

    def _serve(self, connection: Any, pool: ThreadPoolExecutor) -> None:
        """Take requests until there is no connection any more, or it is to stop."""
        self._declare(connection)
        channel = connection.channel()
        channel.basic_qos(prefetch_count=self._settings.workers)
        consumer = channel.basic_consume(self._queue, partial(self._take, connection, pool))
        logger.info("taking requests from %s for %s", self._settings.shown_broker, self._settings.gateway)
        self._ready()
        self._pauses = pauses()
        while not self._stopping.is_set():
            connection.process_data_events(time_limit=_TICK)
            if not channel.consumer_tags:
                # The queue was deleted: start anew, and declare it again.
                raise pika.exceptions.AMQPChannelError("the broker has ended the delivery of requests")
        channel.basic_cancel(consumer)
        deadline = time.monotonic() + self._settings.timeout
        while self._under_way and time.monotonic() < deadline:
            connection.process_data_events(time_limit=_TICK)
        connection.process_data_events(time_limit=0)

    def _declare(self, connection: Any) -> None:
        """Make sure that the queue is there; one that is there stays as it was declared."""
        channel = connection.channel()
        try:
            channel.queue_declare(self._queue, passive=True)
        except pika.exceptions.ChannelClosedByBroker as exc:
            if exc.reply_code != _NOT_FOUND:
                raise
            channel = connection.channel()
            channel.queue_declare(self._queue)
        channel.close()

    def _take(
        self, connection: Any, pool: ThreadPoolExecutor, channel: Any, method: Any, properties: Any, body: bytes
    ) -> None:
        """Take a message; on the connection's own thread."""
        reply_to, correlation_id = properties.reply_to or "", properties.correlation_id
        delivery = _Delivery(
            channel, method.delivery_tag, reply_to, correlation_id, bool(method.redelivered), time.monotonic()
        )
        if delivery.reply_to in ("", self._queue):
            # Nobody would hear the answer; to the queue itself, it would be the next request.
            logger.warning("rejected a message that does not say where its answer goes")
            channel.basic_reject(delivery.tag, requeue=False)
            return
        try:
            request = read_request(body)
        except InvalidRequest as exc:
            logger.warning("rejected a message: %s", exc.message)
            self._publish(delivery, write_error(exc))
            channel.basic_reject(delivery.tag, requeue=False)
            return
        key = repetition_key(body, delivery.reply_to, delivery.correlation_id or "") if delivery.correlation_id else ""
        request_id = log.request_id(request.asked_id)
        future = pool.submit(self._gateway.answer, request, key, request_id)
        self._under_way.add(future)
        future.add_done_callback(partial(self._done, connection, delivery, request, request_id))

    def _done(
        self,
        connection: Any,
        delivery: _Delivery,
        request: RelayedRequest,
        request_id: str,
        future: Future[AnswerMessage],
    ) -> None:
        """Hand the answer to the connection's thread; on the thread that has it."""
        try:
            connection.add_callback_threadsafe(partial(self._finish, delivery, request, request_id, future))
        except pika.exceptions.AMQPError:
            with log.about(request_id=request_id):
                logger.warning("an answer has no connection to go by: its request will come again")
            self._under_way.discard(future)

    def _finish(
        self, delivery: _Delivery, request: RelayedRequest, request_id: str, future: Future[AnswerMessage]
    ) -> None:
        """Publish the answer, then acknowledge; on the connection's own thread."""
        self._under_way.discard(future)
        with log.about(request_id=request_id):
            error = future.exception()
            if error is not None:
                logger.error("a request could not be handed on: %s", type(error).__name__)
            fault = ServerFault("a fault of the relay's own")
            answer = future.result() if error is None else write_error(fault, request_id=request_id)
            self._publish(delivery, answer)
            delivery.channel.basic_ack(delivery.tag)
            self._note(delivery, request, request_id, answer.status)

    def _note(self, delivery: _Delivery, request: RelayedRequest, request_id: str, status: int) -> None:
        """Write the line about a request: who may ask what is the gateway's business, and its access log's."""
        duration, path = time.monotonic() - delivery.started, f"/{request.endpoint.partition('?')[0]}"
        line = {
            "request_id": request_id,
            "method": request.method,
            "path": path,
            "capability": None if request.capability is None else request.capability.name,
            "queue": self._settings.shown_queue,
            "redelivered": delivery.redelivered,
            "status": status,
            "duration": round(duration, 6),
        }
        again = ", delivered again" if delivery.redelivered else ""
        logger.info(
            "%s %s from %s%s -> %d after %.3f s",
            request.method,
            path,
            self._settings.shown_queue,
            again,
            status,
            duration,
            extra={log.LINE: line},
        )

    @staticmethod
    def _publish(delivery: _Delivery, answer: AnswerMessage) -> None:
        properties = pika.BasicProperties(correlation_id=delivery.correlation_id)
        delivery.channel.basic_publish("", delivery.reply_to, answer.message, properties)


_NOT_FOUND = 404
_REFUSALS = (pika.exceptions.ProbableAuthenticationError, pika.exceptions.ProbableAccessDeniedError)


def _tls(settings: RelaySettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.cafile)
    except OSError as exc:  # Those of ssl are, too.
        raise ConfigurationError(
            f"the file {settings.cafile} cannot be used as --cafile: {exc.strerror or exc}"
        ) from exc
    if settings.certfile is not None:
        try:
            context.load_cert_chain(settings.certfile, password=_no_password)
        except OSError as exc:
            raise ConfigurationError(
                f"the file {settings.certfile} cannot be used as --certfile: {exc.strerror or exc}"
            ) from exc
    return context


def _no_password() -> str:
    # Without this, OpenSSL would ask for it on the terminal.
    raise ConfigurationError("the key of --certfile needs a password: give one without, which only the relay can read")


def serve(settings: RelaySettings) -> None:
    """Run a relay in this process until SIGTERM or SIGINT.

    :raises ConfigurationError: the broker refuses it, or a certificate cannot be used.
    """
    log.set_up(settings.log_format, settings.log_level, secrets=settings.secrets)
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    relay = Relay(settings, ready=lambda: print(f"relaying to {settings.gateway}", flush=True))  # noqa: T201
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: relay.stop())
    relay.run()
