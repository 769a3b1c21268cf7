"""Updates of the weights, on accelerate: backward, clip, step, skip what is not finite, count, save and restore.

Supervised training (`training.fit`) and the RL loop share it. A loss is a sum over terms (tokens, pairs); it is
divided by the number of terms in the whole update, over all micro-batches and all processes, so that the way rows
are cut into micro-batches changes nothing.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from components.artifacts import Metrics
from components.errors import InputError, TrainingFailure
from components.optimizers import MAIN, learning_rate_factor, parameter_groups
from components.randomness import random_states, set_random_states
from components.settings import Compute, Optimizer

logger = logging.getLogger(__name__)


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    from accelerate.utils import reduce

    return reduce(tensor, "sum")  # type: ignore[no-any-return]


class Updater:
    """A module under training, its optimiser, and what both have gone through: updates, samples, tokens."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        compute: Compute,
        total_updates: int,
        optimizers: Mapping[str, Optimizer] | None = None,
    ) -> None:
        """`optimizers` gives sub-modules an optimiser of their own, by name and where the model has them.

        Each network's gradient is clipped by itself. They all take their steps together, and `optimizer.max_skipped`
        counts for them all.
        """
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
        present = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        given = {name: settings for name, settings in (optimizers or {}).items() if name in present}
        self.optimizers = {MAIN: optimizer, **given}
        self.compute, self.total_updates = compute, total_updates
        self.update = self.skipped = self.skipped_in_row = self.samples = self.tokens = 0
        if compute.gradient_checkpointing:
            _checkpoint_activations(model)
        groups = parameter_groups(model, self.optimizers)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = [names[id(parameter)] for group in groups for parameter in group["params"]]  # as AdamW counts
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(groups, fused=True))
        self._loss = torch.zeros((), device=self.accelerator.device)

    @property
    def module(self) -> nn.Module:
        """The module itself, without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.model)  # type: ignore[no-any-return]

    def backward(self, loss_sum: Tensor, terms: float, last: bool = True) -> None:
        """Add the gradient of `loss_sum / terms`; `terms` counts the update's terms over all processes.

        Processes average their gradients at the `last` micro-batch, hence the factor of their number.
        """
        loss = loss_sum * (self.accelerator.num_processes / terms)
        self._loss += loss.detach()
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            self.accelerator.backward(loss)

    def count(self, samples: int = 0, tokens: int = 0) -> None:
        """Count what the next update learns from."""
        self.samples += samples
        self.tokens += tokens

    def step(self) -> Metrics:
        """Clip each network's gradient, take one optimiser step and clear the gradients.

        A loss or gradient that is not finite skips the step. Raises TrainingFailure when more updates in a row than
        `max_skipped` are skipped.
        """
        rates = self._set_rates()
        norms = {network: self._norm(network) for network in self.optimizers}
        loss = float(self._loss)
        if all(map(math.isfinite, (loss, *norms.values()))):
            for network, norm in norms.items():
                torch.nn.utils.clip_grads_with_norm_(
                    self._parameters(network), self.optimizers[network].max_grad_norm, torch.tensor(norm)
                )
            self.optimizer.step()
            self.skipped_in_row = 0
        else:
            self._skip(loss, norms, rates)
        self.optimizer.zero_grad()
        self._loss.zero_()
        self.update += 1
        numbers = {"loss/skipped_updates": self.skipped, "data/samples": self.samples, "data/tokens": self.tokens}
        return _named("loss/grad_norm", norms) | _named("loss/lr", rates) | {k: float(v) for k, v in numbers.items()}

    def values(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {name: getattr(self, name) for name in ("update", "skipped", "skipped_in_row", "samples", "tokens")}

    def state(self) -> dict[str, Tensor]:
        """What is trained, the persistent buffers, the optimiser's state and every global random state, by name.

        Frozen weights are left out: they come from the folder that the model was loaded from.
        """
        tensors = {f"model.{name}": tensor for name, tensor in self._own_tensors().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            name = self._names[index]
            tensors |= {f"optimizer.{name}.{key}": torch.as_tensor(value) for key, value in state.items()}
        return tensors | random_states()

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, int], source: str = "the checkpoint") -> None:
        """Take back what `state` and `values` gave.

        Raises InputError naming `source` and the first tensor that is not the model's by name or by shape.
        """
        own = self._own_tensors()
        saved = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        _refuse_another_model(saved, own, source)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        indices, states = {name: index for index, name in enumerate(self._names)}, dict[int, dict[str, Tensor]]()
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                parameter, key = name.removeprefix("optimizer.").rsplit(".", 1)
                states.setdefault(indices[parameter], {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})
        set_random_states(tensors)
        for name in self.values():
            setattr(self, name, int(values[name]))

    def _own_tensors(self) -> dict[str, Tensor]:
        """Trainable parameters and persistent buffers by name."""
        module = self.module
        trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        persistent = module.state_dict().keys()
        return trained | {name: value for name, value in module.named_buffers() if name in persistent}

    def _parameters(self, network: str) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups if group["network"] == network for p in group["params"]]

    def _norm(self, network: str) -> float:
        """The norm of a network's gradient."""
        gradients = [p.grad for p in self._parameters(network) if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _set_rates(self) -> dict[str, float]:
        """Set every group's learning rate for this update; returns those of the networks."""
        rates = {
            network: settings.lr * learning_rate_factor(self.update, self.total_updates, settings)
            for network, settings in self.optimizers.items()
        }
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["network"]]
        return rates

    def _skip(self, loss: float, norms: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Count an update whose loss or gradient is not finite. Raises TrainingFailure after too many in a row."""
        self.skipped += 1
        self.skipped_in_row += 1
        numbers = {"loss": loss} | _named("gradient norm", norms, " of ") | _named("learning rate", rates, " of ")
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        logger.warning("update %d is skipped: %s", self.update + 1, shown)
        if self.skipped_in_row > self.optimizers[MAIN].max_skipped:
            raise TrainingFailure(
                f"update {self.update + 1} of {self.total_updates} was skipped for a loss or gradient that is not "
                f"finite, number {self.skipped_in_row} in a row; max_skipped allows "
                f"{self.optimizers[MAIN].max_skipped}. Last: {shown}, dtype {self.compute.dtype}; "
                f"{self._bad_gradients()}. Lower the learning rate or lengthen the warm-up, compute in fp32, or look "
                "for broken rows in the data. Checkpoints written before stay."
            )

    def _bad_gradients(self) -> str:
        """The first parameters whose gradient is not finite, as a sentence."""
        gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        if not bad:
            return "every gradient is finite"
        more = f" and {len(bad) - 3} more parameters" if len(bad) > 3 else ""
        return f"the gradient is not finite in {', '.join(bad[:3])}{more}"


def _named(name: str, values: Mapping[str, float], between: str = "_") -> dict[str, float]:
    """A number of each network under its name: the main network's bare, the others' with theirs behind."""
    return {name if network == MAIN else f"{name}{between}{network}": value for network, value in values.items()}


def _refuse_another_model(saved: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """Raise InputError where a checkpoint's tensors are not the model's."""
    for name in sorted(saved.keys() | own.keys()):
        there, here = (tuple(side[name].shape) if name in side else None for side in (saved, own))
        if there != here:
            raise InputError(
                f"{source} is of another model: {name} {_shaped(there)} there and {_shaped(here)} in the model that is "
                "trained. Remove the checkpoint to start over, or train the model that it is of."
            )


def _shaped(shape: tuple[int, ...] | None) -> str:
    return "is absent" if shape is None else f"has shape {shape}"


def _checkpoint_activations(model: nn.Module) -> None:
    """Turn gradient checkpointing on in every Hugging Face model inside the module."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or not module.supports_gradient_checkpointing:
            continue
        if not module.is_activation_checkpointing:  # as the inner module of one that was just turned on is
            module.activation_checkpointing_enable({"use_reentrant": False})
