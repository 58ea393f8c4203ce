"""The service of a FirecREST v1 for files: each call is one command, or a few."""

from __future__ import annotations

import base64
import json
import posixpath
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from aiida_marketplace_hpc.gateway.classic.firecrest import is_forbidden, secure_filename
from aiida_marketplace_hpc.testing.firecrest_v1_calls import Call, Refused, problem_of, success
from aiida_marketplace_hpc.testing.firecrest_v1_cluster import Commands, Outcome, refusal_header

if TYPE_CHECKING:
    from aiida_marketplace_hpc.testing.firecrest_v1 import FirecrestV1

Json = dict[str, Any]


class Utilities:
    """The routes below ``/utilities``.

    :param double: says which version's behaviour is wanted, and which limits.
    """

    def __init__(self, double: FirecrestV1, commands: Commands) -> None:
        self._double = double
        self._commands = commands

    def routes(self) -> dict[str, Callable[[Call], Response]]:
        """The routes by method and path."""

        def route(name: str, handler: Callable[[Call, str], Response]) -> Callable[[Call], Response]:
            def handled(call: Call) -> Response:
                self._double.require_machine(call, f"Error on {name} operation")
                return handler(call, name)

            return handled

        return {
            "GET /utilities/ls": route("ls", self._ls),
            "POST /utilities/mkdir": route("mkdir", self._mkdir),
            "PUT /utilities/rename": route("rename", lambda call, name: self._move(call, name, "mv", "--force")),
            "POST /utilities/copy": route(
                "copy", lambda call, name: self._move(call, name, "cp", "--force", "-dR", "--preserve=all", status=201)
            ),
            "PUT /utilities/chmod": route("chmod", self._chmod),
            "PUT /utilities/chown": route("chown", self._chown),
            "POST /utilities/symlink": route("symlink", self._symlink),
            "GET /utilities/file": route("file", lambda call, name: self._simple(call, name, "file", "-b")),
            "GET /utilities/stat": route("stat", self._stat),
            "GET /utilities/checksum": route("checksum", self._checksum),
            "GET /utilities/head": route("head", self._part),
            "GET /utilities/tail": route("tail", self._part),
            "GET /utilities/view": route("view", self._view),
            "DELETE /utilities/rm": route("rm", self._rm),
            "POST /utilities/upload": route("upload", self._upload),
            "GET /utilities/download": route("download", self._download),
            "GET /utilities/whoami": route("whoami", lambda call, name: success("Username", self._commands.user)),
            "POST /utilities/compress": route("compress", self._compress),
            "POST /utilities/extract": route("extract", self._extract),
        }

    def run(self, name: str, *argv: str, input: bytes = b"") -> Outcome:
        """Run a command on the cluster.

        :param name: what it is called in the answer to one that fails.
        :raises Refused: it fails.
        """
        outcome = self._commands.run(*argv, input=input, timeout=self._double.command_timeout)
        if outcome.code:
            headers = refusal_header(outcome)
            raise Refused(
                f"Error on {name} operation", outcome.words if "X-Error" in headers else None, headers=headers
            )
        return outcome

    def _simple(self, call: Call, name: str, *command: str) -> Response:
        said = self.run(name, *command, "--", call.path(name, "targetPath")).stdout
        return success(f"Success to {name} file.", said.strip())

    def _ls(self, call: Call, name: str) -> Response:
        options = ["-A"] if call.flag("showhidden") else []
        quoting = "c" if self._double.listing == "quoted" else "literal"
        style = ("--time-style=+%Y-%m-%dT%H:%M:%S", f"--quoting-style={quoting}")
        said = self.run(name, "ls", "-l", *options, *style, "--", call.path(name, "targetPath")).stdout
        return success("List of contents", _quoted(said) if self._double.listing == "quoted" else split_listing(said))

    def _mkdir(self, call: Call, name: str) -> Response:
        options = ["-p"] if "p" in call.form else []
        self.run(name, "mkdir", *options, "--", call.path(name, "targetPath"))
        return success("Success to mkdir file.", "", 201)

    def _move(self, call: Call, name: str, *command: str, status: int = 200) -> Response:
        target = call.path(name, "targetPath")
        self.run(name, *command, "--", call.path(name, "sourcePath"), target)
        return success(f"Success to {name} file.", "", status)

    def _chmod(self, call: Call, name: str) -> Response:
        path = call.path(name, "targetPath")
        said = self.run(name, "chmod", "-v", call.path(name, "mode"), "--", path).stdout
        return success("Success to chmod file or directory.", said.strip())

    def _chown(self, call: Call, name: str) -> Response:
        path, owner = call.path(name, "targetPath"), f"{call.form.get('owner', '')}:{call.form.get('group', '')}"
        if owner == ":" or is_forbidden(owner):
            raise Refused("Error in chown operation", "group or owner must be set")
        said = self.run(name, "chown", "-v", owner, "--", path).stdout
        return success("Success to chown file or directory.", said.strip())

    def _symlink(self, call: Call, name: str) -> Response:
        target = call.path(name, "targetPath")
        self.run(name, "ln", "-s", "--", target, call.path(name, "linkPath"))
        return success("Success to symlink file.", "", 201)

    def _stat(self, call: Call, name: str) -> Response:
        options = ["--dereference"] if call.flag("dereference") else []
        form = "%f %i %d %h %u %g %s %X %Y %Z"
        said = self.run(name, "stat", *options, "-c", form, "--", call.path(name, "targetPath")).stdout.split()
        names = ("mode", "ino", "dev", "nlink", "uid", "gid", "size", "atime", "mtime", "ctime")
        values = [int(said[0], 16), *map(int, said[1:])]
        return success("Success to stat file.", dict(zip(names, values, strict=True)))

    def _checksum(self, call: Call, name: str) -> Response:
        said = self.run(name, "sha256sum", "--", call.path(name, "targetPath")).stdout
        return success("Success to checksum file.", said.split()[0])

    def _part(self, call: Call, name: str) -> Response:
        options = [f"--{what}={value}" for what in ("bytes", "lines") if (value := call.request.query_params.get(what))]
        if len(options) > 1:
            raise Refused(f"Error on {name} operation", "Can not specify both 'bytes' and 'lines'")
        return self._simple(call, name, name, *options)

    def _view(self, call: Call, name: str) -> Response:
        path = call.path(name, "targetPath")
        self._require_size(name, path, "Failed to view file content")
        return success("Success to head file.", self.run(name, "cat", "--", path).stdout)

    def _rm(self, call: Call, name: str) -> Response:
        self.run(name, "rm", "-r", "--interactive=never", "--", call.path(name, "targetPath"))
        return Response(status_code=204)

    def _upload(self, call: Call, name: str) -> Response:
        folder = call.path(name, "targetPath")
        if call.file is None:
            raise Refused("Failed to upload file", "No file in query")
        filename, content = call.file
        if is_forbidden(filename):
            raise Refused("Failed to upload file", f"Filename {problem_of(filename)}")
        if self._double.file_names == "secure":
            filename = secure_filename(filename)
        # Written in place, as FirecREST does: whoever looks meanwhile, or after a time-out, sees a part of it.
        self.run(name, "bash", "-c", 'cat > "$0"', f"{folder}/{filename}", input=content)
        return success("File upload successful", "", 201)

    def _require_size(self, name: str, path: str, description: str) -> int:
        size = int(self.run(name, "stat", "--dereference", "-c", "%s", "--", path).stdout)
        if size > self._double.limit:
            raise Refused(description, headers={"X-Size-Limit": "File exceeds size limit"})
        return size

    def _download(self, call: Call, name: str) -> Response:
        path = call.path(name, "sourcePath")
        content = b""
        if self._require_size(name, path, "Failed to download file"):
            content = base64.b64decode(self.run(name, "base64", "--wrap=0", "--", path).stdout)
        disposition = f"attachment; filename={secure_filename(posixpath.basename(path))}"
        return Response(content, headers={"Content-Disposition": disposition}, media_type="application/octet-stream")

    def _compress(self, call: Call, name: str) -> Response:
        source, target = call.path(name, "sourcePath"), call.path(name, "targetPath")
        options = ["--dereference"] if call.flag("dereference") else []
        folder, entry = posixpath.split(source.rstrip("/"))
        self.run(name, "tar", "-czf", target, *options, "-C", folder, "--", entry)
        return success("Success to compress file.", "", 201)

    def _extract(self, call: Call, name: str) -> Response:
        source, target = call.path(name, "sourcePath"), call.path(name, "targetPath")
        self.run(name, "tar", "-xf", source, "-C", target)
        return success("Success to extract file.", "", 201)


def split_listing(said: str) -> list[Json]:
    """Read the lines of ``ls -l`` as FirecREST 1.13.0 does: by blanks, with a dollar sign in place of each line's end."""
    lines = said.replace("\n", "$")[:-1].split("$")
    if len(lines) > 1 or lines[0].startswith("total"):
        lines = lines[1:]
    try:
        return [
            {
                "name": words[6],
                "type": words[0][0],
                "link_target": words[8] if len(words) > 8 else "",
                "user": words[2],
                "group": words[3],
                "permissions": words[0][1:],
                "last_modified": words[5],
                "size": words[4],
            }
            for words in (line.split() for line in lines)
        ]
    except IndexError as exc:  # An exception that FirecREST does not catch.
        raise Refused("The server encountered an internal error", status=500) from exc


_LINE = re.compile(
    r'(\S)(\S+) +\d+ (\S+) +(\S+) +(?:\d+, +)?(\d+) (\S+) ("(?:[^"\\]|\\.)*")(?: -> ("(?:[^"\\]|\\.)*"))?'
)


def _quoted(said: str) -> list[Json]:
    """Read the lines of ``ls -l`` with names in quotation marks, as later versions do."""
    found = []
    for line in said.splitlines():
        if match := _LINE.fullmatch(line):
            kind, permissions, user, group, size, moment, name, target = match.groups()
            found.append(
                {
                    "name": json.loads(name),
                    "type": kind,
                    "link_target": json.loads(target) if target else "",
                    "user": user,
                    "group": group,
                    "permissions": permissions,
                    "last_modified": moment,
                    "size": size,
                }
            )
    return found
