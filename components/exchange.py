"""What processes on other machines read and write: laid at a place that all of them reach, and fetched from there.

The place is a bucket's folder, or a folder that every machine has under the same path. Inputs lie there by their names,
the step's result as `output`, its numbers as `metrics`.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from components import storage
from components.processes import Job
from components.ranks import is_first, join
from components.termination import Watch

logger = logging.getLogger(__name__)
OUTPUT, METRICS = "output", "metrics"


@contextmanager
def visiting(job: Job) -> Iterator[Job]:
    """The job on this machine, and what the first process made of it laid where the others look for it.

    Every process of the job calls it; so do those whose paths need no fetching. The numbers of a job that failed are
    laid there, too.
    """
    if not job.exchange:
        yield job
        return
    here = _fetched(job)
    try:
        yield here
    except BaseException:
        if is_first() and here.metrics_file.parent.exists():
            with _at_best("the metrics are lost"):
                storage.put_folder(here.metrics_file.parent, f"{job.exchange}/{METRICS}")
        raise
    if is_first():
        storage.put_folder(_output(here), f"{job.exchange}/{OUTPUT}")
        storage.put_folder(here.metrics_file.parent, f"{job.exchange}/{METRICS}")


@contextmanager
def held(job: Job, place: str, watch: Watch) -> Iterator[Job]:
    """The job for processes elsewhere, its inputs at the place; what they made is brought to where the job says.

    Of a job that failed the numbers are brought. The place is removed in any case; SIGTERM breaks off the copying of
    inputs.
    """
    try:
        with watch.interruptible():
            there = _laid_out(job, place)
        yield there
        _bring(f"{place}/{OUTPUT}", _output(job))
        _bring(f"{place}/{METRICS}", job.metrics_file.parent)
    except BaseException:
        with _at_best("the metrics are lost"):
            if storage.list_names(f"{place}/{METRICS}"):
                _bring(f"{place}/{METRICS}", job.metrics_file.parent)
        raise
    finally:
        with _at_best(f"{place} is left"):
            storage.remove(place)


@contextmanager
def _at_best(loss: str) -> Iterator[None]:
    """Nothing raised inside hides how the job itself ended."""
    try:
        yield
    except Exception as error:
        logger.warning("%s (%s)", loss, error)


def _bring(address: str, target: Path) -> None:
    """Put the folder at the address there; of what had to be fetched no second copy stays."""
    move = shutil.move if storage.is_remote(address) else shutil.copy2
    shutil.copytree(storage.fetch(address), target, copy_function=move, dirs_exist_ok=True)


def _fetched(job: Job) -> Job:
    """The job with its inputs on this machine, fetched by the machine's first process, and its output beside them."""
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


def _laid_out(job: Job, place: str) -> Job:
    """The job for processes elsewhere, its inputs copied to the place."""
    for name, path in _inputs(job).items():
        storage.put_folder(path, f"{place}/{name}")
    return replace(job, exchange=place)


def _inputs(job: Job) -> dict[str, Path]:
    *inputs, _ = job.paths.items()
    return {name: path for name, path in inputs if path is not None}


def _output(job: Job) -> Path:
    *_, output = job.paths.values()
    assert output is not None
    return output
