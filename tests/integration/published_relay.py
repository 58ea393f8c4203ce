"""Run by the Python in which the published packages are: their relay, with a handler as short as they leave it to an app.

usage: published_relay.py GATEWAY_URL APPLICATION_ID SECRET, with the broker's port, name and password in RELAY_BROKER
"""

import os
import sys
from urllib.parse import urljoin

import pika
import requests
from marketplace.message_broker.rpc_server import RpcServer
from marketplace_standard_app_api.models.message_broker import MessageBrokerResponseModel


def main() -> None:
    gateway, application, secret = sys.argv[1:]
    port, name, password = os.environ["RELAY_BROKER"].split()
    # The published relay knows one port, name and password. Nothing else of it is touched.
    pika.connection.Parameters.DEFAULT_PORT = int(port)
    pika.connection.Parameters.DEFAULT_CREDENTIALS = pika.PlainCredentials(name, password)

    def handle(asked):  # type: ignore[no-untyped-def]
        answer = requests.request(
            asked.method,
            urljoin(gateway, asked.endpoint),
            params=asked.query_params,
            headers=asked.headers,
            data=asked.body,
            timeout=60,
        )
        # What is no text ends this relay here.
        return MessageBrokerResponseModel(
            status_code=answer.status_code, headers=dict(answer.headers), body=answer.content
        )

    server = RpcServer("127.0.0.1", application, secret, handle)
    print("relaying", flush=True)
    server.consume_messages()


main()
