"""Commands without a person: from ``-c`` or from a pipe."""

from __future__ import annotations

from collections.abc import Iterable

from aiida_marketplace_hpc.cli.shell.line import IncompleteLine, LineError
from aiida_marketplace_hpc.cli.shell.session import Session

_USAGE = 2


def run_script(session: Session, lines: Iterable[str]) -> None:
    """Carry out lines as they come. One that cannot be understood ends the script: what follows may rest on it.

    :raises Leave: ``exit`` was in it.
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
            pending, problem = "", str(exc)
            break
        pending, problem = "", ""
    if problem:
        session.complain(problem)
        session.failed = _USAGE
