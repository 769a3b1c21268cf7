"""The training steps on a device that is not there: finds tensors of two devices in one operation without a GPU.

    python benchmarks/pretend_gpu.py [ppo_lag rloo ...]

A pretended tensor says that it is on the device "gpu" and keeps its numbers on the CPU. Operations on it are refused as
CUDA refuses them: all tensors must be on one device, but for numbers without a dimension, for indices of a tensor on
the GPU, and for copies. Every algorithm, sft, reward and cost models, adapters, shared critics and a start from a
checkpoint are run on tiny models; nothing is saved. Exits 1 at the first mistake, with its traceback.

It changes what torch knows of devices for the whole process, so tests start it as one of its own.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from components import models, tracking
from components.reward import step as reward
from components.reward.settings import RewardSettings
from components.rl import step as rl
from components.rl.settings import PtxSettings
from components.settings import Lora, Training
from components.sft import step as sft
from components.sft.settings import SFTSettings
from tiny_models import ALGORITHMS, make_inputs, silence, tiny_rl


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """For autocast, which the steps turn off here and there."""
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(rename="gpu", backend_module=Backend())
GPU, CPU = torch.device("gpu", 0), torch.device("cpu")
ops = torch.ops.aten
INDEXING = (ops.index.Tensor, ops.index_put.default, ops.index_put_.default)
COPYING = (ops._to_copy.default, ops.copy_.default)
make_tensor = torch.tensor


class Pretended(Tensor):
    """A tensor that says it is on the GPU."""

    numbers: Tensor
    """On the CPU."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Any:
        """Shaped and laid out as they are."""
        layout: Any = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        made: Any = Tensor._make_wrapper_subclass(cls, numbers.shape, **layout, device=GPU)
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """The operation's result."""
        return computed(function, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        """Lists in an index become tensors here; torch would ask the device for them."""
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        """As reading does."""
        super().__setitem__(_as_tensors(index), value)

    def tolist(self) -> Any:
        """From a copy on the CPU."""
        return self.cpu().tolist()


class Dispatch(TorchDispatchMode):
    """Sees every operation, those that make tensors too."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation's result."""
        return computed(function, args, kwargs or {})


def computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the operation gives, on the device that a GPU would give it on. Raises RuntimeError for a mix of devices."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    on_gpu = any(isinstance(tensor, Pretended) for tensor in tensors)
    if on_gpu and function not in COPYING:
        _check(function, args, tensors)
    if kwargs.get("device") is not None:
        on_gpu = torch.device(kwargs["device"]).type == GPU.type
        kwargs = kwargs | {"device": CPU}
    elif function in COPYING:
        on_gpu = isinstance(tensors[0], Pretended)
    result = function(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))
    given = {id(_numbers(tensor)): tensor for tensor in tensors}  # what is changed in place stays the tensor it was

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return given[id(value)] if id(value) in given else Pretended(value) if on_gpu else value

    return tree_map(placed, result)


def _check(function: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise RuntimeError where an operation on tensors of the GPU has one of the CPU that CUDA would not take."""
    first = tensors[0]
    for tensor in tensors:
        is_index = function in INDEXING and isinstance(first, Pretended) and any(tensor is index for index in args[1])
        is_number = tensor.dim() == 0 and not (tensor is first and function._schema.is_mutable)
        if not (isinstance(tensor, Pretended) or is_index or is_number):
            raise RuntimeError(f"{function}: a tensor {tuple(tensor.shape)} of the CPU among those of the GPU")


def _numbers(value: Any) -> Any:
    return value.numbers if isinstance(value, Pretended) else value


def _as_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_as_tensors, index))
    return make_tensor(index, dtype=torch.long).to(GPU) if isinstance(index, list) else index


@contextmanager
def pretended() -> Iterator[None]:
    """Models and batches are on the pretended GPU, as `components.models.device` says."""

    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """As torch.tensor, which asks the device itself."""
        tensor = make_tensor(data, **options)
        return tensor if device is None else tensor.to(device)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "tensor", made))
        asked = models.device
        for module in list(sys.modules.values()):
            if vars(module).get("device") is asked:
                stack.enter_context(patch.object(module, "device", lambda: GPU))
        stack.enter_context(patch.object(Accelerator, "device", GPU))
        fused = "torch.optim.optimizer._get_fused_kernels_supported_devices"
        stack.enter_context(patch(fused, lambda: [CPU.type, GPU.type]))
        for step in (sft, reward, rl):
            stack.enter_context(patch.object(step, "save_model"))  # safetensors reads memory that is not there
        stack.enter_context(Dispatch())  # type: ignore[no-untyped-call]
        yield


class Stopped(Exception):
    """Ends a step from outside."""


def works(folder: Path) -> dict[str, Callable[[], object]]:
    """What is run, by name; in `folder` are the inputs and what the steps leave."""
    inputs = make_inputs(folder / "inputs")

    def learn(name: str, algorithm: str, **fields: Any) -> Callable[[], object]:
        settings = tiny_rl(algorithm, "fp32", **({"rollouts": 2, "checkpoint_every": 1} | fields))
        return lambda: rl.run(settings, **inputs, model=folder / name / "model")

    def again() -> None:
        """Stopped after the second rollout, and continued from the checkpoint of the first."""
        work, first = learn("again", "rloo"), tracking.Row(1, 0.0, {})
        with patch.object(tracking, "log_metrics", side_effect=[first, Stopped]), suppress(Stopped):
            work()
        work()

    training = Training(epochs=2, batch_tokens=512, max_length=64, eval_every=2, checkpoint_every=1)
    data, policy = inputs["data"], inputs["policy"]
    costs = RewardSettings(training=training, kind="cost", dimension="harmless")
    return {name: learn(name, name) for name in ALGORITHMS} | {
        "ptx": learn("ptx", "ppo", ptx=PtxSettings(coef=1.0, batch_size=2)),
        "lora": learn("lora", "grpo", lora=Lora(rank=2)),
        "shared": learn("shared", "ppo_lag", share_backbone=True),
        "again": again,
        "sft": lambda: sft.run(SFTSettings(training=training), data=data, base=policy, model=folder / "sft" / "model"),
        "reward": lambda: reward.run(
            RewardSettings(training=training), data=data, sft=policy, model=folder / "reward" / "model"
        ),
        "cost": lambda: reward.run(costs, data=data, sft=policy, model=folder / "cost" / "model"),
    }


def main(chosen: list[str]) -> int:
    """0; a mistake is raised."""
    silence()
    with tempfile.TemporaryDirectory(prefix="plumbline-") as scratch:
        for name, work in works(Path(scratch)).items():
            if not chosen or name in chosen:
                with pretended():
                    work()
                print(f"{name}: one device", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
