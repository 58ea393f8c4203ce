"""The conversation with a person: a prompt, history, completion by TAB."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer
from prompt_toolkit.completion import Completion as Suggestion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.shortcuts import CompleteStyle

from aiida_marketplace_hpc.cli.common import printable
from aiida_marketplace_hpc.cli.shell.completion import Completion
from aiida_marketplace_hpc.cli.shell.line import LineError
from aiida_marketplace_hpc.cli.shell.session import Leave, Session


def converse(session: Session) -> int:
    """Read lines and carry them out until ``exit`` or Ctrl-D.

    :return: the exit code that ``exit`` was given; 0 otherwise: whoever sees a command fail knows it already.
    """
    prompt: PromptSession[str] = PromptSession(
        history=_history(),
        completer=_PromptCompleter(Completion(session)),
        # In a thread, so that typing goes on while the gateway is asked.
        complete_in_thread=True,
        complete_while_typing=False,
        complete_style=CompleteStyle.MULTI_COLUMN,
    )
    while True:
        try:
            line = prompt.prompt(_question(session))
        except KeyboardInterrupt:
            continue
        except EOFError:
            return 0
        try:
            session.run(line)
        except LineError as exc:
            session.complain(str(exc))
        except KeyboardInterrupt:
            session.complain("")
        except Leave as exc:
            return exc.status or 0


def confirm(question: str) -> bool:
    """Ask a person; anything but yes is no.

    :raises KeyboardInterrupt: the answer is Ctrl-C or Ctrl-D.
    """
    try:
        return click.confirm(question, default=False)
    except click.Abort:
        raise KeyboardInterrupt from None


class _PromptCompleter(Completer):
    def __init__(self, completion: Completion) -> None:
        self._completion = completion

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Suggestion]:
        for candidate in self._completion.candidates(document.text_before_cursor):
            yield Suggestion(
                candidate.text, start_position=-candidate.back, display=printable(candidate.shown).replace("\n", "\\n")
            )


def _question(session: Session) -> StyleAndTextTuples:
    cluster = session.cluster
    host = urlsplit(cluster.gateway.url).hostname or "gateway"
    who = f"{cluster.user}@{host}"
    folder = printable(cluster.shown(cluster.folder)).replace("\n", "\\n")
    styles = ("ansigreen", "ansibrightblue") if session.colours else ("", "")
    return [(styles[0], who), ("", ":"), (styles[1], folder), ("", "> ")]


def _history() -> History:
    """The lines of earlier sessions; for this one alone where they cannot be kept."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(base) / "marketplace-hpc" / "shell_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)
