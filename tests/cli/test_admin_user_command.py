"""``marketplace-hpc gateway admin user``: whom it is about is never guessed."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.ledger import Ledger

ISSUER = "https://login.example.org"


def admin(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["gateway", "admin", "--state", str(folder), "user", *arguments])


def test_people_of_one_name_are_told_apart_by_their_id(tmp_path: Path, ledger: Ledger) -> None:
    people = [ledger.user_of(Identity(ISSUER, subject, "a.b@example.org", "A")) for subject in ("s-1", "s-2")]
    ambiguous = admin(tmp_path, "block", "A.B@example.org")
    assert ambiguous.exit_code == 1
    assert all(user.id in ambiguous.output for user in people)
    assert not any(user.blocked for user in ledger.users())
    for _ in range(2):
        assert admin(tmp_path, "block", people[1].id).exit_code == 0
    assert [(user.subject, user.blocked) for user in ledger.users()] == [("s-1", False), ("s-2", True)]
    assert admin(tmp_path, "add", people[0].id).exit_code == 0
    assert ledger.user(people[0].id).registered
    assert admin(tmp_path, "remove", "s-1").exit_code == 0
    assert not ledger.user(people[0].id).registered


def test_nobody_is_named(tmp_path: Path, ledger: Ledger) -> None:
    for command in ("block", "unblock", "remove"):
        done = admin(tmp_path, command, "nobody@example.org")
        assert done.exit_code == 1
        assert "has been here" in done.output


def test_an_invitation_can_be_taken_back(tmp_path: Path, ledger: Ledger) -> None:
    for _ in range(2):
        assert admin(tmp_path, "add", "a.b@example.org").exit_code == 0
    assert admin(tmp_path, "list").output.count("a.b@example.org") == 1
    assert admin(tmp_path, "remove", "A.B@example.org").exit_code == 0
    assert "a.b" not in admin(tmp_path, "list").output


def test_names_cannot_speak_to_the_terminal(tmp_path: Path, ledger: Ledger) -> None:
    ledger.user_of(Identity(ISSUER, "s\x1b[2J", "a\x1b[2J@example.org", "A"))
    assert "\x1b" not in admin(tmp_path, "list").output + admin(tmp_path, "block", "\x1b").output
