"""The wrapper that is submitted in place of a job script, and that lets the script run at most once.

Whether a submission arrived is sometimes not known, and then a second copy of it may come to run. Each copy first creates the
submission's guard file, which only one of them can, writes its job id and the script's digest there, and only then becomes the
interpreter of the script: the script's file is run as it is, byte for byte. All other copies end before user code. A job that
Slurm itself starts again under the same id (requeue), and the tasks of one job array, find their own id there and go on.

Where nothing else keeps how a job ended (Slurm without accounting), the wrapper stays: it runs the script as its child,
passes signals on, and notes beginning and end in the guard file, where
:mod:`~aiida_marketplace_hpc.gateway.backends.guard` reads them. Such a wrapper needs bash: other shells cannot wait for
signals themselves beside a child that does not ignore SIGINT and SIGQUIT.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import shlex

from aiida_marketplace_hpc.directives import Directives
from aiida_marketplace_hpc.gateway.backends.base import Deferred, Refused, Submission, Trace

EXIT_SECOND_COPY = 75
"""Exit code of a copy that found the guard taken by another job."""
EXIT_NO_GUARD = 73
"""Exit code of a job that could not write the guard: its folder is gone, read-only or full."""

_TRACE = b"# marketplace-hpc-submission: "
_TRACED = ("jobid", "folder", "script", "script_digest", "client_ref", "owner", "attempt")

GUARD_PREFIX = ".marketplace-hpc-"
"""How the names of guard files begin: by it they are found in a folder."""

_INTERPRETER_LINE = re.compile(rb"#![ \t]*([^ \t\n]*)[ \t]*([^\n]*)")

# `set -C` makes the shell open with O_CREAT|O_EXCL, which is atomic and exclusive also on NFS. It is set in a subshell, so
# that neither the setting nor a failing redirection reaches further.
_TEMPLATE = """\
mphpc_guard={guard}
mphpc_job="${{SLURM_ARRAY_JOB_ID:-${{SLURM_JOB_ID:-$$}}}}"
if ! (set -C; printf '%s\\n%s\\n' "$mphpc_job" {digest} > "$mphpc_guard") 2>/dev/null; then
    if [ ! -e "$mphpc_guard" ]; then
        printf 'marketplace-hpc: cannot write %s: the folder is gone, read-only or full\\n' "$mphpc_guard" >&2
        exit {exit_no_guard}
    fi
    mphpc_holder=
    read -r mphpc_holder < "$mphpc_guard" || :
    if [ "$mphpc_holder" != "$mphpc_job" ] ||
        {{ [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] && [ -z "${{SLURM_ARRAY_JOB_ID:-}}" ]; }}; then
        printf 'marketplace-hpc: job %s is a second copy of job %s (%s): it ends before the job script\\n' \\
            "$mphpc_job" "${{mphpc_holder:-unknown}}" "$mphpc_guard" >&2
        exit {exit_second_copy}
    fi
fi
"""

_BECOME = """\
unset mphpc_guard mphpc_job mphpc_holder
exec {command}
"""

# Slurm sends most signals to all processes of a job, but some (`--signal=B:...`, `scancel --batch`) to this shell only; so the
# script may get a SIGTERM twice. `set -m` gives the script a process group of its own, with SIGINT and SIGQUIT as they were.
# A signal that comes before it is known whom to tell is passed on afterwards. A later one interrupts `wait`, and bash keeps
# the child's exit status for the next one. What this shell says itself ("Killed") has no place in the output of the job.
_STAY = """\
mphpc_note() {{ printf '%s %s %s %s\\n' "$1" "${{SLURM_JOB_ID:-$$}}" "$(date -u +%Y-%m-%dT%H:%M:%S)" "$2" >> "$mphpc_guard"; }}
mphpc_note started "${{SLURM_ARRAY_TASK_COUNT:-1}}"
mphpc_told= mphpc_child=
for mphpc_signal in HUP INT QUIT USR1 USR2 ALRM TERM XCPU; do
    trap "mphpc_told=$mphpc_signal; kill -$mphpc_signal \\$mphpc_child 2>/dev/null" $mphpc_signal
done
set -m
{command} <&0 &
mphpc_child=$!
set +m
exec 2>/dev/null
[ -z "$mphpc_told" ] || kill "-$mphpc_told" "$mphpc_child"
while
    mphpc_told=
    wait "$mphpc_child"
    mphpc_status=$?
    [ -n "$mphpc_told" ]
do
    # A signal that interrupts `wait` just when the child ends makes bash lose the child, for which it then waits for ever.
    if ! kill -0 "$mphpc_child" && [[ $'\\n'$(jobs -rp)$'\\n' == *$'\\n'$mphpc_child$'\\n'* ]]; then
        mphpc_status=$((128 + $(kill -l "$mphpc_told")))
        break
    fi
done
mphpc_note ended "$mphpc_status"
exit "$mphpc_status"
"""


def make_wrapper(submission: Submission, directives: Directives, *, note_end: bool = False) -> bytes:
    """Write the script that is submitted for a submission.

    It is a plain ``#!/bin/sh`` script with the comment lines above the first command of the user's script, among them all
    ``#SBATCH`` lines, verbatim, and one more that says which submission it is (:func:`read_trace`). Without a guard it only
    becomes the user's script.

    :param note_end: stay, and note in the guard file how the script ended.
    :raises Refused: if sbatch would refuse the user's script for what it is, in sbatch's words.
    """
    check_script(submission.script_text)
    command = " ".join(shlex.quote(word) for word in script_command(submission))
    if submission.guard is None:
        return f"#!/bin/sh\nexec {command}\n".encode("utf-8", "surrogateescape")
    body = (_TEMPLATE + (_STAY if note_end else _BECOME)).format(
        guard=shlex.quote(posixpath.join(submission.folder, submission.guard)),
        digest=shlex.quote(submission.script_digest),
        exit_no_guard=EXIT_NO_GUARD,
        exit_second_copy=EXIT_SECOND_COPY,
        command=command,
    )
    trace = json.dumps({name: getattr(submission, name) for name in _TRACED})
    shell = b"#!/usr/bin/env bash" if note_end else b"#!/bin/sh"
    lines = (shell, *directives.lines, _TRACE + trace.encode("ascii"), body.encode("utf-8", "surrogateescape"))
    return b"\n".join(lines)


def read_trace(wrapper: bytes) -> Trace | None:
    """Read from a wrapper which submission it is; ``None`` for any other script."""
    found = None
    for line in wrapper.splitlines():
        if not line.startswith(b"#"):
            break
        if line.startswith(_TRACE):  # A user's script may imitate it; ours is the last one.
            found = line.removeprefix(_TRACE)
    try:
        fields = json.loads(found or b"")
        trace = Trace(**{name: fields[name] for name in _TRACED})
    except (ValueError, TypeError, KeyError):
        return None
    texts = (trace.jobid, trace.folder, trace.script, trace.script_digest, trace.owner)
    return trace if all(isinstance(text, str) for text in texts) and isinstance(trace.attempt, int) else None


def script_command(submission: Submission) -> list[str]:
    """Make the command that runs the user's script as the kernel would: its interpreter, at most one argument, its path.

    An interpreter line without an interpreter is run by ``/bin/sh``, as shells do.
    """
    match = _INTERPRETER_LINE.match(submission.script_text)
    interpreter, argument = ("", "") if match is None else (_text(match[1]), _text(match[2]).rstrip(" \t"))
    if not interpreter:
        interpreter = "/bin/sh"
    elif "/" not in interpreter:
        # The kernel takes it as a path below the working directory, the shell would search it on PATH.
        interpreter = f"./{interpreter}"
    return [interpreter, *([argument] if argument else []), submission.script]


def check_script(text: bytes) -> None:
    """Refuse what sbatch refuses to read as a batch script.

    :raises Refused: in sbatch's words.
    """
    if not text:
        raise Refused("Batch script is empty!")
    if not text.strip():
        raise Refused("Batch script contains only whitespace!")
    if not text.startswith(b"#!"):
        raise Refused(
            "This does not look like a batch script. The first line must start with #! followed by the path to an"
            " interpreter. For instance: #!/bin/sh"
        )
    if b"\0" in text:
        raise Refused("The Slurm controller does not allow scripts that contain a NULL character '\\0'.")
    if b"\r\n" in text:
        raise Refused("Batch script contains DOS line breaks (\\r\\n) instead of expected UNIX line breaks (\\n).")


def check_folder(folder: str) -> None:
    """Refuse a job whose working directory is not there.

    :raises Refused: if it does not exist.
    :raises Deferred: if it cannot be looked at.
    """
    try:
        os.stat(os.path.join(folder, "."))
    except (FileNotFoundError, NotADirectoryError):
        raise Refused(f"the job's folder {folder} does not exist") from None
    except OSError as error:
        raise Deferred(f"the job's folder cannot be reached: {error}") from error


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
