"""The same operations on aiida-core's transport over SSH and on ours: where they differ, and whom we follow."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import pytest
from aiida.transports.plugins.ssh_async import AsyncSshTransport

from tests.plugin.comparison import Asynchronous, Outcome, assert_same, outcome
from tests.plugin.conftest import NewPair, Pair
from tests.plugin.sshd import ssh_server
from tests.plugin.test_differential import ACTIONS

pytestmark = pytest.mark.services

DIFFERENT_OVER_SSH: dict[str, tuple[str, ...]] = {
    "a link that is itself named is copied as what it leads to: elsewhere, a relative link would lead nowhere": (
        "copy a link to a file",
        "copy a link to a folder",
        "copy a link to a folder into a folder",
        "copytree of a link to a folder",
        "put a link with links",
        "put a pattern of all sorts with links",
        "get a link with links",
        "get a pattern of all sorts with links",
    ),
    "what is copied onto itself is refused: core.ssh_async empties the file": (
        "copy a file into its own folder",
        "copy a file onto what it is linked to",
        "copy a pattern of one onto itself",
        "copy onto itself",
        "copyfile onto itself",
        "copyfile onto what it is linked to",
    ),
    "exactly the name that was given: core.ssh_async goes inside a folder of that name": (
        "copyfile onto a folder",
        "getfile onto a folder",
        "putfile onto a folder",
    ),
    "patterns as in a shell: core.ssh_async includes hidden files, leaves out what is behind links, reads ** as any depth": (
        "get a pattern of all sorts",
        "glob hides hidden",
        "glob in two levels",
        "glob of a name below a pattern",
        "glob of two stars",
        "glob of two stars below",
        "glob through a link",
        "symlink across",
    ),
    "listdir answers names: core.ssh_async answers whole paths where there is a pattern": (
        "listdir pattern",
        "listdir pattern for hidden",
        "listdir pattern hides hidden",
        "listdir pattern in two levels",
        "listdir pattern of a link",
        "listdir pattern without magic",
        "listdir with a trailing slash",
    ),
    "a folder that is asked for is there afterwards, or it is an error: core.ssh_async accepts a file in its place": (
        "makedirs through a file",
        "mkdir on a dangling link ignored",
        "mkdir on a file ignored",
    ),
    "paths are normalised before folders and links are made": (
        "makedirs with a trailing slash",
        "symlink is normalised",
    ),
    "rmtree may be repeated, and removes a file": ("rmtree of a file", "rmtree of nothing"),
    "remove removes a link": ("remove a link to a folder",),
    "rename between file systems, too: SFTP cannot": (
        "rename a file across",
        "rename a folder across",
        "rename a link across",
    ),
    "recursive has no effect": ("copy not recursive",),
    "copytree is for folders": ("copytree of a file",),
    "a slash at the end of the source: core.ssh_async has two backends that do different things": (
        "copy a folder with a trailing slash into a folder",
    ),
    "nothing to copy by a pattern is no error": ("copy a pattern without match",),
    "a destination may have a bracket in its name": ("glob escaped",),
    "a local file in place of a folder is an OSError, as every other refusal of a file system": ("puttree of a file",),
    "relative paths are taken from the home": ("relative remote paths",),
    "names that no file can have are no fault of the connection": (
        "get a name that is too long ignored",
        "looking at a name that is too long",
    ),
    "every name that the file system allows": ("name '#?&=%20+'", "name 'back\\\\slash'", "name 'caf\\udce9'"),
}
"""The reasons for not doing as core.ssh_async does, but as core.local, each with the operations that show it."""


@pytest.fixture(scope="module")
def over_ssh(new_pair: NewPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asynchronous]:
    """aiida-core's transport to this machine; the module's home is where it finds its settings."""
    loop = asyncio.new_event_loop()
    with ssh_server(tmp_path_factory.mktemp("sshd"), Path.home(), "cluster-over-ssh"):
        transport = AsyncSshTransport(machine="cluster-over-ssh")
        loop.run_until_complete(transport.open_async())
        try:
            over_ssh = Asynchronous(transport, loop)
            over_ssh.normalize = os.path.realpath  # It has no way of its own; other cases are not to fail for that.
            yield over_ssh
        finally:
            loop.run_until_complete(transport.close_async())
            loop.close()


def as_far_as_ssh_tells(found: Outcome) -> Outcome:
    """An outcome without what core.ssh_async never keeps or says: permission bits, and the class of an error.

    It gives everything the default bits unless told to ``preserve``, which AiiDA never does; we follow core.local, where
    programs stay programs. Its errors are often asyncssh's own, which are not even an :class:`OSError`.
    """
    trees = ({path: (kind, content, 0) for path, (kind, content, _) in tree.items()} for tree in found.trees)
    problem = OSError(str(found.problem)) if isinstance(found.problem, asyncssh.Error | OSError) else found.problem
    return Outcome(found.result, problem, *trees)


def test_the_list_of_differences_names_operations_that_there_are() -> None:
    assert set().union(*DIFFERENT_OVER_SSH.values()) <= set(ACTIONS)


@pytest.mark.parametrize("name", sorted(set(ACTIONS) - set().union(*DIFFERENT_OVER_SSH.values())))
def test_ours_does_what_the_transport_over_ssh_does(name: str, pair: Pair, over_ssh: Asynchronous) -> None:
    expected = outcome(ACTIONS[name], dataclasses.replace(pair.reference, transport=over_ssh))
    found = outcome(ACTIONS[name], pair.ours)
    assert_same(as_far_as_ssh_tells(found), as_far_as_ssh_tells(expected))
