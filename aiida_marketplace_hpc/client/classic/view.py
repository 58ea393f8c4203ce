"""What lies at a path of the virtual disk.

Told from the journal before a job, from the listing while it runs, from its manifest afterwards.
"""

from __future__ import annotations

import errno
import os
import posixpath
import zlib
from dataclasses import dataclass, replace
from typing import Any

from aiida_marketplace_hpc.client.classic.gateway import ClassicGateway, Look
from aiida_marketplace_hpc.client.classic.journal import Folder, FolderState, Node
from aiida_marketplace_hpc.client.classic.manifest import Manifest
from aiida_marketplace_hpc.client.classic.names import MANIFEST, START, is_ours, working_directory
from aiida_marketplace_hpc.client.classic.tree import MAGIC, Entry, InJob, Tree
from aiida_marketplace_hpc.errors import ServerFault, Unavailable

_KINDS = {"-": "file", "d": "directory", "l": "symlink"}
_TREES = 8
"""How many manifests are kept in memory."""
_DEEP = 8
"""How many copies of copies are looked through."""


@dataclass(frozen=True)
class Place:
    """A path, and the folder whose content is known as one.

    :param base: absolute path of that folder.
    :param path: relative to it.
    :param folder: the working directory that it is, if it is one.
    """

    base: str
    path: str
    tree: Tree
    folder: Folder | None = None


class VirtualDisk:
    """Looks things up. Every look at a folder whose job was launched and has not ended is a request."""

    def __init__(self, gateway: ClassicGateway) -> None:
        self._gateway = gateway
        self._trees: dict[tuple[str, tuple[str, ...]], Tree] = {}

    def place(self, path: str, depth: int = 0) -> Place:
        """Find the folder that a path lies in, with its content.

        :param path: absolute, normalised; may be a pattern.
        :raises FileNotFoundError: it lies in a working directory that does not exist.
        :raises PermissionError: it lies outside what there is.
        """
        split = working_directory(path)
        if split is None:
            base = _literal(path)
            return Place(base, path[len(base) :].lstrip("/"), self._outside(base))
        base, below = split
        folder = self._gateway.journal.folder(base)
        if folder is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        tree, folder = self._content(folder, depth)
        return Place(base, below, tree, folder)

    def find(self, path: str, follow: bool = True, depth: int = 0) -> Entry | None:
        """What lies at a path.

        :param follow: look through a link at its end.
        """
        if working_directory(path) is None:
            return self._outside_entry(path, follow, depth)
        try:
            place = self.place(path, depth)
        except FileNotFoundError:
            return None
        return place.tree.find(place.path, follow)

    def folder(self, path: str) -> Folder | None:
        """The working directory that a path lies in, as the journal has it."""
        split = working_directory(path)
        return None if split is None else self._gateway.journal.folder(split[0])

    # Outside of working directories

    def check(self, path: str) -> None:
        """Make sure that a path is one of the virtual disk.

        :raises PermissionError: it is not.
        """
        home = self._gateway.account().home
        if path != home and not path.startswith(f"{home}/"):
            raise PermissionError(
                errno.EACCES,
                f"a gateway with only the published capabilities reaches nothing but the folders of its jobs, and so only "
                f"paths below {home}",
                path,
            )

    def _outside_entry(self, path: str, follow: bool, depth: int) -> Entry | None:
        home = self._gateway.account().home
        if home == path or home.startswith(f"{path.rstrip('/')}/"):
            return Entry("directory")
        self.check(path)
        journal = self._gateway.journal
        node = journal.node(path)
        if node is not None:
            entry = self._entry(node, depth)
            return entry.followed() if follow and entry.kind == "symlink" and entry.leads_to else entry
        if journal.is_above_something(path):
            return Entry("directory")
        return None

    def _outside(self, base: str) -> Tree:
        """What lies below a folder outside of working directories, which themselves are just folders there."""
        self.check(base)
        tree = Tree()
        journal = self._gateway.journal
        for node in journal.nodes(base):
            if node.path != base and working_directory(node.path) is None and "\0" not in node.path:
                self._add(tree, node.path[len(base) + 1 :], self._entry(node, 0))
        for folder in journal.folders(base):
            self._add(tree, folder.path[len(base) + 1 :], Entry("directory"))
        return tree

    def _add(self, tree: Tree, path: str, entry: Entry) -> None:
        above = posixpath.dirname(path)
        while above and above not in tree:
            tree[above] = Entry("directory")
            above = posixpath.dirname(above)
        tree[path] = entry

    # Working directories

    def _content(self, folder: Folder, depth: int) -> tuple[Tree, Folder]:
        if folder.state is FolderState.ENDED:
            return self._ended(folder, depth)
        if not folder.is_launched:
            return self._planned(folder, depth), folder
        look = self._gateway.look(folder.jobid)
        if look.records.end is not None:
            return self._ended(self._gateway.note_end(folder, look.records.end), depth)
        return self._living(folder, look, depth), folder

    def _planned(self, folder: Folder, depth: int) -> Tree:
        """What the job script will make."""
        tree = Tree()
        for node in self._gateway.journal.nodes(folder.path):
            if node.path == folder.path or "\0" in node.path:
                continue
            below = node.path[len(folder.path) + 1 :]
            self._add(tree, below, self._entry(node, depth))
            if node.kind == "copy" and node.origin and depth < _DEEP:
                place = self.place(node.origin, depth + 1)
                for name, entry in place.tree.walk(place.path):
                    if place.path or not is_ours(name):
                        tree.setdefault(f"{below}/{name}", entry)
        return tree

    def _living(self, folder: Folder, look: Look, depth: int) -> Tree:
        tree = self._planned(folder, depth)
        if not look.records.taken:
            return tree
        for path, entry in tree.items():
            if entry.kind == "file":
                tree[path] = replace(entry, content=InJob(folder.jobid, path, exact=False))
        for file in look.files:
            name = str(file.get("name", ""))
            if name and not is_ours(name):
                tree[name] = _listed(folder.jobid, file)
        return tree

    def _ended(self, folder: Folder, depth: int) -> tuple[Tree, Folder]:
        known = self._trees.get((folder.jobid, folder.removed))
        if known is not None:
            return known, folder
        manifest = folder.manifest
        if manifest is None and folder.end and folder.end["pieces"]:
            manifest = self._download_manifest(folder, folder.end["pieces"])
        if manifest is None:
            # The script was killed before it could write one: what the listing shows is what is known.
            tree = self._living(folder, self._gateway.look(folder.jobid), depth)
        else:
            try:
                tree = Manifest(zlib.decompress(manifest)).tree(folder.jobid, folder.piece)
            except ValueError as exc:
                raise ServerFault(f"the manifest of job {folder.jobid} is damaged: {exc}") from exc
        for removed in folder.removed:
            for path in [path for path in tree if path == removed or path.startswith(f"{removed}/")]:
                del tree[path]
        if manifest is not None:
            # To read one of many thousand entries takes longer than to use it. The oldest goes.
            while len(self._trees) >= _TREES:
                self._trees.pop(next(iter(self._trees), ("", ())), None)
            self._trees[folder.jobid, folder.removed] = tree
        return tree, folder

    def _download_manifest(self, folder: Folder, count: int) -> bytes | None:
        text = b"".join(self._gateway.download(folder.jobid, f"{MANIFEST}{number:06}") for number in range(count))
        manifest = zlib.compress(text)
        try:
            Manifest(text).tree(folder.jobid, folder.piece)
        except ValueError as exc:
            if folder.end and folder.end["reason"]:
                return None  # Its script was killed while it wrote this.
            raise Unavailable(f"the manifest of job {folder.jobid} did not arrive whole: {exc}") from exc
        self._gateway.journal.change_folder(folder.path, manifest=manifest)
        # Their place is taken by what came of them.
        self._gateway.journal.remove(folder.path)
        return manifest

    def _entry(self, node: Node, depth: int) -> Entry:
        if node.kind == "directory":
            return Entry("directory", node.mode, mtime=node.mtime)
        if node.kind == "file":
            return Entry("file", node.mode, node.size, node.mtime, content=node.content)
        known = self.find(node.origin, depth=depth + 1) if node.origin and depth < _DEEP else None
        if node.kind == "symlink":
            if known is None:
                return Entry("symlink", 0o777, len(node.source), node.mtime, node.source)
            return Entry("symlink", known.mode, known.size, node.mtime, node.source, known.kind, known.content)
        if node.kind == "copy" and known is not None:
            return replace(known, mode=known.mode if node.mode is None else node.mode)
        return Entry("other", node.mode, mtime=node.mtime)

    # On the cluster

    def real(self, folder: Folder) -> str:
        """Where a working directory really is, once its job has started.

        :raises Unavailable: it has not, so that nobody knows.
        """
        if folder.real:
            return folder.real
        try:
            lines = self._gateway.download(folder.jobid, START).decode("utf-8", "surrogateescape").split("\n")
            real = lines[1]
        except (ServerFault, IndexError) as exc:
            raise Unavailable(
                f"where {folder.path} is on the cluster is not known before its job has started: try again later"
            ) from exc
        self._gateway.journal.change_folder(folder.path, real=real)
        return real


def _literal(path: str) -> str:
    """The part of a path before the first segment with a pattern, or all but its last segment."""
    parts = path.split("/")
    for number, part in enumerate(parts):
        if MAGIC.search(part):
            return "/".join(parts[:number]) or "/"
    return path


def _listed(jobid: str, file: dict[str, Any]) -> Entry:
    name, kind = str(file["name"]), _KINDS.get(str(file.get("type")), "other")
    size = str(file.get("size", ""))
    content = InJob(jobid, name, exact=False) if kind in ("file", "symlink") else None
    return Entry(
        kind,
        _mode(str(file.get("permissions", ""))),
        int(size) if size.isdecimal() else 0,
        target=str(file.get("link_target") or "") if kind == "symlink" else None,
        leads_to="file" if kind == "symlink" else None,
        content=content,
    )


def _mode(text: str) -> int | None:
    """Read permissions as ``ls`` writes them."""
    if len(text) < 9:
        return None
    bits = sum(1 << (8 - number) for number, letter in enumerate(text[:9]) if letter not in "-ST")
    extra = sum(bit for bit, letter in ((0o4000, text[2]), (0o2000, text[5]), (0o1000, text[8])) if letter in "sStT")
    return bits | extra
