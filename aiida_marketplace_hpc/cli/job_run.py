"""``marketplace-hpc job run``: a script with its inputs and outputs, from here to the cluster and back.

The job's folder is named after what is submitted: the same command finds the same job again, whatever has happened meanwhile.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import secrets
import shlex
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aiida_marketplace_hpc.cli.common import Settings, client_options, connect, emit, printable, progress_bar
from aiida_marketplace_hpc.client.auth import DEFAULT_SOURCE
from aiida_marketplace_hpc.errors import FileError, MarketplaceHpcError

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.gateway import HpcGateway

Json = dict[str, Any]

INTERRUPTED = 130
"""The exit code after Ctrl-C, as of any program."""
PATIENCE = 600.0
"""Seconds without an answer after which nobody waits for a job any more."""
_PAUSE = 1.0
"""Seconds between two questions at least; a gateway may answer at once."""
_PATTERN = re.compile(r"[*?[]")
_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@click.command()
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--input",
    "-i",
    "inputs",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="A file or folder to upload beside the script. May be repeated.",
)
@click.option(
    "--output",
    "-o",
    "outputs",
    multiple=True,
    metavar="NAME",
    help="A file, folder or pattern in the job's folder to download at the end. May be repeated.",
)
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="The local folder for what is downloaded.  [default: .]",
)
@click.option(
    "--under", metavar="DIR", help="Where on the cluster the job's folder is made.  [default: runs in the home]"
)
@click.option("--new", is_flag=True, help="Run it anew, also if the same script with the same inputs has run before.")
@client_options()
@click.pass_context
def run(
    ctx: click.Context,
    /,
    script: Path,
    inputs: tuple[Path, ...],
    outputs: tuple[str, ...],
    into: Path,
    under: str | None,
    new: bool,
) -> None:
    """Run SCRIPT on the cluster: upload it with its inputs, submit it, wait for its end, and download its outputs.

    The same script with the same inputs is the same job: given again, the command waits for the job that is there, or fetches
    the outputs of the one that has ended, and runs nothing twice (--new does). Ctrl-C leaves the job running. The exit code is
    that of the job; of one that ended without a code, 128 and its signal, or 1.
    """
    settings = ctx.ensure_object(Settings)
    names = _names(script, inputs)
    for output in outputs:
        if output.startswith("/") or ".." in output.split("/"):
            raise click.UsageError(f"--output {output}: name what lies in the job's folder")
    label = (
        f"{_NAME.sub('-', script.stem).strip('-.') or 'job'}-{secrets.token_hex(8) if new else _digest(script, names)}"
    )
    if settings.machine:  # Machines may share a disk.
        label += f"-{settings.machine}"
    with connect(settings) as gateway:
        errand = Errand(settings, gateway, script, names)
        try:
            job = errand.finish(under, label)
            found = _fetch(settings, gateway, str(job["folder"]), outputs, into)
        except KeyboardInterrupt:
            click.echo(f"\n{printable(errand.interrupted())}", err=True)
            ctx.exit(INTERRUPTED)
        except MarketplaceHpcError:
            if errand.jobid:
                click.echo(printable(errand.interrupted()), err=True)
            raise
    missing = [output for output in outputs if output not in found]
    emit(
        settings,
        {**job, "outputs": [path for paths in found.values() for path in paths], "missing": missing},
        "\n".join([_ended(job), *(path for paths in found.values() for path in paths)]),
    )
    if missing:
        click.echo(
            f"Error: the job left no {printable(', '.join(missing))} in {printable(str(job['folder']))}", err=True
        )
    ctx.exit(exit_code_of(job) or (1 if missing else 0))


class Errand:
    """One script on its way, and how far it has got.

    :param names: the local inputs by their names in the job's folder.
    """

    def __init__(self, settings: Settings, gateway: HpcGateway, script: Path, names: dict[str, Path]) -> None:
        self._settings, self._gateway, self._script, self._names = settings, gateway, script, names
        self._submitting = False
        self.jobid = ""
        self._state = ""
        self._ended = False

    def finish(self, under: str | None, label: str) -> Json:
        """Upload, submit and wait. May be repeated with the same label.

        :return: the fields of the job, which has ended.
        """
        gateway = self._gateway
        gateway.require("launch-on-create")
        gateway.create_user()
        home = gateway.home()
        folder = posixpath.join(home, "runs" if under is None else under, label)
        if not self._exists(f"{folder}/{self._script.name}"):
            self._upload(folder)
        self._submitting = True
        job = gateway.submit(folder, self._script.name)
        self.jobid = str(job["jobid"])
        self._say(f"job {self.jobid} in {folder}")
        job = self._wait(job)
        self._ended = True
        return job

    def interrupted(self) -> str:
        """Say what runs on, and what to do about it."""
        if self._ended:
            return f"The job {self.jobid} has ended: the same command fetches its outputs."
        if self.jobid:
            return (
                f"The job {self.jobid} runs on ({self._state}): the same command waits for it again, "
                f"{_command(self._settings, 'job', 'cancel', self.jobid)} cancels it."
            )
        if self._submitting:
            return (
                "The job may have been submitted: the same command finds out and waits for it, "
                f"{_command(self._settings, 'job', 'list', '--active')} shows it."
            )
        return "Nothing was submitted: the same command goes on where this one stopped."

    def _upload(self, folder: str) -> None:
        gateway = self._gateway
        gateway.ask("mkdir", path=folder, parents=True, exist_ok=True)
        # The script comes last: a folder that has it has all the rest.
        for name, local in [*self._names.items(), (self._script.name, self._script)]:
            remote = f"{folder}/{name}"
            if local.is_dir():
                with progress_bar(self._settings, None, name) as progress:
                    gateway.put_tree(local, remote, progress=progress)
            else:
                status = local.stat()
                with progress_bar(self._settings, status.st_size, name) as progress:
                    gateway.put_file(local, remote, mode=stat.S_IMODE(status.st_mode), progress=progress)

    def _exists(self, path: str) -> bool:
        try:
            self._gateway.ask("stat", path=path)
        except FileError as exc:
            if exc.errno in ("ENOENT", "ENOTDIR"):
                return False
            raise
        return True

    def _wait(self, job: Json) -> Json:
        answered = time.monotonic()
        while not job["final"]:
            if job["state"] != self._state:
                self._state = str(job["state"])
                self._say(self._state.lower())
            asked = time.monotonic()
            try:
                job = self._gateway.show_job(self.jobid, wait=10)
                answered = time.monotonic()
            except MarketplaceHpcError as exc:
                if not exc.retryable or time.monotonic() - answered > PATIENCE:
                    raise
                self._say(f"no answer, the job runs on: {exc.message}")
            time.sleep(max(0.0, _PAUSE - (time.monotonic() - asked)))
        return job

    def _say(self, text: str) -> None:
        if not self._settings.json:
            click.echo(printable(text), err=True)


def exit_code_of(job: Json) -> int:
    """The exit code that a job that has ended stands for, as a shell gives it."""
    if job["state"] == "COMPLETED":
        return 0
    if job.get("exit_code"):
        return int(job["exit_code"])
    return 128 + int(job["signal"]) if job.get("signal") else 1


def _names(script: Path, inputs: Sequence[Path]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for local in inputs:
        name = local.name if local.name not in ("", "..") else local.resolve().name
        if name in names or name == script.name:
            raise click.UsageError(f"two things would be called {name} in the job's folder: rename one of them")
        names[name] = local
    return names


def _digest(script: Path, names: dict[str, Path]) -> str:
    """What tells this script with these inputs from any other."""
    digest = hashlib.sha256(os.fsencode(script.name))
    for name, local in sorted({**names, script.name: script}.items()):
        for path, mode, file in _entries(name, local):
            # No name has a NUL, and the rest has a length of its own: no two lists look alike.
            digest.update(b"\0%s\0%o\0%s" % (os.fsencode(path), mode, _content(file) if file else b""))
    return digest.hexdigest()[:16]


def _entries(name: str, local: Path) -> Iterator[tuple[str, int, Path | None]]:
    """The path, mode and, where it is a file, content of an input, and of all that is in it."""
    from aiida_marketplace_hpc.client.folder import walk

    if not local.is_dir():
        yield name, stat.S_IMODE(local.stat().st_mode), local
        return
    for source in walk(local, dereference=True):
        file = source.path if source.entry.type == "file" else None
        yield f"{name}/{source.entry.path}", source.entry.mode or 0, file


def _content(path: Path) -> bytes:
    """The digest of a file, as text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1024 * 1024):
            digest.update(piece)
    return digest.hexdigest().encode()


def _fetch(
    settings: Settings, gateway: HpcGateway, folder: str, outputs: Sequence[str], into: Path
) -> dict[str, list[str]]:
    """Download what is there of the outputs, under the paths that it has below the job's folder.

    :return: the local paths by output; one that is not there is missing.
    """
    found: dict[str, list[str]] = {}
    for output in outputs:
        paths = [posixpath.normpath(f"{folder}/{output}")]
        if _PATTERN.search(output):
            matching = gateway.ask("glob", pattern=paths[0])["paths"]
            # Whatever a gateway answers, nothing is written outside the local folder.
            paths = sorted(path for path in matching if path.startswith(f"{folder}/") and ".." not in path.split("/"))
        for path in paths:
            relative = posixpath.relpath(path, folder)
            local = into / relative
            local.parent.mkdir(parents=True, exist_ok=True)
            try:
                with progress_bar(settings, None, relative) as progress:
                    gateway.get(path, local, progress=progress)
            except FileError as exc:
                if exc.errno not in ("ENOENT", "ENOTDIR"):
                    raise
                continue
            found.setdefault(output, []).append(str(local))
    return found


def _ended(job: Json) -> str:
    code = job.get("exit_code")
    reason = f": {job['message']}" if job.get("message") else ""
    return f"{job['jobid']} {job['state']}{'' if code is None else f', exit code {code}'}{reason}"


def _command(settings: Settings, *arguments: str) -> str:
    """A command that reaches the same gateway from here."""
    options: list[str] = []
    if settings.url and settings.url != os.environ.get("MP_HOST"):
        options += ["--url", settings.url]
    if settings.app_id and settings.app_id != os.environ.get("MP_APP_ID"):
        options += ["--app-id", settings.app_id]
    if settings.token_source != DEFAULT_SOURCE:
        options += ["--token-source", settings.token_source]
    if settings.machine:
        options += ["--machine", settings.machine]
    return shlex.join(["marketplace-hpc", *options, *arguments])
