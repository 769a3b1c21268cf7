"""From settings to what a run on this machine is made of."""

from pipeline.dag import build
from pipeline.fingerprints import fingerprints
from pipeline.local import Plan
from pipeline.promotion import anchored
from pipeline.settings import Settings


def plan(settings: Settings) -> Plan:
    """What to run here. Raises InputError for a source that is not there."""
    settings = anchored(settings)
    return Plan(
        pipeline=build(settings, fingerprints=fingerprints(settings)),
        name=settings.name,
        tasks=settings.tasks(),
        settings=settings.model_dump(mode="json", exclude_none=True),
    )
