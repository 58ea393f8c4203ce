"""A calculation with a large input, and a watch over the daemon's event loop; the daemon's workers import them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from aiida import orm
from aiida.common.datastructures import CalcInfo, CodeInfo
from aiida.common.folders import Folder
from aiida.engine import CalcJob

__version__ = "1"

GIB = 1024**3
STALL = 0.1
_PACKAGE = f"{os.sep}aiida_marketplace_hpc{os.sep}"


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


_watched = False


def watch_the_loop() -> None:
    """Write each stall of this worker's event loop, with what ran meanwhile, to the file that LOOP_STALLS names."""
    global _watched
    path = os.environ.get("LOOP_STALLS")
    if not path or _watched:
        return
    _watched = True
    loop = asyncio.get_running_loop()
    beat = time.monotonic()

    def tick() -> None:
        nonlocal beat
        beat = time.monotonic()
        loop.call_later(0.01, tick)

    def watch() -> None:
        main = threading.main_thread().ident
        while True:
            time.sleep(0.02)
            began = beat
            stacks: list[list[str]] = []
            while began == beat and time.monotonic() - began > STALL:
                frame = sys._current_frames().get(main or 0)
                stacks.append([f"{entry.filename}:{entry.name}" for entry in traceback.extract_stack(frame)])
                time.sleep(0.02)
            if stacks:
                ours = [stack for stack in stacks if any(_PACKAGE in line for line in stack)]
                shown = (ours or stacks)[0][-12:]
                seconds = beat - began
                # A stall of AiiDA's own may end, or begin, in a call of ours: only the time spent there counts.
                spent = seconds * len(ours) / len(stacks)
                line = {"seconds": round(seconds, 3), "ours": round(spent, 3), "stack": shown}
                with open(path, "a") as file:
                    file.write(json.dumps(line) + "\n")

    tick()
    threading.Thread(target=watch, daemon=True).start()
