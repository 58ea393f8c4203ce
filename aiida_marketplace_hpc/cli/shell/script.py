"""Commands without a person: from ``-c`` or from a pipe."""

from __future__ import annotations

from collections.abc import Iterable

from aiida_marketplace_hpc.cli.shell.line import IncompleteLine, LineError
from aiida_marketplace_hpc.cli.shell.session import Leave, Session

_USAGE = 2


def run_script(session: Session, lines: Iterable[str]) -> int:
    """Carry out lines as they come. One that cannot be understood ends the script: what follows may rest on it.

    :return: the exit code that ``exit`` was given, or that of the last command that failed.
    :raises KeyboardInterrupt: Ctrl-C.
    """
    pending, problem = "", ""
    for line in lines:
        pending += line
        try:
            session.run(pending)
        except IncompleteLine as exc:
            problem = str(exc)
            continue
        except LineError as exc:
            problem = str(exc)
            break
        except Leave as exc:
            return session.failed if exc.status is None else exc.status
        pending, problem = "", ""
    if problem:
        session.complain(problem)
        return _USAGE
    return session.failed
