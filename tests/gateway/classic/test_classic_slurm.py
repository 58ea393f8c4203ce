"""A classic gateway over a real Slurm: each launch is a job of it, which runs the script as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from classic_asker import Asker, eventually

from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.slurm import SlurmCluster

STAND_IN = Path(__file__).parents[2] / "apptainer.sh"

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def ask(slurm_cluster: SlurmCluster) -> Iterator[Asker]:
    machine = slurm_cluster.machine
    runtime = f"{machine.software}/classic/apptainer"
    machine.write(runtime, STAND_IN.read_text(), mode=0o755)
    options = ["--container-runtime", runtime]
    with GatewayProcess(machine, backend="slurm", classic=True, options=options, env=slurm_cluster.env) as gateway:
        yield Asker(gateway.url, gateway.token)


def _folder(ask: Asker, jobid: str) -> str:
    return str(ask("GET", "/api/v1/job/").json()["jobs"][jobid]["remote_folder"])


def _scheduler_id(ask: Asker, jobid: str) -> str:
    return str(ask("GET", "/api/v1/job/").json()["jobs"][jobid]["f7t_job_id"])


def _new_job(ask: Asker, script: str | None = None, command: str = "true") -> str:
    ask("PUT", "/api/v1/user/create")
    fields = {"job_name": "a", "ntasks_per_node": 1, "partition": "debug", "image": "i", "executable_cmd": command}
    jobid = str(ask("POST", "/api/v1/job/create", json=fields).json()["jobid"])
    if script is not None:
        ask.upload(jobid, "job.sh", script.encode())
    return jobid


def test_the_script_that_was_made_runs(ask: Asker) -> None:
    jobid = _new_job(ask, command="bash -c 'echo $OMP_NUM_THREADS \"$0\"' done")
    ask("PATCH", f"/api/v1/job/launch/{jobid}")
    output = f"slurm-{_scheduler_id(ask, jobid)}.out"
    eventually(lambda: ask.text(jobid, output) == "1 done\n")
    folder = _folder(ask, jobid)
    assert ask.text(jobid, "apptainer-calls.txt").splitlines()[:4] == ["run", "--bind", f"{folder}:{folder}", "i"]


def test_two_launches_are_two_jobs_of_slurm(ask: Asker, slurm_cluster: SlurmCluster) -> None:
    jobid = _new_job(ask, "#!/bin/bash\n#SBATCH --job-name=mine\necho $SLURM_JOB_ID $PWD >> ran\n")
    ids = []
    for _ in range(2):
        assert ask("PATCH", f"/api/v1/job/launch/{jobid}").json() == {"jobid": jobid}
        ids.append(_scheduler_id(ask, jobid))
    assert len(set(ids)) == 2
    for id in ids:
        slurm_cluster.wait_for(id)
    folder = _folder(ask, jobid)
    assert sorted(ask.text(jobid, "ran").splitlines()) == sorted(f"{id} {folder}" for id in ids)
    assert set(ask.files(jobid)) == {"job.sh", "ran", *(f"slurm-{id}.out" for id in ids)}
    said = slurm_cluster.run(
        "sacct", "-X", "-n", "-P", "-j", ",".join(ids), "--format=JobName,WorkDir,State", check=True
    )
    assert said.stdout.splitlines() == [f"mine|{folder}|COMPLETED"] * 2


def test_the_output_is_emptied_by_the_next_launch(ask: Asker) -> None:
    jobid = _new_job(ask, "#!/bin/bash\n#SBATCH --output=said\necho $SLURM_JOB_ID\n")
    for _ in range(2):
        ask("PATCH", f"/api/v1/job/launch/{jobid}")
        said = f"{_scheduler_id(ask, jobid)}\n"
        eventually(lambda said=said: ask.text(jobid, "said") == said)  # type: ignore[misc]


def test_a_job_is_cancelled_once(ask: Asker, slurm_cluster: SlurmCluster) -> None:
    jobid = _new_job(ask, "#!/bin/bash\ntouch runs; sleep 600\n")
    ask("PATCH", f"/api/v1/job/launch/{jobid}")
    eventually(lambda: "runs" in ask.files(jobid))
    id = _scheduler_id(ask, jobid)
    cancelled = ask("DELETE", f"/api/v1/job/cancel/{jobid}")
    assert cancelled.json() == {"message": f"Send cancelling signal to job-{jobid}, of f7t job id={id}"}
    eventually(lambda: slurm_cluster.run("squeue", "-h", "-j", id, "-o", "%T").stdout.strip() in ("", "CANCELLED"))
    assert ask("DELETE", f"/api/v1/job/cancel/{jobid}").status_code == 600


def test_what_slurm_refuses_and_what_it_does_not_hear(ask: Asker, slurm_cluster: SlurmCluster) -> None:
    jobid = _new_job(ask, "#!/bin/bash\n#SBATCH --partition=nowhere\n")
    assert ask("PATCH", f"/api/v1/job/launch/{jobid}").status_code == 600
    ask.upload(jobid, "job.sh", b"#!/bin/bash\ntouch ran\n")
    slurm_cluster.stop_controller()
    try:
        assert ask("PATCH", f"/api/v1/job/launch/{jobid}").status_code == 600
    finally:
        slurm_cluster.start_controller()
    assert ask("DELETE", f"/api/v1/job/cancel/{jobid}").status_code == 505
    assert set(ask.files(jobid)) == {"job.sh"}
