"""Silicon with Quantum ESPRESSO on a cluster behind a gateway, through AiiDA's daemon. See README.md; or `run.py --help`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from pw_job import INPUT, OUTPUT, PSEUDO, PwJob, read_energy

HERE = Path(__file__).parent
SILICON = HERE / "silicon.in"
RYDBERG = 13.605693123
"""In eV."""


@click.command(context_settings={"show_default": True})
@click.argument("computer")
@click.option(
    "--pw", default="/usr/bin/pw.x", metavar="PATH", help="pw.x on the cluster, below one of the gateway's roots."
)
@click.option(
    "--pseudo-folder",
    default="/usr/share/espresso/pseudo",
    metavar="PATH",
    help="The folder with Si.pz-vbc.UPF on the cluster; it is linked, so a read-only root is enough.",
)
@click.option(
    "--send-pseudo",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Send this Si.pz-vbc.UPF along instead.",
)
@click.option("--processes", type=click.IntRange(min=1), default=1, help="MPI processes.")
@click.option("--queue", help="The partition.  [default: the cluster's own]")
@click.option("--timeout", type=float, default=1800.0, metavar="SECONDS", help="How long to wait for the result.")
@click.option("--by-hand/--no-by-hand", default=True, help="Run the same input here, too, if pw.x is installed here.")
def main(
    computer: str,
    pw: str,
    pseudo_folder: str,
    send_pseudo: Path | None,
    processes: int,
    queue: str | None,
    timeout: float,
    by_hand: bool,
) -> None:
    """Calculate the total energy of silicon on COMPUTER (its label in AiiDA), and compare it with pw.x run by hand.

    Needs a running daemon that finds pw_job.py: PYTHONPATH=<this folder> verdi daemon restart
    """
    from aiida.engine import submit
    from aiida.manage.configuration import load_profile
    from aiida.orm import RemoteData, SinglefileData

    load_profile()
    code = _code(computer, pw)
    inputs: dict[str, Any] = {"code": code, "input_file": SinglefileData(SILICON)}
    if send_pseudo is not None:
        inputs["pseudos"] = {"Si": SinglefileData(send_pseudo)}
    else:
        inputs["pseudo_folder"] = RemoteData(computer=code.computer, remote_path=pseudo_folder)
    options: dict[str, Any] = {
        "resources": {"num_machines": 1, "num_mpiprocs_per_machine": processes},
        "withmpi": processes > 1,
    }
    if queue:
        options["queue_name"] = queue
    node = submit(PwJob, **inputs, metadata={"label": "silicon", "options": options})
    click.echo(f"PwJob<{node.pk}> is on its way to {computer}")
    energy = _result(node, timeout)
    _show(f"on {computer}, job {node.get_job_id()}", energy)
    if by_hand and shutil.which("pw.x"):
        reference = run_by_hand(Path(pseudo_folder) if send_pseudo is None else send_pseudo.parent)
        _show("by hand, on this machine", reference)
        difference = abs(energy["total"] - reference["total"])
        click.echo(f"difference: {difference:.1e} Ry")
        if difference > 1e-6:
            raise click.ClickException("the two energies differ")


def run_by_hand(pseudo_folder: Path) -> dict[str, Any]:
    """Run ``pw.x`` here, without AiiDA, with the same input.

    :param pseudo_folder: the folder with the pseudopotential on this machine.
    :raises ClickException: if it finds no energy.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PSEUDO).symlink_to(pseudo_folder)
        shutil.copy(SILICON, Path(folder) / INPUT)
        done = subprocess.run(["pw.x", "-in", INPUT], cwd=folder, capture_output=True, text=True, check=False)
    energy = read_energy(done.stdout)
    if energy is None:
        raise click.ClickException(f"pw.x run by hand found no energy:\n{done.stdout[-2000:]}{done.stderr}")
    return energy


def _code(computer: str, pw: str) -> Any:
    """The code ``pw@COMPUTER``, made at the first time."""
    from aiida.common.exceptions import NotExistent
    from aiida.orm import InstalledCode, load_code, load_computer

    try:
        return load_code(f"pw@{computer}")
    except NotExistent:
        try:
            return InstalledCode(label="pw", computer=load_computer(computer), filepath_executable=pw).store()
        except NotExistent as exc:
            raise click.BadParameter(f"{exc}; see verdi computer list", param_hint="COMPUTER") from exc


def _result(node: Any, timeout: float) -> dict[str, Any]:
    """Wait for a calculation and return what it found."""
    deadline = time.monotonic() + timeout
    while not node.is_terminated:
        if time.monotonic() > deadline:
            raise click.ClickException(
                f"no result within {timeout:.0f} s. verdi process status {node.pk} shows how it stands; if it is not even "
                f"begun, the daemon may not run or not find pw_job.py: PYTHONPATH={HERE} verdi daemon restart"
            )
        time.sleep(0.5)
    if not node.is_finished_ok:
        raise click.ClickException(
            f"the calculation failed ({node.exit_message or node.process_state.value}): verdi process report {node.pk}; "
            f"what pw.x said: verdi calcjob outputcat {node.pk} {OUTPUT}"
        )
    result: dict[str, Any] = node.outputs.energy.get_dict()
    return result


def _show(where: str, energy: dict[str, Any]) -> None:
    total = energy["total"]
    click.echo(f"{total:.8f} Ry = {total * RYDBERG:.6f} eV in {energy['iterations']} iterations  {where}")


if __name__ == "__main__":
    main()
