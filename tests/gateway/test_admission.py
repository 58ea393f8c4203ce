"""Who may use the gateway, and which folder is whose."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.errors import ConfigurationError, Forbidden, Unavailable
from aiida_marketplace_hpc.gateway import mapping
from aiida_marketplace_hpc.gateway.admission import Admission
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.gateway.homes import Homes
from aiida_marketplace_hpc.gateway.ledger import Ledger
from aiida_marketplace_hpc.gateway.members import Members

pytestmark = pytest.mark.databases

ISSUER = "https://login.example.org/realms/lab"
OIDC = {"auth": "oidc", "issuer": ISSUER, "audience": ["hpc"]}


def somebody(subject: str, email: str = "", *, issuer: str = ISSUER, verified: bool = True, **claims: Any) -> Identity:
    email = email or f"{subject}@example.org"
    told = {"sub": subject, "email": email, "email_verified": verified, **claims}
    return Identity(issuer, subject, email, subject, email_verified=verified, claims=told)


ALICE, BOB = somebody("alice"), somebody("bob")
Make = Callable[..., Admission]


@pytest.fixture
def members(ledger: Ledger) -> Members:
    return Members(ledger)


@pytest.fixture
def admission(tmp_path: Path, ledger: Ledger) -> Make:
    def make(**flags: Any) -> Admission:
        settings = load({"home": str(tmp_path / "home" / "{username}"), **OIDC, **flags})
        return Admission(settings, ledger, Homes(settings.roots))

    return make


def test_everybody_is_let_in_unless_it_is_said_otherwise(admission: Make) -> None:
    admission().user_of(somebody("x", verified=False))


@pytest.mark.parametrize(
    ("flags", "identity"),
    [
        ({"allow": ["Alice@Example.org"]}, ALICE),
        ({"allow": ["other", "alice"]}, somebody("alice", "x@y", verified=False)),
        ({"allow_claim": ["groups=hpc"]}, somebody("alice", groups=["a", "hpc"])),
        ({"allow_claim": ["department=physics"]}, somebody("alice", department="physics")),
        ({"allow_claim": ["realm_access.roles=hpc"]}, somebody("alice", realm_access={"roles": ["hpc"]})),
        ({"allow_claim": ["scope=hpc"]}, somebody("alice", scope="openid hpc")),
        ({"require_registration": True, "allow_claim": ["a=b", "c=d"]}, somebody("alice", c="d")),
        ({"account": "own", "owner": "alice@example.org"}, ALICE),
        ({"account": "own", "owner": "alice"}, somebody("alice", "x@y", verified=False)),
    ],
)
def test_who_is_named_or_has_the_claim_is_let_in(
    admission: Make, ledger: Ledger, flags: dict[str, Any], identity: Identity
) -> None:
    gate = admission(**flags)
    assert gate.user_of(identity).username
    for other in (
        BOB,
        somebody("bob", "alice@example.org", verified=False),
        somebody("bob", groups=["hpc2"], department="physics of hpc", scope="hpc2", realm_access=["hpc"]),
        somebody("bob", groups="a hpc", c=None, realm_access={"roles": {"hpc": 1}}),
    ):
        with pytest.raises(Forbidden, match="ask its operator to admit you, bob") as refusal:
            gate.user_of(other)
        assert ISSUER in refusal.value.message
    assert [user.subject for user in ledger.users()] == ["alice"]


@pytest.mark.parametrize("text", ["groups", "groups=", "=hpc", ""])
def test_a_claim_that_makes_no_sense_is_named(admission: Make, text: str) -> None:
    with pytest.raises(ConfigurationError, match="NAME=VALUE"):
        admission(allow_claim=[text])


def test_registration_by_address_is_good_for_one_person(admission: Make, members: Members) -> None:
    gate = admission(require_registration=True)
    with pytest.raises(Forbidden):
        gate.user_of(ALICE)
    members.invite("ALICE@example.org")
    with pytest.raises(Forbidden, match="not verified"):
        gate.user_of(somebody("thief", "alice@example.org", verified=False))
    user = gate.user_of(ALICE)
    assert members.invitations() == []
    # She stays registered under another address; who gets her old one later is not.
    assert gate.user_of(somebody("alice", "married@example.org")).id == user.id
    with pytest.raises(Forbidden):
        gate.user_of(somebody("successor", "alice@example.org"))
    members.register(user, registered=False)
    with pytest.raises(Forbidden):
        gate.user_of(ALICE)


def test_somebody_who_was_here_before_can_be_registered(admission: Make, members: Members) -> None:
    user = admission().user_of(ALICE)
    gate = admission(require_registration=True)
    with pytest.raises(Forbidden):
        gate.user_of(ALICE)
    members.register(user)
    assert gate.user_of(ALICE).id == user.id


def test_who_is_blocked_is_not_let_in_whatever_else_admits_them(admission: Make, members: Members) -> None:
    for flags in ({}, {"allow": ["alice"]}, {"account": "own", "owner": "alice"}):
        gate = admission(**flags)
        user = gate.user_of(ALICE)
        members.register(user)
        members.block(user)
        with pytest.raises(Forbidden, match="blocked"):
            gate.user_of(ALICE)
        members.block(user, False)
        gate.user_of(ALICE)


def test_an_own_account_is_one_persons(admission: Make) -> None:
    gate = admission(account="own", owner="alice@example.org")
    gate.user_of(ALICE)
    with pytest.raises(Forbidden):
        gate.user_of(somebody("successor", "alice@example.org"))
    gate.user_of(ALICE)


def test_another_address_is_the_same_person(admission: Make, ledger: Ledger) -> None:
    gate = admission()
    first = gate.user_of(somebody("s-1", "a.b@example.org"))
    again = gate.user_of(somebody("s-1", "married@example.org"))
    assert (again.id, again.username, again.email) == (first.id, "a_b", "married@example.org")
    assert [user.email for user in ledger.users()] == ["married@example.org"]
    assert gate.user_of(somebody("s-2", "married@example.org")).username == "married"


def test_the_same_address_is_not_the_same_person(admission: Make) -> None:
    gate = admission()
    people = [
        somebody("s-1", "a.b@example.org"),
        somebody("s-2", "a.b@example.org"),
        somebody("s-1", "a.b@example.org", issuer="https://other.example.org"),
    ]
    names = [gate.user_of(identity).username for identity in people]
    assert len(set(names)) == 3
    assert names[0] == "a_b"
    assert [gate.user_of(identity).username for identity in people] == names


# --- the names of homes ----------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> Callable[[str], list[str]]:
    def make(script: str) -> list[str]:
        path = tmp_path / "name-of-home"
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(stat.S_IRWXU)
        return [str(path), "--of", "a b"]

    return make


def test_a_claim_names_the_home(admission: Make) -> None:
    gate = admission(home_claim="posix.account")
    assert gate.user_of(somebody("s", "a.b@x", posix={"account": "uq.12"})).username == "uq.12"
    # Afterwards the ledger knows.
    assert gate.user_of(somebody("s", "a.b@x", posix={"account": "other"})).username == "uq.12"


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_file_names_the_home(admission: Make, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"homes{suffix}"

    def write(names: dict[str, str]) -> None:
        lines = "".join(f"{json.dumps(who)} = {json.dumps(name)}\n" for who, name in names.items())
        path.write_text(json.dumps(names) if suffix == ".json" else lines)

    write({"Alice@example.org": "al", "s-2": "two"})
    gate = admission(home_map=path)
    assert gate.user_of(ALICE).username == "al"
    assert gate.user_of(somebody("s-2", "x@y", verified=False)).username == "two"
    for nobody in (BOB, somebody("bob", "alice@example.org", verified=False)):
        with pytest.raises(Forbidden, match="ask the operator of this gateway to name one"):
            gate.user_of(nobody)
    write({"bob": "bobby"})
    assert gate.user_of(BOB).username == "bobby"
    path.write_text("{")
    with pytest.raises(Unavailable):
        gate.user_of(somebody("carol"))
    assert gate.user_of(BOB).username == "bobby"
    path.unlink()
    with pytest.raises(Unavailable):
        gate.user_of(somebody("carol"))


@pytest.mark.parametrize("content", [None, "= 1", '"a" = 1', "[a]\nb = 'c'"])
def test_a_file_that_makes_no_sense_is_named(admission: Make, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "homes.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"homes\.toml"):
        admission(home_map=path)


def test_a_command_names_the_home(
    admission: Make, command: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARKETPLACE_HPC_DATABASE", "postgresql://secret")
    script = f'printf "%s|" "$@" > {tmp_path}/arguments; cat >> {tmp_path}/told; env > {tmp_path}/env; echo "  uq12 "'
    gate = admission(home_command=command(script))
    assert gate.user_of(somebody("s-1", "a.b@x", groups=["hpc"])).username == "uq12"
    gate.user_of(somebody("s-1", "a.b@x"))
    told = json.loads((tmp_path / "told").read_text())
    assert told == {
        "issuer": ISSUER,
        "subject": "s-1",
        "email": "a.b@x",
        "email_verified": True,
        "name": "s-1",
        "claims": {"sub": "s-1", "email": "a.b@x", "email_verified": True, "groups": ["hpc"]},
    }
    assert (tmp_path / "arguments").read_text() == "--of|a b|"
    assert "secret" not in (tmp_path / "env").read_text()


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("cat > /dev/null", Forbidden),
        ("exit 3", Unavailable),
        ("echo alice; exit 1", Unavailable),
        ("kill $$", Unavailable),
    ],
)
def test_a_command_that_names_nobody_or_fails(
    admission: Make, ledger: Ledger, command: Callable[[str], list[str]], script: str, error: type[Exception]
) -> None:
    gate = admission(home_command=command(script))
    with pytest.raises(error):
        gate.user_of(ALICE)
    assert ledger.users() == []


def test_a_command_that_is_not_there_is_no_refusal(admission: Make, tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        admission(home_command=[str(tmp_path / "gone")]).user_of(ALICE)


def test_a_command_that_hangs_is_ended_with_all_it_has_started(
    admission: Make, command: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "_TIMEOUT", 0.3)
    gate = admission(
        home_command=command(f"setsid sleep 60 & echo $! > {tmp_path}/left; sleep 300 & echo $! > {tmp_path}/pid; wait")
    )
    with pytest.raises(Unavailable):
        gate.user_of(ALICE)
    os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)  # It has left, and is nobody's to wait for.
    pid = (tmp_path / "pid").read_text().strip()
    deadline = time.monotonic() + 10
    with suppress(OSError):  # There is no such process any more, or nothing is left of it but its number.
        while Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline, "it goes on"
            time.sleep(0.01)


def test_who_is_refused_does_not_run_the_command_at_every_request(
    admission: Make, command: Callable[[str], list[str]], tmp_path: Path
) -> None:
    gate = admission(home_command=command(f"echo x >> {tmp_path}/runs; cat > /dev/null"))
    for _ in range(5):
        with pytest.raises(Forbidden):
            gate.user_of(ALICE)
    assert (tmp_path / "runs").read_text() == "x\n"


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "/etc", ".hidden", "-rf", "a b", "a\nb", "ä", "x" * 49, "{username}", ""]
)
def test_a_home_has_a_safe_name_only(admission: Make, ledger: Ledger, name: str) -> None:
    with pytest.raises(Forbidden):
        admission(home_claim="account").user_of(somebody("alice", account=name))
    assert ledger.users() == []


def test_a_claim_that_is_no_name(admission: Make) -> None:
    for odd in (None, 7, ["alice"], {"a": "b"}):
        with pytest.raises(Forbidden):
            admission(home_claim="account").user_of(somebody("alice", account=odd))


def test_nobody_is_given_somebody_elses_home(admission: Make, tmp_path: Path, ledger: Ledger) -> None:
    gate = admission(home_claim="account")
    alice = gate.user_of(somebody("alice", account="al"))
    (tmp_path / "home" / "al").mkdir(parents=True)
    Homes(load({"home": str(tmp_path / "home" / "{username}")}).roots).claim(alice)
    with pytest.raises(Forbidden, match="somebody else's already"):
        gate.user_of(somebody("bob", account="al"))
    assert [user.subject for user in ledger.users()] == ["alice"]
    # Nor when the ledger is lost: the home says whose it is.
    empty = Ledger(f"sqlite:///{tmp_path / 'new.sqlite'}")
    empty.migrate()
    settings = load({"home": str(tmp_path / "home" / "{username}"), **OIDC, "home_claim": "account"})
    anew = Admission(settings, empty, Homes(settings.roots))
    with pytest.raises(Forbidden, match="somebody else's already"):
        anew.user_of(somebody("bob", account="al"))
    assert anew.user_of(somebody("alice", account="al")).username == "al"
    empty.close()


def test_two_ways_to_name_homes_are_one_too_many(admission: Make) -> None:
    with pytest.raises(ConfigurationError, match="home_claim and home_command"):
        admission(home_claim="a", home_command=["b"])


@pytest.mark.parametrize("odd", ["x" * 256, "a\0b", "\ud800"])
def test_who_cannot_be_written_down_is_refused_and_never_cut_short(admission: Make, ledger: Ledger, odd: str) -> None:
    gate = admission()
    for identity in (somebody(odd), somebody("a", email=f"{odd}@example.org")):
        with pytest.raises(Forbidden, match="characters"):
            gate.user_of(identity)
    assert ledger.users() == []
