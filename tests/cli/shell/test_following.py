"""``tail -f``: what is added, what is replaced, what breaks off; no clock is waited for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from aiida_marketplace_hpc.cli.shell.session import INTERRUPTED, Session
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.errors import ConnectionFailed, Unauthorized
from aiida_marketplace_hpc.testing.served import ServedGateway

Watch = Callable[[str, Sequence[Callable[[], object]]], tuple[str, str]]


@pytest.fixture
def naps() -> list[float]:
    return []


@pytest.fixture
def watch(session: Session, naps: list[float], capsysbinary: pytest.CaptureFixture[bytes]) -> Watch:
    """Follow files; in each pause something happens, and after the last Ctrl-C is pressed."""

    def watch(line: str, events: Sequence[Callable[[], object]]) -> tuple[str, str]:
        left = list(events)

        def sleep(seconds: float) -> None:
            naps.append(seconds)
            if not left:
                raise KeyboardInterrupt
            left.pop(0)()

        session.sleep = sleep
        capsysbinary.readouterr()
        with pytest.raises(KeyboardInterrupt):
            session.run(line)
        assert session.failed == INTERRUPTED
        assert not left
        out, err = capsysbinary.readouterr()
        return out.decode(), err.decode()

    return watch


def append(path: Path, text: str) -> Callable[[], object]:
    def event() -> None:
        with path.open("a") as file:
            file.write(text)

    return event


def nothing() -> None: ...


def test_what_is_added_is_shown(watch: Watch, home: Path) -> None:
    log = home / "log"
    log.write_text("1\n2\n3\n")
    out, err = watch("tail -n 1 -f log", [append(log, "4\n"), nothing, append(log, "5"), append(log, "6\n")])
    assert out == "3\n4\n56\n"
    assert err == ""


def test_a_file_that_shrinks_is_shown_from_its_beginning(watch: Watch, home: Path) -> None:
    log = home / "log"
    log.write_text("old\n" * 10)
    out, err = watch("tail -n 1 -f log", [lambda: log.write_text("new\n"), append(log, "more\n")])
    assert out == "old\nnew\nmore\n"
    assert "log is another file now" in err


def test_a_file_that_is_replaced_is_shown_from_its_beginning(watch: Watch, home: Path) -> None:
    log = home / "log"
    log.write_text("old\n" * 10)

    def replace() -> None:
        (home / "new").write_text("new line\n" * 20)
        os.replace(home / "new", log)

    out, err = watch("tail -n 1 -f log", [replace])
    assert out == "old\n" + "new line\n" * 20
    assert "log is another file now" in err


def test_a_file_that_vanishes_and_comes_back(watch: Watch, home: Path) -> None:
    log = home / "log"
    log.write_text("one\n")
    out, err = watch("tail -f log", [log.unlink, nothing, append(log, "one\ntwo\n")])
    assert out == "one\none\ntwo\n"
    assert err == "tail: log is not there; waiting for it\n"


def test_a_file_that_is_not_there_yet(watch: Watch, home: Path) -> None:
    out, err = watch("tail -f log", [nothing, append(home / "log", "begun\n")])
    assert out == "begun\n"
    assert "waiting for it" in err


def test_several_files_say_which_is_which(watch: Watch, home: Path) -> None:
    for name in ("a", "b"):
        (home / name).write_text(f"{name}1\n")
    out, _ = watch("tail -f a b", [append(home / "b", "b2\n"), append(home / "a", "a2\n"), append(home / "a", "a3\n")])
    assert out == "==> a <==\na1\n\n==> b <==\nb1\nb2\n\n==> a <==\na2\na3\n"


def test_looking_costs_one_small_request_and_slows_down(
    watch: Watch, home: Path, naps: list[float], served: ServedGateway
) -> None:
    (home / "log").write_text("x\n" * 100_000)
    watch("tail -f log", [nothing] * 10)
    served.stop()
    asked = [line["capability"] for line in served.requests()]
    assert asked[-10:] == ["query"] * 10
    assert naps[0] == 1.0
    assert naps == sorted(naps)
    assert naps[-1] == 5.0


def test_an_outage_is_said_once_and_survived(
    watch: Watch, home: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    log = home / "log"
    log.write_text("1\n")
    original = HpcGateway.query
    down: set[str] = set()

    def query(self: HpcGateway, *arguments: object, **options: object) -> object:
        if down:
            raise ConnectionFailed("the gateway is away")
        return original(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(HpcGateway, "query", query)
    out, err = watch("tail -f log", [lambda: down.add("now"), nothing, append(log, "2\n"), down.clear])
    assert out == "1\n2\n"
    assert err == "tail: the gateway is away; still trying\n"


def test_a_refused_token_ends_it(
    session: Session, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "log").write_text("1\n")

    def sleep(seconds: float) -> None:
        def query(*_: object, **__: object) -> object:
            raise Unauthorized("the token has expired")

        monkeypatch.setattr(HpcGateway, "query", query)

    session.sleep = sleep
    session.run("tail -f log")
    assert session.failed == 4
    assert "the token has expired" in capsys.readouterr().err
