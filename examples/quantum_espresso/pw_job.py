"""Quantum ESPRESSO's ``pw.x`` as an AiiDA calculation: an input file as it is, pseudopotentials, the total energy.

The daemon's workers import this module: start the daemon with this folder in ``PYTHONPATH``. For more than an example there
is aiida-quantumespresso, which works with a gateway's computers, too.
"""

from __future__ import annotations

import re
from typing import Any

from aiida.common.datastructures import CalcInfo, CodeInfo
from aiida.common.folders import Folder
from aiida.engine import CalcJob, ExitCode
from aiida.orm import Dict, RemoteData, SinglefileData

__version__ = "1.0"  # AiiDA notes the version of the plugin with every calculation.

INPUT = "pw.in"
OUTPUT = "pw.out"
PSEUDO = "pseudo"
"""The folder that ``pseudo_dir`` in the input file must name: ``./pseudo``."""

_ENERGY = re.compile(r"^!\s+total energy\s+=\s+(\S+) Ry", re.MULTILINE)
_ITERATIONS = re.compile(r"convergence has been achieved in\s+(\d+) iterations")


class PwJob(CalcJob):
    """A self-consistent field calculation with ``pw.x``.

    The pseudopotentials are a folder that is on the cluster already, which is linked and not copied, or files that are sent
    along.
    """

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("input_file", valid_type=SinglefileData, help="Its `pseudo_dir` is ./pseudo.")
        spec.input(
            "pseudo_folder", valid_type=RemoteData, required=False, help="A folder on the cluster, to be linked."
        )
        spec.input_namespace("pseudos", valid_type=SinglefileData, dynamic=True, help="Files to be sent along.")
        spec.inputs.validator = _one_kind_of_pseudos
        spec.output("energy", valid_type=Dict, help="`total` in Ry, and the number of `iterations`.")
        spec.default_output_node = "energy"
        options = spec.inputs["metadata"]["options"]
        options["resources"].default = {"num_machines": 1, "num_mpiprocs_per_machine": 1}
        options["max_wallclock_seconds"].default = 1800
        options["input_filename"].default = INPUT
        options["output_filename"].default = OUTPUT
        spec.exit_code(300, "ERROR_NO_OUTPUT", message="pw.x left no output.")
        spec.exit_code(310, "ERROR_NO_ENERGY", message="pw.x found no converged energy; see its output.")

    def prepare_for_submission(self, folder: Folder) -> CalcInfo:
        """Say what is sent, linked, run and fetched."""
        inputs = self.inputs
        code = CodeInfo()
        code.code_uuid = inputs.code.uuid
        code.cmdline_params = ["-in", INPUT]
        code.stdout_name = OUTPUT
        calculation = CalcInfo()
        calculation.codes_info = [code]
        calculation.local_copy_list = [(inputs.input_file.uuid, inputs.input_file.filename, INPUT)]
        if "pseudo_folder" in inputs:
            source = inputs.pseudo_folder
            calculation.remote_symlink_list = [(source.computer.uuid, source.get_remote_path(), PSEUDO)]
        for pseudo in inputs.get("pseudos", {}).values():
            calculation.local_copy_list.append((pseudo.uuid, pseudo.filename, f"{PSEUDO}/{pseudo.filename}"))
        calculation.retrieve_list = [OUTPUT]
        return calculation

    def parse_retrieved_output(self, retrieved_temporary_folder: str | None = None) -> ExitCode | None:
        """Read the energy. Here and not in a parser of its own, which AiiDA finds by an entry point only."""
        try:
            text = self.node.outputs.retrieved.base.repository.get_object_content(OUTPUT)
        except OSError:
            return self.exit_codes.ERROR_NO_OUTPUT
        energy = read_energy(text)
        if energy is None:
            return self.exit_codes.ERROR_NO_ENERGY
        self.out("energy", Dict(energy))
        return None


def read_energy(text: str) -> dict[str, float | int] | None:
    """Find the total energy in what ``pw.x`` printed.

    :returns: ``total`` in Ry and the number of ``iterations``; ``None`` if it did not converge.
    """
    energies, iterations = _ENERGY.findall(text), _ITERATIONS.search(text)
    if not energies or iterations is None or "JOB DONE" not in text:
        return None
    return {"total": float(energies[-1]), "iterations": int(iterations[1])}


def _one_kind_of_pseudos(inputs: Any, _: Any) -> str | None:
    if ("pseudo_folder" in inputs) == bool(inputs.get("pseudos")):
        return "give either `pseudo_folder` or `pseudos`"
    return None
