"""From settings to what a run on this machine is made of."""

from components.errors import InputError
from pipeline.dag import build
from pipeline.fingerprints import fingerprints
from pipeline.local import Plan
from pipeline.resources import Equip, nodes_of
from pipeline.settings import Settings


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
