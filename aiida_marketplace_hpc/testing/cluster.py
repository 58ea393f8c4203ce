"""A part of this machine that is set apart: the cluster's side of a test, whose disk the AiiDA side cannot see."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import aiida_marketplace_hpc
from aiida_marketplace_hpc.testing.machine import (
    Machine,
    NotPossibleHere,
    ProcessEntry,
    RigError,
    end_all,
    ensure_user,
    process_table,
    wait_until,
)

PRIVATE = ("/tmp", "/var/tmp")  # noqa: S108 - they are covered, nothing is put there
"""Directories in which a path of the one side could exist on the other side by accident."""

_UNSHARE = ("unshare", "--mount", "--uts", "--propagation", "private", "--")


class IsolatedCluster(Machine):
    """A mount namespace in which an empty file system lies over a directory of this machine.

    What is written there is in no place that a process outside can reach by its path, and what the tests have in ``/tmp`` is
    invisible inside: a file that arrives on the cluster has come through the gateway. The name of the host is another one,
    too; the network is the same. With the end of the process that made it, also by a signal, the namespace, its files and
    all its processes are gone.

    The interpreter and the packages that run the tests stay visible inside at their own places. Where these lie below a
    directory that others may not enter (root's home), it is an open one inside, and the rest of it is hidden.

    Needs root.

    :param path: the directory of the cluster's file systems. The empty file system is mounted on it, or on the nearest
        directory above it that exists.
    :param user: the account of the cluster's processes, created if it is missing.
    :param hostname: the name of the host as the cluster's processes see it.
    """

    def __init__(self, path: str = "/srv/cluster", *, user: str | None = None, hostname: str = "cluster") -> None:
        super().__init__(user)
        self._place = path
        self._hostname = hostname
        self._holder: subprocess.Popen[bytes] | None = None
        self._lifeline = -1

    def __enter__(self) -> IsolatedCluster:
        self.start()
        return self

    @staticmethod
    def check_possible() -> None:
        """Return if namespaces can be made here.

        :raises NotPossibleHere: with the reason, if not.
        """
        if os.geteuid() != 0:
            raise NotPossibleHere("setting a cluster apart (a mount namespace) takes root", "run the tests as root")
        try:
            tried = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, timeout=10)
        except FileNotFoundError:
            raise NotPossibleHere("there is no unshare command", "apt-get install util-linux") from None
        if tried.returncode:
            remedy = "start the container with --cap-add SYS_ADMIN --security-opt apparmor=unconfined"
            raise NotPossibleHere(f"mount namespaces are not allowed here ({tried.stderr.strip()})", remedy)

    def start(self) -> None:
        """Make the namespace and the directories.

        :raises NotPossibleHere: if this machine does not allow it.
        :raises RigError: if the interpreter cannot be made to run inside for :attr:`user`.
        """
        self.check_possible()
        ensure_user(self.user)
        top = next(p for p in (Path(self._place), *Path(self._place).parents) if p.is_dir())
        if top == Path("/"):
            raise RigError(
                f"{self._place} cannot be covered; choose a path below a directory that exists, such as /srv"
            )
        plan = _plan(top, self._hostname)
        program = Path(__file__).with_name("namespace.py")
        reader, self._lifeline = os.pipe()
        with tempfile.NamedTemporaryFile(prefix="mphpc-namespace-") as log:
            self._holder = holder = subprocess.Popen(
                [*_UNSHARE, sys.executable, "-I", str(program), json.dumps(plan)],
                stdin=reader,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            os.close(reader)
            said = Path(log.name)
            try:
                wait_until(
                    lambda: said.read_text() == "ready\n" or holder.poll() is not None,
                    within=20,
                    failure=lambda: f"the namespace does not get ready:\n{said.read_text()}",
                )
                if holder.poll() is not None:
                    raise RigError(f"the namespace could not be made:\n{said.read_text()}")
                self._lay_out(self._place, f"{top}/rig")
                self._check_interpreter()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End every process in the namespace; its files go with it. May be repeated."""
        if self._holder is None:
            return
        os.close(self._lifeline)
        try:
            self._holder.wait(timeout=10)
        except subprocess.TimeoutExpired:
            end_all(lambda: {entry.pid for entry in self.processes()})
            self._holder.wait(timeout=10)
        self._holder = None
        self._reap()

    def environment(self, user: str | None = None) -> dict[str, str]:
        """The environment of the cluster's processes; nothing of the tests' own gets into it."""
        return {**super().environment(user), "TMPDIR": "/tmp"}  # noqa: S108 - the namespace has its own

    def outside(self, path: str) -> Path:
        return Path(f"/proc/{self._pid}/root{path}")

    def processes(self) -> list[ProcessEntry]:
        """The processes in the namespace, the one that holds it included."""
        own = _namespace_of(self._pid)
        return [entry for entry in process_table() if own and _namespace_of(entry.pid) == own]

    @property
    def _pid(self) -> int:
        if self._holder is None:
            raise RigError("the isolated cluster is not started")
        return self._holder.pid

    def _wrap(self, argv: Sequence[str], user: str | None, cwd: str) -> list[str]:
        kinds = {"mount": "mnt", "uts": "uts"}
        enter = [f"--{option}=/proc/{self._pid}/ns/{file}" for option, file in kinds.items()]
        return ["nsenter", *enter, "--", *super()._wrap(argv, user, cwd)]

    def _check_interpreter(self) -> None:
        done = self.run([sys.executable, "-c", f"import {aiida_marketplace_hpc.__name__}"], user=self.user)
        if done.returncode:
            places = " ".join(_interpreter_places())
            raise RigError(
                f"{sys.executable} does not run for {self.user}, who cannot read all of it; "
                f"to mend it: chmod -R o+rX {places}\n{done.stdout}{done.stderr}"
            )


def _plan(top: Path, hostname: str) -> dict[str, object]:
    """What :mod:`~aiida_marketplace_hpc.testing.namespace` has to arrange."""
    cover = {str(top): "mode=755", **dict.fromkeys(PRIVATE, "mode=1777")}
    places = _interpreter_places()
    for place in places:
        if closed := _closed_above(Path(place)):
            cover.setdefault(str(closed), "mode=755")
    keep = [place for place in places if any(Path(covered) in Path(place).parents for covered in cover)]
    outermost = [place for place in keep if not any(Path(other) in Path(place).parents for other in keep)]
    ordered = dict(sorted(cover.items(), key=lambda item: len(Path(item[0]).parts)))
    return {"hostname": hostname, "hosts": f"{top}/hosts", "cover": ordered, "keep": outermost}


def _interpreter_places() -> list[str]:
    """The directories that a process needs in order to run this interpreter with this package."""
    places = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    places.add(str(Path(aiida_marketplace_hpc.__file__).parents[1]))
    executable = Path(sys.executable)
    while executable.is_symlink():  # a virtual environment's: hop by hop to the real one
        executable = Path(os.path.normpath(executable.parent / executable.readlink()))
        places.add(str(executable.parent))
    return sorted(places)


def _closed_above(path: Path) -> Path | None:
    """The outermost directory above ``path`` that others may not enter."""
    for parent in reversed(path.parents):
        if not parent.stat().st_mode & stat.S_IXOTH:
            return parent
    return None


def _namespace_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:  # it has just ended
        return ""
