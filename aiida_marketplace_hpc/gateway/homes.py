"""Whose a user's folders are, written down in the folders themselves.

Folder names come from e-mail addresses, and two people may have like ones: the ledger keeps them apart. It can be lost,
and then whoever comes first would get the folder of the other one. So each folder that is one user's own has a mark in the
gateway's private folder, where no caller looks. It is a digest: it tells people apart, and names nobody.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress

from aiida_marketplace_hpc.errors import Forbidden
from aiida_marketplace_hpc.gateway.config import RootTemplate
from aiida_marketplace_hpc.gateway.descriptors import LIST
from aiida_marketplace_hpc.gateway.draft import opened
from aiida_marketplace_hpc.gateway.ledger import new_names, owner_of
from aiida_marketplace_hpc.gateway.roots import PRIVATE
from aiida_marketplace_hpc.gateway.schema import User

logger = logging.getLogger(__name__)

_MARK = "owner"
_SIZE = 256


class Homes:
    """The folders that users have of their own: their homes, and other roots with their name in the path.

    :param templates: the gateway's roots.
    """

    def __init__(self, templates: Sequence[RootTemplate]) -> None:
        self._templates = [template for template in templates if template.per_user and not template.read_only]

    def names(self, base: str, owner: str) -> Iterator[str]:
        """Folder names that somebody may get who is new to the ledger: those that were theirs before come first.

        :param base: the name that their address makes.
        :param owner: the digest of who they are.
        """
        taken = {name: self._owners(name) for name in {base, *self._like(base)}}
        yield from sorted(name for name, owners in taken.items() if owners == {owner})
        yield from (name for name in new_names(base) if not taken.get(name))

    def may_be(self, name: str, owner: str) -> bool:
        """Whether the folders of that name are somebody's, or may become theirs, as far as their marks say."""
        return self._owners(name) <= {owner}

    def claim(self, user: User) -> None:
        """Mark a user's folders as theirs, where that was not done yet; may be repeated.

        A folder that cannot be marked stays as it is: whoever uses it says what is wrong with it.

        :raises Forbidden: if one of them is marked as somebody else's.
        """
        owner = owner_of(user)
        for template in self._templates:
            path = template.path_for(user.username)
            found = ""
            with suppress(OSError):
                if not _read(path):
                    _write(path, owner)
                found = _read(path)
            if found not in (owner, ""):
                logger.error("%s is the folder of %s, but %s/%s names somebody else", path, user.email, PRIVATE, _MARK)
                raise Forbidden(
                    f"the folder {path} belongs to somebody else: ask the operator of this gateway, whose log says more"
                )

    def _owners(self, name: str) -> set[str]:
        owners = set()
        for template in self._templates:
            try:
                owners.add(_read(template.path_for(name)))
            except OSError:  # It may name anybody.
                owners.add("unknown")
        return owners - {""}

    def _like(self, base: str) -> Iterator[str]:
        """The names on the disk that somebody may have got of whom there is another one."""
        for template in self._templates:
            above, prefix = posixpath.split(template.template.partition("{username}")[0])
            pattern = re.compile(f"{re.escape(prefix + base)}(-[0-9a-f]{{6}})")
            with suppress(OSError):
                for entry in os.listdir(above):
                    if found := pattern.match(entry):
                        yield base + found[1]


def _read(path: str) -> str:
    """Who is named in a folder; nothing where nobody is.

    :raises OSError: if that cannot be read.
    """
    try:
        with (
            opened(f"{path}/{PRIVATE}", LIST) as private,
            opened(_MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, private) as mark,
        ):
            return os.read(mark, _SIZE).decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _write(path: str, owner: str) -> None:
    """Name somebody in a folder, unless somebody is named there; all of it is there or nothing."""
    with suppress(FileExistsError):
        os.mkdir(f"{path}/{PRIVATE}", 0o700)
    with opened(f"{path}/{PRIVATE}", LIST) as private:
        name = f"{_MARK}-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(name, flags, 0o600, dir_fd=private), "w", encoding="ascii") as mark:
                mark.write(f"{owner}\n")
                mark.flush()
                os.fsync(mark.fileno())
            with suppress(FileExistsError):  # Of two at once the first counts.
                os.link(name, _MARK, src_dir_fd=private, dst_dir_fd=private)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=private)
