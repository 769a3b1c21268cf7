"""Checkpoints of training: tensors in safetensors, the rest in JSON, written whole or not at all.

They lie in a folder keyed by the step, its settings, its inputs' digests and the fingerprint of its code
(PLUMBLINE_FINGERPRINT, set by `launch`), under PLUMBLINE_CHECKPOINTS or else beside the step's output, so that the
same work started again finds them and other work does not.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from components.artifacts import file_sha256, folder_digest, json_digest, read_json, write_json

logger = logging.getLogger(__name__)


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

    def __init__(self, folder: Path, every: int, keep: int = 2) -> None:
        self.folder, self.every, self.keep = folder, every, keep

    @classmethod
    def of(
        cls, step: str, settings: Mapping[str, Any], inputs: Mapping[str, Path], output: Path, every: int, keep: int = 2
    ) -> "Checkpoints":
        """The checkpoints of `step` with these settings and inputs."""
        root = os.environ.get("PLUMBLINE_CHECKPOINTS")
        parents = {name: folder_digest(path) for name, path in inputs.items()}
        key = json_digest([step, settings, parents, os.environ.get("PLUMBLINE_FINGERPRINT", "")])[:16]
        return cls((Path(root) if root else output.parent / "checkpoints") / f"{step}-{key}", every, keep)

    def due(self, update: int) -> bool:
        """Whether a checkpoint is written after this update."""
        return self.every > 0 and update % self.every == 0

    def save(self, update: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write the checkpoint of `update` and drop all but the newest `keep`."""
        from safetensors.torch import save_file

        temporary = self.folder / f".{update:08d}.{os.getpid()}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, temporary / "tensors.safetensors")
        digest = file_sha256(temporary / "tensors.safetensors")
        write_json(temporary / "values.json", {"update": update, "tensors_sha256": digest, "values": dict(values)})
        shutil.rmtree(self.folder / f"{update:08d}", ignore_errors=True)
        temporary.rename(self.folder / f"{update:08d}")
        for old in self._written()[:-self.keep]:
            shutil.rmtree(old)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose digest holds; a damaged one is passed over with a warning."""
        from safetensors.torch import load_file

        for folder in reversed(self._written()):
            try:
                stated = read_json(folder / "values.json")
                if file_sha256(folder / "tensors.safetensors") == stated["tensors_sha256"]:
                    tensors = load_file(folder / "tensors.safetensors")
                    return Checkpoint(str(folder), stated["update"], tensors, stated["values"])
            except (OSError, ValueError, KeyError):
                pass
            logger.warning("checkpoint %s is damaged; using the one before it", folder)
        return None

    def clear(self) -> None:
        """Remove them all: the work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _written(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir())
