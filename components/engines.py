"""What holds the weights under training and changes them: in this process as a whole, or in parts over several.

An engine adds gradients up, gives the norm of each network's, and takes one step of AdamW with each network clipped by
itself. Its state is the same tensors by the same names whatever holds them, so that any engine continues from any
other's checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from components.ranks import Ranks

Judge = Callable[[Mapping[str, float]], bool]
"""Whether a step may be taken, from the norm of each network's gradient."""
Groups = Sequence[dict[str, Any]]
"""Parameters as AdamW takes them, in groups that say which `network` they are of."""


class Engine(Protocol):
    """What the updates of the weights need."""

    model: Any
    """What is called for a forward pass in training."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW, whose groups say which `network` they are of."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's part of the loss."""
        ...

    def step(self, judge: Judge, limits: Mapping[str, float]) -> None:
        """Have the norms judged; clip each network's gradient to its limit and take a step, or none; clear them."""
        ...

    def broken(self) -> list[str]:
        """The parameters whose gradient is not finite; asked while a step is judged."""
        ...

    def state(self) -> dict[str, Tensor]:
        """`model.` what is trained, and persistent buffers; `optimizer.` AdamW's state. By name, whole."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of what `state` has below `model.`."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        ...


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and persistent buffers by name."""
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    persistent = module.state_dict().keys()
    return trained | {name: value for name, value in module.named_buffers() if name in persistent}


class Replica:
    """All weights in this process; several of them add their gradients up once an update (data parallel)."""

    def __init__(self, model: nn.Module, module: nn.Module, groups: Groups, ranks: Ranks) -> None:
        """`module` is what lies in `model`, which may wrap it."""
        self.model, self.module, self.ranks = model, module, ranks
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._names = [names[id(parameter)] for group in groups for parameter in group["params"]]  # as AdamW counts
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        ranks.copy_first(list(own_tensors(module).values()))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's part of the loss."""
        loss.backward()

    def step(self, judge: Judge, limits: Mapping[str, float]) -> None:
        """Add up over processes, have the norms judged, clip, and take a step or none."""
        trained = [p for network in limits for p in self._parameters(network)]
        self.ranks.add_up([p.grad for p in trained if p.grad is not None])
        norms = {network: self._norm(network) for network in limits}
        if judge(norms):
            for network, norm in norms.items():
                torch.nn.utils.clip_grads_with_norm_(self._parameters(network), limits[network], torch.tensor(norm))
            self.optimizer.step()
        self.optimizer.zero_grad()

    def broken(self) -> list[str]:
        """The parameters whose gradient is not finite."""
        gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        return [name for name, gradient in gradients.items() if not gradient.isfinite().all()]

    def state(self) -> dict[str, Tensor]:
        """The tensors themselves, which the next step changes."""
        tensors = {f"model.{name}": tensor for name, tensor in own_tensors(self.module).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            name = self._names[index]
            tensors |= {f"optimizer.{name}.{key}": torch.as_tensor(value) for key, value in state.items()}
        return tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of what `state` has below `model.`."""
        return {name: tuple(tensor.shape) for name, tensor in own_tensors(self.module).items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        with torch.no_grad():
            for name, tensor in own_tensors(self.module).items():
                tensor.copy_(tensors[f"model.{name}"])
        indices, states = {name: index for index, name in enumerate(self._names)}, dict[int, dict[str, Tensor]]()
        for name, found in optimizer_states(tensors).items():
            states[indices[name]] = found
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})

    def _parameters(self, network: str) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups if group["network"] == network for p in group["params"]]

    def _norm(self, network: str) -> float:
        """The norm of a network's gradient."""
        gradients = [p.grad for p in self._parameters(network) if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))


def optimizer_states(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """AdamW's state of each parameter by its name, from what an engine's `state` gave."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            parameter, key = name.removeprefix("optimizer.").rsplit(".", 1)
            states.setdefault(parameter, {})[key] = tensor
    return states
