"""The one update loop's machinery, on accelerate: prepare, backward, clip, step, checkpoint, resume.

`Updater` is what supervised training (`fit`, below) and the RL loop share. A loss is a sum over terms (tokens,
pairs); it is divided by the number of terms in the whole update, over all micro-batches and all processes, so
that the way rows are cut into micro-batches changes nothing.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from components import tracking
from components.artifacts import Metrics
from components.batches import token_batches
from components.checkpoints import Checkpoints
from components.errors import InputError
from components.progress import Progress
from components.settings import Compute, Optimizer, Training

logger = logging.getLogger(__name__)


def learning_rate_factor(update: int, total: int, settings: Optimizer) -> float:
    """The share of the peak rate at `update` (0-based) of `total`: linear warm-up, then the schedule."""
    warmup = math.ceil(settings.warmup * total)
    if update < warmup:
        return (update + 1) / warmup
    done = (update - warmup) / max(1, total - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    floor = settings.min_lr if settings.schedule != "constant" else 0.0
    return floor + (1 - floor) * shape[settings.schedule]


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    from accelerate.utils import reduce

    return reduce(tensor, "sum")  # type: ignore[no-any-return]


class Updater:
    """A module under training and its optimiser."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        compute: Compute,
        total_updates: int,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """`rates` gives sub-modules (by name prefix) a peak learning rate of their own."""
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # it is global, and refuses a second precision in one process
        self.accelerator = Accelerator(
            mixed_precision="bf16" if compute.dtype == "bf16" else "no", cpu=not torch.cuda.is_available()
        )
        if self.accelerator.num_processes > 1:
            raise InputError(
                f"{self.accelerator.num_processes} processes were started, and all of them would learn from the same "
                "rows. Start the step in one process."
            )
        self.settings, self.total_updates, self.update, self.skipped = optimizer, total_updates, 0, 0
        if compute.gradient_checkpointing:
            _checkpoint_activations(model)
        adamw = torch.optim.AdamW(
            _parameter_groups(model, optimizer, rates or {}), betas=optimizer.betas, eps=optimizer.eps
        )
        self.model, self.optimizer = self.accelerator.prepare(model, adamw)

    @property
    def module(self) -> nn.Module:
        """The module itself, without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.model)  # type: ignore[no-any-return]

    def backward(self, loss_sum: Tensor, terms: float, last: bool = True) -> None:
        """Add the gradient of `loss_sum / terms`; `terms` counts the update's terms over all processes.

        Processes average their gradients at the `last` micro-batch, hence the factor of their number.
        """
        loss = loss_sum * (self.accelerator.num_processes / terms)
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            self.accelerator.backward(loss)

    def step(self) -> Metrics:
        """Clip, take one optimiser step and clear the gradients; a non-finite gradient skips the step."""
        factor = learning_rate_factor(self.update, self.total_updates, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            self.skipped += 1
            logger.warning("update %d: gradient norm is %s; the step is skipped", self.update + 1, norm)
        self.optimizer.zero_grad()
        self.update += 1
        return {
            "loss/grad_norm": norm,
            "loss/lr": self.optimizer.param_groups[0]["lr"],
            "loss/skipped_updates": float(self.skipped),
        }

    def state(self) -> dict[str, Tensor]:
        """Weights, optimiser state and random state as named tensors."""
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self.module.named_parameters()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        return tensors | {"random.torch": torch.get_rng_state()}

    def restore(self, tensors: Mapping[str, Tensor], update: int, skipped: int) -> None:
        """Take back what `state` gave."""
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        saved: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                saved.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": saved})
        torch.set_rng_state(tensors["random.torch"])
        self.update, self.skipped = update, skipped


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch: a sum over terms, and sums of what is worth logging, per term."""

    total: Tensor
    sums: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """What supervised training needs to know of a task."""

    def length(self, row: Any) -> int:
        """Padded tokens that a row costs."""
        ...

    def terms(self, row: Any) -> int:
        """Terms that a row adds to the loss."""
        ...

    def loss(self, model: nn.Module, rows: Sequence[Any]) -> Loss:
        """The summed loss of some rows."""
        ...


def fit(
    model: nn.Module,
    objective: Objective,
    rows: Sequence[Any],
    settings: Training,
    *,
    seed: int,
    label: str,
    evaluate: Callable[[], Metrics],
    checkpoints: Checkpoints,
) -> Metrics:
    """Train `model` on `rows`; returns the last evaluation and the training metrics.

    Continues from the newest checkpoint where there is one. The order of the rows depends on the seed alone. The
    checkpoints stay until the caller has saved the model and clears them.
    """
    plan = list(_plan(objective, rows, settings, seed))
    updater = Updater(model, settings.optimizer, settings.compute, len(plan))
    if checkpoint := checkpoints.latest():
        updater.restore(checkpoint.tensors, checkpoint.update, checkpoint.values["skipped"])
        logger.info("%s continues from update %d of %d", label, checkpoint.update, len(plan))
    progress = Progress(label, len(plan))
    progress.done = updater.update
    metrics: Metrics = {}
    for batches in plan[updater.update :]:
        metrics = _update(updater, objective, [[rows[i] for i in batch] for batch in batches])
        due = settings.eval_every and updater.update % settings.eval_every == 0
        if due or updater.update == len(plan):
            metrics |= evaluate()
        tracking.log_metrics(metrics, updater.update)
        progress.advance(loss=metrics["loss/train"])
        if checkpoints.due(updater.update):
            checkpoints.save(updater.update, updater.state(), {"skipped": updater.skipped})
    model.eval()
    return metrics or evaluate()


def _plan(objective: Objective, rows: Sequence[Any], settings: Training, seed: int) -> Iterator[list[list[int]]]:
    """The micro-batches of every update of every epoch."""
    lengths = [objective.length(row) for row in rows]
    for epoch in range(settings.epochs):
        batches = token_batches(lengths, settings.batch_tokens, seed + 1000 * epoch)
        for start in range(0, len(batches), settings.accumulation):
            yield batches[start : start + settings.accumulation]


def _update(updater: Updater, objective: Objective, micro_batches: Sequence[Sequence[Any]]) -> Metrics:
    """One optimiser step over some micro-batches."""
    updater.model.train()
    own_terms = sum(objective.terms(row) for rows in micro_batches for row in rows)
    terms = float(total(torch.tensor(float(own_terms))))
    sums: Metrics = {}
    for number, rows in enumerate(micro_batches, start=1):
        loss = objective.loss(updater.model, rows)
        updater.backward(loss.total, terms, last=number == len(micro_batches))
        for name, value in {"loss/train": loss.total.item(), **loss.sums}.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / own_terms for name, value in sums.items()} | updater.step()


def _parameter_groups(model: nn.Module, settings: Optimizer, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and decay: matrices decay, vectors (norms, biases) do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), settings.lr)
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _checkpoint_activations(model: nn.Module) -> None:
    """Turn gradient checkpointing on in every Hugging Face model inside the module."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or not module.supports_gradient_checkpointing:
            continue
        if not module.is_activation_checkpointing:  # as the inner module of one that was just turned on is
            module.activation_checkpointing_enable({"use_reentrant": False})
