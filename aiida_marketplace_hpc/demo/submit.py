"""Submit the study to AiiDA's daemon and follow it: ``python -m aiida_marketplace_hpc.demo.submit CODE@COMPUTER``.

Works with the profile that AiiDA has loaded and any computer that is set up in it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

_POLL = 0.5
_BAR = "  {bar:40} {n_fmt} of {total_fmt} temperatures  {elapsed}{postfix}"


@click.command()
@click.argument("code", metavar="CODE@COMPUTER")
@click.option(
    "--python",
    default="/usr/bin/python3",
    show_default=True,
    metavar="PATH",
    help="The Python on the cluster that a code which does not exist yet is made for.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="The directory for ising.txt, ising.png and study.json.  [default: .]",
)
def main(code: str, python: str, output: Path) -> None:
    """Scan the Ising model through its transition, one job on the cluster for each temperature.

    Needs a running daemon. Ctrl-C leaves the study to it.
    """
    from aiida.engine import submit
    from aiida.manage.configuration import load_profile

    load_profile()
    node = submit(**_inputs(code, python))
    click.echo(f"IsingScan<{node.pk}> is on its way")
    try:
        _follow(node)
    except KeyboardInterrupt:
        raise click.ClickException(f"the study goes on in the daemon: verdi process status {node.pk}") from None
    output.mkdir(parents=True, exist_ok=True)
    if not node.is_finished_ok:
        raise click.ClickException(
            f"the study failed ({node.exit_message or node.process_state.value}); why: verdi process report {node.pk}"
        )
    for result in (node.outputs.table, node.outputs.plot):
        (output / result.filename).write_bytes(result.get_content(mode="rb"))
    summary = {"pk": node.pk, "plot": node.outputs.plot.pk}
    (output / "study.json").write_text(json.dumps(summary) + "\n", encoding="utf-8")
    click.echo(node.outputs.table.get_content())


def _inputs(label: str, python: str) -> dict[str, Any]:
    from aiida.orm import Dict, Float, SinglefileData

    from aiida_marketplace_hpc.demo import study

    return {
        "process": study.IsingScan,
        "code": _code(label, python),
        "program": SinglefileData(study.PROGRAM),
        "settings": Dict(study.SETTINGS),
        "temperatures": {f"t{round(1000 * value)}": Float(value) for value in study.TEMPERATURES},
    }


def _code(label: str, python: str) -> Any:
    from aiida.common.exceptions import NotExistent
    from aiida.orm import InstalledCode, load_code, load_computer

    try:
        return load_code(label)
    except NotExistent:
        name, separator, computer = label.partition("@")
        if not separator:
            raise click.BadParameter("it is CODE@COMPUTER", param_hint="CODE@COMPUTER") from None
        try:
            made = InstalledCode(label=name, computer=load_computer(computer), filepath_executable=python)
        except NotExistent as exc:
            raise click.BadParameter(f"{exc}; see verdi computer list", param_hint="CODE@COMPUTER") from exc
        return made.store()


def _follow(node: Any) -> None:
    """Show how many jobs have ended until the study has."""
    from tqdm import tqdm

    from aiida_marketplace_hpc.demo import study

    total = len(study.TEMPERATURES)
    # Without a terminal a bar would be a heap of lines; then there is one line for each job.
    with tqdm(total=total, bar_format=_BAR, disable=None) as bar:
        while True:
            ended = node.is_terminated
            jobs = [one for one in node.called if one.process_label == study.IsingJob.__name__]
            done = sum(job.is_terminated for job in jobs)
            if bar.disable and done > bar.n:
                click.echo(f"{done} of {total} temperatures done")
            bar.n = done
            if not bar.disable:
                bar.set_postfix_str(_states(jobs))
                bar.refresh()
            if ended:
                return
            time.sleep(_POLL)


def _states(jobs: list[Any]) -> str:
    """How the jobs that have not ended are, in a few words."""
    states = [job.get_scheduler_state() for job in jobs if not job.is_terminated]
    names = [state.value if state is not None else "on the way" for state in states]
    return ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))


if __name__ == "__main__":
    main()
