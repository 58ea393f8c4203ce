"""Who may use the gateway, and which user an identity is."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from aiida_marketplace_hpc.errors import ConfigurationError, Forbidden
from aiida_marketplace_hpc.gateway.account import check_account
from aiida_marketplace_hpc.gateway.auth import Identity
from aiida_marketplace_hpc.gateway.auth.claims import claim_holds
from aiida_marketplace_hpc.gateway.config import Settings
from aiida_marketplace_hpc.gateway.databases import is_storable
from aiida_marketplace_hpc.gateway.homes import Homes
from aiida_marketplace_hpc.gateway.ledger import Ledger, NameTaken
from aiida_marketplace_hpc.gateway.mapping import checked_name, home_names
from aiida_marketplace_hpc.gateway.members import Members
from aiida_marketplace_hpc.gateway.schema import User

logger = logging.getLogger(__name__)

_LONGEST = 255
"""Characters of an issuer, a subject and an address: what the ledger has room for, and OpenID Connect allows a subject."""


class Admission:
    """Lets people in, or says why not.

    Everybody whose token is accepted may use the gateway, unless the settings narrow that down: then whoever is registered, or
    on the list, or has one of the claims. With the account ``own`` it is the owner alone. Whoever is blocked may not.

    :raises ConfigurationError: if the settings do not fit.
    """

    def __init__(self, settings: Settings, ledger: Ledger, homes: Homes) -> None:
        check_account(settings)
        self._settings, self._ledger, self._homes = settings, ledger, homes
        self._members = Members(ledger)
        self._claims = [_name_and_value(text) for text in settings.allow_claim]
        self._home_names = home_names(settings)

    def user_of(self, identity: Identity) -> User:
        """The user of an identity, added to the ledger now if they are new. May be repeated.

        :raises Forbidden: if they may not use the gateway, or their folder would be somebody else's.
        :raises Unavailable: if it cannot be found out now which folder is theirs.
        """
        _check_length(identity)
        known = self._ledger.find_user(identity)
        if known is not None and known.blocked:
            raise Forbidden("you are blocked on this gateway: ask its operator")
        invitation = None
        if not self._admitted(identity, known):
            invitation = self._members.invitation_of(identity)
            if invitation is None:
                logger.info("not admitted: %s", identity)
                raise Forbidden(f"you may not use this gateway: ask its operator to admit you, {identity}")
        user = self._user(identity, known)
        if invitation is not None:
            self._members.accept(user, invitation)
        return user

    def _admitted(self, identity: Identity, known: User | None) -> bool:
        settings = self._settings
        if settings.account_mode == "own":
            return not settings.owner or self._is_owner(identity, known)
        if not settings.closed:
            return True
        return (
            (known is not None and known.registered)
            or any(identity.is_called(who) for who in settings.allow)
            or any(claim_holds(identity.claims, name, value) for name, value in self._claims)
        )

    def _is_owner(self, identity: Identity, known: User | None) -> bool:
        if not identity.is_called(self._settings.owner):
            return False
        if known is None and any(user.email.lower() == identity.email.lower() for user in self._ledger.users()):
            logger.error(
                "%s has the owner's address, which another account had before: name the owner by the subject", identity
            )
            return False
        return True

    def _user(self, identity: Identity, known: User | None) -> User:
        if self._home_names is None or known is not None:
            return self._ledger.user_of(identity, self._homes.names)
        name = checked_name(self._home_names.name_of(identity), identity)

        def names(_: str, owner: str) -> Iterator[str]:
            if self._homes.may_be(name, owner):
                yield name

        try:
            return self._ledger.user_of(identity, names)
        except NameTaken:
            logger.error("the home %s is named for %s, and is somebody else's", name, identity)
            raise Forbidden(
                f"the home that is named for {identity} is somebody else's already: ask the operator of this gateway"
            ) from None


def _check_length(identity: Identity) -> None:
    """Refuse who cannot be written down: what is cut short would be somebody else."""
    for name in (identity.issuer, identity.subject, identity.email):
        if len(name) > _LONGEST or not is_storable(name):
            raise Forbidden("who you are has too many, or unsuitable, characters for this gateway: ask its operator")


def _name_and_value(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise ConfigurationError(f"--allow-claim is NAME=VALUE, such as groups=hpc, not {text!r}")
    return name, value
