"""AiiDA plugins of the tests: a calculation that is told what to do with files, its parser, and monitors.

Parser and monitors are found by their entry points, which ``publish_plugins`` of ``sites`` makes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from aiida import orm
from aiida.common.datastructures import CalcInfo, CodeInfo
from aiida.common.folders import Folder
from aiida.engine import CalcJob, ExitCode, submit
from aiida.parsers import Parser
from contents import contents

__version__ = "1"
"""AiiDA records it with each process that has a monitor of this module, and creates none without it."""


class FilesJob(CalcJob):
    """Runs a line of shell, or a portable code, in a folder that is filled and emptied as the input ``files`` says.

    ``files`` has ``sandbox`` (a text for each path), ``folders`` (empty ones), and lists under the names that they have in
    AiiDA's ``CalcInfo``, in which nodes are named by their labels among the inputs ``nodes``: of the remote lists, too, the
    second item is a path below that node's.
    """

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("line", valid_type=orm.Str, required=False)
        spec.input("files", valid_type=orm.Dict, default=lambda: orm.Dict({}))
        spec.input_namespace("nodes", valid_type=orm.Data, dynamic=True, required=False)
        spec.output("temporary", valid_type=orm.Dict, required=False)
        options = spec.inputs["metadata"]["options"]
        options["resources"].default = {"num_machines": 1, "num_mpiprocs_per_machine": 1}
        options["withmpi"].default = False

    def prepare_for_submission(self, folder: Folder) -> CalcInfo:
        said = self.inputs.files.get_dict()
        for path in said.pop("folders", []):
            folder.get_subfolder(path, create=True)
        for path, text in said.pop("sandbox", {}).items():
            place = Path(folder.abspath, path)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        calc_info = CalcInfo()
        for name, entries in said.items():
            calc_info[name] = [self._resolved(name, entry) for entry in entries]
        code_info = CodeInfo()
        code_info.code_uuid = self.inputs.code.uuid
        code_info.cmdline_params = ["-c", self.inputs.line.value] if "line" in self.inputs else []
        code_info.stdout_name = "stdout.txt"
        calc_info.codes_info = [code_info]
        calc_info.retrieve_list = [*(calc_info.retrieve_list or []), "stdout.txt"]
        return calc_info

    def _resolved(self, name: str, entry: Any) -> Any:
        if name == "local_copy_list":
            label, source, target = entry
            return (self.inputs.nodes[label].uuid, source, target)
        if name in ("remote_copy_list", "remote_symlink_list"):
            label, source, target = entry
            node = self.inputs.nodes[label]
            return (node.computer.uuid, f"{node.get_remote_path()}/{source}", target)
        return entry


class FilesParser(Parser):
    """Writes down what was retrieved for the time of parsing only."""

    def parse(self, **kwargs: Any) -> ExitCode | None:
        self.out("temporary", orm.Dict({"files": contents(kwargs["retrieved_temporary_folder"])}))
        return None


def too_hot(node: Any, transport: Any, limit: float, name: str) -> str | None:
    """A monitor: stops the job once the last line of its file ``name`` is a greater number than ``limit``."""
    path = f"{node.get_remote_workdir()}/{name}"
    if not transport.isfile(path):
        return None
    there = Path(node.get_remote_workdir()).name
    here = Path.home() / f"{there}.seen"
    transport.getfile(path, str(here))
    numbers = here.read_text().split()
    if numbers and float(numbers[-1]) > limit:
        return f"it is too hot: {name} is over {limit:g}"
    return None


def listing(node: Any, transport: Any) -> Any:
    """A monitor that looks with everything there is to look with, hands over what it saw, and is then switched off."""
    from aiida.engine.processes.calcjobs.monitors import CalcJobMonitorAction, CalcJobMonitorResult

    work = node.get_remote_workdir()
    if "started" not in transport.listdir(work):
        return None
    node.base.extras.set(
        "seen",
        {
            "glob": sorted(transport.glob(f"{work}/in/*")),
            "names": sorted(entry["name"] for entry in transport.listdir_withattributes(work)),
            "size": transport.get_attribute(f"{work}/in/a.txt").st_size,
            "mode": transport.get_mode(f"{work}/in/a.txt"),
            "user": transport.whoami(),
        },
    )
    return CalcJobMonitorResult(action=CalcJobMonitorAction.DISABLE_SELF, message="seen")


# For the scripts of the tests.


def wait(*nodes: Any, seconds: float = 120) -> Any:
    """Wait until the processes have ended or AiiDA has given up on one, and return them: the one, or all."""
    deadline = time.monotonic() + seconds
    while not all(node.is_terminated for node in nodes) and time.monotonic() < deadline:
        if any(node.paused for node in nodes):
            break
        time.sleep(0.05)
    return nodes[0] if len(nodes) == 1 else nodes


def finished(*nodes: Any) -> Any:
    """Wait for processes, all of which must end well, and return them.

    :raises RuntimeError: with the end of what was logged about those that do not.
    """
    wait(*nodes)
    for node in nodes:
        if not node.is_finished_ok:
            logged = "\n".join(report(node))[-3000:]
            raise RuntimeError(f"{node}: {node.process_state}, {node.exit_status}, {node.exit_message}\n{logged}")
    return nodes[0] if len(nodes) == 1 else nodes


def start(code: Any, line: str | None = None, files: Any = None, **inputs: Any) -> Any:
    """Submit a :class:`FilesJob`."""
    if line is not None:
        inputs["line"] = orm.Str(line)
    return submit(FilesJob, code=code, files=orm.Dict(files or {}), **inputs)


def repository(node: Any) -> dict[str, str]:
    """The files in a node's repository, as it is now."""
    files = {}
    node = orm.load_node(node.pk)
    for root, _, names in node.base.repository.walk():
        for name in names:
            files[str(root / name)] = node.base.repository.get_object_content(str(root / name))
    return files


def folders(node: Any) -> list[str]:
    """The folders in a node's repository, empty ones included."""
    return sorted(str(root / name) for root, names, _ in node.base.repository.walk() for name in names)


def folder(files: dict[str, str]) -> Any:
    """A node with these files."""
    node = orm.FolderData()
    for path, text in files.items():
        node.base.repository.put_object_from_bytes(text.encode(), path)
    return node


def report(node: Any) -> list[str]:
    """What was logged about a process."""
    return [log.message for log in orm.Log.collection.get_logs_for(node)]
