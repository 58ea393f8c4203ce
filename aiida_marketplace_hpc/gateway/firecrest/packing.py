"""Archives on a cluster behind FirecREST: a small job of the gateway's own runs ``tar`` there, as the user's account.

FirecREST's own ``compress`` packs one path, named by its last part; ``extract`` writes what it reads before it knows whether
that is whole. So a script is submitted that does both as a gateway does on a disk of its own
(:mod:`aiida_marketplace_hpc.gateway.archives`), and no byte of an archive passes through the gateway.

Each job has a folder of its own below the gateway's private one, in the root of what it makes. There lie what it says and an
archive that is not whole. A job that finds no such folder does nothing: removing it is the end of all that is under way.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from aiida_marketplace_hpc.errors import FileError, GatewayError, TooLarge, Unavailable
from aiida_marketplace_hpc.gateway.backends.wrapper import GUARD_PREFIX
from aiida_marketplace_hpc.gateway.firecrest.client import CallFailed, JobFailed
from aiida_marketplace_hpc.gateway.firecrest.failures import error_of, explained
from aiida_marketplace_hpc.gateway.firecrest.files import RemoteFiles
from aiida_marketplace_hpc.gateway.roots import PRIVATE

_JOB_NAME = "marketplace-hpc-archive"
_COMPRESSION = {"tar": "", "tar.gz": "gzip", "tar.bz2": "bzip2", "tar.xz": "xz"}
_LOST = 60.0
"""Seconds in which a job must be listed whose submission had no answer, or it is taken for never submitted."""
_LOOK = 5.0
_LONGEST = 1024 * 1024
"""Bytes of all names in a script: a command takes 2 MiB of arguments, Slurm 4 MiB of script."""
_SAID = re.compile(rf"{_JOB_NAME} (E[A-Z]+|LARGE): (.*)")


class Packing:
    """Makes and unpacks archives over one caller's files.

    :param options: what sbatch is told about the jobs, by long names without dashes: the site's defaults.
    """

    def __init__(self, files: RemoteFiles, options: Mapping[str, str]) -> None:
        self._files = files
        self._options = options

    def compress(
        self,
        members: list[str],
        target: str,
        root_dir: str,
        *,
        format: str,
        overwrite: bool = True,
        dereference: bool = False,
    ) -> dict[str, Any]:
        """Write files and folders into an archive, which appears when it is whole.

        May be repeated with ``overwrite``. What the archive replaces is left out of it by its name, not by what it is.

        :param members: paths relative to ``root_dir``, all of which are there.
        :raises FileError: for what goes wrong with files, in tar's words; EBUSY for one that changes while it is read.
        :raises TooLarge: there are more names than fit into a command.
        :raises Unavailable: the job was not run to its end.
        """
        goal, top = self._goal(target), self._files.roots.locate(root_dir)[1]
        names = shlex.join(members)
        if len(names.encode("utf-8", "surrogateescape")) > _LONGEST:
            raise TooLarge(f"{len(members)} paths are too many for one archive here: name the folder that they are in")
        said = self._run(
            goal,
            lambda folder: _packing(
                names,
                goal,
                top,
                draft=f"{folder}/archive",
                how=_COMPRESSION[format],
                again=overwrite,
                follow=dereference,
            ),
        )
        digest, size = said.split()
        return {"path": goal, "size": int(size), "digest": f"sha-256:{digest}"}

    def extract(
        self, path: str, target: str, *, strip_components: int = 0, most: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """Unpack an archive into a folder, which is made where it is missing; may be repeated.

        The archive is read to its end, and every member looked at, before the first appears. Permission bits lose what the
        cluster's umask takes from them.

        :param most: members, and bytes in all of them, that an archive may have.
        :raises FileError: EBADMSG for what is no archive, or a damaged one; EINVAL for a member that would lie elsewhere,
            EPERM for a device, EBUSY for one in place of what a live job needs; nothing was unpacked. What else goes wrong,
            in tar's words, may have happened in the middle.
        :raises TooLarge: it has more than ``most``; nothing was unpacked.
        :raises Unavailable: the job was not run to its end.
        """
        files = self._files
        source = files.stat(path, follow=True)
        files.mkdir(target, parents=True, exist_ok=True)
        if source["type"] == "directory":
            raise FileError(f"Is a directory: {path}", errno="EISDIR", path=path)
        root, goal = files.roots.locate(target)
        live = [(posixpath.relpath(folder, goal), script) for folder, script in files.protection.live_below(goal)]
        said = self._run(
            goal,
            lambda folder: _unpacking(
                source["path"], goal, strip=strip_components, live=live, most=most, is_root=root.path == goal
            ),
        )
        return {"path": goal, "entries": int(said)}

    def _goal(self, target: str) -> str:
        """Where an archive is to appear: behind a link, at what that leads to."""
        files = self._files
        path = files.roots.writable(target)
        try:
            kind = files.stat(path)["type"]
        except FileError as exc:
            if exc.errno != "ENOENT":
                raise
            kind = None
        files.protection.check_path(path, exists=kind is not None)
        if kind == "symlink":
            path = files.roots.writable(files.realpath(path))
            files.protection.check_path(path, exists=True)
        return path

    def _run(self, goal: str, body: Callable[[str], list[str]]) -> str:
        """Have a job do something, and return what it says.

        :param body: the lines of its script, after it has entered its own folder, which they are told.
        """
        files, cluster = self._files, self._files.cluster
        root, _ = files.roots.locate(goal)
        folder = files.roots.staged(root)
        with explained(goal), files.dropped(folder):
            files.roots.prepare()
            cluster.mkdir(folder, parents=True)
            id = self._submit(folder, "\n".join([*self._head(folder), *body(folder), ""]))
            try:
                files.follow(id, folder)
            except JobFailed as exc:
                raise _meaning(exc, goal) from exc
            except BaseException:
                # Nobody waits any more: nothing is to happen behind the back of the next attempt.
                with suppress(CallFailed):
                    cluster.cancel(id)
                raise
            return cluster.fetch(f"{folder}/said").decode("ascii", "replace")

    def _head(self, folder: str) -> list[str]:
        named = {"job-name": _JOB_NAME, "output": "said", "error": "errors", **self._options}
        return [
            "#!/bin/bash",
            *(f"#SBATCH --{option}={value}" for option, value in named.items()),
            "export LC_ALL=C",
            "set -o pipefail",
            f"cd -- {shlex.quote(folder)} || exit",
            # Where nobody keeps a record of jobs, this says that it has ended, and how.
            f"trap {shlex.quote(f'echo $? >{shlex.quote(folder)}/ended')} EXIT",
        ]

    def _submit(self, folder: str, script: str) -> str:
        """Submit a job; where the answer was lost, find the job by its folder."""
        files = self._files
        try:
            return files.cluster.submit(folder, script, "script")
        except CallFailed as exc:
            if not exc.carried_out:
                raise
            for _ in range(int(_LOST / _LOOK)):
                with suppress(CallFailed):
                    for job in files.cluster.jobs():
                        if str(job.get("workingDirectory") or "").rstrip("/") == folder:
                            return str(job["jobId"])
                files.pause(_LOOK)
            raise


def _packing(names: str, goal: str, root_dir: str, *, draft: str, how: str, again: bool, follow: bool) -> list[str]:
    tar = ["tar", "--create", "--file=-", *([f"--{how}"] if how else []), *(["--dereference"] if follow else [])]
    tar += [f"--exclude={PRIVATE}", f"--exclude={PRIVATE}-*"]
    if goal.startswith(f"{root_dir.rstrip('/')}/"):
        old = posixpath.relpath(goal, root_dir)
        tar += ["--anchored", "--no-wildcards", f"--exclude={old}", f"--exclude=./{old}"]
    place, new = shlex.quote(goal), shlex.quote(draft)
    name = [
        f"if [ -e {place} ]; then chmod --reference={place} -- {new} || exit; fi",
        f"mv -fT -- {new} {place} || exit",
    ]
    if not again:
        # An older mv says nothing when it leaves something where it is.
        name = [
            f"mv -nT -- {new} {place}",
            f"[ ! -e {new} ] || {_fail('EEXIST', 'File exists')}",
        ]
    return [
        *([f"command -v {how} >/dev/null || {_fail('ENOSYS', f'there is no {how} where the job ran')}"] if how else []),
        f"cd -- {shlex.quote(root_dir)} || exit",
        f"digest=$({shlex.join(tar)} -- {names} | tee -- {new} | sha256sum) || exit",
        f"size=$(stat -c %s -- {new}) || exit",
        *name,
        'echo "${digest%% *} $size"',
    ]


def _unpacking(
    path: str,
    goal: str,
    *,
    strip: int,
    live: list[tuple[str, str]],
    most: tuple[int, int] | None,
    is_root: bool,
) -> list[str]:
    archive = shlex.quote(f"--file={path}")
    members, size = most or (-1, -1)
    looking = f"awk -v strip={strip} -v members={members} -v size={size} {shlex.quote(_LOOKING)}"
    tar = ["tar", "--extract", f"--file={path}", f"--directory={goal}", f"--strip-components={strip}"]
    tar += ["--no-same-owner", "--no-same-permissions", *(["--no-overwrite-dir"] if is_root else [])]
    return [
        "cat >live <<'//'",  # No relative path and no name is //.
        *(f"{_quoted(folder)}\n{_quoted(script)}" for folder, script in live),
        "//",
        f"head -c 1 -- {shlex.quote(path)} >/dev/null || exit",
        f"tar --list --verbose --numeric-owner --quoting-style=c {archive} | {looking} >count",
        'ended=("${PIPESTATUS[@]}")',
        "[ ${ended[1]} = 0 ] || exit 1",
        f"[ ${{ended[0]}} = 0 ] || {_fail('EBADMSG', 'it is no archive, or a damaged one')}",
        f"{shlex.join(tar)} || exit",
        "cat count",
    ]


def _fail(code: str, words: str) -> str:
    return f"{{ echo {shlex.quote(f'{_JOB_NAME} {code}: {words}')} >&2; exit 1; }}"


_LOOKING = (
    r"""
function fail(code, words) {
    print "NAME " code ": " words > "/dev/stderr"
    failed = 1
    exit 1
}
function shown(name) { return length(name) > 200 ? substr(name, 1, 200) "..." : name }
BEGIN {
    while ((getline folder < "live") > 0 && (getline script < "live") > 0) {
        folders[folder] = 1
        scripts[folder == "." ? script : folder "/" script] = 1
    }
}
{
    kind = substr($0, 1, 1)
    seen++
    if (kind == "-") bytes += $3
    if (members >= 0 && (seen > members || bytes > size))
        fail("LARGE", "more than " members " members, or " size " bytes in all of them, which is the limit of this gateway")
    if (!match($0, /"([^"\\]|\\.)*"/)) next
    name = substr($0, RSTART + 1, RLENGTH - 2)
    count = split(name, parts, "/")
    path = folder = last = ""
    depth = 0
    for (i = 1; i <= count; i++) {
        if (parts[i] == "") continue
        if (parts[i] == ".." || parts[i] == "PRIVATE")
            fail("EINVAL", "it has the member " shown(name) ", which would lie elsewhere")
        depth++
        if (depth <= strip || parts[i] == ".") continue
        folder = path == "" ? "." : path
        last = parts[i]
        path = path == "" ? last : path "/" last
    }
    if (depth <= strip) next
    if (kind == "b" || kind == "c") fail("EPERM", "it has the member " shown(name) ", which is a device")
    if (path in scripts || (folder in folders && index(last, "GUARD") == 1))
        fail("EBUSY", "it has the member " shown(name) ", in place of what is protected: a job lives there")
    unpacked++
}
END { if (!failed) print unpacked + 0 }
""".replace("NAME", _JOB_NAME)
    .replace("PRIVATE", PRIVATE)
    .replace("GUARD", GUARD_PREFIX)
)
"""Looks at the members of an archive, as tar lists them with names quoted as in C, before any of them is unpacked."""


def _quoted(text: str) -> str:
    """A name as tar lists it: quoted as in C, in a locale that knows ASCII alone."""
    return "".join(
        f"\\{chr(byte)}" if byte in b'"\\' else chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}"
        for byte in text.encode()
    )


def _meaning(failure: JobFailed, goal: str) -> GatewayError:
    """The error for a job that has failed."""
    if found := _SAID.search(failure.message):
        code, words = found.groups()
        if code == "LARGE":
            return TooLarge(f"{goal}: {words}: nothing was unpacked")
        return FileError(f"{goal}: {words}", errno=code, path=goal)
    if " ended as FAILED: " not in failure.message:
        return Unavailable(f"{goal}: {failure.message}", retryable=False)
    known = error_of(failure, goal)
    number = (
        known.errno if isinstance(known, FileError) else "EBUSY" if "changed as we read" in failure.message else "EIO"
    )
    return FileError(f"{goal}: {failure.message}", errno=number, path=goal)
