"""The real Slurm of the tests: jobs of an ordinary user, accounting, restarts, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aiida_marketplace_hpc.testing.machine import Machine, RigError, process_table
from aiida_marketplace_hpc.testing.slurm import ACCOUNT, SlurmCluster

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def spare_cluster(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """One more, beside that of all tests, which nobody minds to be disturbed."""
    with SlurmCluster(slurm_cluster.machine) as another:
        yield another


def _submit(slurm: SlurmCluster, script: str, *options: str) -> str:
    folder = slurm.machine.make_directory("job", user=slurm.user)
    slurm.machine.write(f"{folder}/job.sh", f"#!/bin/bash\n{script}\n", user=slurm.user)
    done = slurm.run("sbatch", "--parsable", *options, "job.sh", user=slurm.user, cwd=folder, check=True)
    return done.stdout.strip()


def _record(slurm: SlurmCluster, jobid: str, fields: str) -> list[str]:
    argv = ("sacct", "-j", jobid, "--allocations", "--noheader", "--parsable2", f"--format={fields}")
    return slurm.run(*argv, check=True).stdout.rstrip("\n").split("|")


def test_a_job_runs_and_is_accounted_for(slurm_cluster: SlurmCluster) -> None:
    jobid = _submit(slurm_cluster, "id -un; srun hostname", "--comment=not-stored", "--output=out")
    slurm_cluster.wait_for(jobid)

    folder, *rest = _record(slurm_cluster, jobid, "WorkDir,User,Account,Partition,ExitCode,Comment")
    assert rest == [slurm_cluster.user, ACCOUNT, "debug", "0:0", ""]
    said = slurm_cluster.machine.read_text(f"{folder}/out").split()
    assert said == [slurm_cluster.user, slurm_cluster.machine.run(["hostname", "-s"]).stdout.strip()]


def test_refusals_are_those_of_a_cluster(slurm_cluster: SlurmCluster) -> None:
    for option, words in (("--account=none", "Invalid account"), ("--partition=none", "Invalid partition")):
        with pytest.raises(RigError, match=words):
            _submit(slurm_cluster, "true", option)


def test_jobs_outlive_the_restart_of_every_daemon(spare_cluster: SlurmCluster) -> None:
    jobid = _submit(spare_cluster, "sleep 6")
    spare_cluster.wait_for(jobid, "RUNNING")
    spare_cluster.stop_dbd()
    assert spare_cluster.run("sacct").returncode == 1
    spare_cluster.stop_controller()
    spare_cluster.stop_node()
    spare_cluster.start_dbd()
    spare_cluster.start_controller()
    spare_cluster.start_node()
    spare_cluster.wait_for(jobid)


def test_slurm_forgets_and_accounting_does_not(spare_cluster: SlurmCluster) -> None:
    jobid = _submit(spare_cluster, "exit 3")
    spare_cluster.wait_for(jobid, "FAILED")
    spare_cluster.forget_ended_jobs()

    assert "Invalid job id" in spare_cluster.run("scontrol", "show", "job", jobid).stderr
    assert _record(spare_cluster, jobid, "State,ExitCode") == ["FAILED", "3:0"]
    following = _submit(spare_cluster, "true")
    assert int(following) > int(jobid)
    spare_cluster.wait_for(following)


def test_slurm_does_not_forget_what_is_alive(spare_cluster: SlurmCluster) -> None:
    jobid = _submit(spare_cluster, "true", "--hold")
    with pytest.raises(RigError, match=f"{jobid} PENDING"):
        spare_cluster.forget_ended_jobs()
    spare_cluster.run("scancel", jobid, check=True)
    spare_cluster.wait_for(jobid, "CANCELLED")


def _belonging_to(conf: str) -> list[str]:
    return [entry.name for entry in process_table() if entry.environment().get("SLURM_CONF") == conf]


def test_two_at_once_and_stop_leaves_nothing(slurm_cluster: SlurmCluster) -> None:
    another = SlurmCluster(slurm_cluster.machine)
    with another:
        conf, directory = another.env["SLURM_CONF"], another.directory
        jobid = _submit(another, "setsid nohup sleep 1000 & exec sleep 1000")
        another.wait_for(jobid, "RUNNING")
        assert {"slurmctld", "slurmd", "slurmstepd", "sleep"} <= set(_belonging_to(conf))
        assert (
            _record(another, jobid, "WorkDir")[0] not in slurm_cluster.run("squeue", "--format=%Z", check=True).stdout
        )
    assert _belonging_to(conf) == []
    assert not slurm_cluster.machine.exists(directory)


def test_a_failed_start_says_why_and_leaves_nothing(slurm_cluster: SlurmCluster, cluster_machine: Machine) -> None:
    broken = SlurmCluster(cluster_machine, options={"SelectType": "select/nonsense"})
    before = {entry.pid for entry in cluster_machine.processes()}
    with pytest.raises(RigError, match=r"slurmctld ended while it started(.|\n)*select/nonsense"):
        broken.start()
    after = {entry.pid: entry.name for entry in cluster_machine.processes()}
    assert {name for pid, name in after.items() if pid not in before} & {
        "munged",
        "mariadbd",
        "slurmdbd",
        "slurmd",
    } == set()
