"""The study as an AiiDA workflow: one calculation job for each temperature, one table and one plot of them all.

AiiDA's daemon imports these classes by their module, so this package needs no entry points for them.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from aiida.common.datastructures import CalcInfo, CodeInfo
from aiida.common.folders import Folder
from aiida.engine import CalcJob, ExitCode, ToContext, WorkChain, calcfunction
from aiida.orm import AbstractCode, ArrayData, Dict, Float, SinglefileData

from aiida_marketplace_hpc.demo import ising, presentation

TEMPERATURES = (1.6, 1.9, 2.1, 2.2, 2.27, 2.35, 2.5, 3.0)
"""Around the transition at 2.269."""
SETTINGS = {"size": 64, "sweeps": 1000, "seed": 42}
"""One or two seconds of one processor for each temperature."""
PROGRAM = Path(ising.__file__)

_PROGRAM = "ising.py"
_PARAMETERS = "parameters.json"
_OBSERVABLES = "observables.json"
_OUTPUT = "ising.out"


class IsingJob(CalcJob):
    """The Ising model at one temperature, simulated on the cluster by a Python program that is sent along."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("program", valid_type=SinglefileData, help="The program that the code, a Python interpreter, runs.")
        spec.input("temperature", valid_type=Float, help="In units of the coupling.")
        spec.input("settings", valid_type=Dict, help="`size` of the lattice, number of `sweeps`, `seed`.")
        spec.output("observables", valid_type=Dict, help="What the program has measured.")
        options = spec.inputs["metadata"]["options"]
        options["resources"].default = {"num_machines": 1, "num_mpiprocs_per_machine": 1}
        options["withmpi"].default = False
        options["output_filename"].default = _OUTPUT
        options["max_wallclock_seconds"].default = 600
        spec.default_output_node = "observables"
        spec.exit_code(300, "ERROR_NO_OBSERVABLES", message="The program left no readable observables; see its output.")

    def prepare_for_submission(self, folder: Folder) -> CalcInfo:
        """Write the parameters, and say what is sent, run and fetched."""
        parameters = {"temperature": self.inputs.temperature.value, **self.inputs.settings.get_dict()}
        with folder.open(_PARAMETERS, "w", encoding="utf-8") as file:
            json.dump(parameters, file, indent=1)
        code = CodeInfo()
        code.code_uuid = self.inputs.code.uuid
        code.cmdline_params = [_PROGRAM, _PARAMETERS, _OBSERVABLES]
        code.stdout_name = self.inputs.metadata.options.output_filename
        calculation = CalcInfo()
        calculation.codes_info = [code]
        calculation.local_copy_list = [(self.inputs.program.uuid, self.inputs.program.filename, _PROGRAM)]
        calculation.retrieve_list = [_OBSERVABLES, code.stdout_name]
        return calculation

    def parse_retrieved_output(self, retrieved_temporary_folder: str | None = None) -> ExitCode | None:
        """Read what the program has left.

        Here and not in a :class:`~aiida.parsers.Parser`, which AiiDA finds by an entry point only.
        """
        try:
            observables = json.loads(self.node.outputs.retrieved.base.repository.get_object_content(_OBSERVABLES))
        except (OSError, ValueError):
            return self.exit_codes.ERROR_NO_OBSERVABLES
        self.out("observables", Dict(observables))
        return None


class IsingScan(WorkChain):
    """The Ising model at several temperatures at once: where does the magnetisation vanish?"""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("code", valid_type=AbstractCode, help="A Python interpreter on the cluster.")
        spec.expose_inputs(IsingJob, include=["program", "settings"])
        spec.input_namespace("temperatures", valid_type=Float, dynamic=True, help="One job for each.")
        spec.outline(cls.submit_jobs, cls.collect)
        spec.output("scan", valid_type=ArrayData, help="All observables by temperature, beside the exact values.")
        spec.output("table", valid_type=SinglefileData)
        spec.output("plot", valid_type=SinglefileData)
        spec.exit_code(400, "ERROR_JOB_FAILED", message="At least one temperature failed: {jobs}.")

    def submit_jobs(self) -> ToContext:
        """Submit all temperatures; they do not wait for each other."""
        return ToContext(
            **{
                name: self.submit(
                    IsingJob,
                    code=self.inputs.code,
                    program=self.inputs.program,
                    settings=self.inputs.settings,
                    temperature=temperature,
                    metadata={"label": f"T = {temperature.value}"},
                )
                for name, temperature in self.inputs.temperatures.items()
            }
        )

    def collect(self) -> ExitCode | None:
        """Make table and plot of what came back."""
        jobs = {name: self.ctx[name] for name in self.inputs.temperatures}
        failed = [str(job.pk) for job in jobs.values() if not job.is_finished_ok]
        if failed:
            return self.exit_codes.ERROR_JOB_FAILED.format(jobs=", ".join(failed))
        collected = collect_scan(**{name: job.outputs.observables for name, job in jobs.items()})
        self.out("scan", collected["scan"])
        self.out("table", collected["table"])
        self.out("plot", plot_scan(collected["scan"]))
        return None


@calcfunction
def collect_scan(**observables: Dict) -> dict[str, Any]:
    """Put the observables of all temperatures into arrays and a table."""
    arrays = presentation.scan_arrays([job.get_dict() for job in observables.values()])
    scan = ArrayData(arrays)
    text = presentation.table(arrays) + "\n"
    return {"scan": scan, "table": SinglefileData(io.BytesIO(text.encode("utf-8")), filename="ising.txt")}


@calcfunction
def plot_scan(scan: ArrayData) -> SinglefileData:
    """Draw the scan."""
    arrays = {name: scan.get_array(name) for name in scan.get_arraynames()}
    return SinglefileData(io.BytesIO(presentation.plot(arrays)), filename="ising.png")
