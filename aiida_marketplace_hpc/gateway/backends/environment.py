"""The environment that jobs and scheduler commands get: nothing of the gateway's own, least of all its secrets."""

from __future__ import annotations

import os
import pwd
import sys


def job_environment() -> dict[str, str]:
    """Make the environment from which a job starts: who and where it is, and a PATH.

    The PATH is the gateway's, without the virtual environment that the gateway itself runs in.
    """
    account = pwd.getpwuid(os.geteuid())
    environment = {
        "PATH": _path_of_jobs(os.environ.get("PATH", os.defpath)),
        "HOME": account.pw_dir,
        "USER": account.pw_name,
        "LOGNAME": account.pw_name,
        "LANG": os.environ.get("LANG", "C.UTF-8"),
    }
    if "TZ" in os.environ:
        environment["TZ"] = os.environ["TZ"]
    return environment


def _path_of_jobs(path: str) -> str:
    if sys.prefix == sys.base_prefix:
        return path
    own = os.path.realpath(os.path.join(sys.prefix, "bin"))
    folders = [folder for folder in path.split(os.pathsep) if folder and os.path.realpath(folder) != own]
    return os.pathsep.join(folders) or os.defpath
