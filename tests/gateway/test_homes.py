"""Homes belong to who had them first, also when the ledger that knew it is lost."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from aiida_marketplace_hpc.errors import Forbidden
from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.gateway.service import Caller, Gateway
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway

FIRST, SECOND = "token-of-the-first", "token-of-the-second"
Restart = Callable[[], Gateway]


@pytest.fixture(params=["{username}", "of-{username}/home"])
def anew(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Restart]:
    """Start a gateway with an empty ledger and the homes that are there."""
    made: list[Gateway] = []

    def make() -> Gateway:
        settings = load(
            {
                "state": tmp_path / f"state{len(made)}",
                "home": str(tmp_path / "home" / request.param),
                "root": [f"scratch={tmp_path}/scratch/{{username}}", f"common={tmp_path}/common"],
                "dev_token": {"a.b@one.org": FIRST, "a.b@two.org": SECOND},
            }
        )
        gateway = Gateway(settings, FakeBackend())
        gateway.ledger.migrate()
        made.append(gateway)
        return gateway

    yield make
    for gateway in made:
        gateway.jobs.close()
        gateway.ledger.close()


def mark_of(caller: Caller) -> Path:
    return Path(caller.home, ".marketplace-hpc", "owner")


def test_who_comes_first_after_the_loss_gets_nobody_elses_home(anew: Restart) -> None:
    gateway = anew()
    first, second = gateway.caller(FIRST), gateway.caller(SECOND)
    assert first.user.username == "a_b"
    Path(first.home, "secret").write_text("of the first")
    for order in ([SECOND, FIRST], [FIRST, SECOND], [SECOND]):
        gateway = anew()
        homes = {token: gateway.caller(token).home for token in order}
        assert homes == {token: {FIRST: first, SECOND: second}[token].home for token in order}


def test_a_stranger_gets_no_home_that_has_an_owner(anew: Restart) -> None:
    first = anew().caller(FIRST)
    stranger = anew().caller(SECOND)
    assert stranger.home != first.home
    assert stranger.user.username.startswith("a_b-")


def test_a_home_without_a_mark_gets_one_at_its_users_next_request(anew: Restart) -> None:
    gateway = anew()
    first = gateway.caller(FIRST)
    mark = mark_of(first)
    written = mark.read_text()
    mark.unlink()
    gateway.caller(FIRST)
    assert mark.read_text() == written
    assert stat.S_IMODE(mark.stat().st_mode) == 0o600
    assert "one.org" not in written
    assert [path.name for path in mark.parent.iterdir()] == ["owner"]


def test_any_folder_of_ones_own_counts(anew: Restart, tmp_path: Path) -> None:
    first = anew().caller(FIRST)
    mark_of(first).unlink()
    assert (tmp_path / "scratch" / "a_b" / ".marketplace-hpc" / "owner").exists()
    assert not (tmp_path / "common" / ".marketplace-hpc" / "owner").exists()
    assert anew().caller(SECOND).home != first.home


def test_a_ledger_that_says_otherwise_is_not_believed(anew: Restart) -> None:
    gateway = anew()
    first = gateway.caller(FIRST)
    mark_of(first).write_text("somebody else\n")
    with pytest.raises(Forbidden, match="ask the operator"):
        gateway.caller(FIRST)
    assert mark_of(first).read_text() == "somebody else\n"


def test_a_home_that_cannot_be_marked_can_be_used(anew: Restart) -> None:
    gateway = anew()
    mark = mark_of(gateway.caller(FIRST))
    mark.unlink()
    mark.parent.rmdir()
    mark.parent.write_text("in the way")
    gateway.caller(FIRST)


def test_nobody_reaches_the_mark(served: ServedGateway) -> None:
    headers = {"Authorization": f"Bearer {TOKENS[ALICE]}"}
    home = requests.get(f"{served.url}/api/v1/info", headers=headers, timeout=20).json()["home"]
    assert Path(home, ".marketplace-hpc", "owner").exists()
    for method, way in (("GET", "download"), ("PUT", "upload"), ("DELETE", "delete")):
        answer = requests.request(
            method,
            f"{served.url}/api/v1/file/{way}/home",
            params={"filename": ".marketplace-hpc/owner"},
            data=b"mine" if method == "PUT" else None,
            headers=headers,
            timeout=20,
        )
        assert answer.status_code == 403
