"""The commands for runs that a cluster starts by itself, at times or in periods."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from components.errors import InputError
from pipeline.options import Configs, Experiment, Overrides, connected

if TYPE_CHECKING:
    from pipeline.cluster import Cluster
    from pipeline.connection import Connection


class _Group(TyperGroup):
    """`plumbline schedule --cron ...` is `plumbline schedule create --cron ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = [*self.commands, "--help"]
        return super().parse_args(ctx, args if args and args[0] in known else ["create", *args])


app = typer.Typer(
    cls=_Group, help="Run the pipeline on a cluster again and again. Without a command below: create, with its options."
)
Which = Annotated[str, typer.Argument(metavar="SCHEDULE", help="Its id or its name, as list shows them.")]


@app.command()
@connected
def create(
    connection: "Connection",
    config: Configs,
    overrides: Overrides = None,
    cron: Annotated[
        str | None, typer.Option(help='Times, such as "0 3 * * 1": five fields, or six with seconds first.')
    ] = None,
    every: Annotated[str | None, typer.Option(help="A period: 30m, 6h, 2d or 1w.")] = None,
    experiment: Experiment = None,
    max_concurrency: Annotated[int, typer.Option(min=1, max=10, help="Runs of the schedule at the same time.")] = 1,
    catch_up: Annotated[bool, typer.Option("--catch-up", help="Also start what was missed in a pause.")] = False,
) -> None:
    """Run the pipeline on a cluster again and again."""
    from dataclasses import replace

    from pipeline.crontab import shown, trigger
    from pipeline.orders import announced
    from pipeline.overrides import resolve

    when, settings = trigger(cron, every), resolve(config, overrides or ())
    cluster, wanted = announced(connection, settings, experiment)
    wanted = replace(wanted, name=f"{settings.name} {shown(when)}")
    made = cluster.schedule(wanted, when, max_concurrency, catch_up)
    print(f"schedule {made}   {wanted.name}")


@app.command("list")
@connected
def list_(connection: "Connection") -> None:
    """List the schedules: id, name, times, and whether they are paused."""
    from pipeline.cluster import Cluster
    from pipeline.crontab import shown

    for schedule in Cluster(connection).schedules():
        state = "paused" if schedule.status == "DISABLED" else "on"
        print(f"{schedule.recurring_run_id}  {state:<7}{shown(schedule.trigger):<22}{schedule.display_name}")


@app.command()
@connected
def pause(connection: "Connection", schedule: Which) -> None:
    """Start no more runs of a schedule; those under way go on."""
    _change(connection, schedule, "disable", "paused")


@app.command()
@connected
def resume(connection: "Connection", schedule: Which) -> None:
    """Start the runs of a paused schedule again."""
    _change(connection, schedule, "enable", "on")


@app.command()
@connected
def delete(connection: "Connection", schedule: Which) -> None:
    """Remove a schedule; its runs stay."""
    _change(connection, schedule, "delete", "deleted")


def _change(connection: "Connection", schedule: str, action: str, now: str) -> None:
    """Make the API do something with one schedule, and say how it is now."""
    from pipeline.cluster import Cluster

    cluster = Cluster(connection)
    found = _find(cluster, schedule)
    cluster.change(found, action)
    print(f"schedule {found} is {now}")


def _find(cluster: "Cluster", schedule: str) -> str:
    """The id of the schedule with this id or name. Raises InputError when there is none, or several."""
    known = cluster.schedules()
    found = [item.recurring_run_id for item in known if schedule in (item.recurring_run_id, item.display_name)]
    if len(found) > 1:
        raise InputError(f"{len(found)} schedules are called {schedule!r}; name one by its id: {', '.join(found)}.")
    if not found:
        names = ", ".join(f"{item.recurring_run_id} ({item.display_name})" for item in known)
        host = cluster.connection.host
        raise InputError(f"{host} has no schedule {schedule!r}; accepted: {names or 'there is none'}.")
    return str(found[0])
