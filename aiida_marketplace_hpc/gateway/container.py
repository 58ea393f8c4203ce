"""The job script of the published ``newTransformation``: one command in one container image."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import jinja2

from aiida_marketplace_hpc.errors import ConfigurationError, InvalidRequest
from aiida_marketplace_hpc.gateway.config import SLURM_WORD, Settings
from aiida_marketplace_hpc.protocol import CREATE_FIELDS_PUBLISHED

_TEMPLATE = Path(__file__).with_name("container.sh.j2")
_TASKS = re.compile(r"[1-9][0-9]{0,5}")
_ADDRESS = re.compile(r"[A-Za-z0-9_.+-]+@[A-Za-z0-9.-]+")
_EXAMPLE = {"job_name": "a", "ntasks_per_node": 1, "partition": "b", "image": "c.sif", "executable_cmd": "d"}


class ContainerScripts:
    """Writes job scripts for the published keys of a job, from the provider's template.

    The template gets those keys, ``account``, ``time_limit``, ``runtime``, ``launcher`` (what starts the tasks, with a blank
    after it) and ``email``, each of them quoted as a script needs it; what is not known is an empty text.

    :param default: the template, unless the settings name one.
    :raises ConfigurationError: if there is no such template, or if it does not work.
    """

    def __init__(self, settings: Settings, default: Path = _TEMPLATE) -> None:
        path = settings.container_template or default
        self._slurm = settings.backend != "local"
        self._fixed = {
            "account": settings.container_account,
            "time_limit": settings.container_time_limit,
            "runtime": shlex.quote(settings.container_runtime),
        }
        # Nothing is escaped for HTML: it is a script, whose values are quoted for the shell.
        environment = jinja2.Environment(  # noqa: S701
            undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
        )
        try:
            self._template = environment.from_string(path.read_text(encoding="utf-8"))
            tried = self.script(_EXAMPLE, "")
        except (OSError, UnicodeDecodeError, jinja2.TemplateError) as exc:
            problem = exc.strerror if isinstance(exc, OSError) else exc
            raise ConfigurationError(f"container template {path}: {problem}") from exc
        if not tried.startswith(b"#!"):
            raise ConfigurationError(f"container template {path}: a job script begins with #! and its interpreter")

    def script(self, fields: dict[str, Any], email: str) -> bytes:
        """The script for the published keys of a job; every value is checked and quoted.

        :param fields: ``job_name``, ``ntasks_per_node``, ``partition``, ``image``, ``executable_cmd``; ``email`` is ignored.
        :param email: the caller's own address.
        :raises InvalidRequest: naming what is missing, unknown or not allowed.
        """
        values = _checked(fields)
        tasks = values["ntasks_per_node"]
        launcher = f"srun -n {tasks} " if self._slurm else f"mpirun -n {tasks} " if tasks != "1" else ""
        address = email if _ADDRESS.fullmatch(email) else ""
        return self._template.render(**self._fixed, **values, launcher=launcher, email=address).encode()


def _checked(fields: dict[str, Any]) -> dict[str, str]:
    wanted = [name for name in CREATE_FIELDS_PUBLISHED if name != "email"]
    missing = [name for name in wanted if fields.get(name) is None]
    unknown = sorted(set(fields) - set(CREATE_FIELDS_PUBLISHED))
    if missing or unknown:
        problem = f"missing: {', '.join(missing)}" if missing else f"unknown: {', '.join(unknown)}"
        raise InvalidRequest(f"a job needs the keys {', '.join(wanted)}, or folder and script; {problem}")
    tasks = str(fields["ntasks_per_node"])
    if not _TASKS.fullmatch(tasks):
        raise InvalidRequest(f"ntasks_per_node is a positive whole number, not {fields['ntasks_per_node']!r}")
    for name in ("job_name", "partition"):
        if not SLURM_WORD.fullmatch(str(fields[name])):
            raise InvalidRequest(f"{name} has letters, digits and . _ + - only, not {fields[name]!r}")
    image, command = str(fields["image"]), str(fields["executable_cmd"])
    if not image or image.startswith("-") or not image.isprintable():
        raise InvalidRequest(f"image is the name of a container image, not {image!r}")
    if not command.isprintable():
        raise InvalidRequest(f"executable_cmd is one line of printable characters, not {command!r}")
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise InvalidRequest(f"executable_cmd does not parse as a command line ({exc}): {command!r}") from exc
    return {
        "job_name": str(fields["job_name"]),
        "ntasks_per_node": tasks,
        "partition": str(fields["partition"]),
        "image": shlex.quote(image),
        "executable_cmd": shlex.join(words),
    }
