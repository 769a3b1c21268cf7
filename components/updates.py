"""Updates of the weights: loss, backward, clip, step, skip what is not finite, count, save and restore.

Supervised training (`training.fit`) and the RL loop share it. A loss is a sum over terms (tokens, pairs); it is
divided by the number of terms in the whole update, over all micro-batches and all processes, so that the way rows
are cut into micro-batches and shared out changes nothing.
"""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from components.artifacts import Metrics
from components.engines import Engine, Groups, Replica
from components.errors import InputError, TrainingFailure
from components.optimizers import MAIN, learning_rate_factor, parameter_groups
from components.randomness import random_states, set_random_states
from components.ranks import ALONE, Ranks
from components.settings import Compute, Optimizer

logger = logging.getLogger(__name__)

OTHERS = "rank."
"""Before the names of the random states of every process but the first."""


class Updater:
    """A module under training, its optimiser, and what both have gone through: updates, samples, tokens."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        compute: Compute,
        total_updates: int,
        optimizers: Mapping[str, Optimizer] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """`optimizers` gives sub-modules an optimiser of their own, by name and where the model has them.

        Each network's gradient is clipped by itself. They all take their steps together, and `optimizer.max_skipped`
        counts for them all. `ranks` are the processes that learn together.
        """
        present = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        given = {name: settings for name, settings in (optimizers or {}).items() if name in present}
        self.optimizers = {MAIN: optimizer, **given}
        self.compute, self.total_updates, self.ranks = compute, total_updates, ranks
        self.update = self.skipped = self.skipped_in_row = self.samples = self.tokens = 0
        if compute.gradient_checkpointing:
            _checkpoint_activations(model)
        self.module = model
        self.engine = _engine(model, parameter_groups(model, self.optimizers), compute, ranks)
        self.device = next(model.parameters()).device
        self._loss = torch.zeros((), device=self.device)

    @property
    def model(self) -> nn.Module:
        """What is called for a forward pass."""
        return self.engine.model  # type: ignore[no-any-return]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW itself."""
        return self.engine.optimizer

    def backward(self, loss_sum: Tensor, terms: float) -> None:
        """Add the gradient of `loss_sum / terms`; `terms` counts the update's terms over all processes."""
        loss = loss_sum * (1.0 / terms)
        self._loss += loss.detach()
        self.engine.backward(loss)

    def count(self, samples: int = 0, tokens: int = 0) -> None:
        """Count what the next update learns from, over all processes."""
        self.samples += samples
        self.tokens += tokens

    def step(self) -> Metrics:
        """Clip each network's gradient, take one optimiser step and clear the gradients.

        A loss or gradient that is not finite skips the step. Raises TrainingFailure when more updates in a row than
        `max_skipped` are skipped.
        """
        rates, seen = self._set_rates(), dict[str, float]()
        self.ranks.add_up([self._loss])

        def judge(norms: Mapping[str, float]) -> bool:
            seen.update(norms)
            if all(map(math.isfinite, (float(self._loss), *norms.values()))):
                self.skipped_in_row = 0
                return True
            self._skip(norms, rates)
            return False

        self.engine.step(judge, {network: settings.max_grad_norm for network, settings in self.optimizers.items()})
        self._loss.zero_()
        self.update += 1
        numbers = {"loss/skipped_updates": self.skipped, "data/samples": self.samples, "data/tokens": self.tokens}
        return _named("loss/grad_norm", seen) | _named("loss/lr", rates) | {k: float(v) for k, v in numbers.items()}

    def values(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {name: getattr(self, name) for name in ("update", "skipped", "skipped_in_row", "samples", "tokens")}

    def state(self) -> dict[str, Tensor]:
        """What is trained, the persistent buffers, the optimiser's state and every global random state, by name.

        Frozen weights are left out: they come from the folder that the model was loaded from. Every process asks for
        it, and the first one has it all.
        """
        own, *others = self.ranks.gathered(random_states())
        random = own | {f"{OTHERS}{n}.{name}": t for n, states in enumerate(others, 1) for name, t in states.items()}
        return self.engine.state() | random

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, int], source: str = "the checkpoint") -> None:
        """Take back what `state` and `values` gave, with however many processes.

        Raises InputError naming `source` and the first tensor that is not the model's by name or by shape.
        """
        saved = {n.removeprefix("model."): tuple(t.shape) for n, t in tensors.items() if n.startswith("model.")}
        _refuse_another_model(saved, self.engine.shapes(), source)
        self.engine.restore(tensors)
        prefix = f"{OTHERS}{self.ranks.rank}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        set_random_states(own or tensors)
        for name in self.values():
            setattr(self, name, int(values[name]))

    def _set_rates(self) -> dict[str, float]:
        """Set every group's learning rate for this update; returns those of the networks."""
        rates = {
            network: settings.lr * learning_rate_factor(self.update, self.total_updates, settings)
            for network, settings in self.optimizers.items()
        }
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["network"]]
        return rates

    def _skip(self, norms: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Count an update whose loss or gradient is not finite. Raises TrainingFailure after too many in a row."""
        self.skipped += 1
        self.skipped_in_row += 1
        numbers = {"loss": float(self._loss)} | _named("gradient norm", norms, " of ")
        numbers |= _named("learning rate", rates, " of ")
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
        bad = self.engine.broken()
        if not bad:
            return "every gradient is finite"
        more = f" and {len(bad) - 3} more parameters" if len(bad) > 3 else ""
        return f"the gradient is not finite in {', '.join(bad[:3])}{more}"


def _named(name: str, values: Mapping[str, float], between: str = "_") -> dict[str, float]:
    """A number of each network under its name: the main network's bare, the others' with theirs behind."""
    return {name if network == MAIN else f"{name}{between}{network}": value for network, value in values.items()}


def _refuse_another_model(
    saved: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise InputError where the shapes of a checkpoint's tensors are not the model's."""
    for name in sorted(saved.keys() | own.keys()):
        there, here = saved.get(name), own.get(name)
        if there != here:
            raise InputError(
                f"{source} is of another model: {name} {_shaped(there)} there and {_shaped(here)} in the model that is "
                "trained. Remove the checkpoint to start over, or train the model that it is of."
            )


def _shaped(shape: tuple[int, ...] | None) -> str:
    return "is absent" if shape is None else f"has shape {shape}"


def _engine(model: nn.Module, groups: Groups, compute: Compute, ranks: Ranks) -> Engine:
    """What holds the weights, as the settings say. Raises InputError for ZeRO with one process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # it is global, and refuses a second precision in one process
    mixed = "bf16" if compute.dtype == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=not torch.cuda.is_available())
    assert accelerator.num_processes == ranks.size, "the processes that were started are not those that learn"
    prepared = accelerator.prepare_model(model, evaluation_mode=True)  # no wrapper: precision and device alone
    if compute.strategy == "ddp":
        return Replica(prepared, model, groups, ranks)
    from components.zero import Zero

    return Zero(prepared, groups, compute, ranks)


def _checkpoint_activations(model: nn.Module) -> None:
    """Turn gradient checkpointing on in every Hugging Face model inside the module."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or not module.supports_gradient_checkpointing:
            continue
        if not module.is_activation_checkpointing:  # as the inner module of one that was just turned on is
            module.activation_checkpointing_enable({"use_reentrant": False})
