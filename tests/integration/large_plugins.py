"""A calculation with a large input, and a watch over the daemon's event loop; the daemon's workers import them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiida import orm
from aiida.common.datastructures import CalcInfo, CodeInfo
from aiida.common.folders import Folder
from aiida.engine import CalcJob

from aiida_marketplace_hpc.testing.stalls import LoopWatch, Stall

__version__ = "1"

GIB = 1024**3


def write_large(path: Path, seed: int, size: int = GIB) -> None:
    """Make a file of ``size`` bytes that no other seed makes; most of it is a hole, so that it costs no time."""
    with path.open("wb") as file:
        for position in range(0, size, GIB // 64):
            file.seek(position)
            file.write(f"{seed} at {position}\n".encode())
        file.truncate(size)


class LargeJob(CalcJob):
    """Uploads a large file, has its digest taken on the cluster and, if told so, fetches it back."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("seed", valid_type=orm.Int)
        spec.input("fetch", valid_type=orm.Bool)
        spec.input("size", valid_type=orm.Int)
        spec.inputs["metadata"]["options"]["resources"].default = {"num_machines": 1, "num_mpiprocs_per_machine": 1}
        spec.inputs["metadata"]["options"]["withmpi"].default = False

    def prepare_for_submission(self, folder: Folder) -> CalcInfo:
        watch_the_loop()
        write_large(Path(folder.abspath) / "large", self.inputs.seed.value, self.inputs.size.value)
        code_info = CodeInfo()
        code_info.code_uuid = self.inputs.code.uuid
        code_info.cmdline_params = ["-c", "sha256sum large"]
        code_info.stdout_name = "sum.txt"
        calc_info = CalcInfo()
        calc_info.codes_info = [code_info]
        calc_info.provenance_exclude_list = ["large"]
        calc_info.retrieve_list = ["sum.txt"]
        if self.inputs.fetch.value:
            calc_info.retrieve_temporary_list = ["large"]
        return calc_info


_watches: list[LoopWatch] = []


def watch_the_loop() -> None:
    """Write each stall of this worker's event loop, with what ran meanwhile, to the file that LOOP_STALLS names."""
    path = os.environ.get("LOOP_STALLS")
    if not path or _watches:
        return

    def write(stall: Stall) -> None:
        with open(path, "a") as file:
            file.write(json.dumps(asdict(stall)) + "\n")

    _watches.append(LoopWatch(report=write))
    _watches[0].start()
