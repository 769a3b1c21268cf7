"""What processes on other machines read and write: laid at a place that all of them reach, and fetched from there.

The place is a bucket's folder, or a folder that every machine has under the same path. Inputs lie there by their names,
the step's result as `output`, its numbers as `metrics`.
"""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from components import storage
from components.processes import Job
from components.ranks import join

OUTPUT, METRICS = "output", "metrics"


def laid_out(job: Job, place: str) -> Job:
    """The job for processes elsewhere, its inputs copied to the place."""
    for name, path in _inputs(job).items():
        storage.put_folder(path, f"{place}/{name}")
    return replace(job, exchange=place)


def fetched(job: Job) -> Job:
    """The job with its inputs on this machine, fetched by the machine's first process, and its output beside them.

    Every process of the job calls it; so do those whose paths need no fetching.
    """
    if not job.exchange:
        return job
    ranks, scratch = join(), Path(tempfile.gettempdir()) / Path(job.exchange).name
    here = scratch if storage.is_remote(job.exchange) else storage.local_path(job.exchange)
    if os.environ["LOCAL_RANK"] == "0" and storage.is_remote(job.exchange):
        for name in _inputs(job):
            storage.fetch(f"{job.exchange}/{name}", into=scratch)
    ranks.barrier()
    paths = {name: path and here / name for name, path in job.paths.items()}
    *_, output = paths
    paths[output] = scratch / OUTPUT
    return replace(job, paths=paths, metrics_file=scratch / METRICS / job.metrics_file.name)


def delivered(job: Job) -> None:
    """Lay the output and the metrics of a job that was `fetched` where the others look for them."""
    if job.exchange:
        storage.put_folder(_output(job), f"{job.exchange}/{OUTPUT}")
        storage.put_folder(job.metrics_file.parent, f"{job.exchange}/{METRICS}")


def brought_back(job: Job, place: str) -> None:
    """Bring the output and the metrics from the place to where the job says, and empty it."""
    for name, target in ((OUTPUT, _output(job)), (METRICS, job.metrics_file.parent)):
        source = storage.fetch(f"{place}/{name}")
        shutil.copytree(source, target, dirs_exist_ok=True)
    storage.remove(place)


def _inputs(job: Job) -> dict[str, Path]:
    *inputs, _ = job.paths.items()
    return {name: path for name, path in inputs if path is not None}


def _output(job: Job) -> Path:
    *_, output = job.paths.values()
    assert output is not None
    return output
