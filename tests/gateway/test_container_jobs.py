"""Jobs as published, of a container image and a command: the script to the letter, and what running it does.

There is no container runtime here: a recording stand-in takes its place, and runs the command.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc import HpcGateway
from aiida_marketplace_hpc.client.auth import StaticToken
from aiida_marketplace_hpc.directives import parse_directives
from aiida_marketplace_hpc.errors import ConfigurationError, InvalidRequest
from aiida_marketplace_hpc.gateway.backends.local import LocalBackend
from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.gateway.container import ContainerScripts
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway

STAND_IN = Path(__file__).parents[1] / "apptainer.sh"
FIELDS = {
    "job_name": "demo",
    "ntasks_per_node": 2,
    "partition": "mc",
    "image": "docker://example.org/tool:1",
    "executable_cmd": "run --input 'a b' c",
}
TO_THE_LETTER = """\
#!/bin/bash -l
#SBATCH --job-name=demo
#SBATCH --account=project-7
#SBATCH --time=1-00:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-core=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --partition=mc

srun -n 2 apptainer run --bind "$PWD:$PWD" docker://example.org/tool:1 run --input 'a b' c
"""


def scripts(**settings: Any) -> ContainerScripts:
    return ContainerScripts(load({"backend": "slurm", "home": "/home/{username}", **settings}))


def script(scripts: ContainerScripts, email: str = "alice@example.org", **change: Any) -> str:
    return scripts.script({**FIELDS, **change}, email).decode()


def test_the_script_to_the_letter() -> None:
    settings = {"container_account": "project-7", "container_time_limit": "1-00:00:00"}
    assert script(scripts(**settings, container_runtime="apptainer")) == TO_THE_LETTER


def test_the_script_by_default() -> None:
    lines = TO_THE_LETTER.replace("apptainer", "singularity").replace("1-00:00:00", "00:10:00").splitlines(True)
    assert script(scripts()) == "".join(line for line in lines if "account" not in line)
    assert script(scripts(), ntasks_per_node="2", email="ignored@example.org") == script(scripts())


@pytest.mark.parametrize(
    ("tasks", "started"), [(1, '\nsingularity run --bind "$PWD'), (3, "\nmpirun -n 3 singularity run")]
)
def test_without_a_scheduler_nothing_of_slurm_starts_the_tasks(tasks: int, started: str) -> None:
    assert started in script(scripts(backend="local"), ntasks_per_node=tasks)


def test_the_providers_own_template(tmp_path: Path) -> None:
    template = tmp_path / "job.sh.j2"
    template.write_text(
        "#!/bin/sh\n"
        "#SBATCH --time={{ time_limit }}\n"
        "{% if email %}\n#SBATCH --mail-user={{ email }}\n{% endif %}\n"
        "module load tools\n"
        "{{ launcher }}{{ runtime }} exec {{ image }} {{ executable_cmd }} # {{ job_name }}\n"
    )
    own = scripts(container_template=template, container_runtime="/opt/my tools/bin/apptainer")
    expected = (
        "#!/bin/sh\n#SBATCH --time=00:10:00\n#SBATCH --mail-user=alice@example.org\nmodule load tools\n"
        "srun -n 2 '/opt/my tools/bin/apptainer' exec docker://example.org/tool:1 run --input 'a b' c # demo\n"
    )
    assert script(own) == expected
    # An address that is more than an address stands nowhere.
    assert "mail" not in script(own, "a b\n#SBATCH --uid=0@example.org")


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("#!/bin/sh\n{{ queue }}\n", "queue"),
        ("#!/bin/sh\n{% if %}\n", "container template"),
        ("srun {{ image }}\n", "#!"),
    ],
)
def test_a_template_that_does_not_work_is_refused_at_the_start(tmp_path: Path, template: str, named: str) -> None:
    (tmp_path / "job.sh.j2").write_text(template)
    with pytest.raises(ConfigurationError, match=named):
        scripts(container_template=tmp_path / "job.sh.j2")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"job_name": "a\n#SBATCH --uid=0"}, "job_name"),
        ({"job_name": None}, "missing: job_name"),
        ({"partition": "-a"}, "partition"),
        ({"ntasks_per_node": 0}, "ntasks_per_node"),
        ({"ntasks_per_node": 2.5}, "ntasks_per_node"),
        ({"ntasks_per_node": True}, "ntasks_per_node"),
        ({"ntasks_per_node": "2 --uid=0"}, "ntasks_per_node"),
        ({"image": "-B/:/mnt"}, "image"),
        ({"image": "a\nb"}, "image"),
        ({"executable_cmd": "a\nb"}, "executable_cmd"),
        ({"executable_cmd": "a 'b"}, "executable_cmd"),
    ],
)
def test_what_makes_no_sense_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        script(scripts(), **change)


HOSTILE = [
    "$(touch escaped)",
    "`touch escaped`",
    "; touch escaped",
    "a b",
    "&& touch escaped",
    "*",
    "$PWD",
    "'",
    '"',
    "\\",
]


@pytest.mark.parametrize("word", HOSTILE)
def test_every_value_arrives_as_it_was_given(tmp_path: Path, word: str) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$1" "$2" >srun-call.txt\nshift 2\nexec "$@"\n')
    (commands / "apptainer").write_text(STAND_IN.read_text())
    for command in commands.iterdir():
        command.chmod(0o755)
    folder = tmp_path / "a job's folder"
    folder.mkdir()
    quoted = "'" + word.replace("'", "'\\''") + "'"
    text = script(scripts(container_runtime="apptainer"), image=word, executable_cmd=f"printf '%s|' {quoted} end")
    assert parse_directives(text.encode()).options["ntasks-per-node"] == "2"
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
    done = subprocess.run(["bash"], input=text, cwd=folder, env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{word}|end|", "")
    assert (folder / "srun-call.txt").read_text() == "-n\n2\n"
    called = ["run", "--bind", f"{folder}:{folder}", word, "printf", "%s|", word, "end"]
    assert (folder / "apptainer-calls.txt").read_text() == "\n".join([*called, "", ""])
    assert not (folder / "escaped").exists()


def test_a_job_from_creation_to_its_results(tmp_path: Path) -> None:
    runtime = tmp_path / "apptainer"
    runtime.write_text(STAND_IN.read_text())
    runtime.chmod(0o755)
    backend = LocalBackend(tmp_path / "spool", slots=1)
    with (
        ServedGateway(tmp_path, backend, container_runtime=str(runtime)) as served,
        HpcGateway(served.url, token_source=StaticToken(TOKENS[ALICE])) as gateway,
    ):
        fields = {**FIELDS, "ntasks_per_node": 1, "partition": "local"}
        jobid = gateway.create_job({**fields, "executable_cmd": """bash -c 'tr a-z A-Z <in.txt >"$0"' out.txt"""})
        (tmp_path / "in.txt").write_text("from the container\n")
        gateway.upload_file(jobid, "in.txt", tmp_path / "in.txt")
        gateway.launch_job(jobid)
        wait_until(lambda: gateway.check_job_state(jobid)["job"]["final"], within=30, failure=lambda: "it does not end")
        assert gateway.check_job_state(jobid)["state"] == "COMPLETED"
        assert gateway.download_file(jobid, "out.txt") == b"FROM THE CONTAINER\n"
        called = gateway.download_file(jobid, "apptainer-calls.txt").decode().splitlines()
    assert called[:2] == ["run", "--bind"]
    assert called[3:6] == ["docker://example.org/tool:1", "bash", "-c"]
