"""The commands for runs on a Kubeflow cluster; rerun, status and logs know local runs, too."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.errors import InputError
from pipeline.options import Configs, Experiment, InContainers, Network, Overrides, Run, RunsDir, connected, runs_folder

if TYPE_CHECKING:
    from pipeline.cluster import Cluster
    from pipeline.connection import Connection

app = typer.Typer()
Wait = Annotated[bool, typer.Option("--wait", help="Show the run until it ends; the exit code is then its own.")]
Step = Annotated[str, typer.Option("--step", help="The first step that runs again: rl, evaluate, ...")]
RUNS = "runs"
EXIT_CODES = {"succeeded": 0, "rejected": 0}
INTERRUPTED_EXIT_CODE = 130


@app.command()
@connected
def submit(
    connection: "Connection",
    config: Configs,
    overrides: Overrides = None,
    experiment: Experiment = None,
    wait: Wait = False,
) -> None:
    """Run the pipeline on a Kubeflow cluster.

    With --wait the exit code is 0 when the run succeeded or the gate rejected the candidate, 1 when it failed, and 130
    after Ctrl-C, which ends the watching and not the run.
    """
    from pipeline.orders import announced
    from pipeline.overrides import resolve

    cluster, wanted = announced(connection, resolve(config, overrides or ()), experiment)
    _follow(cluster, cluster.start(wanted), wait)


@app.command()
@connected
def rerun(
    connection: "Connection",
    run: Run,
    step: Step,
    overrides: Overrides = None,
    runs_dir: RunsDir = RUNS,
    wait: Wait = False,
    containers: InContainers = False,
    network: Network = None,
) -> None:
    """Run a run again from a step on; what comes before is taken from the cache.

    --wait is for a run on a cluster, --containers and --network are for a local one.
    """
    from pipeline.reruns import order_again, settings_again

    place = runs_folder(runs_dir)
    if (place / run).is_dir():
        from pipeline.plans import run_here

        _refuse_wait(wait, place / run)
        raise typer.Exit(run_here(settings_again(place / run, step, overrides or ()), place, containers, network))
    if containers or network:
        raise InputError(f"--containers and --network are for local runs, and {run} is none. Leave them out.")
    cluster = _cluster(connection, place / run)
    _follow(cluster, cluster.start(order_again(cluster, run, step, overrides or ())), wait)


@app.command()
@connected
def status(connection: "Connection", run: Run, runs_dir: RunsDir = RUNS, wait: Wait = False) -> None:
    """Show how a run and its steps are."""
    from pipeline.screen import Screen

    place = runs_folder(runs_dir)
    if (place / run).is_dir():
        from pipeline import history

        _refuse_wait(wait, place / run)
        history.show(place / run, Screen())
        return
    from pipeline import board, details

    cluster = _cluster(connection, place / run)
    if wait:
        _follow(cluster, run, wait)
    found = cluster.run(run)
    board.show(found, details.results(found, cluster.spec(found)), Screen())
    print(f"  {'page':<9}{cluster.page(run)}")


@app.command()
@connected
def logs(
    connection: "Connection",
    run: Run,
    step: Annotated[str, typer.Argument(metavar="STEP", help="The step, as status names it.")],
    runs_dir: RunsDir = RUNS,
) -> None:
    """Print what a step of a run printed."""
    from pipeline.logs import cluster_log, local_log
    from pipeline.runs import RunFolder

    folder = runs_folder(runs_dir) / run
    if folder.is_dir():
        print(local_log(RunFolder(folder), step), end="")
    else:
        print(cluster_log(_cluster(connection, folder), run, step), end="")


def _refuse_wait(wait: bool, folder: Path) -> None:
    """Raise InputError where a local run is to be waited for: the command that started it shows it to its end."""
    if wait:
        raise InputError(f"--wait is for a run on a cluster, and {folder} is a local one. Leave it out.")


def _cluster(connection: "Connection", folder: Path) -> "Cluster":
    """The cluster that knows a run of which there is no folder. Raises InputError without a host."""
    from pipeline.cluster import Cluster

    if not connection.host:
        raise InputError(
            f"{folder}: no such folder, so {folder.name} is no local run; for one on a cluster, name its address with "
            "--host or KF_PIPELINES_ENDPOINT."
        )
    return Cluster(connection)


def _follow(cluster: "Cluster", run_id: str, wait: bool) -> None:
    """Say which run it is; with `wait`, show it until it ends and end with its exit code."""
    from pipeline.board import watch
    from pipeline.screen import Screen

    print(f"run {run_id}   {cluster.page(run_id)}", flush=True)
    if not wait:
        return
    try:
        ended = watch(cluster, run_id, Screen())
    except KeyboardInterrupt:
        print(f"\nThe run goes on. To see it again: plumbline status {run_id} --wait")
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    raise typer.Exit(EXIT_CODES.get(ended, 1))
