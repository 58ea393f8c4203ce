"""Calculations and workflows of the integration tests; the daemon's workers import them."""

from __future__ import annotations

from typing import Any

from aiida import orm
from aiida.common.datastructures import CalcInfo, CodeInfo
from aiida.common.folders import Folder
from aiida.engine import CalcJob, ToContext, WorkChain, calcfunction
from aiida.plugins import CalculationFactory

__version__ = "1"

ArithmeticAdd = CalculationFactory("core.arithmetic.add")


class ShellJob(CalcJob):
    """Runs a line of shell in a folder with nested input folders, and retrieves the folder ``out``."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("line", valid_type=orm.Str)
        spec.inputs["metadata"]["options"]["resources"].default = {"num_machines": 1, "num_mpiprocs_per_machine": 1}
        spec.inputs["metadata"]["options"]["withmpi"].default = False

    def prepare_for_submission(self, folder: Folder) -> CalcInfo:
        deep = folder.get_subfolder("in/deep/er", create=True)
        with deep.open("a b.txt", "w") as handle:
            handle.write("from the depth\n")
        folder.get_subfolder("in/empty", create=True)
        code_info = CodeInfo()
        code_info.code_uuid = self.inputs.code.uuid
        code_info.cmdline_params = ["-c", self.inputs.line.value]
        code_info.stdout_name = "stdout.txt"
        calc_info = CalcInfo()
        calc_info.codes_info = [code_info]
        calc_info.retrieve_list = ["out", "stdout.txt", ("in/*/er/*", ".", 2)]
        return calc_info


@calcfunction
def double(number: orm.Int) -> orm.Int:
    return orm.Int(2 * number.value)


class TwoSteps(WorkChain):
    """(x + y), then that sum doubled plus z: two jobs, the second with a result of the first."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        for name in ("x", "y", "z"):
            spec.input(name, valid_type=orm.Int)
        spec.input("code", valid_type=orm.AbstractCode)
        spec.outline(cls.first, cls.second, cls.finish)
        spec.output("result", valid_type=orm.Int)

    def first(self) -> Any:
        return ToContext(one=self.submit(ArithmeticAdd, x=self.inputs.x, y=self.inputs.y, code=self.inputs.code))

    def second(self) -> Any:
        doubled = double(self.ctx.one.outputs.sum)
        return ToContext(two=self.submit(ArithmeticAdd, x=doubled, y=self.inputs.z, code=self.inputs.code))

    def finish(self) -> None:
        self.out("result", self.ctx.two.outputs.sum)
