"""A site's policy: refusals are clear and come before anything is submitted; defaults change no script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.directives import parse_directives
from aiida_marketplace_hpc.errors import ConfigurationError, SubmissionRefused
from aiida_marketplace_hpc.gateway.backends.base import Refused, Submission
from aiida_marketplace_hpc.gateway.backends.local_job import read_request
from aiida_marketplace_hpc.gateway.backends.slurm_commands import sbatch_arguments
from aiida_marketplace_hpc.gateway.config import load
from aiida_marketplace_hpc.gateway.policy import Policy
from aiida_marketplace_hpc.gateway.schema import User
from aiida_marketplace_hpc.gateway.service import Gateway
from aiida_marketplace_hpc.protocol import JobState
from aiida_marketplace_hpc.testing.backend import FakeBackend
from aiida_marketplace_hpc.testing.gateway import GatewayProcess

DEFAULTS = {"default_account": "site", "default_partition": "normal", "default_qos": "low", "default_time": "10"}


def script(*directives: str) -> bytes:
    return "\n".join(["#!/bin/sh", *(f"#SBATCH {one}" for one in directives), "true", ""]).encode()


def test_what_a_script_does_not_name_is_added() -> None:
    policy = Policy(**DEFAULTS, max_time="1-0", max_nodes=4)
    assert policy.options(script()) == {
        "account": "site",
        "partition": "normal",
        "qos": "low",
        "time": "10",
        "nodes": "1-4",
    }
    assert policy.options(script("-A mine", "--part=fast", "-q", "high", "-t5", "--nodes=2")) == {}


def test_without_a_default_the_time_is_the_longest() -> None:
    assert Policy(max_time="2:00:00").options(script()) == {"time": "2:00:00"}


def test_without_a_policy_nothing_is_looked_at() -> None:
    assert Policy().options(script("--no-such-thing 'unmatched")) == {}


@pytest.mark.parametrize(
    ("policy", "directives"),
    [
        ({"max_time": "1:00:00"}, ["--time=60"]),
        ({"max_nodes": 4}, ["--nodes=1-4"]),
        ({"max_nodes": 4}, ["-N 4"]),
        ({"max_tasks": 8}, ["--nodes=4", "--ntasks-per-node=2"]),
        ({"max_tasks": 8}, ["--nodes=100", "--ntasks=8"]),
        ({"refuse": ("reservation",)}, ["--requeue"]),
        ({"max_tasks": 8}, ["--nodelist=n[1-4]", "--nodes=4"]),
    ],
)
def test_what_is_within_the_limits_is_taken(policy: dict[str, Any], directives: list[str]) -> None:
    Policy(**policy).options(script(*directives))


@pytest.mark.parametrize(
    ("policy", "directives", "words"),
    [
        ({"max_time": "1:00:00"}, ["--time=61"], "61"),
        ({"max_time": "1:00:00"}, ["-t 1-0"], "1:00:00"),
        ({"max_time": "1:00:00"}, ["--time=UNLIMITED"], "1:00:00"),
        ({"max_time": "1:00:00"}, ["--time=0"], "1:00:00"),
        ({"max_time": "1:00:00"}, ["--time=soon"], "Invalid --time"),
        ({"max_time": "1:00:00"}, ["--ti=10000"], "--time"),
        ({"max_nodes": 4}, ["--nodes=5"], "--nodes=5"),
        ({"max_nodes": 4}, ["--nodes=1-5"], "4"),
        ({"max_nodes": 4}, ["--nodes=1k"], "1k"),
        ({"max_tasks": 8}, ["--ntasks=9"], "9 tasks"),
        ({"max_tasks": 8}, ["--nodes=3", "--ntasks-per-node=3"], "9 tasks"),
        ({"max_tasks": 8}, ["--nodes=9"], "9 tasks"),
        ({"max_tasks": 8}, ["--ntasks=many"], "many"),
        ({"max_tasks": 8}, ["--nodelist=n[1-100]"], "--nodes"),
        ({"max_tasks": 8}, ["--ntasks-per-gpu=4", "--gpus=100"], "--ntasks"),
        ({"refuse": ("reservation",)}, ["--reservation=mine"], "--reservation"),
        ({"refuse": ("reservation",)}, ["--res mine"], "--reservation"),
        ({"refuse": ("exclusive",)}, ["--exclus"], "--exclusive"),
        ({"refuse": ("nodelist",)}, ["-w n1"], "--nodelist"),
        ({"max_nodes": 4}, ["--nodes=1", "hetjob", "--nodes=100"], "heterogeneous"),
    ],
)
def test_what_is_beyond_them_is_refused_in_words(policy: dict[str, Any], directives: list[str], words: str) -> None:
    with pytest.raises(Refused, match=words.replace("[", r"\[")):
        Policy(**policy).options(script(*directives))


def test_lines_that_only_sbatch_understands_pass_no_limit() -> None:
    with pytest.raises(Refused, match="#PBS"):
        Policy(max_nodes=1).options(b"#!/bin/sh\n#PBS -l nodes=100\ntrue\n")


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        ({"default_account": "a b"}, "default_account"),
        ({"max_time": "soon"}, "max_time"),
        ({"max_time": "0"}, "max_time"),
        ({"refuse": ["no-such"]}, "--no-such"),
        ({"max_time": "10", "default_time": "20"}, "default_time 20"),
        ({"max_nodes": -1}, "max_nodes"),
        ({"largest": 1}, "largest"),
    ],
)
def test_a_policy_that_makes_no_sense_is_named(policy: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        load({"policy": policy})


def test_a_policy_comes_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('[policy]\nmax_nodes = 2\nrefuse = ["reservation"]\n')
    assert load({}, file).policy == Policy(max_nodes=2, refuse=("reservation",))


@pytest.fixture
def limited(gateway: Gateway) -> Gateway:
    gateway.jobs._submissions._policy = Policy(max_nodes=2, default_account="site")
    return gateway


def write(folder: str, text: bytes) -> None:
    Path(folder, "run.sh").write_bytes(text)


def test_a_refused_job_never_reaches_the_scheduler(
    limited: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    write(folder, script("--nodes=3"))
    job = limited.jobs.create_in_folder(alice, folder, "run.sh")
    with pytest.raises(SubmissionRefused, match=r"policy of this gateway: #SBATCH --nodes=3"):
        limited.jobs.launch(alice, job)
    assert limited.jobs.get(alice, job.id).job_state is JobState.REFUSED
    assert backend.submissions == []


def test_defaults_reach_the_scheduler_beside_the_script(
    limited: Gateway, backend: FakeBackend, alice: User, folder: str
) -> None:
    text = script("--nodes=2")
    write(folder, text)
    limited.jobs.launch(alice, limited.jobs.create_in_folder(alice, folder, "run.sh"))
    [submission] = backend.submissions
    assert (submission.script_text, submission.options) == (text, {"account": "site"})


def test_sbatch_is_told_the_defaults_as_options() -> None:
    directives = parse_directives(script("--account=mine"))
    arguments = sbatch_arguments("/f", directives, name="n", comment="", defaults={"account": "x", "qos": "low"})
    assert "--qos=low" in arguments
    assert not any(one.startswith("--account") for one in arguments)


def test_the_local_backend_keeps_to_them() -> None:
    submission = Submission("1", "/f", "/f/run.sh", script(), "d", "g", "c", options={"time": "10", "account": "site"})
    request = read_request(submission, ["local"])
    assert (request.time_limit, request.account) == (600, "site")


@pytest.mark.services
def test_a_real_slurm_takes_the_defaults(
    gateway_factory: Callable[..., GatewayProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aiida_marketplace_hpc.client.gateway import HpcGateway

    env = {"MARKETPLACE_HPC_POLICY": '{"max_nodes": 1, "max_time": "00:07:00"}'}
    process = gateway_factory(backend="slurm", env=env)
    monkeypatch.setenv("MP_ACCESS_TOKEN", process.token)
    with HpcGateway(process.url) as client:
        home = str(client.info()["home"])
        (tmp_path / "run.sh").write_bytes(script("--job-name=policed"))
        client.put_file(tmp_path / "run.sh", f"{home}/policed/run.sh", parents=True)
        jobid = str(client.submit(f"{home}/policed", "run.sh")["jobid"])
        job = client.show_job(jobid)
        while not job["final"]:
            job = client.show_job(jobid)
        assert (job["state"], job["time_limit"]) == ("COMPLETED", 420)
        (tmp_path / "large.sh").write_bytes(script("--nodes=2"))
        client.put_file(tmp_path / "large.sh", f"{home}/policed/large.sh", parents=True)
        with pytest.raises(SubmissionRefused, match="policy of this gateway"):
            client.submit(f"{home}/policed", "large.sh")
