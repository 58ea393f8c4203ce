"""``marketplace-hpc gateway admin user``: who may use a gateway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from aiida_marketplace_hpc.cli.admin import DatabaseFlags, opened_ledger
from aiida_marketplace_hpc.cli.common import printable, table

if TYPE_CHECKING:
    from aiida_marketplace_hpc.gateway.members import Members
    from aiida_marketplace_hpc.gateway.schema import User


@click.group()
def user() -> None:
    """Say who may use a gateway.

    WHO is an e-mail address, a subject, or an id that `list` shows. A gateway that runs takes notice within 10 seconds.
    """


@contextmanager
def _members(flags: DatabaseFlags) -> Iterator[Members]:
    from aiida_marketplace_hpc.gateway.members import Members

    with opened_ledger(flags, migrate=True) as ledger:
        yield Members(ledger)


@user.command("list")
@click.pass_obj
def list_users(flags: DatabaseFlags) -> None:
    """Show who has been here, and who is invited."""
    with _members(flags) as members:
        rows = [[one.id, one.email, one.subject, one.issuer, one.username, _standing(one)] for one in members.users()]
        rows += [["", who, "", "", "", "invited"] for who in members.invitations()]
    click.echo(table(rows, ["id", "e-mail", "subject", "issuer", "folder", ""]))


def _standing(user: User) -> str:
    return "blocked" if user.blocked else "registered" if user.registered else ""


@user.command()
@click.argument("who")
@click.pass_obj
def add(flags: DatabaseFlags, who: str) -> None:
    """Register somebody.

    Whoever comes first with that subject, or with that e-mail address if their issuer has verified it, is registered then, and
    stays so under another address. May be repeated.
    """
    with _members(flags) as members:
        known = next((one for one in members.find(who) if who == one.id), None)
        if known is not None:
            members.register(known)
        else:
            members.invite(who)
    click.echo(f"{printable(who)} may use the gateway")


@user.command()
@click.argument("who")
@click.pass_obj
def remove(flags: DatabaseFlags, who: str) -> None:
    """Take a registration back. Files and jobs stay; whoever is admitted otherwise still is: `block` them. May be repeated."""
    with _members(flags) as members:
        withdrawn = members.withdraw(who)
        found = members.find(who)
        if found or not withdrawn:
            members.register(_only(found, who), registered=False)
    click.echo(f"{printable(who)} is not registered")


@user.command()
@click.argument("who")
@click.pass_obj
def block(flags: DatabaseFlags, who: str) -> None:
    """Let somebody in no more, whatever else admits them. Their jobs go on. May be repeated."""
    _block(flags, who, True)


@user.command()
@click.argument("who")
@click.pass_obj
def unblock(flags: DatabaseFlags, who: str) -> None:
    """Let somebody in again. May be repeated."""
    _block(flags, who, False)


def _block(flags: DatabaseFlags, who: str, blocked: bool) -> None:
    with _members(flags) as members:
        members.block(_only(members.find(who), who), blocked)
    click.echo(f"{printable(who)} is {'blocked' if blocked else 'not blocked'}")


def _only(found: list[User], who: str) -> User:
    if len(found) == 1:
        return found[0]
    if not found:
        raise click.ClickException(f"nobody who is called {printable(who)} has been here; see `user list`")
    ids = ", ".join(f"{one.id} ({printable(one.subject)} of {printable(one.issuer)})" for one in found)
    raise click.ClickException(f"several people are called {printable(who)}: name one by the id: {ids}")
