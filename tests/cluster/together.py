"""One of several processes that torchrun started: runs the jobs of a list, one after another, and says what it held.

Several jobs in one process: starting costs more than all of them. Started by test_distributed.py, which see.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from components import updates
from components.launch import run_step
from components.processes import Job
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
    seen, rank = Seen(), os.environ["RANK"]
    for text in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        job = Job.read(text)
        seen.rows.clear()
        run_step(job.step, job.settings, job.paths, metrics_file=job.metrics_file, task=job.task)
        (job.metrics_file.parent / f"held-{rank}.json").write_text(json.dumps(seen.rows), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
