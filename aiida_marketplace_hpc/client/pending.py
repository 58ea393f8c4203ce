"""Lists of operations on the cluster, however long they take: asked for until they are done, as long as they make progress.

Each list has a key of its own, with which it is carried out once, however often it is sent: when an answer is lost the same
list is sent again, with the seconds since it was first sent, by which a gateway that was started anew meanwhile sees that it
cannot know whether it has carried it out.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from aiida_marketplace_hpc.errors import DeadlineExceeded, MarketplaceHpcError

Json = dict[str, Any]

_STANDSTILL = 0.85
"""The part of a call's time for which a list may stand still; the rest is for the last answer and for telling it to end."""
_LAST_ANSWER = 0.05
_FAREWELL = 0.1
_WAIT = 0.4
"""The part of a call's time for which the gateway may let one request wait."""


class Send(Protocol):
    """Sends one request of ``query``."""

    def __call__(self, body: Callable[[], Json], *, repeatable: bool, seconds: float) -> tuple[Json, str]:
        """
        :param body: makes the body, once per attempt.
        :param seconds: for all attempts.
        :return: the answer, and the id of the request.
        """


def carry_out(
    send: Send, body: Mapping[str, Any], *, repeatable: bool, clock: Callable[[], float], seconds: float
) -> tuple[Json, str]:
    """Have a list of operations carried out once.

    :param body: of the request, without a key.
    :param repeatable: it may be sent again when an answer is lost.
    :param seconds: for which it may make no progress, all in all.
    :return: the answer, and the id of the request that gave it.
    :raises DeadlineExceeded: it made no progress in that time; it was told to end.
    :raises Unavailable: the gateway does not know whether it was carried out, as it was started anew meanwhile.
    """
    key = uuid.uuid4().hex
    began = moved = clock()
    progress: Any = 0
    sent = False

    def whole() -> Json:
        nonlocal sent
        again = {"again": round(clock() - began, 3)} if sent else {}
        sent = True
        return {**body, "key": key, **again}

    answer, request_id = send(whole, repeatable=repeatable, seconds=seconds)
    while True:
        left = moved + seconds * _STANDSTILL - clock()
        if "unknown" in answer:
            answer, request_id = send(whole, repeatable=repeatable, seconds=max(left, seconds * _FAREWELL))
            continue
        pending = answer.get("pending")
        if not isinstance(pending, dict):
            return answer, request_id
        if pending.get("progress") != progress:
            progress, moved = pending.get("progress"), clock()
            left = seconds * _STANDSTILL
        if left <= 0:
            with suppress(MarketplaceHpcError):
                send(lambda: {"key": key, "stop": True, "wait": 0}, repeatable=True, seconds=seconds * _FAREWELL)
            raise DeadlineExceeded(
                f"the operations on the cluster made no progress for {seconds * _STANDSTILL:.0f} s and were told to end: "
                f"is its file system all right? [request {request_id}]"
            )
        ask = {"key": key, "wait": round(min(left, seconds * _WAIT), 3)}
        answer, request_id = send(lambda ask=ask: ask, repeatable=True, seconds=left + seconds * _LAST_ANSWER)  # type: ignore[misc]
