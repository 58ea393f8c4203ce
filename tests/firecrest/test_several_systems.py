"""Several systems of one FirecREST behind one gateway: each job, file and failure is of one of them."""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner

from aiida_marketplace_hpc.cli import main
from aiida_marketplace_hpc.client.gateway import HpcGateway, Place
from aiida_marketplace_hpc.errors import ConfigurationError, Conflict, Forbidden, InvalidRequest, NotFound, Unavailable
from aiida_marketplace_hpc.gateway.backends.systems import OneOfSeveral
from aiida_marketplace_hpc.testing.firecrest_jobs import Processes
from aiida_marketplace_hpc.testing.firecrest_v2 import FirecrestDouble
from aiida_marketplace_hpc.testing.machine import Machine, wait_until
from aiida_marketplace_hpc.testing.oidc import OidcProvider
from aiida_marketplace_hpc.testing.served import ALICE, TOKENS, ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport
from tests.firecrest.conftest import remote_settings


@dataclass
class Two:
    """A gateway with the systems ``alps``, the default one, and ``bora``, and what is on each, by its name."""

    served: ServedGateway
    clients: dict[str, HpcGateway]
    doubles: dict[str, FirecrestDouble]

    def home(self, system: str) -> Path:
        return Path(self.clients[system].home())

    def submit(self, system: str, name: str, body: str) -> str:
        """Put a script into a folder of Alice's there and submit it; the id of the job."""
        folder = self.home(system) / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.sh").write_text(f"#!/bin/sh\n{body}\n")
        return str(self.clients[system].submit(str(folder), "run.sh")["jobid"])

    def job(self, jobid: str) -> dict[str, Any]:
        job: dict[str, Any] = self.clients["alps"].job_states([jobid])["jobs"][jobid]
        return job

    def wait(self, jobid: str, *states: str) -> dict[str, Any]:
        wait_until(
            lambda: self.job(jobid)["state"] in states, within=40, failure=lambda: f"not {states}: {self.job(jobid)}"
        )
        return self.job(jobid)


@pytest.fixture
def doubles(provider: OidcProvider) -> Iterator[dict[str, FirecrestDouble]]:
    """Both count their jobs from 1."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(Machine(getpass.getuser())) for _ in range(2))
        bora = FirecrestDouble(second, Processes(second), provider, system="bora")
        alps = FirecrestDouble(first, Processes(first), provider, system="alps", beside=[bora])
        stack.enter_context(alps)
        yield {"alps": alps, "bora": bora}


def both_settings(doubles: dict[str, FirecrestDouble], tmp_path: Path) -> dict[str, Any]:
    """What a gateway is told; the root ``both`` is the same disk on both."""
    alps, bora = doubles.values()
    return {
        **remote_settings(alps, tmp_path),
        "firecrest_system": "alps,bora",
        "root": [f"bora.home={bora.machine.home}/{tmp_path.name}/{{username}}", f"both={tmp_path}/both/{{username}}"],
    }


@contextmanager
def serving(folder: Path, doubles: dict[str, FirecrestDouble], settings: dict[str, Any]) -> Iterator[Two]:
    with ServedGateway(folder, None, **settings) as served, ExitStack() as stack:
        clients = {
            name: HpcGateway(served.url, token_source="env:MP_ACCESS_TOKEN", machine=machine)
            for name, machine in (("alps", ""), ("bora", "bora"))
        }
        for client in clients.values():
            stack.callback(client.close)
        yield Two(served, clients, doubles)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.backends.firecrest.SETTLING_TIME", 1.0)
    monkeypatch.setattr("aiida_marketplace_hpc.gateway.service._RECONCILE_INTERVAL", 0.2)
    monkeypatch.setenv("MP_ACCESS_TOKEN", TOKENS[ALICE])


@pytest.fixture
def two(doubles: dict[str, FirecrestDouble], tmp_path: Path) -> Iterator[Two]:
    with serving(tmp_path, doubles, both_settings(doubles, tmp_path)) as two:
        yield two


def test_each_job_runs_on_its_system_though_their_numbers_are_equal(two: Two) -> None:
    jobs = {system: two.submit(system, "work", f"echo {system}; exit {len(system)}") for system in two.clients}
    ends = {system: two.wait(jobid, "FAILED") for system, jobid in jobs.items()}
    assert {system: end["scheduler_id"] for system, end in ends.items()} == {"alps": "1", "bora": "bora/1"}
    for system, end in ends.items():
        assert (end["machine"], end["folder"]) == (system, str(two.home(system) / "work"))
        assert two.doubles[system].calls["submit"] == 1
        # A file of a job is found by its id, whatever machine the client is for.
        for client in two.clients.values():
            assert client.download_file(jobs[system], "slurm-1.out") == f"{system}\n".encode()
            assert "slurm-1.out" in [file["name"] for file in client.check_job_state(jobs[system])["files"]]


def test_a_cancellation_ends_the_job_of_its_system_only(two: Two) -> None:
    body = "until [ -e go ]; do sleep 0.1; done"
    jobs = {system: two.submit(system, "long", body) for system in two.clients}
    for jobid in jobs.values():
        two.wait(jobid, "RUNNING")
    two.clients["alps"].cancel_job(jobs["bora"])
    assert two.wait(jobs["bora"], "CANCELLED")["machine"] == "bora"
    assert (two.job(jobs["alps"])["state"], two.doubles["alps"].calls["cancel"]) == ("RUNNING", 0)
    (two.home("alps") / "long" / "go").touch()
    two.wait(jobs["alps"], "COMPLETED")


def test_files_are_those_of_the_system_that_is_asked_for(two: Two, tmp_path: Path) -> None:
    bora, alps = two.clients["bora"], two.clients["alps"]
    tree = tmp_path / "tree"
    (tree / "empty").mkdir(parents=True)
    (tree / "deep").mkdir()
    (tree / "deep" / "file").write_bytes(b"\0here")
    home = two.home("bora")
    bora.put_tree(tree, f"{home}/tree")
    assert (home / "tree" / "deep" / "file").read_bytes() == b"\0here"
    assert bora.usage(f"{home}/tree")["entries"] == 4
    bora.get(f"{home}/tree", tmp_path / "back")
    assert (tmp_path / "back" / "empty").is_dir()
    assert (tmp_path / "back" / "deep" / "file").read_bytes() == b"\0here"
    # What has the same path on both goes where the client is for.
    both = next(root.path for root in bora.roots() if root.name == "both")
    for system, client in two.clients.items():
        before = {name: double.calls.total() for name, double in two.doubles.items()}
        client.put_file(tree / "deep" / "file", f"{both}/file")
        client.checksum(f"{both}/file")
        used = [name for name, double in two.doubles.items() if double.calls.total() > before[name] + 2]
        assert used == [system]
    with pytest.raises(Forbidden):
        alps.ask("stat", path=str(home))
    with pytest.raises(Forbidden):
        alps.locate(str(home))


def test_a_client_that_names_no_machine_sees_the_default_one_only(two: Two, tmp_path: Path) -> None:
    info = two.clients["alps"].info()
    assert [machine["name"] for machine in info["machines"]] == ["alps", "bora"]
    assert [root["name"] for root in info["roots"]] == ["home", "both"]
    assert {root["path"] for root in info["roots"]} == {info["home"], f"{tmp_path}/both/alice_a"}
    assert [root["name"] for root in info["machines"][1]["roots"]] == ["bora.home", "bora.both"]
    assert [(root.name, root.address) for root in two.clients["bora"].roots()] == [
        ("home", "bora.home"),
        ("both", "bora.both"),
    ]
    local = tmp_path / "file"
    local.write_bytes(b"here")
    # On the wire the name of the root says it all.
    two.clients["alps"].put_file(local, Place("bora.home", "file"))
    assert (two.home("bora") / "file").read_bytes() == b"here"
    for wrong in ("bora.nothing", "carme.home", "bora."):
        with pytest.raises(NotFound):
            two.clients["alps"].download_file(wrong, "file")


def test_an_unknown_machine_is_named_at_the_first_use(two: Two) -> None:
    with HpcGateway(two.served.url, token_source="env:MP_ACCESS_TOKEN", machine="carme") as client:
        for use in (client.roots, client.active_jobs, lambda: client.submit("/x", "y"), lambda: client.locate("/x")):
            with pytest.raises(ConfigurationError, match="no machine carme: it has the machines alps, bora"):
                use()
    alps = two.clients["alps"]
    with pytest.raises(InvalidRequest, match="the machines alps, bora, not carme"):
        alps.create_job({"folder": str(two.home("alps")), "script": "x", "machine": "carme"})


def test_a_folder_stays_with_the_machine_of_its_first_job(two: Two) -> None:
    """Guards and job numbers of two machines in one folder could be taken for each other's."""
    both = next(Path(root.path) for root in two.clients["alps"].roots() if root.name == "both")
    (both / "x").mkdir(parents=True)
    (both / "x" / "run.sh").write_text("#!/bin/sh\n")
    first = two.clients["alps"].submit(str(both / "x"), "run.sh")["jobid"]
    two.wait(first, "COMPLETED")
    with pytest.raises(Conflict, match="on bora use another folder"):
        two.clients["bora"].submit(str(both / "x"), "run.sh")
    (both / "x" / "other.sh").write_text("#!/bin/sh\ntrue\n")
    with pytest.raises(Conflict, match="on bora use another folder"):
        two.clients["bora"].submit(str(both / "x"), "other.sh")
    assert two.clients["alps"].submit(str(both / "x"), "run.sh")["jobid"] == first
    assert two.doubles["bora"].calls["submit"] == 0


@pytest.mark.parametrize("carried_out", [True, pytest.param(False, marks=pytest.mark.services)])
def test_a_submission_whose_answer_was_lost_is_found_on_its_system(two: Two, carried_out: bool) -> None:
    other = two.submit("alps", "lost", "true")
    two.doubles["bora"].fail("submit", carried_out=carried_out)
    jobid = two.submit("bora", "lost", "echo ran >> executed; exit 4")
    end = two.wait(jobid, "FAILED")
    assert (end["exit_code"], end["scheduler_id"], end["machine"]) == (4, "bora/1", "bora")
    assert (two.home("bora") / "lost" / "executed").read_text() == "ran\n"
    assert two.doubles["bora"].calls["submit"] == (1 if carried_out else 2)
    two.wait(other, "COMPLETED")
    assert two.doubles["alps"].calls["submit"] == 1


def test_a_lost_submission_that_waits_is_found_on_its_system(two: Two) -> None:
    """It has taken no guard that would tell of it."""
    two.doubles["bora"].fail("submit", carried_out=True)
    jobid = two.submit("bora", "held", "#SBATCH --hold\ntrue")
    held = two.wait(jobid, "HELD")
    assert (held["scheduler_id"], two.doubles["bora"].calls["submit"]) == ("bora/1", 1)
    two.clients["bora"].cancel_job(jobid)
    two.wait(jobid, "CANCELLED")


def test_a_system_that_does_not_answer_keeps_nothing_of_the_other_from_being_known(two: Two) -> None:
    body = "until [ -e go ]; do sleep 0.1; done"
    jobs = {system: two.submit(system, "dark", body) for system in two.clients}
    for system, jobid in jobs.items():
        two.wait(jobid, "RUNNING")
        (two.home(system) / "dark" / "go").touch()
        if system == "alps":
            two.wait(jobid, "COMPLETED")
            (two.home(system) / "dark2").mkdir()
            two.doubles["bora"].fail("jobs", status=500, times=10_000, message="Error executing Slurm command.")
    late = two.submit("alps", "late", "true")
    two.wait(late, "COMPLETED")
    machines = {one["name"]: one for one in two.clients["alps"].info(refresh=True)["machines"]}
    assert machines["alps"]["problem"] is None
    assert "Error executing Slurm" in machines["bora"]["problem"]
    job = two.job(jobs["bora"])
    assert (job["state"], job["message"]) == ("RUNNING", machines["bora"]["problem"])
    ready = requests.get(f"{two.served.url}/ready", timeout=10)
    assert (ready.status_code, ready.json()["scheduler"]) == (200, "partial")
    figures = two.served.gateway.metrics.page().decode()
    assert 'marketplace_hpc_machine_up{machine="alps"} 1.0' in figures
    assert 'marketplace_hpc_machine_up{machine="bora"} 0.0' in figures
    two.doubles["bora"].faults.clear()
    two.wait(jobs["bora"], "COMPLETED")


def test_a_lost_ledger_learns_from_the_living_jobs_of_each_system(
    doubles: dict[str, FirecrestDouble], tmp_path: Path
) -> None:
    settings = both_settings(doubles, tmp_path)
    with serving(tmp_path, doubles, settings) as two:
        jobid = two.submit("bora", "ledger", "until [ -e go ]; do sleep 0.1; done; exit 5")
        two.wait(jobid, "RUNNING")
        go = two.home("bora") / "ledger" / "go"
    (tmp_path / "second").mkdir()
    with serving(tmp_path / "second", doubles, settings) as two:
        assert two.clients["bora"].info()["username"] == "alice_a"
        wait_until(
            lambda: jobid in two.clients["alps"].job_states([jobid])["jobs"], within=20, failure=lambda: "not adopted"
        )
        go.touch()
        end = two.wait(jobid, "FAILED")
        assert (end["machine"], end["scheduler_id"], end["exit_code"]) == ("bora", "bora/1", 5)
    assert doubles["bora"].calls["submit"] == 1


@pytest.mark.services  # It starts two gateways.
def test_a_lost_ledger_learns_from_a_system_that_was_down_at_first(
    doubles: dict[str, FirecrestDouble], tmp_path: Path
) -> None:
    """The other one takes jobs meanwhile; this one takes none that it may have already."""
    settings = both_settings(doubles, tmp_path)
    with serving(tmp_path, doubles, settings) as two:
        jobid = two.submit("bora", "held", "#SBATCH --hold\ntrue")
        two.wait(jobid, "HELD")
    doubles["bora"].fail("jobs", status=500, times=10_000, message="Error executing Slurm command.")
    (tmp_path / "second").mkdir()
    with serving(tmp_path / "second", doubles, settings) as two:
        two.served.gateway.jobs._patience = 0.1
        two.wait(two.submit("alps", "other", "true"), "COMPLETED")
        again = two.submit("bora", "held", "#SBATCH --hold\ntrue")
        new = two.submit("bora", "new", "true")
        for one in (again, new):
            assert two.job(one)["state"] == "SUBMITTING"
            assert "until the scheduler has said which jobs there are" in two.job(one)["message"]
        assert doubles["bora"].calls["submit"] == 1
        doubles["bora"].faults.clear()
        assert two.wait(again, "HELD")["scheduler_id"] == "bora/1"
        two.wait(new, "COMPLETED")
    assert doubles["bora"].calls["submit"] == 2


@pytest.mark.services  # It starts four gateways.
def test_jobs_go_on_when_a_gateway_gets_a_second_system_and_loses_one(
    doubles: dict[str, FirecrestDouble], tmp_path: Path
) -> None:
    body = "until [ -e go ]; do sleep 0.1; done"
    alone = {**remote_settings(doubles["alps"], tmp_path), "firecrest_system": "alps"}
    with serving(tmp_path, doubles, alone) as two:
        first = two.submit("alps", "first", body)
        assert two.wait(first, "RUNNING")["machine"] == "firecrest"
        home = two.home("alps")
    with serving(tmp_path, doubles, both_settings(doubles, tmp_path)) as two:
        (home / "first" / "go").touch()
        assert two.wait(first, "COMPLETED")["scheduler_id"] == "1"
        second = two.submit("bora", "second", body)
        two.wait(second, "RUNNING")
        go = two.home("bora") / "second" / "go"
        doubles["bora"].fail("submit")  # Nobody knows whether it has come there.
        third = two.submit("bora", "third", "true")
        assert two.job(third)["state"] == "SUBMITTING"
    go.touch()
    with serving(tmp_path, doubles, {**alone, "firecrest_system": "alps,carme"}) as two:
        asked = doubles["alps"].calls["jobs"]
        wait_until(lambda: doubles["alps"].calls["jobs"] > asked + 4, within=20, failure=lambda: "nobody asks")
        assert two.job(second)["state"] == "RUNNING"
        assert two.job(third)["state"] == "SUBMITTING"
        with pytest.raises(Unavailable, match="bora is none of this gateway's any more: it has alps, carme"):
            two.clients["alps"].check_job_state(second)
    assert (doubles["alps"].calls["submit"], doubles["bora"].calls["submit"]) == (1, 2)
    with serving(tmp_path, doubles, both_settings(doubles, tmp_path)) as two:
        two.wait(second, "COMPLETED")
        two.wait(third, "COMPLETED")


def test_aiidas_transport_works_on_the_machine_of_its_computer(two: Two) -> None:
    where = {"machine": "host", "url": two.served.url}
    folder = two.home("bora") / "aiida"
    with MarketplaceHpcTransport(**where, gateway_machine="bora") as bora, MarketplaceHpcTransport(**where) as alps:
        bora.makedirs(str(folder))
        assert folder.is_dir()
        assert bora.gotocomputer_command(str(folder)).endswith(f"--machine=bora shell -- {folder}")
        assert "--machine" not in alps.gotocomputer_command()
        with pytest.raises(PermissionError):
            alps.listdir(str(folder))
    with (
        MarketplaceHpcTransport(**where, gateway_machine="carme") as carme,
        pytest.raises(ConfigurationError, match="no machine carme: it has the machines alps, bora"),
    ):
        carme.listdir(str(folder))


@pytest.mark.services  # A job there and back.
def test_the_command_line_reaches_each_machine(two: Two, tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(main, ["--url", two.served.url, "--json", *arguments])
        return done.exit_code, json.loads(done.stdout)

    code, found = run("doctor", "--machine", "bora")
    assert (code, found["ok"]) == (0, True)
    checks = {check["name"]: check["text"] for check in found["checks"]}
    assert checks["machine"] == "bora"
    assert "alps (firecrest), bora (firecrest)" in checks["gateway"]
    assert str(two.home("bora")) in checks["folder home"]
    code, found = run("doctor", "--machine", "carme")
    assert (code, "no machine carme: it has the machines alps, bora" in json.dumps(found)) == (2, True)
    script = tmp_path / "say.sh"
    script.write_text("#!/bin/sh\necho said > out\n")
    code, job = run("job", "run", str(script), "--machine", "bora", "--output", "out", "--into", str(tmp_path / "back"))
    assert (code, job["machine"]) == (0, "bora")
    assert job["folder"].startswith(f"{two.home('bora')}/runs/say-")
    assert (tmp_path / "back" / "out").read_text() == "said\n"


def test_a_system_that_lets_everybody_wait_takes_no_threads_from_the_other(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OneOfSeveral, "is_silent", property(lambda self: self.machine == "bora"))
    headers = {"Authorization": f"Bearer {TOKENS[ALICE]}"}
    for machine, status in (("bora", 503), ("alps", 200)):
        body = {"machine": machine, "operations": [{"op": "stat", "path": str(two.home(machine))}]}
        answer = requests.post(f"{two.served.url}/api/v1/query", headers=headers, json=body, timeout=10)
        assert answer.status_code == status
        wanted = f"{two.served.url}/api/v1/file/list/{'bora.' if machine == 'bora' else ''}home"
        assert requests.get(wanted, headers=headers, timeout=10).status_code == status
    states = {"machine": "bora", "operations": [{"op": "jobs.active"}]}
    answer = requests.post(f"{two.served.url}/api/v1/query", headers=headers, json=states, timeout=10)
    assert answer.json()["results"][0]["ok"]
    assert set(two.doubles["bora"].calls) <= {"jobs", "partitions"}


def test_users_act_on_each_system_with_their_own_token(
    doubles: dict[str, FirecrestDouble], provider: OidcProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        **{
            name: value
            for name, value in both_settings(doubles, tmp_path).items()
            if not name.startswith(("firecrest_c", "firecrest_t"))
        },
        "account": "delegated",
        "auth": "oidc",
        "dev_token": {},
        "issuer": provider.issuer,
        "audience": ("hpc-gateway",),
    }
    monkeypatch.setenv("MP_ACCESS_TOKEN", provider.issue("carol", email="carol@example.org"))
    before = provider.grants["client_credentials"]
    with serving(tmp_path, doubles, settings) as two:
        jobs = {system: two.submit(system, "work", f"exit {len(system) + 1}") for system in two.clients}
        assert {two.wait(jobid, "FAILED")["machine"] for jobid in jobs.values()} == set(jobs)
    assert provider.grants["client_credentials"] == before
