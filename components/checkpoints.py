"""Checkpoints of training: tensors in safetensors, the rest in JSON, digests of both; written whole or not at all.

They lie in a folder (local or gs://) keyed by the step, its settings, its inputs' digests and the fingerprint of its
code (PLUMBLINE_FINGERPRINT, set by `launch`), under PLUMBLINE_CHECKPOINTS or else beside the step's output, so that
the same work started again finds them and other work does not.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from components import storage
from components.artifacts import file_sha256, folder_digest, json_digest, read_json, write_json
from components.errors import InputError
from components.parsing import flattened
from components.ranks import Ranks, is_first

logger = logging.getLogger(__name__)
ROOT = "PLUMBLINE_CHECKPOINTS"
ELSEWHERE = f"checkpoints=PLACE for a pipeline, {ROOT} for a step by hand"
LAYOUT = ("processes", "nodes", "strategy", "offload")
"""Settings of `compute` that decide who does the work and not what it is."""
TENSORS, VALUES, DIGESTS = "tensors.safetensors", "values.json", "digests.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was read back."""

    source: str
    """Where it lies."""
    update: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Checkpoints:
    """The checkpoints of one piece of work; with `every` 0 none is due, but what there is is read."""

    def __init__(
        self, place: str | Path, every: int, keep: int = 2, work: Mapping[str, Any] | None = None
    ) -> None:
        """`work` says what they are checkpoints of; one that says otherwise is refused."""
        self.place, self.every, self.keep, self.work = str(place), every, keep, dict(work or {})

    @classmethod
    def of(
        cls, step: str, settings: Mapping[str, Any], inputs: Mapping[str, Path], output: Path, every: int, keep: int = 2
    ) -> "Checkpoints":
        """The checkpoints of `step` with these settings and inputs. Raises InputError where none could be written.

        They are found by any number of processes, under any strategy; where an update would then take more or fewer
        micro-batches than before, `latest` refuses them.
        """
        root = os.environ.get(ROOT) or str(output.parent / "checkpoints")
        if not storage.is_remote(root):
            _refuse_unwritable(storage.local_path(root))
        plain, sizes = _layout_apart(settings)
        work = {
            "step": step,
            "settings": plain,
            "inputs": {name: folder_digest(path) for name, path in inputs.items()},
            "fingerprint": os.environ.get("PLUMBLINE_FINGERPRINT", ""),
        }
        return cls(f"{root.rstrip('/')}/{step}-{json_digest(work)[:16]}", every, keep, work | sizes)

    def due(self, update: int) -> bool:
        """Whether a checkpoint is written after this update."""
        return self.every > 0 and update % self.every == 0

    def save(self, update: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write the checkpoint of `update` and drop all but the newest `keep`; the first process does, for all.

        Raises InputError when it cannot be written; nothing of it stays then, and those before it do.
        """
        from safetensors.torch import save_file

        if not is_first():
            return
        try:
            with storage.new_folder(f"{self.place}/{update:08d}", last=DIGESTS) as folder:
                on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                save_file(on_cpu, folder / TENSORS)
                stated = {"update": update, "work": self.work, "values": dict(values)}
                (folder / VALUES).write_text(json.dumps(stated), encoding="utf-8")
                write_json(folder / DIGESTS, {name: file_sha256(folder / name) for name in (TENSORS, VALUES)})
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"{self.place}: the checkpoint of update {update} cannot be written: {reason}. Make room or allow "
                f"writing there, or name another place ({ELSEWHERE}). Those before it stay: the same command continues "
                "from them."
            ) from error
        self._drop_around(update)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose digests hold; a damaged one is passed over with a warning.

        Raises InputError for a checkpoint of other work.
        """
        names = self._written()
        for number, name in reversed(list(enumerate(names))):
            source = f"{self.place}/{name}"
            with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
                folder = storage.fetch(source, into=Path(scratch))
                damage = _damage(folder)
                if not damage:
                    return self._read(folder, source)
            before = "using the one before it" if number else "there is none before it, so the work starts over"
            logger.warning("checkpoint %s is damaged (%s); %s", source, damage, before)
        return None

    def agreed(self, ranks: Ranks) -> Checkpoint | None:
        """The newest checkpoint, which every process continues from; raises InputError as `latest`.

        Raises InputError, too, where the processes do not all see the same one.
        """
        checkpoint = self.latest()
        seen = ranks.gathered(None if checkpoint is None else checkpoint.update)
        if len(set(seen)) > 1:
            raise InputError(
                f"{self.place}: the processes of this step see different checkpoints there, of the updates {seen}. "
                f"Name a place that all of them reach, such as a bucket ({ELSEWHERE})."
            )
        return checkpoint

    def clear(self) -> None:
        """Remove them all: the work is done; the first process does."""
        if is_first():
            _remove(self.place)

    def _read(self, folder: Path, source: str) -> Checkpoint:
        """An undamaged checkpoint. Raises InputError when it is of other work."""
        from safetensors.torch import load_file

        stated = read_json(folder / VALUES)
        there, here = (dict(flattened(work)) for work in (stated["work"], self.work))
        if key := next((key for key in sorted(there | here) if there.get(key) != here.get(key)), None):
            raise InputError(
                f"{source} is a checkpoint of other work: {key} is {there.get(key)!r} there and {here.get(key)!r} "
                "here. Remove it to start over, or go back to what it was made with."
            )
        return Checkpoint(source, stated["update"], load_file(folder / TENSORS), stated["values"])

    def _written(self) -> list[str]:
        return [name for name in storage.list_folders(self.place) if name.isdigit()]

    def _drop_around(self, update: int) -> None:
        """Remove what is too old, what is newer (and was damaged), and what killed processes left half-written."""
        names = self._written()
        older = [name for name in names if int(name) < update]
        newer = [name for name in names if int(name) > update]
        left = [name for name in storage.list_folders(self.place) if name.startswith(".")]
        for name in older[: max(0, len(older) + 1 - self.keep)] + newer + left:
            _remove(f"{self.place}/{name}")


def _layout_apart(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings without who does the work, and what follows from that of the size of an update."""
    plain, sizes = dict(settings), dict[str, Any]()
    if "training" in plain:
        plain["training"], sizes = _layout_apart(plain["training"])
    if "compute" in plain:
        compute: Mapping[str, Any] = plain["compute"]
        if "accumulation" in plain:
            processes = compute["nodes"] * compute["processes"]
            sizes["micro_batches_per_update"] = plain.pop("accumulation") * processes
        plain["compute"] = {name: value for name, value in compute.items() if name not in LAYOUT}
    return plain, sizes


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files; nothing when their digests hold."""
    try:
        stated = read_json(folder / DIGESTS)
        differing = [name for name in (TENSORS, VALUES) if file_sha256(folder / name) != stated[name]]
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{DIGESTS} is absent or not what was written"
    return f"{' and '.join(differing)} not as written" if differing else ""


def _remove(address: str) -> None:
    """Remove a folder; what cannot be removed is left, with a warning: no training is worth losing for it."""
    try:
        storage.remove(address)
    except (OSError, InputError) as error:
        logger.warning("%s cannot be removed: %s", address, error)


def _refuse_unwritable(folder: Path) -> None:
    """Raise InputError when checkpoints could not be written below the folder, so that it is known at once."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"{folder}: checkpoints cannot be written there: {existing} is "
            f"{'not writable' if existing.is_dir() else 'a file'}. Change that, or name another place ({ELSEWHERE})."
        )
