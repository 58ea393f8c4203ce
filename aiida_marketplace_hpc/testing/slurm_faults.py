"""Slurm commands that misbehave on demand, put on PATH in front of the real ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal, get_args

from aiida_marketplace_hpc.testing.machine import SYSTEM_PATH, Machine, wait_until

Command = Literal["sbatch", "squeue", "sacct", "scancel", "scontrol"]
Kind = Literal[
    "hang-before", "hang-after", "fail-before", "fail-after", "late", "silent", "half", "garbage", "reworded"
]
"""``hang``: wait until released, before the real command is called or between its end and its answer; ``fail``: end with
Slurm's words for a lost answer, without calling the real command or after it; ``late``: fail at once, and call the real
command when released; ``silent``, ``half``, ``garbage``: call it, end with 0 and print that in place of its answer;
``reworded``: call it, and put other words in the place of some of its answer's."""

_SCRIPT = """\
#!/bin/sh
name=${{0##*/}}
control={control}
PATH={path}
kind=none seconds= words=
for held in "$control/$name".*; do
    case $held in
    *.claimed | *.\\*) continue ;;
    *.always) ;;
    *) mv "$held" "$held.claimed" 2>/dev/null || continue; held=$held.claimed ;;
    esac
    read -r kind seconds words < "$held" 2>/dev/null && break
    kind=none
done
hit() {{
    printf '%s\\n' "${{held##*/}}" >> "$control/hits"
}}
wait_for_release() {{
    left=$((seconds * 20))
    while [ -e "$held" ] && [ "$left" -gt 0 ]; do sleep 0.05; left=$((left - 1)); done
}}
lose() {{
    printf '%s: error: Socket timed out on send/recv operation\\n' "$name" >&2
    exit 1
}}

case $kind in
none) exec "$name" "$@" ;;
hang-before) hit; wait_for_release; exec "$name" "$@" ;;
fail-before) hit; lose ;;
late)
    input=$(mktemp) && cat > "$input"
    (wait_for_release; "$name" "$@" < "$input"; rm -f "$input") > /dev/null 2>&1 &
    hit
    lose ;;
esac
answer=$("$name" "$@")
code=$?
hit
case $kind in
hang-after) wait_for_release; [ -z "$answer" ] || printf '%s\\n' "$answer"; exit "$code" ;;
fail-after) lose ;;
half) printf '%s' "$answer" | head -c $((${{#answer}} / 2)) ;;
reworded) printf '%s' "${{answer:+$answer
}}" | sed -E "$words"; exit "$code" ;;
garbage) printf 'slurm_load_jobs: \\377\\n|||\\n' ;;
esac
"""


class SlurmFault:
    """One fault of one command."""

    def __init__(self, faults: SlurmFaults, name: str) -> None:
        self._faults = faults
        self._name = name

    @property
    def hits(self) -> int:
        """To how many calls it has happened so far."""
        return self._faults.hits().count(self._name)

    def wait_for_hit(self, within: float = 30.0) -> None:
        """Wait until it has happened to a call.

        :param within: seconds.
        :raises RigError: if it has not by then.
        """
        wait_until(lambda: self.hits > 0, within=within, failure=lambda: f"{self._name} did not happen")

    def release(self) -> None:
        """Let calls that wait go on, and let it happen no more. May be repeated."""
        self._faults.remove(self._name)


class SlurmFaults:
    """A directory of commands that do as the real ones do, until a test injects a fault.

    For the PATH of a gateway, whose jobs get it, too::

        faults = SlurmFaults(slurm.machine)
        gateway = GatewayProcess(slurm.machine, backend="slurm", env={**slurm.env, **faults.env})
        lost = faults.inject("sbatch", "fail-after")

    A command that hangs is killed by its caller's time-out as a real one is; what the real one has done by then is done.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._directory = machine.make_directory("slurm-faults", user=machine.user)
        self._control = f"{self._directory}/control"
        self._numbers = itertools.count()
        machine.run(["mkdir", self._control, f"{self._directory}/bin"], user=machine.user, check=True)
        for command in get_args(Command):
            script = _SCRIPT.format(control=self._control, path=SYSTEM_PATH)
            machine.write(f"{self._directory}/bin/{command}", script, user=machine.user, mode=0o755)

    @property
    def env(self) -> dict[str, str]:
        """What puts these commands in front of the real ones."""
        return {"PATH": f"{self._directory}/bin:{SYSTEM_PATH}"}

    def inject(
        self,
        command: Command,
        kind: Kind,
        *,
        always: bool = False,
        seconds: int | None = None,
        words: Mapping[str, str] | None = None,
    ) -> SlurmFault:
        """Let a fault happen to the next call of a command; several wait for one call each, in their order.

        :param always: to every call, until it is released.
        :param seconds: after which it releases itself.
        :param words: for ``reworded``: extended regular expressions, and what each is replaced by.
        """
        name = f"{command}.{next(self._numbers):06}{'.always' if always else ''}"
        # Under another name first: a command reads what it finds.
        edits = ";".join(f"s\x01{old}\x01{new}\x01g" for old, new in (words or {}).items())
        content = f"{kind} {100_000 if seconds is None else seconds} {edits}\n"
        self._machine.write(f"{self._control}/new", content, user=self._machine.user)
        self._machine.run(["mv", f"{self._control}/new", f"{self._control}/{name}"], check=True)
        return SlurmFault(self, name if always else f"{name}.claimed")

    def hits(self) -> list[str]:
        """The faults that have happened so far, by name, in their order."""
        path = f"{self._control}/hits"
        return self._machine.read_text(path).splitlines() if self._machine.exists(path) else []

    def remove(self, name: str) -> None:
        """Release a fault by its name."""
        self._machine.run(["rm", "-f", f"{self._control}/{name}", f"{self._control}/{name.removesuffix('.claimed')}"])

    def clear(self) -> None:
        """Release everything, also what has not happened yet."""
        self._machine.run(["find", self._control, "-name", "*.[0-9]*", "-delete"], check=True)
