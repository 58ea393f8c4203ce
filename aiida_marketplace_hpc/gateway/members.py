"""Whom an operator has registered, invited and blocked, in the ledger."""

from __future__ import annotations

from sqlalchemy import delete, func, or_, select, update

from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.ledger import Ledger, utc_now
from aiida_marketplace_hpc.gateway.schema import Invitation, User


class Members:
    """What operators have decided about people. Every change may be repeated.

    People are named by their e-mail address, their subject, or the id of their row.

    :param ledger: where it is written down.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def users(self) -> list[User]:
        """Everybody who was ever here, by e-mail address."""
        return sorted(self._ledger.users(), key=lambda user: (user.email, user.created_at))

    def find(self, who: str) -> list[User]:
        """Those who have been here and are called so."""
        named = or_(User.id == who, User.subject == who, func.lower(User.email) == who.lower())
        with self._ledger.reading() as session:
            return list(session.scalars(select(User).where(named).order_by(User.created_at)))

    def block(self, user: User, blocked: bool = True) -> None:
        """Let somebody in no more, or again."""
        with self._ledger.writing() as session:
            session.execute(update(User).where(User.id == user.id).values(blocked=blocked))

    def register(self, user: User, registered: bool = True) -> None:
        """Admit somebody by name, or take that back."""
        with self._ledger.writing() as session:
            session.execute(update(User).where(User.id == user.id).values(registered=registered))

    def invitations(self) -> list[str]:
        """Who may come and has not yet, by subject or e-mail address."""
        with self._ledger.reading() as session:
            return list(session.scalars(select(Invitation.who).order_by(Invitation.created_at, Invitation.who)))

    def invite(self, who: str) -> None:
        """Admit somebody from their next request on, of whom only subject or e-mail address are known."""
        with self._ledger.writing() as session:
            if session.get(Invitation, who) is None:
                session.add(Invitation(who=who, created_at=utc_now()))

    def withdraw(self, who: str) -> bool:
        """Take an invitation back; whether there was one."""
        with self._ledger.writing() as session:
            same = func.lower(Invitation.who) == who.lower()
            return bool(session.execute(delete(Invitation).where(same)).rowcount)  # type: ignore[attr-defined]

    def invitation_of(self, identity: Identity) -> str | None:
        """Under which name somebody is invited."""
        return next((who for who in self.invitations() if identity.is_called(who)), None)

    def accept(self, user: User, who: str) -> None:
        """Make of an invitation a registration: it is used up, whoever gets that address later."""
        with self._ledger.writing() as session:
            session.execute(update(User).where(User.id == user.id).values(registered=True))
            session.execute(delete(Invitation).where(Invitation.who == who))
