"""Weights under training in parts over several processes, by DeepSpeed's ZeRO.

Stage 1 divides AdamW's state, stage 2 the gradients too, stage 3 the weights too; `offload` keeps AdamW's state, and
its arithmetic, in the memory of the CPU. The weights are float32 and so are gradients; what computes in bfloat16 is the
forward pass. Gradients are added up when they are made (stages 2 and 3) or once an update (stage 1).

ZeRO clips all weights by one norm. Here every network is clipped by its own: in the moment in which gradients are
summed and not yet used, between DeepSpeed's engine and its optimiser's step.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from components.engines import Groups, Judge, optimizer_states
from components.gathering import shape_of
from components.group import BUCKET
from components.ranks import Ranks
from components.settings import Compute

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a weight, beside the number of steps."""


class Zero:
    """Weights, gradients or AdamW's state in parts, as the stage says."""

    def __init__(self, model: nn.Module, groups: Groups, compute: Compute, ranks: Ranks) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.ranks, self.stage, self.offload = ranks, int(compute.strategy.removeprefix("zero")), compute.offload
        trained = sum(math.prod(shape_of(p)) for group in groups for p in group["params"])
        adam = torch.optim.AdamW(groups, fused=True)
        self.engine, self.zero, *_ = deepspeed.initialize(
            model=model, optimizer=adam, config=_config(self.stage, compute.offload)
        )
        self.model, self.module = self.engine, model
        self._refuse_the_whole(trained)
        self._plain_step, self.zero.step = self.zero.step, self._judged_step
        self._judging: tuple[Judge, Mapping[str, float]] | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW itself, on this process's parts."""
        return self.zero.optimizer  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's part of the loss; ZeRO takes the mean over processes, not the sum."""
        self.engine.backward(loss * self.ranks.size)

    def step(self, judge: Judge, limits: Mapping[str, float]) -> None:
        """Have the norms judged, clip, and take a step or none."""
        self._judging = judge, limits
        self.engine.step()

    def broken(self) -> list[str]:
        """The parameters whose gradient is not finite."""
        from deepspeed.utils import safe_get_full_grad

        return [name for name, p in self._trained() if not safe_get_full_grad(p).isfinite().all()]

    def state(self) -> dict[str, Tensor]:
        """Whole copies on the CPU, of one parameter after the other; on the first process alone."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        stepped = any("step" in state for state in self.optimizer.state.values())
        steps = next((s["step"] for s in self.optimizer.state.values() if "step" in s), torch.zeros(()))
        found: dict[str, Tensor] = {}
        self._link_moments()
        for name, parameter in self._trained():
            self._keep(found, f"model.{name}", safe_get_full_fp32_param(parameter))
            for moment in MOMENTS if stepped else ():
                self._keep(found, f"optimizer.{name}.{moment}", safe_get_full_optimizer_state(parameter, moment))
            if stepped:
                self._keep(found, f"optimizer.{name}.step", steps)
        for name, buffer in self._buffers():
            self._keep(found, f"model.{name}", buffer)
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of what `state` has below `model.`, as a whole."""
        trained = {name: shape_of(p) for name, p in self._trained()}
        return trained | {name: tuple(buffer.shape) for name, buffer in self._buffers()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what any engine's `state` gave, each process its parts."""
        import deepspeed

        for name, parameter in self._trained():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(tensors[f"model.{name}"])
        for name, buffer in self._buffers():
            buffer.copy_(tensors[f"model.{name}"])
        self.zero.refresh_fp32_params()
        if states := optimizer_states(tensors):
            self._restore_moments(states)

    def _restore_moments(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        steps = float(next(iter(states.values()))["step"])
        for part in self._parts():
            step = torch.tensor(steps, device=part.device)
            self.optimizer.state[part] = {"step": step} | {name: torch.zeros_like(part) for name in MOMENTS}
        self._link_moments()
        for name, parameter in self._trained():
            for moment in MOMENTS:
                value = states[name][moment].to(self.engine.device)
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value, moment)
                else:
                    safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), moment)

    def _link_moments(self) -> None:
        """Let DeepSpeed find AdamW's state of every parameter; it looks when the first group alone has one."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _own_part(self, parameter: Any, value: Tensor) -> Tensor:
        """What this process holds of a value, which is filled up with zeros to equal parts."""
        size = parameter.ds_tensor.numel()
        filled = value.new_zeros(size * self.ranks.size)
        filled[: value.numel()] = value.flatten()
        return filled[size * self.ranks.rank :][:size]

    def _judged_step(self, *arguments: Any, **named: Any) -> Any:
        """ZeRO's step, or one that it skips, with all gradients clipped."""
        assert self._judging is not None
        judge, limits = self._judging
        gradients = self._gradients()
        squares = dict.fromkeys(limits, 0.0)
        for network, parts in gradients:
            squares[network] += sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in parts)
        totals = self.ranks.totals({network: (square, 0.0) for network, square in squares.items()})
        norms = {network: math.sqrt(square) for network, (square, _) in totals.items()}
        if judge(norms):
            for network, parts in gradients:
                for gradient in parts:
                    gradient.mul_(min(1.0, limits[network] / (norms[network] + 1e-6)))  # as torch clips
        else:
            self._spoil(gradients)
        return self._plain_step(*arguments, **named)

    def _spoil(self, gradients: list[tuple[str, list[Tensor]]]) -> None:
        """Have ZeRO skip the step, as it does for a norm that is no number, and clear what it has summed."""
        if self.offload:  # it knows the norms already
            bad = torch.tensor(math.nan, dtype=torch.float64)
            self.zero.norm_for_param_grads = dict.fromkeys(self.zero.norm_for_param_grads, bad)
            return
        for _, parts in gradients:
            for gradient in parts:
                gradient.fill_(math.nan)

    def _gradients(self) -> list[tuple[str, list[Tensor]]]:
        """What this process holds of the summed gradients, and the network that it is of."""
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()  # they are on their way to the CPU
        found = []
        for number, part in enumerate(self._parts()):
            gradients = [part.grad] if self.offload else self.zero.averaged_gradients[number]
            group = self.zero.sub_group_to_group_id[number] if self.stage == 3 else number
            found.append((self.optimizer.param_groups[group]["network"], [g for g in gradients if g is not None]))
        return found

    def _parts(self) -> list[Tensor]:
        """What this process holds of the weights, as AdamW sees it: one tensor for each of several groups."""
        held = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.zero, held))

    def _trained(self) -> list[tuple[str, Any]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def _buffers(self) -> list[tuple[str, Tensor]]:
        persistent = self.module.state_dict().keys()
        return [(name, buffer) for name, buffer in self.module.named_buffers() if name in persistent]

    def _keep(self, found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if self.ranks.rank == 0:
            found[name] = tensor.detach().to("cpu", copy=True)

    def _refuse_the_whole(self, trained: int) -> None:
        """Fail where DeepSpeed is not divided over the processes: it would train, each process by itself."""
        assert self.engine.zero_optimization_stage() == self.stage, "DeepSpeed runs another stage"
        assert self.engine.dp_world_size == self.ranks.size, "DeepSpeed runs on another number of processes"
        held = sum(part.numel() for part in self._parts())
        assert held < trained, f"this process holds {held} of {trained} weights' states: nothing is divided"


@contextmanager
def divided() -> Iterator[None]:
    """What transformers loads inside is divided as it comes: no process ever has more than a layer in full.

    The first process reads the files, in place; each keeps its part of every weight on its device.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    known = HfDeepSpeedConfig(_config(3, offload=False))  # transformers looks at it for as long as it is there
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del known


def _config(stage: int, offload: bool) -> dict[str, Any]:
    """DeepSpeed's settings: nothing that looks ahead, since processes also pass through models each for itself."""
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "overlap_comm": False,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,  # a layer is given back as soon as it has computed
        "stage3_param_persistence_threshold": 0,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # it counts samples by it, and nothing else
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # each network is clipped by itself, above; by default all are, together, to 1
        "managed_gradient_accumulation": False,  # an update ends where we say so
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
