"""The folder of a live job stays as the job needs it: it is not taken away, nor are its script and its guard changed.

A job is live from its launch until its end is in the ledger. What is protected then, whoever asks:

- its folder, and with it every folder above, against being removed or renamed;
- its script and its guard (every name in the folder that begins with :data:`GUARD_PREFIX`) against being removed,
  renamed, replaced, and a guard also against being made: a job that finds its guard taken takes itself for a second copy.

Everything else in the folder stays free. Where a path leads counts, not how it is written: a check asks for the real path
of the *open* folder in which something is about to happen, so that neither a link nor a folder that was renamed meanwhile
helps. Of a script that is itself a link, the link is protected, also from writing through it, but not what it leads to.

The ledger is asked only where something that exists is to be taken away or replaced, and for names of guards, so that
uploads of new files cost nothing. That is enough: a script exists from before the launch on, as does the guard of a job
that has started; and whoever takes them away by force, or around the gateway, means it.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from aiida_marketplace_hpc.errors import FileError
from aiida_marketplace_hpc.gateway.backends.wrapper import GUARD_PREFIX
from aiida_marketplace_hpc.gateway.roots import Place

if TYPE_CHECKING:
    from aiida_marketplace_hpc.gateway.ledger import Ledger
    from aiida_marketplace_hpc.gateway.schema import Job


class Named(Protocol):
    """Knows under which names callers may know a path: see :class:`~aiida_marketplace_hpc.gateway.roots.Roots`."""

    def names_of(self, real: str, *, below: bool = False) -> set[str]: ...


Concerned = tuple[str, "Job"]
"""A protected path, and the live job that it belongs to."""


class Protection:
    """What is asked before anything is taken away or replaced; this one protects nothing.

    Every check raises :class:`FileError` (EBUSY, with the job in its message), is made right before the act, and may be
    repeated. A job that is launched between the two is not seen.
    """

    def forced(self) -> Protection:
        """The same for somebody who means it: their own jobs are not protected from them, those of others are."""
        return self

    def check_target(self, place: Place, *, exists: bool) -> None:
        """Something is to be written under the name of a place, or what is there (no folder) is to be taken away."""

    def check_folder(self, folder: int, name: str) -> None:
        """A folder is to be removed or renamed.

        :param folder: descriptor of the one that it is in.
        """

    def check_names(self, folder: int, *, old: Iterable[str] = (), new: Iterable[str] = ()) -> None:
        """Several names in an open folder are to get another content.

        :param old: those that exist.
        :param new: those that do not.
        """


class LiveJobs(Protection):
    """Protects the folders of live jobs of everybody from one caller.

    A job that has ended, of which the gateway does not know yet, counts as live: so the scheduler is asked before anything is
    refused.

    :param refresh: asks the scheduler.
    :param roots: the caller's.
    :param user_id: the caller's.
    """

    def __init__(
        self, ledger: Ledger, refresh: Callable[[], None], roots: Named, user_id: str, *, force: bool = False
    ) -> None:
        self._ledger = ledger
        self._refresh = refresh
        self._roots = roots
        self._user_id = user_id
        self._force = force

    def forced(self) -> LiveJobs:
        return LiveJobs(self._ledger, self._refresh, self._roots, self._user_id, force=True)

    def check_target(self, place: Place, *, exists: bool) -> None:
        if exists or _is_guard(place.name):
            self._check_names(_real(place.folder), {place.name})
        for folder, name in place.links:  # Whoever writes through a link changes what is read under its name.
            self._check_names(folder, {name})

    def check_names(self, folder: int, *, old: Iterable[str] = (), new: Iterable[str] = ()) -> None:
        names = {*old, *filter(_is_guard, new)}
        if names:
            self._check_names(_real(folder), names)

    def check_folder(self, folder: int, name: str) -> None:
        self.check_tree(posixpath.join(_real(folder), name))

    def check_path(self, path: str, *, exists: bool) -> None:
        """:meth:`check_target` where no folder can be opened: by the words of a path alone."""
        folder, name = posixpath.split(path)
        if exists or _is_guard(name):
            self._check_names(folder, {name})

    def check_paths(self, folder: str, names: Collection[str]) -> None:
        """Several names in a folder are to get another content; whether they exist is not known."""
        self._check_names(folder, names)

    def check_tree(self, path: str) -> None:
        """:meth:`check_folder` where no folder can be opened: by the words of a path alone."""
        folder, name = posixpath.split(path)
        self._check_names(folder, {name})
        folders = _storable(self._roots.names_of(path, below=True))
        self._check(lambda: ((job.folder, job) for job in self._ledger.live_below(folders)))

    def live_below(self, path: str) -> list[tuple[str, str]]:
        """The folders, at ``path`` and below, that are protected from the caller just now, each with its script's name.

        For what cannot be checked name by name, because the names are known only where the files are.
        """
        folders = _storable(self._roots.names_of(path, below=True))

        def live() -> list[tuple[str, str]]:
            jobs = self._ledger.live_below(folders)
            return [(job.folder, job.script) for job in jobs if not (self._force and job.user_id == self._user_id)]

        if not live():
            return []
        self._refresh()
        return live()

    def _check_names(self, folder: str, names: Collection[str]) -> None:
        folders = _storable(self._roots.names_of(folder))
        guards = sorted(filter(_is_guard, names))

        def concerned() -> Iterator[Concerned]:
            for job in self._ledger.live_in(folders):
                for name in [job.script] if job.script in names else guards[:1]:
                    yield f"{job.folder}/{name}", job

        self._check(concerned)

    def _check(self, look: Callable[[], Iterator[Concerned]]) -> None:
        """Refuse if what is looked for is there, and still is when the scheduler was asked."""

        def concerned() -> list[Concerned]:
            return [(path, job) for path, job in look() if not (self._force and job.user_id == self._user_id)]

        if not concerned():
            return
        self._refresh()
        for path, job in concerned():
            raise FileError(f"{path} is protected: {self._reason(job)}", errno="EBUSY", path=path)

    def _reason(self, job: Job) -> str:
        if job.user_id != self._user_id:  # Which one it is, is nobody's business.
            return "a job of somebody else lives there; wait for its end"
        return f"job {job.id} lives there ({job.state}); cancel it, wait for its end, or force this"


def _is_guard(name: str) -> bool:
    return name.startswith(GUARD_PREFIX)


def _real(folder: int) -> str:
    """Where an open folder is just now."""
    return os.readlink(f"/proc/self/fd/{folder}")


def _storable(paths: Iterable[str]) -> list[str]:
    """Those that a ledger can hold; a job's folder has a name in UTF-8."""
    return [path for path in paths if not any("\ud800" <= letter <= "\udfff" for letter in path)]
