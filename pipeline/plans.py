"""From settings to a run on this machine, its tasks in processes or in containers."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from components.errors import InputError
from pipeline.dag import build
from pipeline.fingerprints import fingerprints
from pipeline.local import Plan, run
from pipeline.processes import Processes
from pipeline.promotion import anchored
from pipeline.resources import Equip, nodes_of
from pipeline.screen import Screen
from pipeline.settings import Settings


def run_here(settings: Settings, runs_dir: Path, containers: bool = False, network: str | None = None) -> int:
    """Run the whole pipeline and give its exit code, as `local.run` does.

    Raises InputError for a source that is not there, and without a container engine or the images it needs.
    """
    if network and not containers:
        raise InputError(f"--network is {network}, which is for containers. Add --containers, or leave it out.")
    settings = anchored(settings)
    with contained(settings, runs_dir, network or "bridge") if containers else nullcontext(Processes()) as runner:
        return run(plan(settings, runner.equip), runs_dir, Screen(), runner)


def plan(settings: Settings, equip: Equip | None = None) -> Plan:
    """What to run here, of anchored settings.

    Raises InputError for a source that is not there, and for a task that wants several machines.
    """
    for task in settings.tasks():
        if (nodes := nodes_of(settings, task)).number > 1:
            raise InputError(
                f"{nodes.key} is {nodes.number}, and a run on this machine has one. Set it to 1, or start the run on a "
                "cluster with `plumbline submit`."
            )
    return Plan(
        pipeline=build(settings, fingerprints=fingerprints(settings), equip=equip),
        name=settings.name,
        tasks=settings.tasks(),
        settings=settings.model_dump(mode="json", exclude_none=True),
    )


def contained(settings: Settings, runs_dir: Path, network: str) -> Any:
    """What runs tasks in containers. Raises InputError where the package that speaks with engines is missing."""
    try:
        from pipeline.containers import containers
    except ModuleNotFoundError as error:
        if error.name != "docker":
            raise
        raise InputError("--containers needs the package docker: pip install 'plumbline[containers]'.") from None
    return containers(settings, runs_dir, network)
