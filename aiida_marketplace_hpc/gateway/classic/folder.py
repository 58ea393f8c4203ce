"""The folder of a published job: what FirecREST does with files, without its ways out.

A refusal is a :class:`Refusal`, which says only what the published gateway lets its clients know.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import BinaryIO

from aiida_marketplace_hpc.errors import GatewayError
from aiida_marketplace_hpc.gateway.classic import firecrest
from aiida_marketplace_hpc.gateway.config import MIB, Settings
from aiida_marketplace_hpc.gateway.files import Files
from aiida_marketplace_hpc.gateway.names import group_name, user_name

SCRIPT = "job.sh"
"""The name of every job's script."""


class Refusal(Exception):
    """FirecREST would refuse.

    :param kind: the class of the exception that the published gateway gets for it, as it prints it.
    """

    def __init__(self, kind: str = firecrest.HEADER) -> None:
        super().__init__(kind)
        self.kind = kind


class JobFolder:
    """One job's folder.

    Names may lead below it, by folders that are there; never out of it by what they say (``..``, an absolute path). A link
    in it may lead to whatever else is the caller's own.

    :param files: what the caller can do with files.
    :param path: absolute.
    """

    def __init__(self, settings: Settings, files: Files, path: str) -> None:
        self._settings = settings
        self._limit = int(settings.classic_file_limit * MIB)
        self._files = files
        self.path = path

    def make(self) -> None:
        """Make it; not to be repeated."""
        with self._command() as files:
            files.mkdir(self.path)

    def listing(self) -> list[dict[str, str]]:
        """What is in it, as ``ls -l`` shows it: hidden entries not."""
        with self._command() as files:
            entries = files.listing(self.path)
            for entry in entries:
                entry["user"], entry["group"] = user_name(entry["uid"]), group_name(entry["gid"])
            try:
                return firecrest.listed(entries, split=self._settings.classic_listing == "split")
            except IndexError:
                raise Refusal(firecrest.PLAIN) from None

    def write(self, filename: str, content: BinaryIO, size: int) -> None:
        """Store a file under the name that FirecREST gives it; one of that name is replaced. May be repeated."""
        filename = firecrest.posted(filename)
        if firecrest.form_size(self.path, filename, size) > self._limit:
            raise Refusal(firecrest.PLAIN)
        if firecrest.is_forbidden(filename):
            raise Refusal(firecrest.PLAIN)
        if self._settings.classic_file_names == "secure":
            filename = firecrest.secure_filename(filename)
        path = self._below(filename)
        with self._command() as files:
            files.write(path, _watched(content.read, files))

    def write_script(self, content: bytes) -> None:
        """Store the job's script."""
        self.write(SCRIPT, io.BytesIO(content), len(content))

    def read(self, filename: str) -> bytes:
        """A file's content."""
        with self._command() as files:
            file, attributes = files.read(self._path(filename))
            with file:
                if attributes.st_size > self._limit:
                    raise Refusal(firecrest.PLAIN)
                return file.read(self._limit)

    def remove(self, filename: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        with self._command() as files:
            files.remove(self._path(filename), recursive=True)

    def script(self, most: int) -> bytes:
        """The content of the job's script.

        :param most: bytes that it may have.
        """
        with self._command() as files:
            file, attributes = files.read(f"{self.path}/{SCRIPT}")
            with file:
                if attributes.st_size > most:
                    raise Refusal
                return file.read(most)

    def _path(self, filename: str) -> str:
        if firecrest.is_forbidden(filename):
            raise Refusal(firecrest.PLAIN)
        return self._below(filename)

    def _below(self, filename: str) -> str:
        parts = filename.split("/")
        if filename.startswith("/") or ".." in parts or not any(part not in ("", ".") for part in parts):
            raise Refusal
        return f"{self.path}/{filename}"

    @contextmanager
    def _command(self) -> Iterator[Files]:
        """What FirecREST does in one command, which has a time-out."""
        until = monotonic() + self._settings.classic_command_timeout

        def advance(_: int) -> None:
            if monotonic() > until:
                raise Refusal

        try:
            yield self._files.watched(advance)
        except GatewayError as exc:
            raise Refusal from exc


def _watched(read: Callable[[int], bytes], files: Files) -> Callable[[int], bytes]:
    def watched(size: int) -> bytes:
        chunk = read(size)
        files.advance(len(chunk))
        return chunk

    return watched
