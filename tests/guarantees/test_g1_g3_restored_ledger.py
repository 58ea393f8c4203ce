"""G1 and G3 with a ledger that was restored from a back-up: jobs that were submitted after it are adopted, none runs twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiida_marketplace_hpc.client import transfer
from aiida_marketplace_hpc.client.gateway import HpcGateway
from aiida_marketplace_hpc.testing.gateway import GatewayProcess
from aiida_marketplace_hpc.testing.machine import wait_until
from aiida_marketplace_hpc.testing.postgresql import PostgreSql
from tests.conftest import DATABASES

Start = Callable[[], tuple[GatewayProcess, Callable[[], None], Callable[[], None]]]


@pytest.fixture(params=DATABASES)
def start(request: pytest.FixtureRequest, gateway_factory: Callable[..., GatewayProcess]) -> Iterator[Start]:
    """Start a gateway, and say how its ledger is backed up while it runs, and restored while it does not."""
    if request.param == "sqlite":

        def on_sqlite() -> tuple[GatewayProcess, Callable[[], None], Callable[[], None]]:
            process = gateway_factory()
            machine, state, user = process.machine, process.state, process.user
            command = str(process.command)

            def back_up() -> None:
                arguments = ["gateway", "admin", "--state", state, "backup", f"{state}/backup"]
                machine.run([command, *arguments], user=user, check=True)

            def restore() -> None:
                script = f"rm {state}/ledger.sqlite*; cp {state}/backup {state}/ledger.sqlite"
                machine.run(["sh", "-c", script], user=user, check=True)

            return process, back_up, restore

        yield on_sqlite
        return
    server: PostgreSql = request.getfixturevalue("postgresql_server")
    name = server.create()
    dumps: list[bytes] = []

    def on_postgresql() -> tuple[GatewayProcess, Callable[[], None], Callable[[], None]]:
        def restore() -> None:
            server.drop(name)
            server.query("postgres", f"CREATE DATABASE {name}")
            server.restore(name, dumps[0])

        process = gateway_factory(env={"MARKETPLACE_HPC_DATABASE": server.url(name)})
        return process, lambda: dumps.append(server.dump(name)), restore

    yield on_postgresql
    server.drop(name)


def test_what_was_submitted_after_the_back_up_still_runs_once(start: Start, tmp_path: Path) -> None:
    process, back_up, restore = start()
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(process.token)
    with HpcGateway(process.url, token_source=f"file:{token}") as gateway:
        folder = f"{gateway.info()['home']}/{tmp_path.name}"
        runs_until = "echo ran >> executed; while [ ! -e go ]; do sleep 0.1; done; exit {}"
        scripts = {
            "before": runs_until.format(3),
            "ended": "echo ran >> executed; exit 4",
            "runs": runs_until.format(5),
        }

        def submit(name: str) -> str:
            return str(gateway.submit(f"{folder}/{name}", "run.sh")["jobid"])

        def wait(jobid: str, state: str) -> None:
            wait_until(
                lambda: gateway.show_job(jobid)["state"] == state,
                within=30,
                failure=lambda: str(gateway.show_job(jobid)),
            )

        for name, text in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            transfer.put_file(gateway, tmp_path / name, f"{folder}/{name}/run.sh", parents=True)
        jobids = {"before": submit("before")}
        wait(jobids["before"], "RUNNING")
        back_up()
        jobids |= {"ended": submit("ended"), "runs": submit("runs")}
        wait(jobids["ended"], "FAILED")
        wait(jobids["runs"], "RUNNING")
        process.kill()
        restore()
        process.start()
        assert {name: submit(name) for name in scripts} == jobids
        for name in ("before", "runs"):
            process.machine.run(["touch", f"{folder}/{name}/go"], check=True)
        deadline = time.monotonic() + 60
        for name, code in (("before", 3), ("ended", 4), ("runs", 5)):
            while gateway.show_job(jobids[name])["exit_code"] is None:
                assert time.monotonic() < deadline, gateway.show_job(jobids[name])
                time.sleep(0.1)
            assert gateway.show_job(jobids[name])["exit_code"] == code
            assert process.machine.read_text(f"{folder}/{name}/executed") == "ran\n"
