"""From settings to what a run on this machine is made of."""

from pipeline.dag import build
from pipeline.fingerprints import fingerprints
from pipeline.local import Plan
from pipeline.resources import Equip
from pipeline.settings import Settings


def plan(settings: Settings, equip: Equip | None = None) -> Plan:
    """What to run here, of anchored settings. Raises InputError for a source that is not there."""
    return Plan(
        pipeline=build(settings, fingerprints=fingerprints(settings), equip=equip),
        name=settings.name,
        tasks=settings.tasks(),
        settings=settings.model_dump(mode="json", exclude_none=True),
    )
