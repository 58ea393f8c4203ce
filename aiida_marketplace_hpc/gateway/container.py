"""The job script of the published ``newTransformation``: one command in one container image."""

from __future__ import annotations

import re
import shlex
from typing import Any

from aiida_marketplace_hpc.errors import InvalidRequest
from aiida_marketplace_hpc.protocol import CREATE_FIELDS_PUBLISHED

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
_TEMPLATE = """\
#!/bin/bash -l
#SBATCH --job-name={job_name}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node={ntasks_per_node}
#SBATCH --partition={partition}
#SBATCH --time=00:10:00

srun -n {ntasks_per_node} singularity run --bind "$PWD:$PWD" {image} {executable_cmd}
"""


def container_script(fields: dict[str, Any]) -> bytes:
    """The script for the published keys of a job; every value is checked and quoted.

    :param fields: ``job_name``, ``ntasks_per_node``, ``partition``, ``image``, ``executable_cmd``; ``email`` is ignored.
    :raises InvalidRequest: naming what is missing, unknown or not allowed.
    """
    wanted = [name for name in CREATE_FIELDS_PUBLISHED if name != "email"]
    missing = [name for name in wanted if name not in fields]
    unknown = sorted(set(fields) - set(CREATE_FIELDS_PUBLISHED))
    if missing or unknown:
        problem = f"missing: {', '.join(missing)}" if missing else f"unknown: {', '.join(unknown)}"
        raise InvalidRequest(f"a job needs the keys {', '.join(wanted)}, or folder and script; {problem}")
    try:
        tasks = int(fields["ntasks_per_node"])
    except (TypeError, ValueError):
        tasks = 0
    if tasks < 1:
        raise InvalidRequest(f"ntasks_per_node is a positive whole number, not {fields['ntasks_per_node']!r}")
    for name in ("job_name", "partition"):
        if not _WORD.fullmatch(str(fields[name])):
            raise InvalidRequest(f"{name} has letters, digits and . _ + - only, not {fields[name]!r}")
    image, command = str(fields["image"]), str(fields["executable_cmd"])
    if not image or image.startswith("-") or not image.isprintable():
        raise InvalidRequest(f"image is the name of a container image, not {image!r}")
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise InvalidRequest(f"executable_cmd does not parse as a command line ({exc}): {command!r}") from exc
    return _TEMPLATE.format(
        job_name=fields["job_name"],
        ntasks_per_node=tasks,
        partition=fields["partition"],
        image=shlex.quote(image),
        executable_cmd=shlex.join(words),
    ).encode()
