"""``marketplace-hpc file``."""

from __future__ import annotations

import stat
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aiida_marketplace_hpc.cli.common import Settings, client_options, connect, emit, progress_bar, table

if TYPE_CHECKING:
    from aiida_marketplace_hpc.client.gateway import HpcGateway, Place

_WHERE = "A job's id or the name of a root, followed by a path below it; or an absolute path on the cluster alone."

_force_option = click.option(
    "--force", is_flag=True, help="Also what a live job of yours needs: its script, its folder."
)


@click.group(help=f"List, upload, download and delete files.\n\nWHERE [PATH]: {_WHERE}")
def file() -> None:
    pass


@file.command("list")
@click.argument("where")
@click.argument("path", required=False)
@client_options()
@click.pass_obj
def list_(settings: Settings, where: str, path: str | None) -> None:
    """List a folder, hidden files included where the gateway shows them."""
    with connect(settings) as gateway:
        absolute = _absolute(gateway, where, path)
        if absolute is None:
            files = gateway.list_files(where, path or "")
            rows = [[f.get("permissions"), f.get("size"), f.get("last_modified"), _named(f)] for f in files]
        else:
            files = gateway.ask("list", path=absolute)["entries"]
            rows = [[stat.filemode(f["mode"])[1:], f["size"], _time(f["mtime"]), _named(f)] for f in files]
    emit(settings, {"files": files}, table(rows, ["MODE", "SIZE", "MODIFIED", "NAME"]))


@file.command()
@click.argument("local", type=click.Path(exists=True, path_type=Path))
@click.argument("where")
@click.argument("path", required=False)
@click.option("--parents", is_flag=True, help="Make missing folders on the way.")
@click.option("--no-overwrite", is_flag=True, help="Refuse to replace what is there.")
@_force_option
@client_options()
@click.pass_obj
def upload(
    settings: Settings,
    local: Path,
    where: str,
    path: str | None,
    parents: bool,
    no_overwrite: bool,
    force: bool,
) -> None:
    """Upload LOCAL, a file or a folder; inside PATH if that is a folder, as `cp -r` does."""
    with connect(settings) as gateway:
        place = _place(where, path)
        name = local.absolute().name
        options: dict[str, Any] = {"into": name, "parents": parents, "overwrite": not no_overwrite, "force": force}
        if local.is_file() and "digest" not in gateway.extensions() and not isinstance(place, str):
            answer = gateway.upload_file(place.jobid, name if place.path == "." else place.path, local)
        elif local.is_dir():
            with progress_bar(settings, None, name) as progress:
                answer = gateway.put_tree(local, place, progress=progress, **options)
        else:
            with progress_bar(settings, local.stat().st_size, name) as progress:
                answer = gateway.put_file(local, place, progress=progress, **options)
    emit(settings, answer, str(answer.get("path") or answer.get("message")))


@file.command()
@click.argument("where")
@click.argument("path", required=False)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), default=Path(), help="The local name, or a folder.  [default: .]"
)
@click.option("--no-overwrite", is_flag=True, help="Refuse to replace what is there.")
@click.option("--keep-links", is_flag=True, help="Fetch symbolic links inside a folder as links.")
@client_options()
@click.pass_obj
def download(
    settings: Settings, where: str, path: str | None, output: Path, no_overwrite: bool, keep_links: bool
) -> None:
    """Download a file or a folder."""
    from aiida_marketplace_hpc.client.folder import inside_if_folder, write_file

    with connect(settings) as gateway:
        place = _place(where, path)
        full = (place if isinstance(place, str) else f"{place.jobid}/{place.path}").rstrip("/.")
        name = full.rpartition("/")[2] or "root"
        if "bundle" in gateway.extensions() or isinstance(place, str):
            with progress_bar(settings, None, name) as progress:
                received = gateway.get(
                    place,
                    inside_if_folder(output, name),
                    dereference=not keep_links,
                    overwrite=not no_overwrite,
                    progress=progress,
                )
        else:
            content = gateway.download_file(place.jobid, place.path)
            target = output / name if output.is_dir() else output
            received = write_file(target, content, overwrite=not no_overwrite)
    emit(settings, {"type": received.type, "path": str(received.path)}, str(received.path))


@file.command()
@click.argument("where")
@click.argument("path", required=False)
@_force_option
@client_options()
@click.pass_obj
def delete(settings: Settings, where: str, path: str | None, force: bool) -> None:
    """Delete a file, or a folder with all that is in it."""
    with connect(settings) as gateway:
        place = gateway.place(_place(where, path))
        if place.path in (".", ""):
            raise click.UsageError("name a file or folder: neither a root nor a job's folder is deleted as a whole")
        below_a_root = _absolute(gateway, place.jobid, place.path)
        if below_a_root is not None:
            # As an operation it may take as long as it gets on, which the removal of a large folder needs.
            gateway.ask("remove", path=below_a_root, recursive=True, force=force or None)
            answer = {"message": "File deleted."}
        else:
            answer = gateway.delete_file(place.jobid, place.path, force=force)
    emit(settings, answer, str(answer.get("message", "")))


def _place(where: str, path: str | None) -> str | Place:
    from aiida_marketplace_hpc.client.gateway import Place

    if where.startswith("/"):
        if path is not None:
            raise click.UsageError("an absolute path stands alone")
        return where
    return Place(where, path or ".")


def _absolute(gateway: HpcGateway, where: str, path: str | None) -> str | None:
    """The absolute path, or ``None`` for one in a job's folder."""
    place = _place(where, path)
    if isinstance(place, str):
        return place
    if gateway.extensions():
        for root in gateway.roots():
            if root.name == place.jobid:
                return f"{root.path}/{place.path}"
    return None


def _named(entry: dict[str, Any]) -> str:
    target = entry.get("target") or entry.get("link_target")
    kind = "/" if entry.get("type") in ("d", "directory") else ""
    return f"{entry['name']}{kind}{f' -> {target}' if target else ''}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(timespec="seconds")
