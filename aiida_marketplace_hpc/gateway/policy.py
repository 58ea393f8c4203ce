"""A site's policy: what jobs get that name nothing themselves, what they may not ask for, and how large they may be.

It is about the ``#SBATCH`` lines of a job script. The script itself is never changed: what it does not name is given to sbatch
as an option. A policy that cannot be checked is not kept: where there is one, what the gateway does not read with certainty
(components of heterogeneous jobs, ``#PBS`` lines that sbatch translates, abbreviations that could mean several options) is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from aiida_marketplace_hpc.directives import (
    OPTION_NAMES,
    DirectiveError,
    Directives,
    parse_directives,
    parse_duration,
)
from aiida_marketplace_hpc.gateway.backends.base import Refused

SLURM_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
"""What may stand in a directive of Slurm as it is: the name of a job, a partition or an account."""
_TRANSLATED = re.compile(rb"#(PBS|BSUB)\b")
_NODES = re.compile(r"(\d+)(?:-(\d+))?")


class Policy(BaseModel):
    """What a site wants of jobs, in the table ``policy``. Nothing is wanted unless it is said."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_account: str = ""
    """The account of jobs that name none."""
    default_partition: str = ""
    """The partition of jobs that name none."""
    default_qos: str = ""
    """The quality of service of jobs that name none."""
    default_time: str = ""
    """The time limit of jobs that name none, as Slurm writes it; by default ``max_time``, if there is one."""
    refuse: tuple[str, ...] = ()
    """Options of sbatch that no script may have, by their long names without dashes, such as ``reservation``."""
    max_time: str = ""
    """The longest time limit that a job may ask for, such as ``1-00:00:00``."""
    max_nodes: int = Field(default=0, ge=0)
    """The most nodes that a job may ask for; 0: any number."""
    max_tasks: int = Field(default=0, ge=0)
    """The most tasks that a job may ask for, in all; 0: any number."""

    @field_validator("default_account", "default_partition", "default_qos")
    @classmethod
    def _are_words(cls, value: str) -> str:
        if value and not SLURM_WORD.fullmatch(value):
            raise ValueError(f"such a name has letters, digits and . _ + - only, not {value!r}")
        return value

    @field_validator("default_time", "max_time")
    @classmethod
    def _are_durations(cls, value: str) -> str:
        try:
            if value and not parse_duration(value):
                raise ValueError
        except ValueError:
            raise ValueError(f"a time is what Slurm takes for one, such as 00:10:00 or 1-12, not {value!r}") from None
        return value.strip()

    @field_validator("refuse")
    @classmethod
    def _are_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in OPTION_NAMES:
                raise ValueError(f"sbatch has no option --{name}; options are named in full and without dashes")
        return value

    @model_validator(mode="after")
    def _default_is_allowed(self) -> Policy:
        default, most = (parse_duration(text) if text else None for text in (self.default_time, self.max_time))
        if default and most and default > most:
            raise ValueError(f"default_time {self.default_time} is longer than max_time {self.max_time}")
        return self

    @property
    def restricts(self) -> bool:
        """Whether there is anything that a job may not ask for."""
        return bool(self.refuse or self.max_time or self.max_nodes or self.max_tasks)

    def options(self, script: bytes) -> dict[str, str]:
        """Check a job script, and return what sbatch is to be told beside it: long names without dashes, and their values.

        :raises Refused: if the policy does not allow what it asks for.
        """
        if self == Policy():
            return {}
        try:
            directives = parse_directives(script)
        except DirectiveError as exc:
            raise Refused(str(exc)) from exc
        asked = directives.options
        if self.restricts:
            self._check_form(directives)
            self._check_names(asked)
            self._check_time(asked)
            self._check_size(asked)
        default_nodes = f"1-{self.max_nodes}" if self.max_nodes else ""
        defaults = {
            "account": self.default_account,
            "partition": self.default_partition,
            "qos": self.default_qos,
            "time": self.default_time or self.max_time,
            "nodes": default_nodes,
        }
        return {name: value for name, value in defaults.items() if value and name not in asked}

    def _check_form(self, directives: Directives) -> None:
        if directives.heterogeneous:
            raise Refused(_words("heterogeneous jobs are not taken here"))
        for line in directives.lines:
            if _TRANSLATED.match(line):
                word = line.split()[0].decode("ascii", "replace")
                raise Refused(_words(f"lines that begin with {word} are not taken here: write #SBATCH lines"))

    def _check_names(self, asked: Mapping[str, str]) -> None:
        limited = {"time": self.max_time, "nodes": self.max_nodes, "ntasks": self.max_tasks}
        limited |= {"ntasks-per-node": self.max_tasks}
        watched = {*self.refuse, *(name for name, limit in limited.items() if limit)}
        for name in asked:
            if name in self.refuse:
                raise Refused(_words(f"#SBATCH --{name} is not allowed here"))
            if name not in OPTION_NAMES and (full := next((one for one in watched if one.startswith(name)), None)):
                raise Refused(_words(f"#SBATCH --{name} is not clear: did you mean --{full}? Write the option out"))

    def _check_time(self, asked: Mapping[str, str]) -> None:
        if not self.max_time or "time" not in asked:
            return
        try:
            seconds = parse_duration(asked["time"])
        except ValueError:
            raise Refused("Invalid --time specification") from None
        if not seconds or seconds > (parse_duration(self.max_time) or 0):
            raise Refused(
                _words(f"#SBATCH --time={asked['time']} is more than the {self.max_time} that a job may have")
            )

    def _check_size(self, asked: Mapping[str, str]) -> None:
        nodes = 1
        if "nodes" in asked and (self.max_nodes or self.max_tasks):
            nodes = _most_nodes(asked["nodes"])
        if self.max_nodes and nodes > self.max_nodes:
            raise Refused(
                _words(f"#SBATCH --nodes={asked['nodes']} is more than the {self.max_nodes} that a job may have")
            )
        if not self.max_tasks:
            return
        if "ntasks" not in asked:
            for name, other in (("nodelist", "nodes"), ("nodefile", "nodes"), ("ntasks-per-gpu", "ntasks")):
                if name in asked and other not in asked:
                    raise Refused(
                        _words(f"with #SBATCH --{name} goes --{other} here, so that the size of the job is known")
                    )
        each, in_all = (_number(name, asked) for name in ("ntasks-per-node", "ntasks"))
        tasks = in_all if in_all is not None else nodes * (1 if each is None else each)
        if tasks > self.max_tasks:
            raise Refused(_words(f"{tasks} tasks are more than the {self.max_tasks} that a job may have"))


def _most_nodes(text: str) -> int:
    match = _NODES.fullmatch(text.strip())
    if match is None:
        raise Refused(_words(f"#SBATCH --nodes={text} is not a number of nodes, or two with a dash between them"))
    return int(match[2] or match[1])


def _number(name: str, asked: Mapping[str, str]) -> int | None:
    text = asked.get(name)
    if text is None:
        return None
    if not text.strip().isascii() or not text.strip().isdigit():
        raise Refused(_words(f"#SBATCH --{name}={text} is not a number"))
    return int(text)


def _words(text: str) -> str:
    return f"refused by the policy of this gateway: {text}"
