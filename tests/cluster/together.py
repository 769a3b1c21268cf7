"""One of several processes that torchrun started: runs the jobs of a list, one after another, and says what it held.

Several jobs in one process: starting costs more than all of them. Started by test_distributed.py, which see.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from deepspeed.runtime.zero.partition_parameters import Init

from components import models, updates
from components.launch import run_step
from components.processes import Job
from components.rl.shares import SharedSampler
from components.zero import Zero


class Seen:
    """Every updater that a job made, and what its engine held of the weights' states."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        made = updates._engine

        def engine(*given: Any) -> Any:
            found = made(*given)
            self.rows.append(held(found, given[3]))
            return found

        updates._engine = engine


class Gathered:
    """The most elements of divided weights that this process ever had in full at once, by what it was doing.

    That is sampling (by our own decoder), loading (before there is an engine), or otherwise.
    """

    def __init__(self) -> None:
        self.known: WeakSet[Any] = WeakSet()
        self.most: dict[str, int] = {}
        self.doing = "otherwise"
        convert, sample, load = Init._convert_to_deepspeed_param, SharedSampler.sample, models._load

        def converted(init: Any, parameter: Any) -> None:
            convert(init, parameter)
            self.known.add(parameter)
            for name in ("all_gather", "all_gather_coalesced"):
                setattr(parameter, name, self._counted(getattr(parameter, name)))

        Init._convert_to_deepspeed_param = converted
        SharedSampler.sample = self._named("sampling", sample)
        models._load = self._named("loading", load)

    def _counted(self, gather: Any) -> Any:
        def counted(*given: Any, **named: Any) -> Any:
            found = gather(*given, **named)
            full = sum(p.ds_numel for p in self.known if p.ds_status.name != "NOT_AVAILABLE")
            self.most[self.doing] = max(self.most.get(self.doing, 0), full)
            return found

        return counted

    def _named(self, doing: str, function: Any) -> Any:
        def named(*given: Any, **others: Any) -> Any:
            before, self.doing = self.doing, doing
            try:
                return function(*given, **others)
            finally:
                self.doing = before

        return named


def held(engine: Any, ranks: Any) -> dict[str, Any]:
    """Who computes, and the share of AdamW's state, of gradients and of weights that this process has."""
    row = {"engine": type(engine).__name__, "rank": ranks.rank, "size": ranks.size}
    if not isinstance(engine, Zero):
        return row
    whole = [p for p in engine.module.parameters() if p.requires_grad]
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in whole)
    parts = sum(part.numel() for part in engine._parts())
    weights = sum(p.numel() for p in whole)
    row |= {"stage": engine.engine.zero_optimization_stage(), "states": parts / numel, "weights": weights / numel}
    return row | {"divides_gradients": bool(engine.engine.zero_optimization_partition_gradients())}


def main() -> int:
    """Run the jobs in the file named first; leave what was held beside each job's metrics."""
    torch.set_num_threads(1)
    seen, gathered, rank = Seen(), Gathered(), os.environ["RANK"]
    for text in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        job = Job.read(text)
        seen.rows.clear()
        gathered.known.clear()
        gathered.most.clear()
        run_step(job.step, job.settings, job.paths, metrics_file=job.metrics_file, task=job.task)
        (job.metrics_file.parent / f"held-{rank}.json").write_text(json.dumps(seen.rows), "utf-8")
        (job.metrics_file.parent / f"gathered-{rank}.json").write_text(json.dumps(gathered.most), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
