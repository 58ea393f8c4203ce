"""The program that holds a mount namespace open; :mod:`~aiida_marketplace_hpc.testing.cluster` starts it as ``unshare``'s.

It arranges the mounts, says ``ready`` and then waits for the end of its standard input: whoever started it holds the other
end, so that it comes also if that process is killed. Then it kills everything that runs in the namespace and ends, and the
kernel takes the mounts away. It is run as a file, by itself, and imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

MS_BIND = 4096


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    """Call mount(2).

    The command would not do: it resolves a source below ``/proc/self/fd`` to a path, and what was there is hidden by then.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    strings = [None if value is None else os.fsencode(value) for value in (source, target, kind, options)]
    if libc.mount(strings[0], strings[1], strings[2], flags, strings[3]):
        number = ctypes.get_errno()
        raise OSError(number, f"mount: {os.strerror(number)}", target)


def arrange(hostname: str, hosts: str, cover: dict[str, str], keep: list[str]) -> None:
    """Cover directories with empty file systems, except for what must stay visible below them.

    :param hosts: where the file is written that stands in for ``/etc/hosts``.
    :param cover: options of the file system, by directory; a directory comes before those below it.
    :param keep: directories that stay where they are.
    """
    kept = {path: os.open(path, os.O_PATH) for path in keep}
    for path, options in cover.items():
        os.makedirs(path, exist_ok=True)
        mount("tmpfs", path, "tmpfs", 0, options)
    for path, descriptor in kept.items():
        os.makedirs(path, exist_ok=True)
        mount(f"/proc/self/fd/{descriptor}", path, None, MS_BIND, None)
        os.close(descriptor)
    socket.sethostname(hostname)
    Path(hosts).write_text(f"127.0.0.1 localhost {hostname}\n")
    mount(hosts, "/etc/hosts", None, MS_BIND, None)


def others_here() -> list[int]:
    """The processes in this mount namespace, without this one."""
    own = os.readlink("/proc/self/ns/mnt")
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and int(entry) != os.getpid() and os.readlink(f"/proc/{entry}/ns/mnt") == own:
                found.append(int(entry))
        except OSError:  # it has just ended
            continue
    return found


def main() -> None:
    """Arrange, wait, kill."""
    arrange(**json.loads(sys.argv[1]))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    while pids := others_here():
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.01)


if __name__ == "__main__":
    main()
