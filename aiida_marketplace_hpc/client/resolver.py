"""The addresses of a host, asked for without waiting longer than one wants to.

The system's resolver cannot be interrupted, and may take half a minute where no name server answers. So a thread of its own
asks it, one for each name however many wait, and who has waited long enough goes.
"""

from __future__ import annotations

import socket
import threading
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress

from urllib3.util.connection import allowed_gai_family

_asking: dict[str, Future[list[str]]] = {}
_lock = threading.Lock()


def resolve(name: str, patience: float) -> list[str]:
    """The numeric addresses of a host, in the order in which to try them. May be repeated.

    :param name: a host's name, or an address, for which nobody is asked.
    :param patience: seconds.
    :raises socket.gaierror: there is none.
    :raises TimeoutError: the resolver has not answered; it goes on, and the next who asks waits for the same answer.
    """
    with suppress(socket.gaierror):
        return _addresses(name, socket.AI_NUMERICHOST)
    with _lock:
        answer = _asking.get(name)
        if answer is None:
            answer = _asking[name] = Future()
            # A daemon, which nobody waits for when the program ends.
            threading.Thread(target=_ask, args=(name, answer), name=f"resolve {name}", daemon=True).start()
    try:
        return answer.result(patience)
    except futures.TimeoutError:
        raise TimeoutError(f"the name {name} was not resolved in time") from None


def _ask(name: str, answer: Future[list[str]]) -> None:
    try:
        found = _addresses(name)
    except BaseException as exc:  # noqa: BLE001 - whoever waits must hear of it, whatever it is.
        _forget(name)
        answer.set_exception(exc)
    else:
        _forget(name)
        answer.set_result(found)


def _forget(name: str) -> None:
    # Before it is told: what is asked for after an answer is asked for anew, as names move.
    with _lock:
        del _asking[name]


def _addresses(name: str, flags: int = 0) -> list[str]:
    name = name.strip("[]")
    found = socket.getaddrinfo(name, None, allowed_gai_family(), socket.SOCK_STREAM, 0, flags)
    return list(dict.fromkeys(str(row[4][0]) for row in found))
