"""The calculation of the benchmark; AiiDA's daemon imports it."""

from __future__ import annotations

from typing import Any

from aiida import orm
from aiida.common.datastructures import CalcInfo, CodeInfo
from aiida.common.folders import Folder
from aiida.engine import CalcJob


class ManyFiles(CalcJob):
    """Sends small input files, and retrieves small output files one by one."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("sent", valid_type=orm.Int)
        spec.input("fetched", valid_type=orm.Int)
        spec.inputs["metadata"]["options"]["resources"].default = {"num_machines": 1, "num_mpiprocs_per_machine": 1}
        spec.inputs["metadata"]["options"]["withmpi"].default = False

    def prepare_for_submission(self, folder: Folder) -> CalcInfo:
        for number in range(self.inputs.sent.value):
            with folder.open(f"input-{number:03}", "w") as handle:
                handle.write(f"{number}\n" * 100)
        outputs = [f"output-{number:03}" for number in range(self.inputs.fetched.value)]
        code_info = CodeInfo()
        code_info.code_uuid = self.inputs.code.uuid
        code_info.cmdline_params = ["-c", f"for name in {' '.join(outputs)}; do cp input-000 $name; done"]
        calc_info = CalcInfo()
        calc_info.codes_info = [code_info]
        calc_info.retrieve_list = outputs
        return calc_info
