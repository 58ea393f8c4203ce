"""Asking for a list of operations until it is done: a gateway that is a script, a clock that the script moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aiida_marketplace_hpc.client.pending import carry_out
from aiida_marketplace_hpc.errors import ConnectionFailed, DeadlineExceeded, Unavailable

Json = dict[str, Any]
DONE: Json = {"results": [{"ok": True, "result": {}}]}
BODY: Json = {"operations": [{"op": "mkdir", "path": "/x"}], "stop_on_error": False}


class Script:
    """Answers one after the other, each after so many seconds; an exception is raised."""

    def __init__(self, *answers: tuple[float, Json | Exception]) -> None:
        self.now = 1000.0
        self.bodies: list[Json] = []
        self.options: list[tuple[bool, float]] = []
        self._answers = list(answers)

    def __call__(self, body: Callable[[], Json], *, repeatable: bool, seconds: float) -> tuple[Json, str]:
        self.bodies.append(body())
        self.options.append((repeatable, seconds))
        after, answer = self._answers.pop(0)
        self.now += after
        if isinstance(answer, Exception):
            raise answer
        return answer, "id"

    def run(self) -> Json:
        return carry_out(self, BODY, repeatable=True, clock=lambda: self.now, seconds=20.0)[0]


def pending(progress: int) -> Json:
    return {"pending": {"key": "k", "progress": progress}}


def test_what_is_done_at_once_is_one_request() -> None:
    script = Script((0.1, DONE))
    assert script.run() == DONE
    (body,) = script.bodies
    assert body == {**BODY, "key": body["key"]}
    assert len(body["key"]) == 32


def test_every_list_has_a_key_of_its_own() -> None:
    first, second = Script((0, DONE)), Script((0, DONE))
    first.run()
    second.run()
    assert first.bodies[0]["key"] != second.bodies[0]["key"]


def test_it_is_asked_for_as_long_as_it_advances() -> None:
    script = Script(*((8.0, pending(number)) for number in range(1, 500)), (1.0, DONE))
    assert script.run() == DONE
    key = script.bodies[0]["key"]
    assert script.now > 1000.0 + 499 * 8.0
    assert all(body == {"key": key, "wait": 8.0} for body in script.bodies[1:])
    assert all(repeatable for repeatable, _ in script.options)


def test_what_stands_still_is_told_to_end_in_time() -> None:
    script = Script((8.0, pending(0)), (8.0, pending(0)), (1.2, pending(0)), (0.1, DONE))
    with pytest.raises(DeadlineExceeded, match="made no progress for 17 s"):
        script.run()
    assert script.now < 1020.0
    assert [body.get("wait") for body in script.bodies] == [None, 8.0, 1.0, 0]
    assert script.bodies[-1]["stop"] is True
    # However slow the answers are, there is no more time than this for all of it.
    assert 8 + 8 + script.options[2][1] + script.options[3][1] <= 20.0


def test_standing_still_is_counted_from_the_last_progress() -> None:
    script = Script((8.0, pending(5)), (8.0, pending(5)), (8.0, pending(6)), (8.0, pending(6)), (8.0, DONE))
    assert script.run() == DONE


def test_a_gateway_that_went_away_meanwhile_is_an_error() -> None:
    script = Script((8.0, pending(5)), (17.0, ConnectionFailed("gone")))
    with pytest.raises(ConnectionFailed):
        script.run()
    assert script.options[1][1] <= 20.0


def test_a_gateway_that_was_started_anew_is_asked_again_with_the_time_since() -> None:
    script = Script((8.0, pending(5)), (2.0, {"unknown": {"key": "k"}}), (0.0, DONE))
    assert script.run() == DONE
    assert script.bodies[2] == {**script.bodies[0], "again": 10.0}
    script = Script((8.0, pending(5)), (2.0, {"unknown": {"key": "k"}}), (0.0, Unavailable("x", retryable=False)))
    with pytest.raises(Unavailable):
        script.run()
