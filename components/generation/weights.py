"""Weights on their way to a server: a folder that both reach, there for as long as it is read."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from components.adapters import base_of
from components.errors import InputError

READABLE = 0o755
"""The server may run as another user."""
ONE_FILE = "1000TB"
"""Without shards there is no index, which would hide the head beside it."""


@contextmanager
def shared_weights(policy: Any, tensors: dict[str, Tensor], parent: str, key: str) -> Iterator[Path]:
    """A folder below `parent` with the policy's `merged_tensors` in safetensors; gone at the end.

    A head that is tied to the embeddings is written too, for a server that keeps the two apart.
    Raises InputError, which names the setting `key`, when it cannot be written.
    """
    try:
        Path(parent).mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(prefix="plumbline-weights-", dir=Path(parent).absolute())
    except OSError as error:
        raise _unwritable(key, parent, error) from None
    with place as name:
        folder = Path(name)
        folder.chmod(READABLE)
        try:
            model = base_of(policy)
            model.save_pretrained(name, state_dict=dict(tensors), safe_serialization=True, max_shard_size=ONE_FILE)
            _write_tied_head(model, tensors, folder)
        except (OSError, SafetensorError) as error:
            raise _unwritable(key, parent, error) from None
        for path in folder.iterdir():
            path.chmod(READABLE)
        yield folder


def _write_tied_head(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        name = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
        save_file({name: tensors[name].contiguous()}, folder / "head.safetensors")


def _unwritable(key: str, parent: str, error: Exception) -> InputError:
    return InputError(
        f"{key} is {parent}: the policy's weights cannot be written there ({error}). Name a folder with room for them "
        "that this process may write, and that the server reads under the same path."
    )
