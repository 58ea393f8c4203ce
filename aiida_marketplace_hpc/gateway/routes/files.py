"""Files and folders on their way in and out."""

from __future__ import annotations

import io
import mimetypes
import os
import stat
from collections.abc import Generator
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote

from aiida_marketplace_hpc import bundle
from aiida_marketplace_hpc.errors import InvalidRequest, NotFound
from aiida_marketplace_hpc.gateway.names import group_name, user_name
from aiida_marketplace_hpc.gateway.routes.call import Answer, Body, Call, Stream
from aiida_marketplace_hpc.gateway.service import Caller
from aiida_marketplace_hpc.gateway.textual import decoded, encoded, is_coded
from aiida_marketplace_hpc.gateway.transfers import Position
from aiida_marketplace_hpc.protocol import DIGEST_HEADER

_PIECE = 4 * bundle.CHUNK  # Bytes of a piece that is read at once, so that its digest can go before it.


def upload(call: Call) -> Answer:
    """Write a file, or with ``bundle`` a folder."""
    body, given = call.body, call.parameters
    if body is None:
        raise InvalidRequest("an upload needs a body: the file itself, or a form with the part 'file'")
    if is_coded(given.get("encoding")):
        body = decoded(body)
    caller, path = place_of(call, given.get("filename") or _form_name(body))
    options: dict[str, Any] = {
        "overwrite": given.get("overwrite", True),
        "into": given.get("into"),
        "parents": given.get("parents", False),
    }
    caller = caller.forced() if given.get("force") else caller
    transfers = caller.transfers
    if "total" in given:
        if "digest" not in given:
            raise InvalidRequest("an upload in parts needs the digest of the whole file")
        written = transfers.write_parts(
            path,
            body.read,
            total=given["total"],
            digest=given["digest"],
            offset=given.get("offset"),
            restart=given.get("restart", False),
            mode=given.get("mode"),
            **options,
        )
        if not written["complete"]:
            return {"message": "The file is not complete.", **written}
    elif given.get("bundle"):
        written = transfers.write_folder(path, body.read, **options)
    else:
        written = caller.files.write(path, body.read, digest=given.get("digest"), mode=given.get("mode"), **options)
    return {"message": "File uploaded.", **written}


def download(call: Call) -> Answer:
    """Send a file or a piece of it, or with ``bundle`` a file or a folder with digests."""
    coded = is_coded(call.parameters.get("encoding"))
    stream = _content(call)
    return encoded(stream) if coded else stream


def _content(call: Call) -> Stream:
    given = call.parameters
    caller, path = place_of(call, given["filename"])
    files = caller.files
    if given.get("bundle"):
        position = None
        if "after" in given or "offset" in given:
            position = Position(given.get("after", ""), given.get("offset"))
        content = caller.transfers.send(
            path, dereference=given.get("dereference", True), position=position, limit=given.get("length")
        )
        return Stream(content, bundle.MEDIA_TYPE, headers={"Content-Disposition": "attachment"})
    file, attributes = files.read(path)
    # Not to the end of the file but of what was announced: it may grow meanwhile.
    offset = min(given.get("offset", 0), attributes.st_size)
    size = min(attributes.st_size - offset, given.get("length", attributes.st_size))
    name = PurePosixPath(path).name
    kind, encoding = mimetypes.guess_type(name)
    if kind in ("text/plain", "text/x-sh", "application/x-sh") and not encoding:
        media_type = "text/plain; charset=utf-8"
    else:
        # A page or picture in a user's folder must never run or show as if it came from the gateway.
        media_type = "application/octet-stream"
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, errors='surrogateescape')}"}
    if "length" in given and size <= _PIECE:
        with file:
            piece = os.pread(file.fileno(), size, offset)
        headers[DIGEST_HEADER] = bundle.header_digest_of(piece)
        return Stream(_chunks(io.BytesIO(piece), len(piece)), media_type, len(piece), headers)
    file.seek(offset)
    return Stream(_chunks(file, size), media_type, size, headers)


def _chunks(content: BinaryIO, size: int) -> Generator[bytes, None, None]:
    with content:
        while size and (chunk := content.read(min(bundle.CHUNK, size))):
            size -= len(chunk)
            yield chunk


def delete(call: Call) -> Answer:
    """Remove a file, or a folder with all that is in it."""
    caller, path = place_of(call, call.parameters["filename"])
    caller = caller.forced() if call.parameters.get("force") else caller
    caller.files.remove(path, recursive=True)
    return {"message": "File deleted."}


def list_files(call: Call) -> Answer:
    """List a folder in the published form."""
    caller, path = place_of(call, call.parameters.get("filename") or "")
    return {"files": published_listing(caller.files.listing(path)), "message": "Files in the job folder."}


def published_listing(entries: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Entries of a folder as the published gateway lists them: without hidden ones, sizes as text, times without a zone."""
    letters = {"file": "-", "directory": "d", "symlink": "l"}
    return [
        {
            "group": group_name(entry["gid"]),
            "last_modified": datetime.fromtimestamp(entry["mtime"]).strftime("%Y-%m-%dT%H:%M:%S"),
            "link_target": entry.get("target", ""),
            "name": entry["name"],
            "permissions": stat.filemode(entry["mode"])[1:],
            "size": str(entry["size"]),
            "type": letters.get(entry["type"], "?"),
            "user": user_name(entry["uid"]),
        }
        for entry in entries
        if not entry["name"].startswith(".")
    ]


def place_of(call: Call, filename: str) -> tuple[Caller, str]:
    """A file below a job's folder, or below the root that stands in place of a job: its machine, and its absolute path."""
    jobid, caller = call.parameters["jobid"], call.caller
    named = call.gateway.settings.root_at(jobid)
    root = None
    if named is not None:
        caller = caller.on(named[0])
        root = caller.files.roots.by_name(named[1])
    if root is not None:
        base = root.path
    else:
        try:
            job = call.gateway.jobs.get(caller.user, jobid)
            caller, base = caller.on(job.machine), job.folder
        except NotFound:
            names = ", ".join(root.name for root in call.caller.files.roots)
            raise NotFound(
                f"you have no job {jobid} on this gateway, nor has it a root of that name ({names})"
            ) from None
    # Below a root '..' is resolved on the way, where links count; a job's folder is not left at all.
    if filename.startswith("/") or (root is None and ".." in filename.split("/")):
        raise InvalidRequest(f"{filename!r} is not a path below {base}")
    return caller, base if filename in ("", ".") else f"{base}/{filename}"


def _form_name(body: Body) -> str:
    # The published client sends the whole local path as the part's name.
    name = PurePosixPath(body.filename or "").name
    if not name:
        raise InvalidRequest("an upload needs a name: the parameter filename")
    return name
