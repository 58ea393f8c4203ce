"""A web server in threads of the test's own process, for what stands in for others."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WebServer(ThreadingHTTPServer):
    """Answers on a free port of 127.0.0.1, each request in a thread of its own, from :meth:`start` to :meth:`stop`.

    Whoever connects before the start waits.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_port}"

    def start(self) -> None:
        """Begin to answer. Once."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests; whoever has connected since gets nothing. May be repeated."""
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join(timeout=10)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that has gone is none of our faults, some are killed on purpose."""
