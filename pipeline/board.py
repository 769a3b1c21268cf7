"""A run that goes on elsewhere, as it is seen here: asked for now and then, until it has ended."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from pipeline import details
from pipeline.cluster import Cluster
from pipeline.connection import Unavailable
from pipeline.screen import Screen, duration, rows
from pipeline.summary import Result

POLL_S = 5.0
PATIENCE_S = 600.0
"""How long an API may be away in a row before we stop waiting: it is started anew while a cluster is upgraded."""
ENDED = ("succeeded", "cached", "failed")


class Board:
    """The tasks of a run: a table that is drawn anew on a terminal, a line per change elsewhere."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._seen: dict[str, str] = {}
        self._live: Live | None = None
        if screen.console.is_terminal:
            self._live = Live(console=screen.console, auto_refresh=False, transient=True)
            self._live.start()

    def show(self, tasks: Sequence[Result], seconds: float) -> None:
        """The tasks as they are now."""
        if self._live is not None:
            self._live.update(Group(*rows(tasks), Text(f"\nrunning for {duration(seconds)}")), refresh=True)
            return
        for result in tasks:
            if self._seen.get(result.task) != result.status:
                self._seen[result.task] = result.status
                if result.status == "running":
                    self._screen.started(result.task)
                elif result.status in ENDED:
                    self._screen.ended(result)

    def close(self) -> None:
        """Take the table away; the last one is printed by whoever knows how the run ended."""
        if self._live is not None:
            self._live.stop()


def watch(cluster: Cluster, run_id: str, screen: Screen) -> str:
    """Show a run until it has ended; how it did: succeeded, rejected, failed or canceled.

    Raises InputError when the API refuses, or stays away for PATIENCE_S.
    """
    board, spec, away = Board(screen), None, 0.0
    try:
        while True:
            try:
                run = cluster.run(run_id)
                spec = cluster.spec(run) if spec is None else spec
                away = 0.0
            except Unavailable as error:
                if away == 0:
                    screen.line(f"{error} Still waiting.")
                if (away := away + POLL_S) > PATIENCE_S:
                    raise
            else:
                tasks = details.results(run, spec)
                if (status := details.status(run, tasks)) != "running":
                    break
                board.show(tasks, details.seconds(run))
            time.sleep(POLL_S)
    finally:
        board.close()
    show(run, tasks, screen)
    return status


def show(run: Any, tasks: Sequence[Result], screen: Screen) -> str:
    """The table of a run and what failed in it; gives back how the run is."""
    status = details.status(run, tasks)
    screen.table(status, details.seconds(run), tasks)
    for result in tasks:
        if result.status == "failed":
            screen.line(f"  {result.task:<9}{result.error or f'plumbline logs {run.run_id} {result.task}'}")
    if run.error is not None and run.error.message:
        screen.line(f"  {'run':<9}{run.error.message}")
    return status
