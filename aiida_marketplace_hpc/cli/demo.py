"""``marketplace-hpc demo``: a study from beginning to end, on a gateway and an AiiDA profile that exist only for it."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from aiida_marketplace_hpc.cli.common import mark
from aiida_marketplace_hpc.demo import stage
from aiida_marketplace_hpc.demo.stage import CODE, COMPUTER, Layout, Stage
from aiida_marketplace_hpc.errors import ConfigurationError, MarketplaceHpcError

_STUDY_TIMEOUT = 600.0
_INTERRUPTED = 130
_WIDTH = 78


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=5005,
    show_default=True,
    help="The gateway's port; 0: any free one.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path("demo-result"),
    show_default=True,
    help="Where everything goes. The result of an earlier demo there is replaced.",
)
@click.pass_context
def demo(ctx: click.Context, port: int, directory: Path) -> None:
    """Run a small but real study on a cluster behind a gateway, all on this machine.

    Starts a gateway with a batch system of its own and a temporary AiiDA profile with its daemon, sets up the computer, and
    scans the Ising model of a magnet through its transition, one calculation job for each temperature. Takes about a minute
    and needs no services. Nothing is left running; the result stays in the directory.
    """
    stage.check_python(sys.version_info[:2])
    stage.check_packages()
    stage.check_port(port)
    began = time.monotonic()
    layout = Layout(directory.absolute())
    interrupted = False
    with _signals_end_it():
        try:
            with Stage(directory, port) as staged:
                try:
                    _run(staged)
                except KeyboardInterrupt:
                    click.echo("\nInterrupted; stopping everything …")
                    raise
                ending = _Step("everything stopped")
        except KeyboardInterrupt:
            interrupted = True
        except MarketplaceHpcError as exc:
            if isinstance(exc, ConfigurationError):
                raise  # Nothing has been started; the message says it all.
            raise MarketplaceHpcError(f"{exc}\n\nThe logs: {_shown(layout.log)}, {_shown(layout.gateway_log)}") from exc
    if interrupted:
        click.echo(f"Nothing is left running. What there is so far is in {_shown(layout.directory)}.")
        ctx.exit(_INTERRUPTED)
    ending.done()
    _farewell(layout, time.monotonic() - began)


def _run(staged: Stage) -> None:
    layout = staged.layout
    click.secho("A study on a cluster that can be reached only through a web gateway", bold=True)
    click.echo(
        f"Here both sides are on this machine, with everything in {_shown(layout.directory)}. "
        "The commands are\nthe real ones, the same as for a supercomputer.\n"
    )
    click.secho("The cluster's side", bold=True)
    with _step("gateway") as step:
        command = staged.start_gateway()
        step.text = f"gateway on {staged.url}, running up to {staged.slots} jobs at once"
        step.commands = [shlex.join(command)]

    click.secho("AiiDA's side", bold=True)
    with _step("profile without PostgreSQL and RabbitMQ", "verdi presto --use-zeromq"):
        staged.verdi("presto", "--non-interactive", "--use-zeromq", "--profile-name", "demo")
    _set_up_computer(staged)
    with _step("Python on the cluster, below a read-only root, as a code") as step:
        settings = {
            "label": CODE,
            "computer": COMPUTER,
            "filepath_executable": str(staged.interpreter),
            "with_mpi": False,
            "prepend_text": "",
            "append_text": "",
        }
        config = staged.write_settings("code-python", settings)
        staged.verdi("code", "create", "core.code.installed", "--non-interactive", "--config", str(config))
        step.commands = [f"verdi code create core.code.installed --config {config.name}"]
    with _step("daemon", "verdi daemon start"):
        staged.start_daemon()

    click.secho("\nThe study", bold=True)
    click.echo(
        "When does a magnet lose its magnetisation as it gets hot? The two-dimensional Ising model is the simplest one\n"
        "that does, at T = 2.269. Each temperature is a calculation job; AiiDA submits, watches and fetches them all.\n"
    )
    # Through the interpreter's -m, so that what is shown can be repeated with any computer.
    module = "aiida_marketplace_hpc.demo.submit"
    click.echo(click.style(f"      python -m {module} {CODE}@{COMPUTER}", dim=True))
    study = _Step("", watched=False)
    staged.run_study(
        [Path(sys.executable), "-m", module, f"{CODE}@{COMPUTER}", "--output", layout.result], _STUDY_TIMEOUT
    )
    study.text = "the table, beside Onsager's exact solution for an infinite lattice, and the plot"
    study.done()
    click.echo("      On a finite lattice the transition is rounded off, which shows from T = 2.27 on.\n")
    _show_records(staged)


def _set_up_computer(staged: Stage) -> None:
    layout = staged.layout
    with _step("computer with transport and scheduler `marketplace_hpc`") as step:
        setup = staged.write_settings(
            "computer-setup",
            {
                "label": COMPUTER,
                "hostname": stage.HOST,
                "description": "A cluster behind a gateway",
                "transport": "marketplace_hpc",
                "scheduler": "marketplace_hpc",
                "shebang": "#!/bin/bash",
                "work_dir": f"{layout.cluster}/{{username}}/aiida",
                "mpirun_command": "mpirun -np {tot_num_mpiprocs}",
                "mpiprocs_per_machine": 1,
                "use_double_quotes": False,
                "prepend_text": "",
                "append_text": "",
            },
        )
        configure = staged.write_settings(
            "computer-configure", {"url": staged.url, "token_source": f"file:{layout.token}"}
        )
        staged.verdi("computer", "setup", "--non-interactive", "--config", str(setup))
        staged.verdi(
            "computer", "configure", "marketplace_hpc", COMPUTER, "--non-interactive", "--config", str(configure)
        )
        step.commands = [
            f"verdi computer setup --config {setup.name}",
            f"verdi computer configure marketplace_hpc {COMPUTER} --config {configure.name}",
        ]
    with _step("connection, files and scheduler", f"verdi computer test {COMPUTER}") as step:
        said = staged.verdi("computer", "test", COMPUTER)
        # It exits with 0 also where a test has failed.
        verdict = next((line for line in said.splitlines() if line.startswith("Success: ")), None)
        if verdict is None:
            raise MarketplaceHpcError(f"`verdi computer test {COMPUTER}` has found faults\n{said}")
        step.text = f"connection, files and scheduler: {verdict.removeprefix('Success: ')}"


def _show_records(staged: Stage) -> None:
    """Show what AiiDA remembers of the study."""
    layout = staged.layout
    click.secho("What AiiDA remembers", bold=True)
    with _step("every process", "verdi process list --all"):
        listed = staged.verdi("process", "list", "--all")
    click.echo(f"\n{listed.partition('Report:')[0].strip()}\n")
    study = json.loads((layout.result / "study.json").read_text(encoding="utf-8"))
    if shutil.which("dot"):
        options = ["--link-types", "data", "--identifier", "pk", "--output-format", "png"]
        command = f"verdi node graph generate {shlex.join(options)} {study['plot']}"
        with _step("how every number of the plot came about, as a graph", command):
            picture = layout.result / "provenance.png"
            staged.verdi("node", "graph", "generate", *options, "--output-file", str(picture), str(study["plot"]))
    else:
        with _step("what called what", f"verdi process status {study['pk']}"):
            tree = staged.verdi("process", "status", str(study["pk"]))
        click.echo(f"\n{tree}")
        click.echo("With graphviz (apt install graphviz) there would be a picture of how every number came about, too.")


def _farewell(layout: Layout, seconds: float) -> None:
    result = layout.result
    provenance = result / "provenance.png"
    places = [
        (result / "ising.png", "the plot"),
        (result / "ising.txt", "the table"),
        *([(provenance, "the provenance graph")] if provenance.exists() else []),
        (layout.cluster, "the cluster's file system, with each job's folder"),
        (layout.gateway, "the gateway's database and log"),
        (layout.aiida, "AiiDA's profile"),
        (layout.log, "every command with what it said"),
    ]
    width = max(len(_shown(path)) for path, _ in places)
    click.secho(f"\nDone in {seconds:.0f} s. Where everything is", bold=True)
    for path, meaning in places:
        click.echo(f"  {_shown(path):<{width}}  {meaning}")
    verdi = _shown(stage.program("verdi")) if shutil.which("verdi") is None else "verdi"
    click.secho("\nTo look around", bold=True)
    click.echo(f"  AIIDA_PATH={_shown(layout.directory)} {verdi} process list --all")
    click.secho(
        "\nThe same on a cluster of yours, behind a gateway of its own, with your profile and daemon", bold=True
    )
    setup = _shown(layout.settings("computer-setup"))
    python = "python" if shutil.which("verdi") else _shown(Path(sys.executable))
    click.echo(
        f"  {verdi} computer setup --config {setup} --label mine --hostname HOST --work-dir DIR --non-interactive"
    )
    click.echo(
        f"  {verdi} computer configure marketplace_hpc mine --url https://GATEWAY --token-source file:TOKEN_FILE"
    )
    click.echo(f"  {python} -m aiida_marketplace_hpc.demo.submit {CODE}@mine")
    click.echo(
        "\nNo gateway yet? On a login node: marketplace-hpc gateway serve --backend slurm --home '/DIR/{username}'"
    )


class _Step:
    """One thing that is done, as one line with the time it took."""

    def __init__(self, text: str, *commands: str, watched: bool | None = None) -> None:
        self.text = text
        self.commands = list(commands)
        self._began = time.monotonic()
        # Something else may write to the terminal meanwhile.
        self._watched = sys.stdout.isatty() if watched is None else watched
        if self._watched:
            click.echo(f"  … {text}", nl=False)

    def done(self) -> None:
        self._finish(good=True)
        for command in self.commands:
            click.echo(click.style(f"      {command}", dim=True))

    def failed(self) -> None:
        self._finish(good=False)

    def _finish(self, *, good: bool) -> None:
        begin = "\r\x1b[K" if self._watched else ""
        sign = click.style(mark(good), fg="green" if good else "red")
        click.echo(f"{begin}  {sign} {self.text:<{_WIDTH}} {time.monotonic() - self._began:5.1f} s")


@contextmanager
def _step(text: str, *commands: str) -> Iterator[_Step]:
    step = _Step(text, *commands)
    try:
        yield step
    except BaseException:
        step.failed()
        raise
    step.done()


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Let the signals that end a program do so by way of taking everything down, once."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for one in signals:
            # Not SIG_IGN, which the commands that stop things would inherit.
            signal.signal(one, lambda *_: None)
        raise KeyboardInterrupt

    before = [signal.signal(one, interrupt) for one in signals]
    try:
        yield
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)


def _shown(path: Path) -> str:
    """A path as a person would type it here."""
    try:
        shown = str(path.relative_to(Path.cwd()))
    except ValueError:
        shown = str(path)
    return shlex.quote(shown)
